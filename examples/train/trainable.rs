//! A Llama whose every weight gets a gradient: candle's fused norms and rotations cut them, so none is used here.

use std::collections::BTreeMap;

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{linear_no_bias, rms_norm, Linear, RmsNorm, VarBuilder, VarMap};
use candle_sfattention::{
    CompressedAttention, CompressedSelfAttention, CompressionLossSink, MergeStats, ModelShape, RotaryConfig,
    RotaryLayout, SelfAttentionConfig,
};
use rand::{rngs::StdRng, Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// The model's sizes under their names in a Hugging Face config.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    pub model_type: String,
    pub hidden_act: String,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub max_position_embeddings: usize,
    pub rope_theta: f64,
    pub tie_word_embeddings: bool,
}

impl ModelConfig {
    /// What policies are made for.
    pub fn shape(&self) -> ModelShape {
        ModelShape {
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
        }
    }
}

struct Layer {
    attention_norm: RmsNorm,
    attention: CompressedSelfAttention,
    mlp_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Layer {
    fn new(
        config: &ModelConfig,
        attention: CompressedAttention,
        sink: CompressionLossSink,
        vb: VarBuilder,
    ) -> Result<Self> {
        let (hidden, inner, eps) = (config.hidden_size, config.intermediate_size, config.rms_norm_eps);
        let sizes = SelfAttentionConfig {
            hidden_size: hidden,
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            qkv_bias: false,
            output_bias: false,
            rotary: Some(RotaryConfig {
                theta: config.rope_theta,
                max_tokens: config.max_position_embeddings,
                layout: RotaryLayout::Half,
            }),
        };
        let mlp = vb.pp("mlp");
        Ok(Self {
            attention_norm: rms_norm(hidden, eps, vb.pp("input_layernorm"))?,
            attention: CompressedSelfAttention::new(sizes, attention, vb.pp("self_attn"))?.with_loss_sink(sink),
            mlp_norm: rms_norm(hidden, eps, vb.pp("post_attention_layernorm"))?,
            gate: linear_no_bias(hidden, inner, mlp.pp("gate_proj"))?,
            up: linear_no_bias(hidden, inner, mlp.pp("up_proj"))?,
            down: linear_no_bias(inner, hidden, mlp.pp("down_proj"))?,
        })
    }

    fn forward(&self, xs: &Tensor) -> candle_core::Result<(Tensor, MergeStats)> {
        let (output, plan) = self
            .attention
            .forward_with_plan(&self.attention_norm.forward_diff(xs)?)?;
        let xs = (xs + output)?;
        let normed = self.mlp_norm.forward_diff(&xs)?;
        let inner = (self.gate.forward(&normed)?.silu()? * self.up.forward(&normed)?)?;
        Ok(((&xs + self.down.forward(&inner)?)?, plan.stats()?))
    }
}

/// The model and its weights.
pub struct Trainable {
    vars: VarMap,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    sink: CompressionLossSink,
}

/// What one forward pass found; both are scalars with a graph.
pub struct Losses {
    pub cross_entropy: Tensor,
    /// Summed over layers.
    pub compression: Option<Tensor>,
    /// Hidden tokens over pairs, of all layers and heads.
    pub hidden_ratio: f64,
}

impl Trainable {
    /// Fresh weights, the same for the same seed; `attention` holds one entry per layer.
    pub fn new(config: &ModelConfig, attention: Vec<CompressedAttention>, seed: u64) -> Result<Self> {
        ensure!(
            attention.len() == config.num_hidden_layers,
            "attention: expected {} layers, got {}; give one per layer",
            config.num_hidden_layers,
            attention.len()
        );
        let (vars, sink) = (VarMap::new(), CompressionLossSink::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu).pp("model");
        let embedding = vb.get((config.vocab_size, config.hidden_size), "embed_tokens.weight")?;
        let mut layers = Vec::with_capacity(attention.len());
        for (index, attention) in attention.into_iter().enumerate() {
            let vb = vb.pp("layers").pp(index);
            layers.push(Layer::new(config, attention, sink.clone(), vb)?);
        }
        let model = Self {
            norm: rms_norm(config.hidden_size, config.rms_norm_eps, vb.pp("norm"))?,
            vars,
            embedding,
            layers,
            sink,
        };
        model.initialize(seed)?;
        Ok(model)
    }

    /// Normal values: 0.02 for the embedding, `fan_in^-1/2` for matrices, and less by the root of the number of
    /// residual additions for those that add to the stream. Norms start at 1. candle's own CPU generator has no seed.
    fn initialize(&self, seed: u64) -> Result<()> {
        let mut rng = StdRng::seed_from_u64(seed);
        let residual = (2.0 * self.layers.len() as f64).sqrt();
        for (name, var) in self.vars() {
            let &[rows, columns] = var.dims() else {
                var.set(&var.ones_like()?)?;
                continue;
            };
            let std = match name.rsplit('.').nth(1) {
                Some("embed_tokens") => 0.02,
                Some("o_proj" | "down_proj") => (columns as f64).powf(-0.5) / residual,
                _ => (columns as f64).powf(-0.5),
            };
            let values: Vec<f32> = (0..rows * columns).map(|_| (std * normal(&mut rng)) as f32).collect();
            var.set(&Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)?;
        }
        Ok(())
    }

    /// Every weight by its Hugging Face name, in the order of the names.
    pub fn vars(&self) -> BTreeMap<String, Var> {
        let vars = self.vars.data().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        vars.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
    }

    /// How many numbers the weights have.
    pub fn parameters(&self) -> usize {
        self.vars().values().map(|var| var.elem_count()).sum()
    }

    /// inputs and targets (B, N) u32.
    pub fn losses(&self, inputs: &Tensor, targets: &Tensor) -> Result<Losses> {
        let (batch, tokens) = inputs.dims2()?;
        let rows = self.embedding.index_select(&inputs.flatten_all()?, 0)?;
        let mut xs = rows.reshape((batch, tokens, ()))?;
        self.sink.take()?;
        let (mut hidden_tokens, mut pairs) = (0, 0);
        for layer in &self.layers {
            let (output, stats) = layer.forward(&xs)?;
            xs = output;
            hidden_tokens += stats.hidden;
            pairs += stats.pairs;
        }
        let hidden = self.norm.forward_diff(&xs)?.flatten_to(1)?;
        let logits = hidden.matmul(&self.embedding.t()?)?;
        Ok(Losses {
            cross_entropy: candle_nn::loss::cross_entropy(&logits, &targets.flatten_all()?)?,
            compression: self.sink.take()?,
            hidden_ratio: hidden_tokens as f64 / pairs.max(1) as f64,
        })
    }
}

/// A standard normal value: Box and Muller.
fn normal(rng: &mut StdRng) -> f64 {
    let (u, turn): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * turn).cos()
}
