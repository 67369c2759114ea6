//! Random settings, shapes and strategies for caches, as property tests draw them.

use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_sfattention::{CompressionConfig, Criterion, Fold, GroupRule, HeadStrategies, MergeStrategy};
use proptest::prelude::*;

use super::inputs::Shape;

/// Every setting that a cache takes, small windows and windows that never fill among them.
pub fn configs() -> impl Strategy<Value = CompressionConfig> {
    (
        prop_oneof![Just(Fold::PairSum), Just(Fold::Mean), Just(Fold::Drop)],
        prop_oneof![Just(Criterion::QueryKey), Just(Criterion::KeyKey)],
        prop_oneof![Just(GroupRule::PerQueryHead), Just(GroupRule::Unanimous)],
        0..6usize,
        prop_oneof![Just(0usize), 1..9usize, 30..200usize],
        1..7usize,
        0.05..0.6f64,
    )
        .prop_map(
            |(fold, criterion, group_rule, sinks, window, max_merge_level, threshold)| CompressionConfig {
                similarity_threshold: threshold,
                difference_threshold: threshold,
                max_merge_level,
                group_rule,
                criterion,
                fold,
                sinks,
                window,
                ..Default::default()
            },
        )
}

/// Small shapes with 1 to 3 query heads per KV head.
pub fn shapes() -> impl Strategy<Value = Shape> {
    (1..3usize, 1..3usize, 1..4usize, 1..160usize, 1..40usize)
        .prop_map(|(batch, kv_heads, group, tokens, dim)| Shape(batch, kv_heads * group, kv_heads, tokens, dim))
}

/// Uniform, per head, and per batch row and head.
pub fn strategies(kind: u8, shape: &Shape) -> Result<HeadStrategies> {
    let codes = |count: usize| (0..count).map(|i| (i * 7 % 3) as u32).collect::<Vec<_>>();
    Ok(match kind {
        0..=2 => HeadStrategies::uniform(MergeStrategy::ALL[kind as usize]),
        3 => HeadStrategies::from_tensor(&Tensor::new(codes(shape.1), &Device::Cpu)?)?,
        _ => {
            let codes = Tensor::from_vec(codes(shape.0 * shape.1), (shape.0, shape.1), &Device::Cpu)?;
            HeadStrategies::from_tensor(&codes)?
        }
    })
}

/// Tokens `start..start + count` of q, k and v.
pub fn part(qkv: &[Tensor; 3], start: usize, count: usize) -> Result<[Tensor; 3]> {
    let one = |x: &Tensor| x.narrow(2, start, count);
    Ok([one(&qkv[0])?, one(&qkv[1])?, one(&qkv[2])?])
}
