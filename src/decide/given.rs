//! Decisions by scores that the caller gives: [`Criterion::Given`](crate::Criterion).

use super::ScoreRule;
use crate::config::{CompressionConfig, HeadStrategies, Segment};
use crate::plan::MergePlan;
use crate::storage::not_on_cpu;
use candle_core::{bail, DType, Result, Tensor};

impl MergePlan {
    /// Decides by a score per token and KV head, f32 (B, Hk, N): low means that later rows will not miss the token.
    /// Under [`Criterion::Given`](crate::Criterion) a token is hidden where its score is below the threshold of its KV
    /// head, it is none of the first `sinks`, and it has left the window of the last row. The comparison is in f32,
    /// strict, and false for NaN. Where the query heads of a KV head have thresholds of their own, the least counts.
    /// No gradient reaches the scores. The number of query heads is that of the thresholds.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_sfattention::{attend, CompressionConfig, Criterion, HeadStrategies, MergePlan, MergeStrategy};
    /// let config = CompressionConfig { criterion: Criterion::Given, ..CompressionConfig::calibrated() };
    /// let thresholds = Tensor::new(&[0.5f32; 8], &Device::Cpu)?; // one a query head
    /// let strategies = HeadStrategies::uniform(MergeStrategy::Similarity).with_thresholds(&thresholds)?;
    /// let random = |heads| Tensor::randn(0f32, 1., (1, heads, 100, 64), &Device::Cpu);
    /// let (q, kv) = (random(8)?, random(2)?);
    /// let scores = Tensor::rand(0f32, 1., (1, 2, 100), &Device::Cpu)?;
    /// let plan = MergePlan::from_scores(&scores, &strategies, &config, true)?;
    /// let output = attend(&q, &kv, &kv, &plan, &Default::default())?;
    /// assert_eq!(output.dims(), q.dims());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Another criterion, dtype or rank, settings that do not fit the scores, or a device without kernels.
    pub fn from_scores(
        scores: &Tensor,
        strategies: &HeadStrategies,
        config: &CompressionConfig,
        causal: bool,
    ) -> Result<Self> {
        let call = GivenCall::new(scores, strategies, config, causal)?;
        let indicators = call.decide()?;
        Ok(Self::decided(indicators, config, strategies.all_off()))
    }

    /// [`Self::from_scores`] for the segments of [`AttentionOptions::segments`](crate::AttentionOptions), u32 (B, N):
    /// `sinks` and `window` count inside a segment. On a GPU this waits for the device.
    ///
    /// # Errors
    /// As [`Self::from_scores`], or segments of another shape or whose numbers come back.
    pub fn from_scores_in_segments(
        scores: &Tensor,
        strategies: &HeadStrategies,
        config: &CompressionConfig,
        segments: &Tensor,
    ) -> Result<Self> {
        let call = GivenCall::new(scores, strategies, config, true)?;
        let [batch, heads, kv_heads, tokens] = call.sizes;
        let pairs = tokens - 1;
        let (scores, mut bits) = (call.on_host()?, vec![0u8; batch * heads * pairs]);
        let segments = Segment::read(segments, [batch, tokens])?;
        for segment in segments.iter().filter(|segment| segment.tokens.len() > 1) {
            let strategies = strategies.of_row(segment.batch);
            let count = segment.tokens.len();
            let alone = ScoreRule {
                sizes: [1, heads, kv_heads],
                pairs: count - 1,
                strategies: &strategies,
                config,
            };
            let scores = segment.cut(&scores, [kv_heads, tokens, 1]);
            let alone = alone.indicators(&scores, count);
            segment.pairs().paste(&alone, &mut bits, [heads, pairs, 1]);
        }
        let indicators = Tensor::from_vec(bits, (batch, heads, pairs), call.scores.device())?;
        Ok(Self::decided(indicators, config, strategies.all_off()))
    }
}

/// Checked scores.
struct GivenCall<'a> {
    /// (B, Hk, N), f32, contiguous.
    scores: Tensor,
    /// B, H, Hk, N.
    sizes: [usize; 4],
    strategies: &'a HeadStrategies,
    config: &'a CompressionConfig,
}

impl<'a> GivenCall<'a> {
    fn new(
        scores: &Tensor,
        strategies: &'a HeadStrategies,
        config: &'a CompressionConfig,
        causal: bool,
    ) -> Result<Self> {
        if !config.criterion.takes_scores() {
            bail!(
                "criterion: expected Criterion::Given with scores, got {:?}; set CompressionConfig::criterion, or let \
                 MergePlan::new decide",
                config.criterion
            )
        }
        config.check(causal)?;
        config.check_strategies(strategies)?;
        let &[batch, kv_heads, tokens] = scores.dims() else {
            bail!(
                "scores: expected shape (batch, kv_heads, tokens), got {:?}; give one score per token and KV head",
                scores.dims()
            )
        };
        if scores.dtype() != DType::F32 || scores.elem_count() == 0 {
            bail!(
                "scores: expected f32 and at least one token, got {:?} of shape {:?}; convert them with to_dtype",
                scores.dtype(),
                scores.dims()
            )
        }
        let Some(heads) = strategies.heads() else {
            bail!(
                "strategies: expected a strategy or a threshold per query head, got one strategy for all; write \
                 HeadStrategies::per_head(vec![strategy; heads])"
            )
        };
        if heads == 0 || heads % kv_heads != 0 {
            bail!(
                "scores: expected KV heads that divide the {heads} query heads of the strategies, got {kv_heads}; give \
                 one row of scores per KV head"
            )
        }
        strategies.check(batch, heads)?;
        Ok(Self {
            scores: scores.detach().contiguous()?,
            sizes: [batch, heads, kv_heads, tokens],
            strategies,
            config,
        })
    }

    fn on_host(&self) -> Result<Vec<f32>> {
        self.scores.flatten_all()?.to_vec1()
    }

    /// The indicators (B, H, N-1) on the scores' device.
    fn decide(&self) -> Result<Tensor> {
        let ([batch, heads, kv_heads, tokens], device) = (self.sizes, self.scores.device());
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            let call = crate::cuda::decide::ScoreCall {
                sizes: self.sizes,
                strategies: self.strategies,
                config: self.config,
            };
            return crate::cuda::tensors::decide_given(&self.scores, &call);
        }
        if !device.is_cpu() {
            return not_on_cpu(device);
        }
        let rule = ScoreRule {
            sizes: [batch, heads, kv_heads],
            pairs: tokens - 1,
            strategies: self.strategies,
            config: self.config,
        };
        Tensor::from_vec(
            rule.indicators(&self.on_host()?, tokens),
            (batch, heads, tokens - 1),
            device,
        )
    }
}
