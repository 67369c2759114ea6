//! Segments and settings for caches.

use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_sfattention::{AttentionOptions, CompressionConfig, Criterion, Fold, GroupRule};

use super::inputs::Shape;

pub const SHAPE: Shape = Shape(4, 4, 2, 90, 16);
const FOLDS: [Fold; 3] = [Fold::PairSum, Fold::Mean, Fold::Drop];

/// The numbers of all tokens: three documents, one of a single token; left padding; right padding; padding alone.
pub fn numbers() -> Vec<Vec<u32>> {
    let runs: [&[(u32, usize)]; 4] = [
        &[(1, 40), (5, 1), (3, 49)],
        &[(0, 33), (1, 57)],
        &[(2, 50), (0, 20), (4, 1), (0, 19)],
        &[(0, 90)],
    ];
    let row = |runs: &&[(u32, usize)]| runs.iter().flat_map(|(number, count)| vec![*number; *count]).collect();
    runs.iter().map(row).collect()
}

/// The numbers of tokens `start..start + count`.
pub fn segments(numbers: &[Vec<u32>], start: usize, count: usize) -> Result<Tensor> {
    let rows: Vec<&[u32]> = numbers.iter().map(|row| &row[start..start + count]).collect();
    Ok(Tensor::new(rows, &Device::Cpu)?)
}

/// The options with these segments.
pub fn with(segments: Tensor, options: &AttentionOptions) -> AttentionOptions {
    AttentionOptions {
        segments: Some(segments),
        ..options.clone()
    }
}

/// Every fold, windows and sliding windows on both sides of each other, and every criterion that needs no scores.
pub fn configs() -> Vec<(CompressionConfig, AttentionOptions)> {
    let base = CompressionConfig {
        similarity_threshold: 0.35,
        sinks: 2,
        criterion: Criterion::KeyKey,
        group_rule: GroupRule::Unanimous,
        ..Default::default()
    };
    let mut configs = Vec::new();
    for fold in FOLDS {
        for (window, sliding_window) in [(0, None), (6, None), (6, Some(11)), (11, Some(6))] {
            let config = CompressionConfig {
                fold,
                window,
                ..base.clone()
            };
            let options = AttentionOptions {
                sliding_window,
                ..Default::default()
            };
            configs.push((config, options));
        }
    }
    let observed = CompressionConfig {
        criterion: Criterion::ObservedMass,
        fold: Fold::Drop,
        window: 8,
        ..base.clone()
    };
    configs.push((observed, AttentionOptions::default()));
    let apart = CompressionConfig {
        criterion: Criterion::QueryKey,
        group_rule: GroupRule::PerQueryHead,
        ..base
    };
    configs.push((apart, AttentionOptions::default()));
    configs
}
