//! The choices of a caller: the method's parameters, each head's strategy, and the options of one attention call.
//!
//! Everything here is plain data. [`CompressionConfig::check`] refuses combinations that make no sense together; every
//! entry point of the crate calls it before it computes anything.
//!
//! A `match` on one of the enums here names every variant. Each consequence of a variant is a method on its enum, such
//! as [`Fold::has_sizes`] or [`Criterion::reads_queries`]. So a new variant stops the compiler at every place that
//! decides.

mod budget;
mod choices;
mod compression;
mod layout;
mod options;
mod segments;
pub(crate) mod shard;
mod storage;
mod strategies;
pub(crate) mod whole;

pub(crate) use budget::ListBudget;
pub use choices::{Criterion, Fold, GroupRule, LossNormalizer, MergeRule, MergeStrategy};
pub use compression::CompressionConfig;
pub use layout::TensorLayout;
pub use options::{AttentionOptions, Dropout};
pub use segments::{segments_from_lengths, Segment};
pub(crate) use storage::ByteCode;
pub use storage::Storage;
pub use strategies::{HeadStrategies, HeadTest};
