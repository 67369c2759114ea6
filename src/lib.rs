//! Compressed attention for candle.

pub mod config;
pub mod reference;

pub use config::{
    AttentionOptions, CompressionConfig, Criterion, Dropout, Fold, GroupRule, HeadStrategies, HeadTest, LossNormalizer,
    MergeRule, MergeStrategy,
};
