//! Calls whose options change logits, beside the reference's decisions.

use crate::common::inputs::Shape;
use crate::common::settings::{reference_bits, Setting};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::reference::{Array4, Indicators};
use candle_sfattention::{
    AttentionOptions, CompressionConfig, Criterion, Dropout, Fold, GroupRule, MergePlan, MergeStrategy,
};

const CPU: Device = Device::Cpu;

/// One token, one more than a lane, a block and a tile, head sizes that fill no register, GQA and MQA.
pub(super) const SHAPES: [Shape; 7] = [
    Shape(1, 1, 1, 1, 32),
    Shape(2, 2, 1, 2, 64),
    Shape(1, 4, 2, 59, 59),
    Shape(2, 2, 1, 97, 32),
    Shape(1, 2, 2, 129, 128),
    Shape(1, 4, 1, 257, 64),
    Shape(1, 1, 1, 705, 20),
];

/// Logits of these inputs reach 20 and more: a cap of 4 bends most of them.
pub(super) fn softcap(_: &Shape) -> AttentionOptions {
    AttentionOptions {
        softmax_scale: Some(0.6),
        softcap: Some(4.0),
        ..Default::default()
    }
}

/// Sinks near the logits, far below, far above, and none.
pub(super) fn sinks(shape: &Shape) -> AttentionOptions {
    let logits: Vec<f32> = (0..shape.1)
        .map(|head| [1.5, -200.0, 40.0, f32::NEG_INFINITY][head % 4])
        .collect();
    AttentionOptions {
        sink_logits: Tensor::from_vec(logits, shape.1, &CPU).ok(),
        ..Default::default()
    }
}

/// Rows that see nothing, and rows that see some columns.
pub(super) fn hiding(shape: &Shape, options: AttentionOptions) -> AttentionOptions {
    let tokens = shape.3;
    let entry = |i: usize| match (i / tokens).is_multiple_of(7) || (i / tokens * 7 + i % tokens * 3).is_multiple_of(5) {
        true => f32::NEG_INFINITY,
        false => 0.5,
    };
    AttentionOptions {
        bias: Tensor::from_vec((0..tokens * tokens).map(entry).collect(), (tokens, tokens), &CPU).ok(),
        ..options
    }
}

pub(super) fn with_bias(shape: &Shape, options: AttentionOptions) -> AttentionOptions {
    let &Shape(_, heads, _, tokens, _) = shape;
    let entry = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 40.0;
    let bias: Vec<f32> = (0..heads * tokens * tokens).map(entry).collect();
    AttentionOptions {
        bias: Tensor::from_vec(bias, (heads, tokens, tokens), &CPU).ok(),
        ..options
    }
}

pub(super) fn with_dropout(options: AttentionOptions) -> AttentionOptions {
    AttentionOptions {
        dropout: Some(Dropout { p: 0.3, seed: 77 }),
        ..options
    }
}

pub(super) fn everywhere(options: AttentionOptions) -> AttentionOptions {
    AttentionOptions {
        causal: false,
        ..options
    }
}

/// A softcap, sinks and a sliding window.
pub(super) fn together(shape: &Shape) -> AttentionOptions {
    AttentionOptions {
        sliding_window: Some(40),
        sink_logits: sinks(shape).sink_logits,
        ..softcap(shape)
    }
}

/// Padding before the first segment, then three segments.
pub(super) fn in_segments(shape: &Shape, options: AttentionOptions) -> AttentionOptions {
    let &Shape(batch, _, _, tokens, _) = shape;
    let number = |at: usize| match at % tokens {
        token if token < at / tokens => 0,
        token => 1 + (token * 3 / tokens) as u32,
    };
    AttentionOptions {
        segments: Tensor::from_vec((0..batch * tokens).map(number).collect(), (batch, tokens), &CPU).ok(),
        ..options
    }
}

