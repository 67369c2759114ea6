//! Compressed attention for candle.

pub mod config;

pub use config::{
    AttentionOptions, CompressionConfig, Criterion, Dropout, Fold, GroupRule, HeadStrategies, HeadTest, LossNormalizer,
    MergeRule, MergeStrategy,
};
