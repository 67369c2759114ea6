//! [`MergePlan`]: the tokens that each head hides, and their number.

#[cfg(doc)]
use crate::config::AttentionOptions;
use crate::config::{CompressionConfig, Segment};
use crate::problem::Problem;
use candle_core::{bail, DType, Result, Tensor};

/// The tokens that are folded into their right neighbours, per batch row and query head. Made once per call, from the
/// tensors or from the caller's own bits, and then given to [`crate::attend`]. The decisions carry no gradient.
#[derive(Clone, Debug)]
pub struct MergePlan {
    /// The indicators, u8 (B, H, N-1), contiguous.
    indicators: Tensor,
    config: CompressionConfig,
    /// Whether [`Self::new`] decided, so that under [`crate::GroupRule::Unanimous`] a KV head's query heads agree.
    #[cfg_attr(not(any(feature = "cuda", feature = "cuda-emu")), allow(dead_code))]
    decided: bool,
    /// Whether it is known without reading the indicators that nothing is hidden.
    hides_nothing: bool,
}

/// The error of a call without the scores that [`crate::Criterion::Given`] needs.
pub(crate) fn without_scores<T>() -> Result<T> {
    bail!(
        "scores: expected a score per token and KV head for Criterion::Given, got none; give them to \
         MergePlan::from_scores and attend, or to CompressedKvCache::append_and_attend_scored, or choose another \
         criterion"
    )
}

/// The counts of a plan. A pair is two neighbouring tokens of one query head of one batch row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergeStats {
    /// B·H·(N-1): all pairs. Each pair can hide one token.
    pub pairs: usize,
    /// The number of hidden tokens, over all heads.
    pub hidden: usize,
    /// Hidden tokens per batch row and query head: `per_head[b][h]`.
    pub per_head: Vec<Vec<usize>>,
}

impl MergeStats {
    /// Hidden tokens over pairs, 0 to 1; 0 where there is no pair.
    pub fn hidden_ratio(&self) -> f64 {
        self.hidden as f64 / self.pairs.max(1) as f64
    }
}

impl MergePlan {
    /// What was decided for a call.
    pub(crate) fn decided(indicators: Tensor, config: &CompressionConfig, hides_nothing: bool) -> Self {
        Self {
            indicators,
            config: config.clone(),
            decided: true,
            hides_nothing,
        }
    }

    /// A plan of the caller's own merge indicators: u8 (B, H, N-1) in either [`AttentionOptions::layout`], 1 where
    /// token t is folded into t+1. Of `config`, only the fold and the window are read from here on.
    ///
    /// # Errors
    /// Another dtype or rank, a value that is not 0 or 1, or a configuration that has no meaning.
    pub fn from_indicators(indicators: &Tensor, config: &CompressionConfig) -> Result<Self> {
        config.check(true)?;
        if indicators.dtype() != DType::U8 {
            bail!(
                "indicators: expected dtype u8, got {:?}; convert them with to_dtype",
                indicators.dtype()
            )
        }
        if indicators.rank() != 3 {
            bail!(
                "indicators: expected shape (batch, heads, tokens - 1), got {:?}; give one bit per pair of neighbours",
                indicators.dims()
            )
        }
        let bits = indicators.flatten_all()?.to_vec1::<u8>()?;
        if let Some(bad) = bits.iter().find(|bit| **bit > 1) {
            bail!("indicators: expected 0 or 1, got {bad}; write 1 where a token is folded into the next one")
        }
        Ok(Self {
            indicators: indicators.detach().contiguous()?,
            config: config.clone(),
            decided: false,
            hides_nothing: bits.iter().all(|bit| *bit == 0),
        })
    }

    /// The merge indicators, u8 (B, H, N-1) in either [`AttentionOptions::layout`]: 1 where token t is folded into t+1
    /// and its column is hidden.
    pub fn indicators(&self) -> &Tensor {
        &self.indicators
    }

