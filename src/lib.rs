//! Compressed attention for candle. Per head, a token that later rows will not miss is folded into its right neighbour
//! or dropped, and its key/value column disappears: attention and the KV cache shrink in proportion.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_sfattention::{CompressedAttention, CompressionConfig, HeadStrategies, MergeStrategy};
//!
//! let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
//! let attention = CompressedAttention::new(strategies, CompressionConfig::pretrained(), Default::default())?;
//! let q = Tensor::randn(0f32, 1., (1, 4, 128, 64), &Device::Cpu)?; // (batch, heads, tokens, head_dim)
//! let kv = Tensor::randn(0f32, 1., (1, 2, 128, 64), &Device::Cpu)?; // 2 KV heads serve 4 query heads
//! let (output, plan) = attention.forward_with_plan(&q, &kv, &kv)?;
//! assert_eq!(output.dims(), q.dims());
//! println!("{} of {} tokens hidden", plan.stats()?.hidden, plan.stats()?.pairs);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # Where to begin
//!
//! | you have | take |
//! |---|---|
//! | q, k and v of a layer | [`CompressedAttention`], or [`compressed_attention`] with its loss |
//! | a layer with projections | [`CompressedSelfAttention`], a `candle_nn::Module` |
//! | a model that decodes | [`CompressedKvCache`], one for each layer |
//! | a stock checkpoint | [`CompressionConfig::pretrained`], or [`Calibrator`] and [`Policy`] |
//! | a model that calls `flash_attn` | [`Session`] |
//! | bits of your own | [`MergePlan::from_indicators`] and [`attend`] |
//!
//! [`mod@reference`] is the specification: the same attention, loss and gradients as scalar f64 code.
//!
//! # Features
//!
//! `cuda` compiles the CUDA kernels with nvcc, for compute capability 8.0 and above. `cuda-emu` runs the same kernels
//! on the CPU, for tests. `fit` compiles nalgebra, with which [`calibrate`] fits a [`KeyProbe`]. `nccl` is `cuda` with
//! NCCL, for the llama example on several GPUs. None is on by default.
//!
//! # Layers
//!
//! A module uses those to its left: `config`, `instructions` <- `problem` <- `plan` <- `reference`, `cpu`, `cuda` <-
//! `storage` <- `decide`, `loss`, `op` <- `cache` <- `attention`, `calibrate` <- `session`. The reference and the fast
//! paths never call each other; tests compare them.

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
pub mod session;
mod storage;

pub use attention::{
    CompressedAttention, CompressedSelfAttention, CompressionLossSink, KeyGate, QkNorm, RelaxedGate, RotaryConfig,
    RotaryLayout, RotaryScaling, SelfAttentionConfig,
};
pub use cache::{CacheOptions, CompressedKvCache, PrefixKey};
pub use calibrate::{Calibrator, KeyProbe, Measurement, ModelShape, Policy};
#[cfg(feature = "fit")]
pub use calibrate::{ProbeFitter, ProbeRegression, ProbeSample};
pub use config::{
    segments_from_lengths, AttentionOptions, CompressionConfig, Criterion, Dropout, Fold, GroupRule, HeadStrategies,
    HeadTest, LossNormalizer, MergeRule, MergeStrategy, Segment, Storage, TensorLayout,
};
pub use decide::observed_mass;
pub use loss::{
    compression_loss, compression_loss_in_segments, compression_loss_terms, compression_loss_terms_in_segments,
    CompressionLossTerms,
};
pub use op::{attend, compressed_attention, CompressedAttentionOutput};
pub use plan::{MergePlan, MergeStats};
pub use problem::Problem;
pub use session::Session;

#[cfg(feature = "cuda-emu")]
#[doc(hidden)]
pub use cuda::emulator as emulation;

// The pages' Rust is compiled and run, and shown where the pages are.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/howto/your-model.md")]
    struct YourModel;
    #[doc = include_str!("../docs/howto/stock-checkpoint.md")]
    struct StockCheckpoint;
    #[doc = include_str!("../docs/howto/calibrate.md")]
    struct Calibrate;
    #[doc = include_str!("../docs/howto/report.md")]
    struct Report;
    #[doc = include_str!("../docs/howto/decode-and-serve.md")]
    struct DecodeAndServe;
    #[doc = include_str!("../docs/howto/train.md")]
    struct Train;
    #[doc = include_str!("../docs/howto/cuda-build.md")]
    struct CudaBuild;
}
