//! Random settings and shapes for caches, as property tests draw them.

// Each test file is a crate of its own, and uses only a part of this module.
#![allow(dead_code)]

use candle_sfattention::{CompressionConfig, Criterion, Fold, GroupRule};
use proptest::prelude::*;

use crate::common::inputs::Shape;

/// Every setting that a cache takes; some windows are small, some never fill.
pub fn configs() -> impl Strategy<Value = CompressionConfig> {
    prop_oneof![3 => compared(), 1 => observed()]
}

fn observed() -> impl Strategy<Value = CompressionConfig> {
    (0..6usize, prop_oneof![2..9usize, 30..200usize]).prop_map(|(sinks, window)| CompressionConfig {
        group_rule: GroupRule::Unanimous,
        criterion: Criterion::ObservedMass,
        fold: Fold::Drop,
        sinks,
        window,
        ..Default::default()
    })
}

fn compared() -> impl Strategy<Value = CompressionConfig> {
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
