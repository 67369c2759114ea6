//! The table of settings under which fast paths are held against the reference.

use super::caches::with_thresholds;
use super::inputs::Shape;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::reference::{self, Array4, Indicators};
use candle_sfattention::{
    AttentionOptions, CompressionConfig, Criterion, Dropout, Fold, GroupRule, HeadStrategies, MergeRule, MergeStrategy,
};

pub struct Setting {
    pub name: &'static str,
    pub strategy: MergeStrategy,
    pub config: CompressionConfig,
    pub options: fn(&Shape) -> AttentionOptions,
    /// Whether a token must be hidden in every shape of 59 tokens or more.
    pub hides: bool,
}

impl Setting {
    /// The setting's strategies, with thresholds if the criterion needs them.
    pub fn strategies(&self, shape: &Shape) -> Result<HeadStrategies> {
        with_thresholds(HeadStrategies::uniform(self.strategy), shape, &self.config)
    }
}

/// Settings by which the query heads of a KV head decide as one, with two sinks.
pub fn config(fold: Fold, window: usize, criterion: Criterion) -> CompressionConfig {
    CompressionConfig {
        fold,
        window,
        criterion,
        sinks: 2,
        similarity_threshold: 0.35,
        group_rule: GroupRule::Unanimous,
        ..Default::default()
    }
}

