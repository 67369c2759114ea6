//! A Llama whose every weight gets a gradient: candle's fused norms and rotations would cut them, so it uses none.

use std::collections::BTreeMap;

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{linear_b, rms_norm, Linear, RmsNorm, VarBuilder, VarMap};
use candle_sfattention::{CompressedAttention, CompressionLossSink, MergeStats};
use rand::{rngs::StdRng, Rng, SeedableRng};

use crate::model::LlamaConfig;
use crate::rope::{Rope, Rotation};

/// Projections and the attention between them.
struct SelfAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    attention: CompressedAttention,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl SelfAttention {
    fn new(config: &LlamaConfig, attention: CompressedAttention, vb: VarBuilder) -> Result<Self> {
        let (hidden, bias) = (config.hidden_size, config.attention_bias);
        let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        Ok(Self {
            query: linear_b(hidden, queries, bias, vb.pp("q_proj"))?,
            key: linear_b(hidden, keys, bias, vb.pp("k_proj"))?,
            value: linear_b(hidden, keys, bias, vb.pp("v_proj"))?,
            output: linear_b(queries, hidden, bias, vb.pp("o_proj"))?,
            attention,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
        })
    }

    /// xs (B, N, hidden) -> output of the same shape, compression loss, and merge statistics.
    fn forward(&self, xs: &Tensor, rotation: &Rotation) -> Result<(Tensor, Option<Tensor>, MergeStats)> {
        let (batch, tokens, _) = xs.dims3()?;
        let split = |projection: &Linear, heads| -> Result<Tensor> {
            let rows = projection.forward(xs)?.reshape((batch, tokens, heads, self.head_dim))?;
            Ok(rows.transpose(1, 2)?)
        };
        let q = rotation.apply_diff(&split(&self.query, self.heads)?)?;
        let k = rotation.apply_diff(&split(&self.key, self.kv_heads)?)?;
        let result = self
            .attention
            .forward_with_loss(&q, &k, &split(&self.value, self.kv_heads)?)?;
        let output = self.output.forward(&result.output.transpose(1, 2)?.flatten_from(2)?)?;
        Ok((output, result.compression_loss, result.plan.stats()?))
    }
}

struct Layer {
    attention_norm: RmsNorm,
    attention: SelfAttention,
    mlp_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Layer {
    fn new(config: &LlamaConfig, attention: CompressedAttention, vb: VarBuilder) -> Result<Self> {
        let (hidden, inner, eps) = (config.hidden_size, config.intermediate_size, config.rms_norm_eps);
        let (mlp, bias) = (vb.pp("mlp"), config.mlp_bias);
        Ok(Self {
            attention_norm: rms_norm(hidden, eps, vb.pp("input_layernorm"))?,
            attention: SelfAttention::new(config, attention, vb.pp("self_attn"))?,
            mlp_norm: rms_norm(hidden, eps, vb.pp("post_attention_layernorm"))?,
            gate: linear_b(hidden, inner, bias, mlp.pp("gate_proj"))?,
            up: linear_b(hidden, inner, bias, mlp.pp("up_proj"))?,
            down: linear_b(inner, hidden, bias, mlp.pp("down_proj"))?,
        })
    }

    fn forward(&self, xs: &Tensor, rotation: &Rotation) -> Result<(Tensor, Option<Tensor>, MergeStats)> {
        let (output, loss, stats) = self
            .attention
            .forward(&self.attention_norm.forward_diff(xs)?, rotation)?;
        let xs = (xs + output)?;
        let normed = self.mlp_norm.forward_diff(&xs)?;
        let inner = (self.gate.forward(&normed)?.silu()? * self.up.forward(&normed)?)?;
        Ok(((&xs + self.down.forward(&inner)?)?, loss, stats))
    }
}

/// The model and its weights.
pub struct Trainable {
    vars: VarMap,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    /// The output matrix; the embedding if they are tied.
    head: Tensor,
    rope: Rope,
}

/// The losses of one forward pass, scalars with a graph.
pub struct Losses {
    pub cross_entropy: Tensor,
    /// Summed over layers.
    pub compression: Option<Tensor>,
    /// Hidden tokens over pairs, of all layers and heads.
    pub hidden_ratio: f64,
}

impl Trainable {
    /// Fresh weights, the same for the same seed; `attention` holds one entry per layer.
    pub fn new(config: &LlamaConfig, attention: Vec<CompressedAttention>, seed: u64) -> Result<Self> {
        ensure!(
            attention.len() == config.layers,
            "attention: expected {} layers, got {}; give one per layer",
            config.layers,
            attention.len()
        );
        let vars = VarMap::new();
        let root = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let (vb, table) = (root.pp("model"), (config.vocab_size, config.hidden_size));
        let embedding = vb.get(table, "embed_tokens.weight")?;
        let head = match config.tied {
            true => embedding.clone(),
            false => root.get(table, "lm_head.weight")?,
        };
        let mut layers = Vec::with_capacity(attention.len());
        for (index, attention) in attention.into_iter().enumerate() {
            let vb = vb.pp("layers").pp(index);
            layers.push(Layer::new(config, attention, vb)?);
        }
        let model = Self {
            norm: rms_norm(config.hidden_size, config.rms_norm_eps, vb.pp("norm"))?,
            vars,
            embedding,
            layers,
            head,
            rope: Rope::new(config, DType::F32, &Device::Cpu)?,
        };
        model.initialize(seed)?;
        Ok(model)
    }

    /// Normal values: standard deviation 0.02 for the embedding, `fan_in^-1/2` for matrices, divided by the root of the
    /// number of residual additions for matrices that add to the stream. Norms start at 1, biases at 0. candle's own
    /// CPU generator has no seed.
    fn initialize(&self, seed: u64) -> Result<()> {
        let mut rng = StdRng::seed_from_u64(seed);
        let residual = (2.0 * self.layers.len() as f64).sqrt();
        for (name, var) in self.vars() {
            let &[rows, columns] = var.dims() else {
                let start = match name.ends_with(".bias") {
                    true => var.zeros_like()?,
                    false => var.ones_like()?,
                };
                var.set(&start)?;
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

    /// The number of parameters.
    pub fn parameters(&self) -> usize {
        self.vars().values().map(|var| var.elem_count()).sum()
    }

    /// inputs and targets (B, N) u32.
    pub fn losses(&self, inputs: &Tensor, targets: &Tensor) -> Result<Losses> {
        let (batch, tokens) = inputs.dims2()?;
        let rows = self.embedding.index_select(&inputs.flatten_all()?, 0)?;
        let mut xs = rows.reshape((batch, tokens, ()))?;
        let (rotation, sum) = (self.rope.at(0, tokens)?, CompressionLossSink::new());
        let (mut hidden_tokens, mut pairs) = (0, 0);
        for layer in &self.layers {
            let (output, loss, stats) = layer.forward(&xs, &rotation)?;
            xs = output;
            loss.into_iter().for_each(|loss| sum.push(loss));
            hidden_tokens += stats.hidden;
            pairs += stats.pairs;
        }
        let hidden = self.norm.forward_diff(&xs)?.flatten_to(1)?;
        let logits = hidden.matmul(&self.head.t()?)?;
        Ok(Losses {
            cross_entropy: candle_nn::loss::cross_entropy(&logits, &targets.flatten_all()?)?,
            compression: sum.take()?,
            hidden_ratio: hidden_tokens as f64 / pairs.max(1) as f64,
        })
    }
}

/// A standard normal value: Box and Muller.
fn normal(rng: &mut StdRng) -> f64 {
    let (u, turn): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * turn).cos()
}