    /// The settings that this plan was made with.
    pub fn config(&self) -> &CompressionConfig {
        &self.config
    }

    /// Counts the hidden tokens. On a GPU this waits for the device.
    ///
    /// # Errors
    /// An error of reading the indicators.
    pub fn stats(&self) -> Result<MergeStats> {
        let rows = self.indicators.to_vec3::<u8>()?;
        let count = |head: &Vec<u8>| head.iter().map(|bit| usize::from(*bit)).sum();
        let per_head: Vec<Vec<usize>> = rows.iter().map(|heads| heads.iter().map(count).collect()).collect();
        Ok(MergeStats {
            pairs: self.indicators.elem_count(),
            hidden: per_head.iter().flatten().sum(),
            per_head,
        })
    }

    /// Whether nothing is known to be hidden; a GPU's indicators are not read for this.
    #[cfg(any(feature = "cuda", feature = "cuda-emu"))]
    pub(crate) fn hides_nothing(&self) -> bool {
        self.hides_nothing
    }

    /// Whether the query heads of every KV head are known to agree.
    #[cfg(any(feature = "cuda", feature = "cuda-emu"))]
    pub(crate) fn heads_agree(&self) -> bool {
        self.decided && self.config.group_rule.heads_agree()
    }

    /// The plan of one segment alone.
    ///
    /// # Errors
    /// An error of the device.
    #[cfg(any(feature = "cuda", feature = "cuda-emu"))]
    pub(crate) fn alone(&self, segment: &Segment) -> Result<Self> {
        let (start, pairs) = (segment.tokens.start, segment.tokens.len() - 1);
        let indicators = self.indicators.narrow(0, segment.batch, 1)?.narrow(2, start, pairs)?;
        Ok(Self {
            // Kernels read bits from the start of their buffer.
            indicators: match pairs {
                0 => indicators,
                _ => indicators.force_contiguous()?,
            },
            config: self.config.clone(),
            ..*self
        })
    }

    /// Refuses hidden tokens at the end of a segment, which would be folded into another one.
    pub(crate) fn check_segments(&self, segments: &[Segment]) -> Result<()> {
        let tokens = self.indicators.dim(2)? + 1;
        let bits = self.indicators.to_vec3::<u8>()?;
        for segment in segments {
            for (head, bits) in bits[segment.batch].iter().enumerate() {
                if let Some(pair) = segment.borders(tokens).find(|pair| bits[*pair] == 1) {
                    bail!(
                        "plan: expected bit 0 between two segments, got 1 at token {pair} of batch row {}, head \
                         {head}, which would fold it into the next segment; clear the bit, or make the plan with \
                         these segments",
                        segment.batch
                    )
                }
            }
        }
        Ok(())
    }

    /// Refuses a plan that was made for other shapes, whose window has no meaning without causality, or that needs
    /// queries that are not there.
    pub(crate) fn check(&self, problem: &Problem, causal: bool) -> Result<()> {
        let expected = [problem.batch, problem.heads, problem.pairs()];
        if self.indicators.dims() != expected {
            bail!(
                "plan: expected indicators of shape {expected:?} (batch, heads, tokens - 1) for this query, got {:?}; \
                 make a plan for these tensors",
                self.indicators.dims()
            )
        }
        self.config.check(causal)?;
        let Problem { queries, tokens, .. } = *problem;
        if queries == tokens || self.hides_nothing {
            return Ok(());
        }
        if !causal {
            bail!(
                "plan: expected heads that are all MergeStrategy::Off where {queries} queries see all {tokens} keys, \
                 got a plan that may hide tokens; a row that is no token has no edge, so leave merging off"
            )
        }
        if self.config.fold.folds_queries() {
            bail!(
                "fold: expected Mean or Drop with fewer queries than keys, got {:?}, which folds the query before the \
                 first one too; choose another fold, or give the queries of all tokens",
                self.config.fold
            )
        }
        Ok(())
    }
}
