//! [`AttentionOptions`]: the options of one attention call, apart from compression.

use super::TensorLayout;
use candle_core::{bail, Result, Tensor};

/// Dropout on the softmax weights, drawn from Philox 4x32-10 so that every device and the backward pass see one mask.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The probability that a weight is set to 0, in `[0, 1)`; kept weights are scaled by `1 / (1 - p)`.
    pub p: f64,
    /// The generator's key. The same seed draws the same mask: change it from step to step.
    pub seed: u64,
}

/// The options of one attention call, apart from compression. [`Default`] is plain causal attention.
#[derive(Clone, Debug)]
pub struct AttentionOptions {
    /// Factor on `query . key`; `None` is `1 / sqrt(head_dim)`.
    pub softmax_scale: Option<f64>,
    /// Whether a row sees only tokens up to itself. Default true.
    pub causal: bool,
    /// Dropout on the softmax weights; `None` (default) for none.
    pub dropout: Option<Dropout>,
    /// Added to the logit of every visible column, by the column's token index: any shape that broadcasts to
    /// `(B, H, N, N)`, in any float dtype. It receives no gradient.
    ///
    /// A finite bias of any size, the dtype's minimum included, is finite: a row whose every logit is that minimum is
    /// the softmax of equal logits. Minus infinity hides a column from a row. A row that sees nothing is zeros and
    /// sends no gradient.
    ///
    /// Under [`MergeRule::Causal`](crate::MergeRule::Causal) two neighbours merge only where the later token's row sees
    /// both. Minus infinity at any other column that a row would see, in a head that hides tokens, is an error on the
    /// CPU. The reasons: a bias does not tell apart the tokens that were folded together, and `sinks` and `window`
    /// count from the first token, padding included. On CUDA the check would mean waiting for the device, so there is
    /// no check: do not give such a bias. For left-padded batches and packed documents with merging, give each sequence
    /// its own call, or keep their heads [`MergeStrategy::Off`](crate::MergeStrategy::Off).
    pub bias: Option<Tensor>,
    /// The order of the axes of query, key, value and output tensors, at every function that takes these options.
    /// Default [`TensorLayout::HeadsFirst`]: (B, H, N, D). The bias is (B, H, N, N) in either, and the arrays of
    /// [`crate::reference`] are (B, H, N, D).
    pub layout: TensorLayout,
    /// Whether gradients must be the same bits every time. Default false: on CUDA in f16 and bf16, for head sizes up to
    /// 128, the parts of the query's gradient are then added in the order in which they arrive, and both passes take a
    /// quarter less time. Every other result, and every result on the CPU, is the same bits every time either way.
    pub deterministic: bool,
}

impl Default for AttentionOptions {
    fn default() -> Self {
        Self {
            softmax_scale: None,
            causal: true,
            dropout: None,
            bias: None,
            layout: TensorLayout::HeadsFirst,
            deterministic: false,
        }
    }
}

impl AttentionOptions {
    /// The factor on `query . key` for this head dimension.
    pub fn scale(&self, head_dim: usize) -> f64 {
        self.softmax_scale.unwrap_or_else(|| 1.0 / (head_dim as f64).sqrt())
    }

    /// Refuses a scale that is not finite, a dropout probability outside `[0, 1)`, and a bias that is not a float or
    /// asks for a gradient.
    ///
    /// # Errors
    /// As above.
    pub fn check(&self) -> Result<()> {
        if let Some(scale) = self.softmax_scale {
            if !scale.is_finite() {
                bail!("softmax_scale: expected a finite number, got {scale}; None gives 1/sqrt(head_dim)")
            }
        }
        if let Some(Dropout { p, .. }) = self.dropout {
            if !(0.0..1.0).contains(&p) {
                bail!("dropout: expected a probability p with 0 <= p < 1, got {p}; None turns dropout off")
            }
        }
        if let Some(bias) = &self.bias {
            if !bias.dtype().is_float() {
                bail!(
                    "bias: expected a float dtype, got {:?}; convert it with to_dtype",
                    bias.dtype()
                )
            }
            if bias.track_op() {
                bail!(
                    "bias: expected a tensor without gradient, got a tracked one; no gradient would reach it, pass \
                     bias.detach()"
                )
            }
        }
        Ok(())
    }
}
