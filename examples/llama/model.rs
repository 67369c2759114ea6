//! A Llama, or a model whose layers differ from a Llama's by [`LayerOptions`], with [`CompressedAttention`] in place of
//! its attention.
//!
//! Activations are `(1, N, hidden)`. The model asks a [`Weights`] for its matrices by their Hugging Face names and does
//! not know the file format.

#[path = "model/config.rs"]
mod config;
#[path = "model/counts.rs"]
mod counts;
#[path = "model/layer.rs"]
mod layer;
#[path = "model/layer_options.rs"]
mod layer_options;
#[path = "model/norm.rs"]
mod norm;
#[path = "model/shard.rs"]
mod shard;

#[allow(unused_imports)] // not read where no checkpoint is loaded
pub use config::MOST_LAYERS;
pub use config::{check_ids, LlamaConfig};
pub use counts::HiddenCounts;
pub use layer::capped;
pub use layer_options::LayerOptions;
#[allow(unused_imports)] // not read where no checkpoint is loaded
pub use layer_options::{Activation, NormKind, Sliding};

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor, D};
use candle_sfattention::{attend, AttentionOptions, CacheOptions, CompressedAttention, CompressedKvCache, MergePlan};

use self::layer::{fitted, rotated, Layer};
use self::norm::Norm;
use self::shard::ShardWeights;
use crate::ranks::Ranks;
use crate::rope::{Rope, Rotation};
use crate::weights::{Linear, Pass, Weights};

/// The inputs of one layer's attention, for a caller that makes its plan.
pub struct LayerCall<'a> {
    pub layer: usize,
    /// Query, key and value `(1, heads or KV heads, N, D)`, rotated.
    pub qkv: [&'a Tensor; 3],
    /// The key before its rotation.
    #[allow(dead_code)] // read where probes are fitted
    pub unrotated: &'a Tensor,
    /// The query before its rotation.
    #[allow(dead_code)] // read by rankings
    pub unrotated_query: &'a Tensor,
    /// The layer's rotations.
    #[allow(dead_code)] // read by rankings
    pub rope: &'a Rope,
    /// The layer's scale, softcap and window.
    pub options: &'a AttentionOptions,
    /// The output projection `(hidden, heads·D)`.
    pub projection: &'a Linear,
    /// Factor on the projection's output before the stream gets it.
    pub residual_scale: f64,
    /// The residual stream that its output will be added to, `(1, N, hidden)`.
    pub stream: &'a Tensor,
}

impl LayerCall<'_> {
    /// The matrix `(hidden, heads·D)` from attention's output to what the stream gets.
    #[allow(dead_code)] // calibration reads it
    pub fn projection_to_stream(&self) -> Result<Tensor> {
        let matrix = self.projection.weight()?;
        match self.residual_scale {
            1.0 => Ok(matrix),
            scale => Ok((matrix * scale)?),
        }
    }
}

/// The whole model.
pub struct Llama {
    device: Device,
    vocab_size: usize,
    embedding: Linear,
    layers: Vec<Layer>,
    norm: Norm,
    head: Linear,
    options: LayerOptions,
    rope: Rope,
    /// Of the layers that slide, where it is another one.
    sliding_rope: Option<Rope>,
    /// The rank whose heads these are.
    ranks: Ranks,
}

/// The rotations of some positions: those of layers that see all tokens, and of layers that slide.
struct Rotations {
    all: Rotation,
    sliding: Rotation,
}

impl Llama {
    /// Loads every weight of the shard of one rank. `config` is the whole model's; `attention` holds one entry per
    /// layer, for the rank's heads, whose scale, softcap and window become the model's.
    pub fn load(
        weights: &mut dyn Weights,
        config: &LlamaConfig,
        attention: Vec<CompressedAttention>,
        ranks: &Ranks,
    ) -> Result<Self> {
        if ranks.world() == 1 {
            return Self::load_own(weights, config, attention, ranks);
        }
        let mut weights = ShardWeights { inner: weights, ranks };
        Self::load_own(&mut weights, &config.shard(ranks.world())?, attention, ranks)
    }

