//! Compressed attention for candle.

pub mod attention;
pub mod config;
mod cpu;
pub mod loss;
pub mod op;
pub mod plan;
pub mod problem;
pub mod reference;

pub use attention::{
    CompressedAttention, CompressedSelfAttention, CompressionLossSink, RotaryConfig, RotaryLayout, SelfAttentionConfig,
};
pub use config::{
    AttentionOptions, CompressionConfig, Criterion, Dropout, Fold, GroupRule, HeadStrategies, HeadTest, LossNormalizer,
    MergeRule, MergeStrategy,
};
pub use loss::{compression_loss, compression_loss_terms, CompressionLossTerms};
pub use op::{attend, compressed_attention, CompressedAttentionOutput};
pub use plan::{MergePlan, MergeStats};
pub use problem::Problem;