/// All folds, with and without a window, a bias and dropout.
pub(super) fn settings() -> Vec<Setting> {
    use MergeStrategy::{Off, Similarity};
    let key = |fold, window| CompressionConfig {
        fold,
        window,
        criterion: Criterion::KeyKey,
        group_rule: GroupRule::Unanimous,
        similarity_threshold: 0.35,
        ..Default::default()
    };
    let setting = |name, strategy, config, options| Setting {
        name,
        strategy,
        config,
        options,
        hides: !matches!(strategy, Off),
    };
    vec![
        setting("softcap, off", Off, key(Fold::Drop, 0), softcap),
        setting("softcap, off, everywhere", Off, key(Fold::Drop, 0), |s| {
            everywhere(softcap(s))
        }),
        setting("softcap, pair sum", Similarity, key(Fold::PairSum, 0), softcap),
        setting(
            "softcap, pair sum, window, bias",
            Similarity,
            key(Fold::PairSum, 5),
            |s| with_bias(s, softcap(s)),
        ),
        setting("softcap, mean", Similarity, key(Fold::Mean, 0), softcap),
        setting("softcap, mean, everywhere", Similarity, key(Fold::Mean, 0), |s| {
            everywhere(softcap(s))
        }),
        setting("softcap, mean, window, dropout", Similarity, key(Fold::Mean, 7), |s| {
            with_dropout(softcap(s))
        }),
        setting("softcap, drop, window", Similarity, key(Fold::Drop, 32), softcap),
        setting("sinks, off", Off, key(Fold::Drop, 0), sinks),
        setting("sinks, off, everywhere, hidden columns", Off, key(Fold::Drop, 0), |s| {
            hiding(s, everywhere(sinks(s)))
        }),
        setting("sinks, pair sum, window", Similarity, key(Fold::PairSum, 5), sinks),
        setting("sinks, mean, bias, softcap", Similarity, key(Fold::Mean, 0), |s| {
            let AttentionOptions { softcap, .. } = softcap(s);
            with_bias(s, AttentionOptions { softcap, ..sinks(s) })
        }),
        setting("sinks, drop, window, dropout", Similarity, key(Fold::Drop, 9), |s| {
            with_dropout(sinks(s))
        }),
        setting(
            "all together, mean, window, bias",
            Similarity,
            key(Fold::Mean, 7),
            |s| with_bias(s, together(s)),
        ),
        setting(
            "all together, pair sum, window",
            Similarity,
            key(Fold::PairSum, 50),
            together,
        ),
        setting(
            "all together, drop, window, dropout, segments",
            Similarity,
            key(Fold::Drop, 9),
            |s| in_segments(s, with_dropout(together(s))),
        ),
        setting(
            "all together, mean, segments, bias",
            Similarity,
            key(Fold::Mean, 3),
            |s| in_segments(s, with_bias(s, together(s))),
        ),
    ]
}

pub(super) struct Case {
    pub(super) what: String,
    pub(super) options: AttentionOptions,
    pub(super) qkv: [Tensor; 3],
    pub(super) arrays: [Array4; 3],
    pub(super) bits: Indicators,
    pub(super) plan: MergePlan,
}

pub(super) fn each_case(dtype: DType, shapes: &[Shape], check: impl Fn(&Setting, &Case) -> Result<()>) -> Result<()> {
    for setting in settings() {
        for (seed, shape) in shapes.iter().enumerate() {
            let options = (setting.options)(shape);
            let qkv = shape.qkv(seed as u64, dtype)?;
            let arrays = [
                Array4::from_tensor(&qkv[0])?,
                Array4::from_tensor(&qkv[1])?,
                Array4::from_tensor(&qkv[2])?,
            ];
            let [q, k, v] = &arrays;
            let bits = reference_bits([q, k, v], &setting.strategies(shape)?, &setting.config, &options)?;
            let hides = bits.bits.contains(&true);
            assert!(
                hides || !setting.hides || shape.3 < 59,
                "{}: nothing hidden",
                setting.name
            );
            let case = Case {
                what: format!("{} {shape:?} {dtype:?}", setting.name),
                plan: MergePlan::from_indicators(&bits.to_tensor(&CPU)?, &setting.config)?,
                options,
                qkv,
                arrays,
                bits,
            };
            check(&setting, &case)?;
        }
    }
    Ok(())
}
