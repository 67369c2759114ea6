//! The shape of a model, checked against the contents of its file before anything is allocated for it.

use anyhow::{bail, ensure, Result};
use candle_sfattention::ModelShape;

use super::layer_options::LayerOptions;
use crate::rope::{Pairing, RopeScaling};
use crate::weights::Weights;

/// The most layers that a model may have.
pub const MOST_LAYERS: usize = 1 << 12;

/// The shape of a Llama, or of a model whose layers differ from a Llama's by [`LayerOptions`], and the numbers that its
/// forward pass needs.
#[derive(Clone, Debug)]
pub struct LlamaConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub rope_pairing: Pairing,
    /// The most tokens the model was made for.
    pub context_length: usize,
    /// Whether any layer has biases of q, k, v or o, and of its feed-forward part.
    pub attention_bias: bool,
    pub mlp_bias: bool,
    /// Whether the output matrix is the embedding matrix.
    pub tied: bool,
    pub layer: LayerOptions,
}

impl LlamaConfig {
    /// The shape that policies are made for.
    pub fn shape(&self) -> ModelShape {
        ModelShape {
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
        }
    }

    /// How many numbers of a head are rotated.
    pub fn rotary_dim(&self) -> usize {
        self.layer.rotated.unwrap_or(self.head_dim)
    }

    /// Whether the matrix at `path`, a Hugging Face name without `.weight`, has a bias.
    pub fn has_bias(&self, path: &str) -> bool {
        if path.contains(".mlp.") {
            self.mlp_bias
        } else if path.ends_with(".o_proj") {
            self.attention_bias && !self.layer.output_without_bias
        } else {
            self.attention_bias
        }
    }

    /// Refuses shapes that no Llama has, before anything is allocated for them.
    pub fn check(&self) -> Result<()> {
        // Far larger than any Llama, and small enough that a product of two sizes does not overflow.
        const MOST: usize = 1 << 24;
        for (name, value, most) in [
            ("hidden size", self.hidden_size, MOST),
            ("intermediate size", self.intermediate_size, MOST),
            ("vocabulary size", self.vocab_size, MOST),
            ("number of layers", self.layers, MOST_LAYERS),
            ("number of query heads", self.heads, MOST),
            ("number of KV heads", self.kv_heads, MOST),
            ("head dimension", self.head_dim, MOST),
            ("context length", self.context_length, MOST),
        ] {
            ensure!(
                (1..=most).contains(&value),
                "{name}: expected 1 to {most}, got {value}; the checkpoint is damaged"
            );
        }
        ensure!(
            self.heads.is_multiple_of(self.kv_heads),
            "query heads: expected a multiple of the {} KV heads, got {}; the checkpoint is damaged",
            self.kv_heads,
            self.heads
        );
        ensure!(
            self.head_dim.is_multiple_of(2),
            "head dimension: expected an even number, as rotary embeddings need, got {}; the checkpoint is damaged",
            self.head_dim
        );
        ensure!(
            self.norm_eps.is_finite() && self.norm_eps >= 0.0,
            "norm epsilon: expected a number of at least 0, got {}; the checkpoint is damaged",
            self.norm_eps
        );
        ensure!(
            self.rope_theta.is_finite() && self.rope_theta > 0.0,
            "rope theta: expected a number above 0, got {}; the checkpoint is damaged",
            self.rope_theta
        );
        ensure!(
            self.rotary_dim().is_multiple_of(2) && (2..=self.head_dim).contains(&self.rotary_dim()),
            "rotated numbers of a head: expected an even number from 2 to {}, the head dimension, got {}; the \
             checkpoint is damaged",
            self.head_dim,
            self.rotary_dim()
        );
        self.rope_scaling.check(self.rotary_dim() / 2)?;
        self.layer.check(self.layers)
    }

    /// Refuses sizes for which `weights` has too few numbers: allocations by these sizes then fit the stored ones.
    pub fn check_held(&self, weights: &dyn Weights) -> Result<()> {
        ensure!(
            self.layers <= weights.len(),
            "number of layers: expected at most {}, as many as there are tensors, got {}; the checkpoint is damaged",
            weights.len(),
            self.layers
        );
        let (hidden, first) = (self.hidden_size, "model.layers.0");
        for (path, rows) in [
            ("model.embed_tokens".into(), self.vocab_size),
            (format!("{first}.self_attn.q_proj"), self.heads * self.head_dim),
            (format!("{first}.self_attn.k_proj"), self.kv_heads * self.head_dim),
            (format!("{first}.mlp.gate_proj"), self.intermediate_size),
        ] {
            let (expected, got) = ([rows, hidden], weights.shape(&path));
            ensure!(
                got.as_deref() == Some(&expected),
                "{path}.weight: expected shape {expected:?}, got {}; fetch the checkpoint again",
                got.map_or_else(|| "none".into(), |got| format!("{got:?}"))
            );
        }
        Ok(())
    }
}

/// Refuses ids beyond the vocabulary. candle reads some of them as a row of zeros.
pub fn check_ids(ids: &[u32], vocab_size: usize) -> Result<()> {
    let beyond = ids
        .iter()
        .find(|&&id| usize::try_from(id).map_or(true, |id| id >= vocab_size));
    if let Some(id) = beyond {
        bail!(
            "token id: expected one below {vocab_size}, the size of the model's vocabulary, got {id}; the tokenizer \
             does not belong to this model"
        )
    }
    Ok(())
}
