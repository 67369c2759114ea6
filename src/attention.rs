//! Modules: the drop-in for a layer's `softmax(QK)V`, a whole self-attention layer, and a sink for its loss.

mod gate;
mod layer;
mod rotary;
mod sink;

pub use gate::{KeyGate, RelaxedGate};
pub use layer::{CompressedSelfAttention, QkNorm, SelfAttentionConfig};
pub use rotary::{RotaryConfig, RotaryLayout, RotaryScaling};
pub use sink::CompressionLossSink;

use crate::cache::{CacheOptions, CompressedKvCache};
use crate::calibrate::{KeyProbe, LayerScorer};
use crate::config::{AttentionOptions, CompressionConfig, Dropout, HeadStrategies};
use crate::op::{attend, compressed_attention, CompressedAttentionOutput};
use crate::plan::MergePlan;
use candle_core::{bail, Result, Tensor};
use std::sync::atomic::{AtomicU64, Ordering};

/// Compressed attention without weights. Query (B, H, N, D), key and value (B, Hk, N, D), output (B, H, N, D), or with
/// their axes in the order of [`AttentionOptions::layout`]. Put it where a layer computes `softmax(scale·QKᵀ)·V`;
/// transposed views need no `contiguous()`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sfattention::{CompressedAttention, CompressionConfig, HeadStrategies, MergeStrategy};
/// let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
/// let attention = CompressedAttention::new(strategies, CompressionConfig::pretrained(), Default::default())?;
/// let q = Tensor::randn(0f32, 1., (1, 8, 128, 64), &Device::Cpu)?;
/// let kv = Tensor::randn(0f32, 1., (1, 2, 128, 64), &Device::Cpu)?;
/// assert_eq!(attention.forward(&q, &kv, &kv)?.dims(), q.dims());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct CompressedAttention {
    strategies: HeadStrategies,
    config: CompressionConfig,
    options: AttentionOptions,
    /// Of this layer alone.
    probe: Option<LayerScorer>,
    /// The number of calls so far; each call draws another dropout mask.
    calls: AtomicU64,
}

impl Clone for CompressedAttention {
    fn clone(&self) -> Self {
        Self {
            strategies: self.strategies.clone(),
            config: self.config.clone(),
            options: self.options.clone(),
            probe: self.probe.clone(),
            calls: AtomicU64::new(self.calls.load(Ordering::Relaxed)),
        }
    }
}

impl CompressedAttention {
    /// Keeps the settings for all calls. If `options` has dropout, call number i (from 0) uses its seed plus i, so that
    /// each call draws another mask; see [`Self::set_dropout`] to end training.
    ///
    /// # Errors
    /// Settings that have no meaning, see [`CompressionConfig::check`] and [`AttentionOptions::check`].
    pub fn new(strategies: HeadStrategies, config: CompressionConfig, options: AttentionOptions) -> Result<Self> {
        config.check(options.causal)?;
        config.check_strategies(&strategies)?;
        options.check()?;
        Ok(Self {
            strategies,
            config,
            options,
            probe: None,
            calls: AtomicU64::new(0),
        })
    }

    /// The same strategies, parameters and probe under other options.
    ///
    /// # Errors
    /// Options that have no meaning, or that the parameters do not fit.
    pub fn with_options(mut self, options: AttentionOptions) -> Result<Self> {
        self.config.check(options.causal)?;
        options.check()?;
        self.options = options;
        Ok(self)
    }

    /// Takes scores from layer `layer` of a probe, under [`Criterion::Given`](crate::Criterion):
    /// [`Self::forward_probed`] and [`Self::forward_cached_probed`] then decide by them.
    ///
    /// # Errors
    /// Another criterion, or a layer that the probe does not have.
    pub fn with_probe(mut self, probe: &KeyProbe, layer: usize) -> Result<Self> {
        if !self.config.criterion.takes_scores() {
            bail!(
                "probe: expected Criterion::Given with a probe, got {:?}; set CompressionConfig::criterion",
                self.config.criterion
            )
        }
        self.probe = Some(LayerScorer::new(probe, layer)?);
        Ok(self)
    }

