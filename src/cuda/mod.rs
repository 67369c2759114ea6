//! The CUDA path. A launcher (sizes, buffers, order of kernels) is written once, over [`on_gpu::Gpu`]: a CUDA device,
//! or the emulator of `cuda/emu` for tests. One launcher file per file of `cuda/`.
//!
//! # Columns that a bias hides
//!
//! A finite bias of any size hides nothing by itself, and -inf hides a column from a row: `cuda/lib/bias.cuh`. A row
//! that sees no column is zeros and sends no gradient. Under [`MergeRule::Causal`](crate::MergeRule::Causal) a pair of
//! tokens merges only where the second token's row sees both.
//!
//! On the CPU -inf at a column that a row would see is an error in a head that hides tokens, since the bias does not
//! tell apart the tokens that are folded into that column. On a device it is no error: the bias is in device memory,
//! and reading it would mean waiting. There -inf hides the column with all tokens folded into it, and a token that was
//! folded into a visible column stays visible.

pub(crate) mod attention;
mod backward;
pub(crate) mod cache;
pub(crate) mod decide;
pub(crate) mod decode;
#[cfg(feature = "cuda")]
pub(crate) mod device;
#[cfg(feature = "cuda-emu")]
pub mod emulator;
pub(crate) mod extras;
mod fade;
pub(crate) mod fold;
pub(crate) mod forward;
pub(crate) mod loss;
pub(crate) mod observe;
pub(crate) mod on_gpu;
pub(crate) mod operands;
mod params;
#[cfg(feature = "cuda")]
mod ptx;
pub(crate) mod sizes;
#[cfg(feature = "cuda")]
pub(crate) mod tensors;
mod variants;
