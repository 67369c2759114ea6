#![doc = include_str!("../README.md")]
#![doc = "\n## Where things are\n"]
//! [`config`] holds the caller's choices; [`problem`] the checks; [`plan`] the hidden tokens; [`op`] attention;
//! [`loss`] the compression loss; [`attention`] modules; [`mod@reference`] the specification as code; [`calibrate`]
//! strategies and thresholds from samples. Below the public names,
//! `config <- problem <- plan <- cpu <- op <- attention`; the reference and the fast path never call each other.

pub mod attention;
pub mod cache;
pub mod calibrate;
pub mod config;
mod cpu;
#[cfg(any(feature = "cuda", feature = "cuda-emu"))]
mod cuda;
mod decide;
mod files;
mod instructions;
pub mod loss;
pub mod op;
pub mod plan;
pub mod problem;
pub mod reference;
mod storage;

pub use attention::{
    CompressedAttention, CompressedSelfAttention, CompressionLossSink, RotaryConfig, RotaryLayout, SelfAttentionConfig,
};
pub use cache::{CacheOptions, CompressedKvCache};
pub use calibrate::{Calibrator, Measurement, ModelShape, Policy};
pub use config::{
    AttentionOptions, CompressionConfig, Criterion, Dropout, Fold, GroupRule, HeadStrategies, HeadTest, LossNormalizer,
    MergeRule, MergeStrategy, TensorLayout,
};
pub use decide::observed_mass;
pub use loss::{compression_loss, compression_loss_terms, CompressionLossTerms};
pub use op::{attend, compressed_attention, CompressedAttentionOutput};
pub use plan::{MergePlan, MergeStats};
pub use problem::Problem;

#[cfg(feature = "cuda-emu")]
#[doc(hidden)]
pub use cuda::emulator as emulation;
