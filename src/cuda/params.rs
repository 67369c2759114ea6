//! The structs that kernels take by value: the same fields in the same order as in `cuda/lib/params.cuh`, which asserts
//! the same sizes. Fields have 4 or 8 bytes, and 8-byte fields come first: no padding.

use super::on_gpu::{Gpu, Params};
use crate::config::AttentionOptions;
use crate::cuda::operands::BiasBuffer;
use crate::problem::{Problem, RowLayout};
use candle_core::{bail, Result};

/// Declares structs as parameters of kernels, and asserts their size in bytes.
macro_rules! params {
    ($($name:ident: $size:literal),* $(,)?) => {
        $(
            // SAFETY: repr(C), and as large as the sum of its fields, as in cuda/lib/params.cuh.
            unsafe impl Params for $name {}
            const _: () = assert!(size_of::<$name>() == $size);
        )*
    };
}

params!(Rows: 32, BiasEntries: 40, Sizes: 24);

/// Where the rows of q, k or v start, in elements.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub offset: u64,
    pub batch_stride: u64,
    pub head_stride: u64,
    pub token_stride: u64,
}

impl Rows {
    pub fn new(layout: &RowLayout) -> Self {
        let [batch, head, token] = layout.strides.map(|stride| stride as u64);
        Self {
            offset: layout.offset as u64,
            batch_stride: batch,
            head_stride: head,
            token_stride: token,
        }
    }
}

/// Where the entries of a bias are, in elements: a view of (batch, query heads, rows, tokens).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct BiasEntries {
    pub offset: u64,
    pub strides: [u64; 4],
}

impl BiasEntries {
    /// Without a bias no kernel reads these fields.
    pub fn new<G: Gpu>(bias: Option<BiasBuffer<'_, G>>) -> Self {
        let (offset, strides) = bias.map_or((0, [0; 4]), |bias| (bias.offset, bias.strides));
        Self {
            offset: offset as u64,
            strides: strides.map(|stride| stride as u64),
        }
    }
}

/// The sizes of one call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub batch: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub tokens: u32,
    pub head_dim: u32,
    /// Lists of columns per batch row: `heads` or `kv_heads`.
    pub lists: u32,
}

impl Sizes {
    /// The sizes of `problem`, with `lists` lists per batch row.
    ///
    /// # Errors
    /// More tokens, heads or rows than a kernel's 32-bit indices reach.
    pub fn new(problem: &Problem, lists: usize) -> Result<Self> {
        // A grid has the rows of a batch and the heads in its second axis.
        let (rows, largest) = (problem.batch * problem.heads, (1 << 31) - 1);
        if rows > 65535 || problem.tokens > largest / 2 || problem.head_dim > 65535 {
            bail!(
                "query: expected at most 65535 heads over all batch rows and {} tokens on CUDA, got {rows} and {}; \
                 split the batch",
                largest / 2,
                problem.tokens
            )
        }
        Ok(Self {
            batch: problem.batch as u32,
            heads: problem.heads as u32,
            kv_heads: problem.kv_heads as u32,
            tokens: problem.tokens as u32,
            head_dim: problem.head_dim as u32,
            lists: lists as u32,
        })
    }
}

/// Parameters of the emulator's own tests.
#[cfg(feature = "cuda-emu")]
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct BrokenParams {
    pub n: u32,
}

#[cfg(feature = "cuda-emu")]
params!(BrokenParams: 4);

// --- Decisions ---

params!(DecideParams: 152, FewTests: 1024, SweepParams: 16, ScoreParams: 16, ObservedParams: 136);

/// The parameters of decide.cu and loss.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct DecideParams {
    pub q: Rows,
    pub k: Rows,
    pub bias: BiasEntries,
    pub sizes: Sizes,
    pub key_key: u32,
    pub max_merge_level: u32,
    pub sinks: u32,
    pub levels: u32,
    /// The bias starts with this row; earlier rows have none.
    pub first_row: u32,
    pub reserved: u32,
}

/// Strategy and threshold of every query head, (B, H, 2), if they fit.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct FewTests {
    pub numbers: [f32; 256],
}

/// Scores that the caller gives.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScoreParams {
    /// Query heads of a KV head.
    pub group: u32,
    pub tokens: u32,
    pub sinks: u32,
    /// Tokens that have left the last row's window.
    pub decided: u32,
}

/// One sweep of the reference rule.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct SweepParams {
    /// Batch rows times heads.
    pub heads: u32,
    pub pairs: u32,
    pub levels: u32,
    pub sweep: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ObservedParams {
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    pub sizes: Sizes,
    pub window: u32,
    pub sinks: u32,
    pub scale: f32,
    /// Query heads of a KV head.
    pub group: u32,
}

// --- Fold ---

params!(FoldParams: 128);

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct FoldParams {
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    pub sizes: Sizes,
    /// 0 pair sum, 1 mean, 2 drop.
    pub fold: u32,
    pub reserved: u32,
}

// --- Loss ---

params!(TotalParams: 4);

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct TotalParams {
    pub blocks: u32,
}

// --- Attention ---

params!(AttentionParams: 232);

