//! The compression loss of a model whose heads or batch rows are split over ranks.

use super::CompressionLossTerms;
use candle_core::{bail, DType, Result, Tensor};

impl CompressionLossTerms {
    /// S, M and P as one tensor (3), f64, without gradient, on the device of the terms: the ranks sum it by one
    /// all-reduce.
    ///
    /// # Errors
    /// An error of candle.
    pub fn sums(&self) -> Result<Tensor> {
        let pairs = Tensor::new(self.pairs as f64, self.squared.device())?;
        let wide = |x: &Tensor| x.detach().to_dtype(DType::F64);
        Tensor::stack(&[wide(&self.squared)?, wide(&self.merged)?, pairs], 0)
    }

    /// The terms of all ranks, of `totals`, the sum of all ranks' [`Self::sums`]. [`Self::loss`] of them is the loss of
    /// the whole model, the same bits on every rank. Its gradient is that of this rank's own heads and batch rows in
    /// the whole loss: M and P are constants to it, and so are the other ranks' S. On a GPU this waits for the device.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor, Var};
    /// # use candle_sfattention::*;
    /// # let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    /// # let config = CompressionConfig::default();
    /// # let q = Var::from_tensor(&Tensor::randn(0f32, 1., (1, 4, 20, 8), &Device::Cpu)?)?;
    /// // 4 heads on 2 ranks, here in one process.
    /// let of_rank = |rank: usize| -> candle_core::Result<CompressionLossTerms> {
    ///     let heads = q.narrow(1, rank * 2, 2)?;
    ///     let terms = compression_loss_terms(&heads, &heads, &strategies, &config)?;
    ///     terms.ok_or_else(|| candle_core::Error::msg("no pairs"))
    /// };
    /// let ranks = [of_rank(0)?, of_rank(1)?];
    /// let totals = (ranks[0].sums()? + ranks[1].sums()?)?; // the all-reduce
    /// let loss = ranks[0].over_ranks(&totals)?.loss(1.0, LossNormalizer::Merged)?;
    /// let gradients = loss.backward()?; // those of heads 0 and 1
    /// # assert!(gradients.get(&q).is_some());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Totals of another dtype or shape, or of fewer pairs than this rank has.
    pub fn over_ranks(&self, totals: &Tensor) -> Result<Self> {
        if totals.dtype() != DType::F64 || totals.dims() != [3] {
            bail!(
                "totals: expected f64 of shape [3], the sum of all ranks' CompressionLossTerms::sums, got {:?} of \
                 shape {:?}; sum the ranks' own",
                totals.dtype(),
                totals.dims()
            )
        }
        let pairs = totals.get(2)?.to_scalar::<f64>()?;
        // A NaN is no number of pairs either.
        let counted = pairs >= self.pairs as f64 && pairs.fract() == 0.0;
        if !counted {
            bail!(
                "totals: expected at least the {} pairs of this rank, got {pairs}; sum the sums of all ranks, this one \
                 among them",
                self.pairs
            )
        }
        let total = |index: usize| totals.get(index)?.detach().to_dtype(self.squared.dtype());
        // 0, with the gradient of this rank's S.
        let own = (&self.squared - self.squared.detach())?;
        Ok(Self {
            squared: (total(0)? + own)?,
            merged: total(1)?,
            pairs: pairs as usize,
        })
    }
}