/// The reference's decisions, by the setting's criterion.
pub fn reference_bits(
    [q, k, v]: [&Array4; 3],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Indicators> {
    Ok(match config.criterion {
        Criterion::ObservedMass => reference::observed_indicators(q, k, v, strategies, config, options)?,
        Criterion::QueryKey | Criterion::KeyKey => {
            let bias = options.bias.as_ref();
            match &options.segments {
                None => reference::indicators_under(q, k, strategies, config, bias)?,
                Some(segments) => reference::indicators_in_segments(q, k, strategies, config, bias, segments)?,
            }
        }
        Criterion::Given => anyhow::bail!("settings: expected a criterion that needs no scores"),
    })
}

/// The reference's output rows, by its own decisions.
pub fn reference_rows(
    qkv: &[Tensor; 3],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Tensor> {
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
    let (q, k, v) = (q?, k?, v?);
    let bits = reference_bits([&q, &k, &v], strategies, config, options)?;
    Ok(reference::attention(&q, &k, &v, &bits, config, options)?.to_tensor(DType::F64, &Device::Cpu)?)
}

fn plain(_: &Shape) -> AttentionOptions {
    AttentionOptions::default()
}

fn scaled(_: &Shape) -> AttentionOptions {
    AttentionOptions {
        softmax_scale: Some(0.3),
        ..Default::default()
    }
}

fn everywhere(_: &Shape) -> AttentionOptions {
    AttentionOptions {
        causal: false,
        softmax_scale: Some(0.2),
        ..Default::default()
    }
}

/// A bias per head and per pair of tokens, with a broadcast batch axis and columns masked by the dtype's least number.
fn biased(shape: &Shape) -> AttentionOptions {
    masked(shape, |row, column| {
        match row != column && (row * 7 + column * 3) % 5 == 0 {
            true => Some(f32::MIN),
            false => None,
        }
    })
}

/// The same with hidden columns, and rows that see none.
fn hiding(shape: &Shape) -> AttentionOptions {
    masked(shape, |row, column| {
        match row % 7 == 0 || (row * 7 + column * 3) % 5 == 0 {
            true => Some(f32::NEG_INFINITY),
            false => None,
        }
    })
}

fn masked(shape: &Shape, mask: impl Fn(usize, usize) -> Option<f32>) -> AttentionOptions {
    let &Shape(_, heads, _, tokens, _) = shape;
    let entry = |i: usize| {
        let (row, column) = (i / tokens % tokens, i % tokens);
        mask(row, column).unwrap_or(((i * 37 % 101) as f32 - 50.0) / 40.0)
    };
    let bias: Vec<f32> = (0..heads * tokens * tokens).map(entry).collect();
    AttentionOptions {
        bias: Tensor::from_vec(bias, (heads, tokens, tokens), &Device::Cpu).ok(),
        ..Default::default()
    }
}

fn dropping(_: &Shape) -> AttentionOptions {
    AttentionOptions {
        dropout: Some(Dropout {
            p: 0.3,
            seed: 0x1234_5678_9abc_def0,
        }),
        ..Default::default()
    }
}

pub fn settings() -> Vec<Setting> {
    use Fold::{Drop, Mean};
    use MergeStrategy::{Difference, Off, Similarity};
    let base = CompressionConfig {
        similarity_threshold: 0.35,
        difference_threshold: 0.25,
        ..Default::default()
    };
    let key = CompressionConfig {
        criterion: Criterion::KeyKey,
        ..base.clone()
    };
    let unanimous = CompressionConfig {
        group_rule: GroupRule::Unanimous,
        ..key.clone()
    };
    let observed = |window, sinks| CompressionConfig {
        criterion: Criterion::ObservedMass,
        fold: Drop,
        window,
        sinks,
        ..unanimous.clone()
    };
    let setting = |name, strategy, config, options, hides| Setting {
        name,
        strategy,
        config,
        options,
        hides,
    };
    vec![
        setting("off", Off, base.clone(), plain, false),
        setting(
            "off, window",
            Off,
            CompressionConfig {
                window: 7,
                ..base.clone()
            },
            plain,
            false,
        ),
        setting("off, everywhere", Off, base.clone(), everywhere, false),
        setting("pair sum", Similarity, base.clone(), plain, true),
        setting("pair sum, difference", Difference, base.clone(), plain, false),
        setting(
            "pair sum, reference",
            Similarity,
            CompressionConfig {
                rule: MergeRule::Reference,
                ..base.clone()
            },
            plain,
            true,
        ),
        setting("pair sum, everywhere", Similarity, base.clone(), everywhere, true),
        setting(
            "pair sum, window",
            Similarity,
            CompressionConfig {
                window: 5,
                ..base.clone()
            },
            plain,
            true,
        ),
        setting(
            "mean",
            Similarity,
            CompressionConfig {
                fold: Mean,
                ..key.clone()
            },
            plain,
            true,
        ),
        setting(
            "mean, everywhere",
            Similarity,
            CompressionConfig {
                fold: Mean,
                ..unanimous.clone()
            },
            everywhere,
            true,
        ),
        setting(
            "mean, pretrained",
            Similarity,
            CompressionConfig {
                similarity_threshold: 0.35,
                ..CompressionConfig::pretrained()
            },
            plain,
            true,
        ),
        setting(
            "mean, window 1, sinks",
            Similarity,
            CompressionConfig {
                fold: Mean,
                window: 1,
                sinks: 3,
                ..key.clone()
            },
            plain,
            true,
        ),
        setting(
            "drop",
            Similarity,
            CompressionConfig {
                fold: Drop,
                ..unanimous.clone()
            },
            plain,
            true,
        ),
        setting(
            "drop, window 64",
            Similarity,
            CompressionConfig {
                fold: Drop,
                window: 64,
                ..key.clone()
            },
            plain,
            true,
        ),
        setting(
            "drop, window over all",
            Similarity,
            CompressionConfig {
                fold: Drop,
                window: 5000,
                ..key.clone()
            },
            plain,
            true,
        ),
        setting(
            "mean, bias",
            Similarity,
            CompressionConfig {
                fold: Mean,
                window: 4,
                ..unanimous.clone()
            },
            biased,
            true,
        ),
        setting("pair sum, bias", Similarity, base.clone(), biased, true),
        setting(
            "drop, dropout",
            Similarity,
            CompressionConfig {
                fold: Drop,
                window: 4,
                ..unanimous.clone()
            },
            dropping,
            true,
        ),
        setting("pair sum, dropout", Similarity, base.clone(), dropping, true),
        setting("observed mass", Similarity, observed(8, 4), plain, true),
        setting("observed mass, window 32", Difference, observed(32, 1), scaled, true),
        setting(
            "observed mass, window 2, bias",
            Similarity,
            observed(2, 0),
            biased,
            true,
        ),
        setting("off, hidden columns", Off, unanimous, hiding, false),
        setting("off, dropout", Off, base, dropping, false),
    ]
}