/// The parameters of every attention kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionParams {
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    pub bias: BiasEntries,
    pub dropout_cut: u64,
    pub sizes: Sizes,
    pub capacity: u32,
    pub window: u32,
    pub causal: u32,
    pub dense: u32,
    pub dropout_key: [u32; 2],
    pub scale: f32,
    pub scale_sign: f32,
    pub dropout_scale: f32,
    pub listed: u32,
    pub softcap: f32,
    /// L of a sliding window, at most the number of tokens, which is none.
    pub slide: u32,
    /// Rows before it are left out; the bias starts with it.
    pub first_row: u32,
    /// Dropout counts heads over all batch rows, rows and tokens from these on.
    pub drawn_from: [u32; 3],
}

params!(SpreadParams: 16);

/// The parameters of `forward_spread_nan`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct SpreadParams {
    pub tokens: u32,
    pub head_dim: u32,
    pub block_rows: u32,
    /// Batch rows times heads.
    pub heads: u32,
}

params!(DecodeParams: 20);

/// The parameters of `cuda/cache/decode_step.cuh`, besides [`CacheParams`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct DecodeParams {
    /// Query heads over all batch rows.
    pub rows: u32,
    /// `splits`, and one more for local columns.
    pub parts: u32,
    pub splits: u32,
    /// 1: the kernel appends a new token first.
    pub appends: u32,
    /// scale * log2(e)
    pub scale: f32,
}

// --- Cache ---

/// As in cuda/lib/params.cuh: no sliding window.
pub(crate) const NO_SLIDE: u32 = u32::MAX;

params!(CacheParams: 224, CacheAttendParams: 120, PadParams: 48, CopyParams: 32);

/// The parameters of `cache_append`: `sizes.tokens` new tokens, after `first` earlier ones.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheParams {
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    pub bias: BiasEntries,
    pub sizes: Sizes,
    pub key_key: u32,
    pub max_merge_level: u32,
    pub sinks: u32,
    pub window: u32,
    /// 0 pair sum, 1 mean, 2 drop.
    pub fold: u32,
    /// Pages that a list has room for in the table of pages.
    pub pages: u32,
    pub first: u32,
    /// 1: observed mass decides, with this softmax scale.
    pub observes: u32,
    pub scale: f32,
    /// L of the sliding window; [`NO_SLIDE`] for none.
    pub slide: u32,
    /// The score of the first new token of the first list, and the number of scores from list to list.
    pub scores_first: u32,
    pub scores_stride: u32,
    pub value_dim: u32,
    /// The size of the rows of a first chunk's columns.
    pub column_dim: u32,
    /// How closed chains are stored: `PageCode` in cuda/lib/params.cuh.
    pub code: u32,
    pub unused: u32,
}

params!(ChunkParams: 12);

/// The parameters of `cuda/cache/chunk.cu` besides [`CacheParams`]: attention numbers `tokens` tokens and rows, and the
/// chunk's are those from `lead` on.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChunkParams {
    pub lead: u32,
    pub tokens: u32,
    /// Far columns that a list has room for.
    pub capacity: u32,
}

/// The parameters of `cache_attend`: a row that sees the whole cache.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheAttendParams {
    pub bias: BiasEntries,
    pub dropout_cut: u64,
    /// Heads of one batch row, like `lists`.
    pub heads: u32,
    pub lists: u32,
    pub head_dim: u32,
    pub pages: u32,
    pub window: u32,
    /// The row's own token.
    pub last: u32,
    pub dropout_key: [u32; 2],
    /// scale * log2(e)
    pub scale: f32,
    pub dropout_scale: f32,
    pub softcap: f32,
    /// L of the sliding window; [`NO_SLIDE`] for none.
    pub slide: u32,
    pub value_dim: u32,
    /// Dropout counts heads over all batch rows, rows and tokens from these on.
    pub drawn_from: [u32; 3],
    /// 1: closed chains have sizes.
    pub sized: u32,
    /// As in [`CacheParams`].
    pub code: u32,
}

/// The parameters of `cache_pad`: rows of `dim` numbers become rows of `padded` numbers.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct PadParams {
    pub rows: Rows,
    pub heads: u32,
    pub tokens: u32,
    pub dim: u32,
    pub padded: u32,
}

/// The parameters of `cache_copy`, counted in numbers.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyParams {
    pub to_offset: u64,
    pub from_offset: u64,
    pub from_stride: u32,
    pub to_stride: u32,
    pub count: u32,
    pub unused: u32,
}

/// The dropout parameters of every attention kernel, field by field.
pub(crate) struct DropoutParams {
    /// A Philox word below this is dropped; 0 without dropout.
    pub cut: u64,
    pub key: [u32; 2],
    /// 1 / (1 - p)
    pub scale: f32,
}

impl DropoutParams {
    pub fn new(options: &AttentionOptions) -> Self {
        let (seed, p) = options.dropout.map_or((0, 0.0), |dropout| (dropout.seed, dropout.p));
        Self {
            cut: (p * 4_294_967_296.0).ceil() as u64,
            key: [seed as u32, (seed >> 32) as u32],
            scale: (1.0 / (1.0 - p)) as f32,
        }
    }
}
