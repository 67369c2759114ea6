//! [`AttentionOptions`]: the options of one attention call, apart from compression.

use super::{Segment, TensorLayout};
use candle_core::{bail, DType, Result, Tensor};

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
    /// `(B, H, N, N)`, in any float dtype; `(B, H, Nq, N)` with Nq queries. One that does not
    /// depend on the row, such as `(B, 1, 1, N)`, costs least. It receives no gradient.
    ///
    /// A finite bias of any size, the dtype's minimum included, is finite: a row whose every logit is that minimum is
    /// the softmax of equal logits. Minus infinity hides a column from a row. A row that sees nothing is zeros and
    /// sends no gradient.
    ///
    /// Under [`MergeRule::Causal`](crate::MergeRule::Causal) two neighbours merge only where the later token's row sees
    /// both. Minus infinity at any other column that a row would see, in a head that hides tokens, is an error on the
    /// CPU. The reasons: a bias does not tell apart the tokens that were folded together, and `sinks` and `window`
    /// count from the first token, padding included. On CUDA the check would mean waiting for the device, so there is
    /// no check: do not give such a bias. Left-padded batches and packed documents are [`Self::segments`].
    pub bias: Option<Tensor>,
    /// L, at least 1: row i sees token s only where s > i - L, the rule of Mistral and Gemma; L tokens with its own. A
    /// column of folded tokens stands for its last token. Decisions do not read it. Time follows L, not N. A cache
    /// keeps what a later row sees, at most L entries a list. Its first attended call fixes L for all later calls.
    /// `None` (default): every earlier token.
    pub sliding_window: Option<usize>,
    /// c, above 0: a logit z becomes c·tanh(z/c), before the bias, the size of a fold and the mask, as in Gemma 2.
    /// Decisions do not read it. On CUDA a product of a query and a key beyond f32 is NaN, not c. `None` (default):
    /// logits stay as they are.
    pub softcap: Option<f64>,
    /// (H), a float dtype, on the query's device: each row's softmax has one more term, exp(sink), in its denominator,
    /// and no value for it. -inf is no term; NaN and inf are errors on the CPU. A row that sees nothing else is zeros.
    /// [`attend`](crate::attend) has a gradient for it, in its dtype and shape. Decisions do not read it. `None`
    /// (default): no such term.
    pub sink_logits: Option<Tensor>,
    /// (B, Hk, N), a float dtype, on the query's device: `c[t]` is added to the logits of token t's column in rows
    /// i > t + window of every query head of the KV head's group, after the softcap. A gate that is trained with the
    /// model fades a token by it in place of hiding it. [`attend`](crate::attend) has a gradient for it, in its dtype
    /// and shape. Needs causal attention. Decisions do not read it, and a cache refuses it. On CUDA the tokens that
    /// have left a window are copied, as if they were folded. `None` (default): no such bias.
    pub column_bias: Option<Tensor>,
    /// (B, N), u32: row i sees token s only where their numbers are equal; 0 is padding, whose rows are zeros with zero
    /// gradients, and no row sees it. Equal numbers follow each other. Pairs of tokens in two segments do not merge;
    /// `sinks`, `window` and [`Self::sliding_window`] count inside a segment, so that the result is that of each
    /// segment alone. Bias and dropout go by the token indices of the whole call. A mask of zeros and ones is segments,
    /// in u32; for packed documents see [`segments_from_lengths`](super::segments_from_lengths).
    ///
    /// Each segment is a call of its own inside: many short ones take longer than one long row. On CUDA each is as many
    /// launches as a call, the numbers and the plan's bits are read, which waits for the device, and a gradient takes a
    /// tensor of the whole call's size for each segment, one at a time. `None` (default): one segment.
    pub segments: Option<Tensor>,
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
            sliding_window: None,
            softcap: None,
            sink_logits: None,
            column_bias: None,
            segments: None,
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

    /// The sliding window of a cache's call, whose calls before had `held`; None before the first of them.
    ///
    /// # Errors
    /// Another one than in the calls before.
    pub(crate) fn sliding_window_after(&self, held: Option<Option<usize>>) -> Result<Option<usize>> {
        if let Some(held) = held.filter(|held| *held != self.sliding_window) {
            bail!(
                "sliding_window: expected {held:?} as in the calls before, got {:?}; tokens outside of it are gone, \
                 give the same one in every call, or reset() the cache and append again",
                self.sliding_window
            )
        }
        Ok(self.sliding_window)
    }

    /// The options of a call on one segment alone; `bias` is the call's as a (B, H, N, N) view.
    pub(crate) fn alone(&self, segment: &Segment, bias: Option<&Tensor>) -> Result<Self> {
        let (start, count) = (segment.tokens.start, segment.tokens.len());
        let part = |bias: &Tensor| {
            bias.narrow(0, segment.batch, 1)?
                .narrow(2, start, count)?
                .narrow(3, start, count)
        };
        let columns = |bias: &Tensor| bias.narrow(0, segment.batch, 1)?.narrow(2, start, count);
        Ok(Self {
            bias: bias.map(part).transpose()?,
            column_bias: self.column_bias.as_ref().map(columns).transpose()?,
            segments: None,
            ..self.clone()
        })
    }

    /// Refuses a scale that is not finite, a sliding window of 0, a dropout probability outside `[0, 1)`, a softcap
    /// that is not finite or not above 0, sink logits or a column bias that are not floats, and a bias that is not a
    /// float or asks for a gradient.
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
        if self.sliding_window == Some(0) {
            bail!("sliding_window: expected at least 1, got 0; a row sees its own token, None sees every earlier one")
        }
        if let Some(softcap) = self.softcap.filter(|c| !(c.is_finite() && *c > 0.0)) {
            bail!("softcap: expected a finite number above 0, got {softcap}; None leaves logits as they are")
        }
        if let Some(sinks) = self.sink_logits.as_ref().filter(|sinks| !sinks.dtype().is_float()) {
            bail!(
                "sink_logits: expected a float dtype, got {:?}; convert them with to_dtype",
                sinks.dtype()
            )
        }
        if let Some(bias) = &self.column_bias {
            if !bias.dtype().is_float() || bias.rank() != 3 {
                bail!(
                    "column_bias: expected floats of shape (batch, KV heads, tokens), got {:?} of shape {:?}; give one \
                     number per token and KV head",
                    bias.dtype(),
                    bias.dims()
                )
            }
            if !self.causal {
                bail!(
                    "column_bias: expected causal attention, got causal = false; no row is past a token's window there"
                )
            }
        }
        if let Some(segments) = &self.segments {
            if segments.dtype() != DType::U32 || segments.rank() != 2 {
                bail!(
                    "segments: expected u32 of shape (batch, tokens), got {:?} of shape {:?}; give each token its \
                     segment's number, and 0 to padding",
                    segments.dtype(),
                    segments.dims()
                )
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
