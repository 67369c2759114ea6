//! A Llama with [`CompressedAttention`] in place of its attention.
//!
//! Activations are `(1, N, hidden)`. The model asks a [`Weights`] for its matrices by their Hugging Face names and does
//! not know the file format.

#[path = "model/config.rs"]
mod config;

pub use config::{check_ids, LlamaConfig};

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{ops, RmsNorm};
use candle_sfattention::{attend, CacheOptions, CompressedAttention, CompressedKvCache, MergePlan, MergeStats};

use crate::rope::{Rope, Rotation};
use crate::weights::{Linear, Weights};

/// Pairs seen and hidden, per layer, over all counted calls.
#[derive(Clone, Debug, Default)]
pub struct HiddenCounts {
    layers: Vec<(usize, usize)>,
}

impl HiddenCounts {
    fn add(&mut self, layer: usize, stats: &MergeStats) {
        if self.layers.len() <= layer {
            self.layers.resize(layer + 1, (0, 0));
        }
        let (pairs, hidden) = &mut self.layers[layer];
        *pairs += stats.pairs;
        *hidden += stats.hidden;
    }

    /// Hidden pairs / pairs, over all heads and layers.
    pub fn ratio(&self) -> f64 {
        let (pairs, hidden) = self
            .layers
            .iter()
            .fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1));
        hidden as f64 / pairs.max(1) as f64
    }

    /// Hidden pairs / pairs over all heads of each layer.
    pub fn ratio_per_layer(&self) -> Vec<f64> {
        self.layers
            .iter()
            .map(|&(pairs, hidden)| hidden as f64 / pairs.max(1) as f64)
            .collect()
    }
}

/// The inputs of one layer's attention, for a caller that makes its plan.
pub struct LayerCall<'a> {
    pub layer: usize,
    /// Query, key and value `(1, heads or KV heads, N, D)`, rotated.
    pub qkv: [&'a Tensor; 3],
    /// The output projection `(hidden, heads·D)`.
    pub projection: &'a Linear,
    /// The residual stream that its output will be added to, `(1, N, hidden)`.
    pub stream: &'a Tensor,
}

/// Projections, rotary embedding and compressed attention of one layer.
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
    fn load(
        weights: &mut dyn Weights,
        path: &str,
        config: &LlamaConfig,
        attention: CompressedAttention,
    ) -> Result<Self> {
        let hidden = config.hidden_size;
        let (query_rows, kv_rows) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        Ok(Self {
            query: weights.linear(&format!("{path}.q_proj"), query_rows, hidden)?,
            key: weights.linear(&format!("{path}.k_proj"), kv_rows, hidden)?,
            value: weights.linear(&format!("{path}.v_proj"), kv_rows, hidden)?,
            output: weights.linear(&format!("{path}.o_proj"), hidden, query_rows)?,
            attention,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
        })
    }

    /// The rows `(1, N, hidden)` of a whole sequence, and the tokens hidden from them.
    fn forward(&self, xs: &Tensor, rotation: &Rotation) -> Result<(Tensor, MergeStats)> {
        let [q, k, v] = self.project(xs, rotation)?;
        let (out, plan) = self.attention.forward_with_plan(&q, &k, &v)?;
        Ok((self.merge_heads(&out)?, plan.stats()?))
    }

    /// The rows of new tokens `(1, n, hidden)` over all that `cache` has seen.
    fn forward_cached(&self, xs: &Tensor, rotation: &Rotation, cache: &mut CompressedKvCache) -> Result<Tensor> {
        let [q, k, v] = self.project(xs, rotation)?;
        self.merge_heads(&self.attention.forward_cached(&q, &k, &v, cache)?)
    }

    /// Rotated queries and keys, and values: `(B, heads, N, D)`.
    fn project(&self, xs: &Tensor, rotation: &Rotation) -> Result<[Tensor; 3]> {
        let (batch, n, _) = xs.dims3()?;
        // (B, N, heads·D) -> (B, heads, N, D), a view.
        let split = |xs: Tensor, heads| xs.reshape((batch, n, heads, self.head_dim))?.transpose(1, 2);
        Ok([
            rotation.apply(&split(self.query.forward(xs)?, self.heads)?)?,
            rotation.apply(&split(self.key.forward(xs)?, self.kv_heads)?)?,
            split(self.value.forward(xs)?, self.kv_heads)?,
        ])
    }

    fn merge_heads(&self, out: &Tensor) -> Result<Tensor> {
        self.output.forward(&out.transpose(1, 2)?.flatten_from(2)?)
    }
}