    fn load_own(
        weights: &mut dyn Weights,
        config: &LlamaConfig,
        attention: Vec<CompressedAttention>,
        ranks: &Ranks,
    ) -> Result<Self> {
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
                fitted(&attention, index, &config.layer)?,
                ranks,
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
            norm: Norm::load(weights, "model.norm", config.hidden_size, config)?,
            head,
            options: config.layer.clone(),
            rope: Rope::new(config, weights.dtype(), &weights.device())?,
            sliding_rope: Rope::sliding(config, weights.dtype(), &weights.device()),
            ranks: ranks.clone(),
        })
    }

    fn rotations(&self, position: usize, n: usize) -> Result<Rotations> {
        let all = self.rope.at(position, n)?;
        let sliding = match &self.sliding_rope {
            Some(rope) => rope.at(position, n)?,
            None => all.clone(),
        };
        Ok(Rotations { all, sliding })
    }

    /// The rotations of a layer.
    fn rope_of(&self, layer: usize) -> &Rope {
        match (self.options.window(layer), &self.sliding_rope) {
            (Some(_), Some(rope)) => rope,
            (_, None) | (None, _) => &self.rope,
        }
    }

    fn rotation<'r>(&self, layer: usize, rotations: &'r Rotations) -> &'r Rotation {
        match self.options.window(layer) {
            Some(_) => &rotations.sliding,
            None => &rotations.all,
        }
    }

    /// Hidden states `(1, N, hidden)` of a whole sequence. Each layer's hidden tokens are added to `counts`.
    pub fn forward(&self, tokens: &[u32], counts: &mut HiddenCounts) -> Result<Tensor> {
        let rotations = self.rotations(0, tokens.len())?;
        self.run(tokens, Pass::Prompt, |index, layer, xs, _| {
            let (attended, stats) = layer.attention.forward(xs, self.rotation(index, &rotations))?;
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
        self.forward_as(tokens, caches, Pass::Prompt)
    }

    /// As [`Self::forward_cached`], by the matrices for this pass.
    pub fn forward_as(&self, tokens: &[u32], caches: &mut [CompressedKvCache], pass: Pass) -> Result<Tensor> {
        let position = caches.first().map_or(0, CompressedKvCache::seq_len);
        let rotations = self.rotations(position, tokens.len())?;
        self.run(tokens, pass, |index, layer, xs, _| {
            let rotation = self.rotation(index, &rotations);
            layer.attention.forward_cached(xs, rotation, &mut caches[index], pass)
        })
    }

    /// Hidden states `(1, sequences, hidden)` of the next token of each sequence, whose caches append it.
    #[allow(dead_code)] // not read by every program
    pub fn forward_batch(
        &self,
        tokens: &[u32],
        caches: &mut [&mut Vec<CompressedKvCache>],
        pass: Pass,
    ) -> Result<Tensor> {
        ensure!(
            tokens.len() == caches.len(),
            "batch: expected a token for each of the {} sequences, got {}",
            caches.len(),
            tokens.len()
        );
        let rotations = caches.iter().map(|caches| {
            let position = caches.first().map_or(0, CompressedKvCache::seq_len);
            self.rotations(position, 1)
        });
        let rotations = rotations.collect::<Result<Vec<_>>>()?;
        self.run(tokens, pass, |index, layer, xs, _| {
            let rotations: Vec<&Rotation> = rotations.iter().map(|each| self.rotation(index, each)).collect();
            let caches = caches.iter_mut().map(|caches| &mut caches[index]);
            layer.attention.forward_batch(xs, &rotations, caches, pass)
        })
    }

    /// Hidden states `(rows, 1, hidden)` of the next token of each batch row of `caches`, which append it. All rows are
    /// at the same position.
    #[allow(dead_code)] // not read by every program
    pub fn forward_rows(&self, tokens: &[u32], caches: &mut [CompressedKvCache], pass: Pass) -> Result<Tensor> {
        let position = caches.first().map_or(0, CompressedKvCache::seq_len);
        let rotations = self.rotations(position, 1)?;
        self.run_rows((tokens, tokens.len()), pass, |index, layer, xs, _| {
            let rotation = self.rotation(index, &rotations);
            layer.attention.forward_cached(xs, rotation, &mut caches[index], pass)
        })
    }

    /// As [`Self::forward_rows`] at `position`, with attention and its caches left out: the rotated queries take the
    /// place of its output. For the time of all else.
    #[allow(dead_code)] // not read by every program
    pub fn forward_rows_unattended(&self, tokens: &[u32], position: usize, pass: Pass) -> Result<Tensor> {
        let rotations = self.rotations(position, 1)?;
        self.run_rows((tokens, tokens.len()), pass, |index, layer, xs, _| {
            let projected = layer.attention.project(xs, pass)?;
            let [q, _, _] = rotated(&projected, self.rotation(index, &rotations))?;
            layer.attention.merge_heads(&q, pass)
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
        self.forward_attended(tokens, |call| {
            let ([q, k, v], plan) = (call.qkv, plan(call)?);
            counts.add(call.layer, &plan.stats()?);
            Ok(attend(q, k, v, &plan, call.options)?)
        })
    }

    /// Hidden states `(1, N, hidden)` of a whole sequence, with attention `(1, heads, N, D)` that the caller computes.
    pub fn forward_attended(
        &self,
        tokens: &[u32],
        mut attended: impl FnMut(&LayerCall) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let rotations = self.rotations(0, tokens.len())?;
        self.run(tokens, Pass::Prompt, |index, layer, xs, stream| {
            let attention = &layer.attention;
            let projected = attention.project(xs, Pass::Prompt)?;
            let [q, k, v] = rotated(&projected, self.rotation(index, &rotations))?;
            let out = attended(&LayerCall {
                layer: index,
                qkv: [&q, &k, &v],
                unrotated: &projected[1],
                unrotated_query: &projected[0],
                rope: self.rope_of(index),
                options: attention.attention.options(),
                projection: &attention.output,
                residual_scale: self.options.residual_scale.unwrap_or(1.0),
                stream,
            })?;
            attention.merge_heads(&out, Pass::Prompt)
        })
    }

    /// A fingerprint of the weights that does not depend on their storage: it hashes the norms' vectors, which stay
    /// floats.
    pub fn fingerprint(&self) -> Result<String> {
        // FNV-1a.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let layers = self.layers.iter().flat_map(Layer::norms);
        for norm in layers.chain([&self.norm]) {
            // bf16 of each number, so that a model in bf16 or f16 has the fingerprint of the one in f32.
            for x in norm.weight().to_dtype(DType::BF16)?.to_vec1::<half::bf16>()? {
                hash = (hash ^ u64::from(x.to_bits())).wrapping_mul(0x0100_0000_01b3);
            }
        }
        Ok(format!("norms-{hash:016x}"))
    }

    /// Runs all layers on one sequence; `attend` gets each layer's index, normed input, and input.
    fn run(
        &self,
        tokens: &[u32],
        pass: Pass,
        attend: impl FnMut(usize, &Layer, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.run_rows((tokens, 1), pass, attend)
    }

    /// As [`Self::run`], with the tokens of `rows` sequences, one after another.
    fn run_rows(
        &self,
        (tokens, rows): (&[u32], usize),
        pass: Pass,
        mut attend: impl FnMut(usize, &Layer, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        check_ids(tokens, self.vocab_size)?;
        let ids = Tensor::new(tokens, &self.device)?;
        let xs = self.embedding.rows(&ids)?;
        let mut xs = xs.reshape((rows, tokens.len() / rows, xs.dim(1)?))?;
        if let Some(scale) = self.options.embedding_scale {
            xs = (xs * scale)?;
        }
        for (index, layer) in self.layers.iter().enumerate() {
            xs = layer.forward(&xs, pass, |normed| attend(index, layer, normed, &xs))?;
        }
        self.norm.forward(&xs)
    }

    /// The window of each layer; None of a layer that sees all tokens.
    pub fn windows(&self) -> Vec<Option<usize>> {
        (0..self.layers.len()).map(|layer| self.options.window(layer)).collect()
    }

    /// The rank whose heads these are.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// The device of the model.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Logits `(vocabulary)` in f32, on the CPU, of the last token of hidden states `(1, n, hidden)`.
    #[allow(dead_code)] // tests read it
    pub fn last_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.logits(hidden, hidden.dim(1)? - 1, 1)?.squeeze(0)?)
    }

    /// Logits `(n, vocabulary)` in f32, on the CPU, of rows `first..first + n` of hidden states `(1, N, hidden)`.
    pub fn logits(&self, hidden: &Tensor, first: usize, n: usize) -> Result<Tensor> {
        self.logits_as(hidden, first, n, Pass::Prompt)
    }

    /// As [`Self::logits`], by the matrix for this pass.
    pub fn logits_as(&self, hidden: &Tensor, first: usize, n: usize, pass: Pass) -> Result<Tensor> {
        Ok(self.logits_on_device(hidden, first, n, pass)?.to_device(&Device::Cpu)?)
    }

    /// As [`Self::logits`], on the model's device.
    #[allow(dead_code)] // a report reads it
    pub fn logits_in_place(&self, hidden: &Tensor, first: usize, n: usize) -> Result<Tensor> {
        self.logits_on_device(hidden, first, n, Pass::Prompt)
    }

    /// The likeliest next token of each row of hidden states `(rows, 1, hidden)`, found on the model's device.
    #[allow(dead_code)] // not read by every program
    pub fn likeliest(&self, hidden: &Tensor, pass: Pass) -> Result<Vec<u32>> {
        let rows = hidden.dim(0)?;
        let logits = self.logits_on_device(&hidden.transpose(0, 1)?, 0, rows, pass)?;
        Ok(logits.argmax(D::Minus1)?.to_vec1()?)
    }

    fn logits_on_device(&self, hidden: &Tensor, first: usize, n: usize, pass: Pass) -> Result<Tensor> {
        let rows = hidden.narrow(1, first, n)?.contiguous()?;
        let mut logits = self.head.through(&rows, pass)?.squeeze(0)?.to_dtype(DType::F32)?;
        if let Some(divisor) = self.options.logit_divisor {
            logits = (logits / divisor)?;
        }
        match self.options.final_softcap {
            Some(cap) => capped(&logits, cap),
            None => Ok(logits),
        }
    }
}
