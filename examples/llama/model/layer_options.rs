//! What the layers of a model do beyond a Llama's: one decoder reads all models, with these options.

use anyhow::{ensure, Result};

/// What the layers of a model do beyond a Llama's. The default is a Llama.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerOptions {
    /// The gate's function in the feed-forward part.
    pub activation: Activation,
    pub norm: NormKind,
    /// Whether the biases of q, k and v come without one of o: Qwen2, StableLM.
    pub output_without_bias: bool,
    /// An RMS norm of each head's query and key before rotation: Qwen3, Gemma 3.
    pub qk_norm: bool,
    /// Norms also of what attention and the feed-forward part add to the stream: Gemma 2 and 3.
    pub sandwich_norms: bool,
    /// Factor on the rows of the embedding: Gemma's `sqrt(hidden size)`, Granite's own.
    pub embedding_scale: Option<f64>,
    /// Factor on what attention and the feed-forward part add to the stream: Granite.
    pub residual_scale: Option<f64>,
    /// Factor on `query . key`; None: `1 / sqrt(head_dim)`.
    pub softmax_scale: Option<f64>,
    /// The cap c of attention's logits z, which become `c tanh(z / c)`: Gemma 2.
    pub softcap: Option<f64>,
    /// The cap of the tokens' logits: Gemma 2.
    pub final_softcap: Option<f64>,
    /// Divisor of the tokens' logits: Granite.
    pub logit_divisor: Option<f64>,
    /// How many numbers of a head are rotated, the first ones; None: all. StableLM rotates a part.
    pub rotated: Option<usize>,
    pub sliding: Option<Sliding>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NormKind {
    #[default]
    Rms,
    /// LayerNorm with a bias: StableLM.
    Layer,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    #[default]
    Silu,
    /// GELU with its approximation by tanh.
    GeluTanh,
}

/// Layers whose rows see a window of the last tokens only.
#[derive(Clone, Debug, PartialEq)]
pub struct Sliding {
    /// Tokens that a row sees, its own included.
    pub window: usize,
    /// Whether each layer slides.
    pub layers: Vec<bool>,
    /// The rope theta of the layers that slide, whose rotations are not scaled. None: rotations as in other layers.
    pub rope_theta: Option<f64>,
}

impl LayerOptions {
    /// The window of a layer that slides.
    pub fn window(&self, layer: usize) -> Option<usize> {
        let sliding = self.sliding.as_ref()?;
        sliding.layers.get(layer)?.then_some(sliding.window)
    }

    /// Whether the layers compute what a Llama's do. Biases of q, k and v without one of o are those of a Llama whose o
    /// has a bias of 0.
    #[allow(dead_code)] // the train example asks
    pub fn is_llama(&self) -> bool {
        let llama = Self {
            output_without_bias: self.output_without_bias,
            ..Self::default()
        };
        *self == llama
    }

    /// Refuses numbers that no model has; `layers`: the number of layers.
    pub fn check(&self, layers: usize) -> Result<()> {
        for (name, number) in [
            ("embedding scale", self.embedding_scale),
            ("residual scale", self.residual_scale),
            ("softmax scale", self.softmax_scale),
            ("softcap of attention", self.softcap),
            ("softcap of the logits", self.final_softcap),
            ("divisor of the logits", self.logit_divisor),
            (
                "rope theta of sliding layers",
                self.sliding.as_ref().and_then(|sliding| sliding.rope_theta),
            ),
        ] {
            if let Some(number) = number {
                ensure!(
                    number.is_finite() && number > 0.0,
                    "{name}: expected a number above 0, got {number}; the checkpoint is damaged"
                );
            }
        }
        if let Some(sliding) = &self.sliding {
            ensure!(
                sliding.window > 0,
                "sliding window: expected at least 1 token, got 0; the checkpoint is damaged"
            );
            ensure!(
                sliding.layers.len() == layers,
                "sliding layers: expected one entry for each of the {layers} layers, got {}; the checkpoint is damaged",
                sliding.layers.len()
            );
        }
        Ok(())
    }
}