/// SwiGLU: `down(silu(gate(x)) * up(x))`.
struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Mlp {
    fn load(weights: &mut dyn Weights, path: &str, config: &LlamaConfig) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            gate: weights.linear(&format!("{path}.gate_proj"), inner, hidden)?,
            up: weights.linear(&format!("{path}.up_proj"), inner, hidden)?,
            down: weights.linear(&format!("{path}.down_proj"), hidden, inner)?,
        })
    }

    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.down
            .forward(&(ops::silu(&self.gate.forward(xs)?)? * self.up.forward(xs)?)?)
    }
}

struct Layer {
    attention_norm: RmsNorm,
    attention: SelfAttention,
    mlp_norm: RmsNorm,
    mlp: Mlp,
}

impl Layer {
    fn load(
        weights: &mut dyn Weights,
        path: &str,
        config: &LlamaConfig,
        attention: CompressedAttention,
    ) -> Result<Self> {
        let mut norm = |name: &str| -> Result<RmsNorm> {
            let weight = weights.vector(&format!("{path}.{name}"), config.hidden_size)?;
            Ok(RmsNorm::new(weight, config.rms_norm_eps))
        };
        Ok(Self {
            attention_norm: norm("input_layernorm")?,
            mlp_norm: norm("post_attention_layernorm")?,
            attention: SelfAttention::load(weights, &format!("{path}.self_attn"), config, attention)?,
            mlp: Mlp::load(weights, &format!("{path}.mlp"), config)?,
        })
    }
}

/// The whole model.
pub struct Llama {
    device: Device,
    vocab_size: usize,
    embedding: Linear,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    rope: Rope,
}

impl Llama {
    /// Loads every weight; `attention` holds one entry per layer.
    pub fn load(weights: &mut dyn Weights, config: &LlamaConfig, attention: Vec<CompressedAttention>) -> Result<Self> {
        ensure!(
            attention.len() == config.layers,
            "attention: expected {} layers, got {}; give one per layer",
            config.layers,
            attention.len()
        );
        let embedding = weights.table("model.embed_tokens", config.vocab_size, config.hidden_size)?;
        let mut layers = Vec::with_capacity(config.layers);
        for (index, attention) in attention.into_iter().enumerate() {
            layers.push(Layer::load(
                weights,
                &format!("model.layers.{index}"),
                config,
                attention,
            )?);
        }
        let head = match config.tied {
            true => embedding.clone(),
            false => weights.table("lm_head", config.vocab_size, config.hidden_size)?,
        };
        Ok(Self {
            device: weights.device(),
            vocab_size: config.vocab_size,
            embedding,
            layers,
            norm: RmsNorm::new(weights.vector("model.norm", config.hidden_size)?, config.rms_norm_eps),
            head,
            rope: Rope::new(config, weights.dtype(), &weights.device())?,
        })
    }

    /// Hidden states `(1, N, hidden)` of a whole sequence. Each layer's hidden tokens are added to `counts`.
    pub fn forward(&self, tokens: &[u32], counts: &mut HiddenCounts) -> Result<Tensor> {
        let rotation = self.rope.at(0, tokens.len())?;
        self.run(tokens, |index, layer, xs, _| {
            let (attended, stats) = layer.attention.forward(xs, &rotation)?;
            counts.add(index, &stats);
            Ok(attended)
        })
    }