    /// Whether a probe gives the scores.
    pub fn has_probe(&self) -> bool {
        self.probe.is_some()
    }

    /// The output alone: query (B, H, N, D), key and value (B, Hk, N, D), output (B, H, N, D), or in the options'
    /// layout.
    ///
    /// # Errors
    /// As [`MergePlan::new`] and [`attend`].
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        Ok(self.forward_with_plan(q, k, v)?.0)
    }

    /// The output and the plan: query (B, H, N, D), key and value (B, Hk, N, D), output (B, H, N, D), or in the
    /// options' layout.
    ///
    /// # Errors
    /// As [`MergePlan::new`] and [`attend`].
    pub fn forward_with_plan(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, MergePlan)> {
        let options = self.next_options();
        let plan = MergePlan::new(q, k, v, &self.strategies, &self.config, &options)?;
        Ok((attend(q, k, v, &plan, &options)?, plan))
    }

    /// The output under [`Criterion::Given`](crate::Criterion), by scores f32 (B, Hk, N): query (B, H, N, D), key and
    /// value (B, Hk, N, D), output (B, H, N, D), or in the options' layout. The query heads are those of the
    /// thresholds.
    ///
    /// # Errors
    /// As [`MergePlan::from_scores`] and [`attend`].
    pub fn forward_scored(&self, q: &Tensor, k: &Tensor, v: &Tensor, scores: &Tensor) -> Result<Tensor> {
        Ok(self.scored([q, k, v], scores)?.0)
    }

    /// [`Self::forward_with_plan`], by the scores of `probed` where there is a probe: the keys before rotary embedding,
    /// (B, Hk, N, D) or in the options' layout. Without a probe they are not read.
    ///
    /// # Errors
    /// As [`Self::forward_with_plan`], and keys of another shape.
    pub fn forward_probed(&self, [q, k, v]: [&Tensor; 3], probed: &Tensor) -> Result<(Tensor, MergePlan)> {
        match self.probe_scores(probed)? {
            Some(scores) => self.scored([q, k, v], &scores),
            None => self.forward_with_plan(q, k, v),
        }
    }

    /// [`Self::forward_cached`], by the scores of `probed` where there is a probe: the new keys before rotary
    /// embedding, (B, Hk, n, D) or in the options' layout. Without a probe they are not read.
    ///
    /// # Errors
    /// As [`Self::forward_cached`], and keys of another shape.
    pub fn forward_cached_probed(
        &self,
        [q, k, v]: [&Tensor; 3],
        probed: &Tensor,
        cache: &mut CompressedKvCache,
    ) -> Result<Tensor> {
        match self.probe_scores(probed)? {
            Some(scores) => self.forward_cached_scored([q, k, v], &scores, cache),
            None => self.forward_cached(q, k, v, cache),
        }
    }

    fn probe_scores(&self, probed: &Tensor) -> Result<Option<Tensor>> {
        let Some(probe) = &self.probe else { return Ok(None) };
        probe.scores(&self.options.layout.turned(probed)?).map(Some)
    }

    fn scored(&self, [q, k, v]: [&Tensor; 3], scores: &Tensor) -> Result<(Tensor, MergePlan)> {
        let options = self.next_options();
        let (strategies, config) = (&self.strategies, &self.config);
        let plan = match &options.segments {
            Some(segments) => MergePlan::from_scores_in_segments(scores, strategies, config, segments)?,
            None => MergePlan::from_scores(scores, strategies, config, options.causal)?,
        };
        Ok((attend(q, k, v, &plan, &options)?, plan))
    }

    /// The output, the compression loss and the plan: query (B, H, N, D), key and value (B, Hk, N, D), output
    /// (B, H, N, D), or in the options' layout.
    ///
    /// # Errors
    /// As [`compressed_attention`].
    pub fn forward_with_loss(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<CompressedAttentionOutput> {
        compressed_attention(q, k, v, &self.strategies, &self.config, &self.next_options())
    }

    /// An empty cache with this attention's strategies and parameters, for [`Self::forward_cached`]: one per layer.
    ///
    /// # Errors
    /// As [`CompressedKvCache::new`], and options that are not causal.
    pub fn new_cache(&self, options: CacheOptions) -> Result<CompressedKvCache> {
        if !self.options.causal {
            bail!("causal: expected true for a KV cache, got false; a cached row cannot see tokens that come later")
        }
        CompressedKvCache::new(self.strategies.clone(), self.config.clone(), options)
    }

    /// Appends n >= 1 new tokens to `cache` and returns their output rows over all tokens in it. Query (B, H, n, D),
    /// key and value (B, Hk, n, D), output (B, H, n, D), or with their axes in the order of
    /// [`AttentionOptions::layout`]. Any chunking of a sequence gives the result of [`Self::forward`] on the whole
    /// sequence, to rounding. Dropout uses the unchanged seed in every call, so that the whole sequence has one mask.
    ///
    /// # Errors
    /// A cache of other strategies or parameters than [`Self::new_cache`] gives, or as
    /// [`CompressedKvCache::append_and_attend`]. The cache is then unchanged.
    pub fn forward_cached(&self, q: &Tensor, k: &Tensor, v: &Tensor, cache: &mut CompressedKvCache) -> Result<Tensor> {
        self.check_cache(cache)?;
        cache.append_and_attend(q, k, v, &self.options)
    }

    /// [`Self::forward_cached`] under [`Criterion::Given`](crate::Criterion), with the scores of the new tokens, f32
    /// (B, Hk, n).
    ///
    /// # Errors
    /// As [`Self::forward_cached`] and [`CompressedKvCache::append_and_attend_scored`].
    pub fn forward_cached_scored(
        &self,
        [q, k, v]: [&Tensor; 3],
        scores: &Tensor,
        cache: &mut CompressedKvCache,
    ) -> Result<Tensor> {
        self.check_cache(cache)?;
        cache.append_and_attend_scored(q, k, v, scores, &self.options)
    }

    fn check_cache(&self, cache: &CompressedKvCache) -> Result<()> {
        if (cache.strategies(), cache.config()) != (&self.strategies, &self.config) {
            bail!(
                "cache: expected this attention's strategies and {:?}, got other strategies or {:?}; make the cache \
                 with new_cache",
                self.config,
                cache.config()
            )
        }
        Ok(())
    }

    /// Each head's strategy.
    pub fn strategies(&self) -> &HeadStrategies {
        &self.strategies
    }

    /// The method's parameters.
    pub fn config(&self) -> &CompressionConfig {
        &self.config
    }

    /// Scale, causality, dropout, bias and layout.
    pub fn options(&self) -> &AttentionOptions {
        &self.options
    }

    /// Changes the dropout: `None` for evaluation, `Some` for training.
    ///
    /// # Errors
    /// A probability outside `[0, 1)`.
    pub fn set_dropout(&mut self, dropout: Option<Dropout>) -> Result<()> {
        let options = AttentionOptions {
            dropout,
            ..self.options.clone()
        };
        options.check()?;
        self.options = options;
        Ok(())
    }

    /// Gives the next calls their segments: see [`AttentionOptions::segments`]. `None` for one segment a batch row.
    ///
    /// # Errors
    /// Another dtype than u32, or another rank than 2.
    pub fn set_segments(&mut self, segments: Option<Tensor>) -> Result<()> {
        let options = AttentionOptions {
            segments,
            ..self.options.clone()
        };
        options.check()?;
        self.options = options;
        Ok(())
    }

    fn next_options(&self) -> AttentionOptions {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let mut options = self.options.clone();
        if let Some(dropout) = &mut options.dropout {
            dropout.seed = dropout.seed.wrapping_add(call);
        }
        options
    }
}
