//! Appending tokens without attending, with their queries or without.

use super::{wider, CompressedKvCache};
#[cfg(doc)]
use crate::config::{Criterion, Fold};
use crate::plan::without_scores;
use crate::problem::Problem;
use candle_core::{bail, DType, Result, Tensor};

impl CompressedKvCache {
    /// Appends n >= 1 new tokens without computing their rows: query (B, H, n, D), key and value (B, Hk, n, D). O(n·D)
    /// per head, times the window and the sinks under [`Criterion::ObservedMass`]. Dtypes may differ as in
    /// [`Self::append_and_attend`].
    ///
    /// **The queries decide** under [`Criterion::ObservedMass`] (with the default softmax scale) and
    /// [`Criterion::QueryKey`], and [`Fold::PairSum`] folds them: they must be the tokens' own, rotated like the keys.
    /// Zeros or invented queries fill the cache with wrong decisions, and no call can detect that. Without the queries,
    /// use [`Self::append_without_queries`], which refuses these settings.
    ///
    /// # Errors
    /// As [`Self::append_and_attend`]. The cache is then unchanged.
    pub fn append(&mut self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        let [wide_q, wide_k, wide_v] = &wider(q, k, v)?;
        let problem = Problem::new(wide_q, wide_k, wide_v)?;
        self.take_in(&problem, [wide_q, wide_k, wide_v], None, k.dtype(), None)
            .map(|_| ())
    }

    /// Appends n >= 1 new tokens under [`Criterion::Given`], without computing their rows: key and value (B, Hk, n, D),
    /// scores f32 (B, Hk, n). `heads` is H, the number of query heads that will read the cache. Leaves the cache as
    /// [`Self::append_and_attend_scored`] does.
    ///
    /// # Errors
    /// Another criterion, a number of heads that is no multiple of the KV heads, or as
    /// [`Self::append_and_attend_scored`]. The cache is then unchanged.
    pub fn append_scored(&mut self, k: &Tensor, v: &Tensor, scores: &Tensor, heads: usize) -> Result<()> {
        let q = unread_queries(k, heads)?;
        self.take_in(&Problem::new(&q, k, v)?, [&q, k, v], Some(scores), k.dtype(), None)
            .map(|_| ())
    }

    /// The scores as (B, Hk, n, 1), after checking that the settings take them.
    pub(super) fn checked_scores(
        &self,
        problem: &Problem,
        scores: Option<&Tensor>,
        k: &Tensor,
    ) -> Result<Option<Tensor>> {
        let criterion = self.config.criterion;
        let Some(scores) = scores else {
            let needed = criterion.takes_scores() && !self.strategies.all_off();
            return if needed { without_scores() } else { Ok(None) };
        };
        if !criterion.takes_scores() {
            bail!(
                "scores: expected none under Criterion::{criterion:?}, got some; set the criterion to Given, or leave \
                 them out"
            )
        }
        let Problem {
            batch,
            kv_heads,
            tokens,
            ..
        } = *problem;
        let fits = scores.dims() == [batch, kv_heads, tokens] && scores.dtype() == DType::F32;
        if !fits || !scores.device().same_device(k.device()) {
            bail!(
                "scores: expected f32 of shape (batch, KV heads, new tokens) = ({batch}, {kv_heads}, {tokens}) on the \
                 device of the keys, got {:?} of shape {:?} on {:?}; give one score per new token and KV head",
                scores.dtype(),
                scores.dims(),
                scores.device().location()
            )
        }
        scores.detach().contiguous()?.unsqueeze(3).map(Some)
    }

    /// Appends n >= 1 new tokens without their queries: key and value (B, Hk, n, D). Leaves the cache as
    /// [`Self::append_and_attend`] does. `heads` is H, the number of query heads that will read the cache. For settings
    /// that read no queries: [`Criterion::KeyKey`] with [`Fold::Mean`] or `Drop`, and heads that are all
    /// [`MergeStrategy::Off`](crate::MergeStrategy).
    ///
    /// # Errors
    /// Another criterion or fold, a number of heads that is no multiple of the KV heads, or as
    /// [`Self::append_and_attend`]. The cache is then unchanged.
    pub fn append_without_queries(&mut self, k: &Tensor, v: &Tensor, heads: usize) -> Result<()> {
        let (criterion, fold) = (self.config.criterion, self.config.fold);
        let reads = if criterion.reads_queries() {
            Some(format!("criterion {criterion:?}"))
        } else if fold.folds_queries() {
            Some(format!("fold {fold:?}"))
        } else {
            None
        };
        if let Some(reads) = reads.filter(|_| !self.strategies.all_off()) {
            bail!(
                "append_without_queries: expected criterion KeyKey with fold Mean or Drop, or heads that are all off, \
                 got {reads}, which reads queries; give the tokens' own queries to append"
            )
        }
        self.append(&unread_queries(k, heads)?, k, v)
    }
}

/// Queries for steps that read none: one row of zeros stands for all.
fn unread_queries(k: &Tensor, heads: usize) -> Result<Tensor> {
    let [batch, _, tokens, dim] = *k.dims() else {
        bail!(
            "key: expected 4 axes (batch, kv_heads, tokens, head_dim), got shape {:?}; split the heads with reshape \
             and transpose",
            k.dims()
        )
    };
    let row = Tensor::zeros((1, 1, 1, dim), k.dtype(), k.device())?;
    row.broadcast_as((batch, heads, tokens, dim))
}