    /// An empty cache per layer, for [`Self::forward_cached`].
    pub fn caches(&self, options: &CacheOptions) -> Result<Vec<CompressedKvCache>> {
        let cache = |layer: &Layer| Ok(layer.attention.attention.new_cache(options.clone())?);
        self.layers.iter().map(cache).collect()
    }

    /// Hidden states `(1, n, hidden)` of the next tokens of the sequence in `caches`, which append them.
    pub fn forward_cached(&self, tokens: &[u32], caches: &mut [CompressedKvCache]) -> Result<Tensor> {
        let position = caches.first().map_or(0, CompressedKvCache::seq_len);
        let rotation = self.rope.at(position, tokens.len())?;
        self.run(tokens, |index, layer, xs, _| {
            layer.attention.forward_cached(xs, &rotation, &mut caches[index])
        })
    }

    /// Hidden states `(1, N, hidden)` of a whole sequence, with plans that the caller makes. Each layer's hidden tokens
    /// are added to `counts`.
    pub fn forward_planned(
        &self,
        tokens: &[u32],
        counts: &mut HiddenCounts,
        mut plan: impl FnMut(&LayerCall) -> Result<MergePlan>,
    ) -> Result<Tensor> {
        let rotation = self.rope.at(0, tokens.len())?;
        self.run(tokens, |index, layer, xs, stream| {
            let attention = &layer.attention;
            let [q, k, v] = attention.project(xs, &rotation)?;
            let plan = plan(&LayerCall {
                layer: index,
                qkv: [&q, &k, &v],
                projection: &attention.output,
                stream,
            })?;
            counts.add(index, &plan.stats()?);
            attention.merge_heads(&attend(&q, &k, &v, &plan, attention.attention.options())?)
        })
    }

    /// A fingerprint of the weights that does not depend on their storage: it hashes the norms' vectors, which stay
    /// floats.
    pub fn fingerprint(&self) -> Result<String> {
        // FNV-1a.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let layers = self
            .layers
            .iter()
            .flat_map(|layer| [&layer.attention_norm, &layer.mlp_norm]);
        for norm in layers.chain([&self.norm]) {
            // bf16 of each number, so that a model in bf16 or f16 has the fingerprint of the one in f32.
            for x in norm.weight().to_dtype(DType::BF16)?.to_vec1::<half::bf16>()? {
                hash = (hash ^ u64::from(x.to_bits())).wrapping_mul(0x0100_0000_01b3);
            }
        }
        Ok(format!("norms-{hash:016x}"))
    }

    /// Runs all layers; `attend` gets each layer's index, normed input, and input.
    fn run(
        &self,
        tokens: &[u32],
        mut attend: impl FnMut(usize, &Layer, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        check_ids(tokens, self.vocab_size)?;
        let ids = Tensor::new(tokens, &self.device)?;
        let mut xs = self.embedding.rows(&ids)?.unsqueeze(0)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let attended = attend(index, layer, &layer.attention_norm.forward(&xs)?, &xs)?;
            xs = (xs + attended)?;
            let mixed = layer.mlp.forward(&layer.mlp_norm.forward(&xs)?)?;
            xs = (xs + mixed)?;
        }
        Ok(self.norm.forward(&xs)?)
    }

    /// The device of the model.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Logits `(vocabulary)` in f32, on the CPU, of the last token of hidden states `(1, n, hidden)`.
    pub fn last_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.logits(hidden, hidden.dim(1)? - 1, 1)?.squeeze(0)?)
    }

    /// Logits `(n, vocabulary)` in f32, on the CPU, of rows `first..first + n` of hidden states `(1, N, hidden)`.
    pub fn logits(&self, hidden: &Tensor, first: usize, n: usize) -> Result<Tensor> {
        let rows = hidden.narrow(1, first, n)?.contiguous()?;
        let logits = self.head.forward(&rows)?.squeeze(0)?.to_dtype(DType::F32)?;
        Ok(logits.to_device(&Device::Cpu)?)
    }
}
