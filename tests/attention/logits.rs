//! Options that change logits: the CPU path against the f64 reference, forward, backward and through a cache, over
//! folds, windows, dtypes and odd shapes.

use crate::common::again::{on_every_instruction_set, on_every_kernel};
use crate::common::caches::{chunked, part_options};
use crate::common::inputs::{assert_close, values, Shape};
use crate::common::judge::differentiate;
use crate::common::settings::{reference_bits, Setting};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::reference::{self, Array4, Indicators};
use candle_sfattention::{
    attend, AttentionOptions, CompressedKvCache, CompressionConfig, Criterion, Dropout, Fold, GroupRule,
    HeadStrategies, MergePlan, MergeStrategy,
};

const CPU: Device = Device::Cpu;

/// One token, one more than a lane, a block and a tile, head sizes that fill no register, GQA and MQA.
const SHAPES: [Shape; 7] = [
    Shape(1, 1, 1, 1, 32),
    Shape(2, 2, 1, 2, 64),
    Shape(1, 4, 2, 59, 59),
    Shape(2, 2, 1, 97, 32),
    Shape(1, 2, 2, 129, 128),
    Shape(1, 4, 1, 257, 64),
    Shape(1, 1, 1, 705, 20),
];

/// Logits of these inputs reach 20 and more: a cap of 4 bends most of them.
fn softcap(_: &Shape) -> AttentionOptions {
    AttentionOptions {
        softmax_scale: Some(0.6),
        softcap: Some(4.0),
        ..Default::default()
    }
}

/// Sinks near the logits, far below, far above, and none.
fn sinks(shape: &Shape) -> AttentionOptions {
    let logits: Vec<f32> = (0..shape.1)
        .map(|head| [1.5, -200.0, 40.0, f32::NEG_INFINITY][head % 4])
        .collect();
    AttentionOptions {
        sink_logits: Tensor::from_vec(logits, shape.1, &CPU).ok(),
        ..Default::default()
    }
}

/// Rows that see nothing, and rows that see some columns.
fn hiding(shape: &Shape, options: AttentionOptions) -> AttentionOptions {
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

fn with_bias(shape: &Shape, options: AttentionOptions) -> AttentionOptions {
    let &Shape(_, heads, _, tokens, _) = shape;
    let entry = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 40.0;
    let bias: Vec<f32> = (0..heads * tokens * tokens).map(entry).collect();
    AttentionOptions {
        bias: Tensor::from_vec(bias, (heads, tokens, tokens), &CPU).ok(),
        ..options
    }
}

fn with_dropout(options: AttentionOptions) -> AttentionOptions {
    AttentionOptions {
        dropout: Some(Dropout { p: 0.3, seed: 77 }),
        ..options
    }
}

fn everywhere(options: AttentionOptions) -> AttentionOptions {
    AttentionOptions {
        causal: false,
        ..options
    }
}

/// A softcap, sinks and a sliding window.
fn together(shape: &Shape) -> AttentionOptions {
    AttentionOptions {
        sliding_window: Some(40),
        sink_logits: sinks(shape).sink_logits,
        ..softcap(shape)
    }
}

/// Padding before the first segment, then three segments.
fn in_segments(shape: &Shape, options: AttentionOptions) -> AttentionOptions {
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
fn settings() -> Vec<Setting> {
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

struct Case {
    what: String,
    options: AttentionOptions,
    qkv: [Tensor; 3],
    arrays: [Array4; 3],
    bits: Indicators,
    plan: MergePlan,
}

fn each_case(dtype: DType, shapes: &[Shape], check: impl Fn(&Setting, &Case) -> Result<()>) -> Result<()> {
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

/// The errors of outputs, absolute and relative, per dtype: f32 sums, or one rounding at the end, and with products in
/// bf16 pairs those of weights and folded rows.
fn tolerances(dtype: DType) -> [f64; 2] {
    match dtype {
        DType::F64 => [1e-13, 1e-13],
        DType::F32 => [6e-6, 6e-6],
        DType::F16 => [6e-5, 5e-4],
        _ => [1.6e-2, 4e-3],
    }
}

fn forward(dtype: DType) -> Result<()> {
    each_case(dtype, &SHAPES, |setting, case| {
        let ([q, k, v], [aq, ak, av]) = (&case.qkv, &case.arrays);
        let got = attend(q, k, v, &case.plan, &case.options)?;
        let expected = reference::attention(aq, ak, av, &case.bits, &setting.config, &case.options)?;
        let [absolute, relative] = tolerances(dtype);
        let expected = expected.to_tensor(DType::F64, &CPU)?;
        Ok(assert_close(&case.what, &got, &expected, absolute, relative)?)
    })
}

fn backward(dtype: DType, shapes: &[Shape], tolerance: f64, floor: f64) -> Result<()> {
    each_case(dtype, shapes, |setting, case| {
        let ([q, _, v], [aq, ak, av]) = (&case.qkv, &case.arrays);
        let grad = Shape(q.dim(0)?, q.dim(1)?, q.dim(1)?, q.dim(2)?, v.dim(3)?).qkv(77, dtype)?;
        let got = differentiate(&case.qkv, &grad[2], |q, k, v| {
            Ok(attend(q, k, v, &case.plan, &case.options)?)
        })?;
        let grad = Array4::from_tensor(&grad[2])?;
        let (dq, dk, dv) =
            reference::attention_gradients(aq, ak, av, &grad, &case.bits, &setting.config, &case.options)?;
        for (name, got, expected) in [("dq", &got[1], dq), ("dk", &got[2], dk), ("dv", &got[3], dv)] {
            let expected = expected.to_tensor(DType::F64, &CPU)?;
            let largest = values(&expected)?.iter().fold(floor, |m: f64, x| m.max(x.abs()));
            let what = format!("{} {name}", case.what);
            assert_close(&what, got, &expected, tolerance * largest, tolerance)?;
        }
        sink_gradients(setting, case, &grad, tolerance, floor)
    })
}

/// The gradient of the sinks, where they are, in their dtype; the other tensors may be tracked or not.
fn sink_gradients(setting: &Setting, case: &Case, grad: &Array4, tolerance: f64, floor: f64) -> Result<()> {
    let Some(sinks) = &case.options.sink_logits else {
        return Ok(());
    };
    let ([q, k, v], [aq, ak, av]) = (&case.qkv, &case.arrays);
    let expected = reference::sink_gradients(aq, ak, av, grad, &case.bits, &setting.config, &case.options)?;
    let largest = expected.iter().fold(floor, |m: f64, x| m.max(x.abs()));
    let expected = Tensor::new(expected, &CPU)?;
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        let var = Var::from_tensor(&sinks.to_dtype(dtype)?)?;
        let options = AttentionOptions {
            sink_logits: Some(var.as_tensor().clone()),
            ..case.options.clone()
        };
        let tracked = Var::from_tensor(v)?;
        let plain = attend(q, k, v, &case.plan, &case.options)?;
        for v in [v, tracked.as_tensor()] {
            let output = attend(q, k, v, &case.plan, &options)?;
            assert_eq!(values(&output)?, values(&plain)?, "{}", case.what);
            let grad = grad.to_tensor(q.dtype(), &CPU)?;
            let store = (output * grad)?.sum_all()?.backward()?;
            let got = store.get(&var).context("no gradient of the sinks")?;
            assert_eq!(got.dtype(), dtype, "{}", case.what);
            let rounding = match dtype {
                DType::F64 => 0.0,
                DType::F32 => 1e-6,
                _ => 4e-3,
            };
            let tolerance = tolerance + rounding;
            let what = format!("{} sinks in {dtype:?}", case.what);
            assert_close(&what, got, &expected, tolerance * largest, tolerance)?;
            assert_eq!(store.get(&tracked).is_some(), v.track_op(), "{what}");
        }
    }
    Ok(())
}

#[test]
fn f32_agrees_with_the_reference() -> Result<()> {
    forward(DType::F32)
}

#[test]
fn f64_agrees_with_the_reference() -> Result<()> {
    forward(DType::F64)
}

#[test]
fn halves_agree_with_the_reference() -> Result<()> {
    forward(DType::F16)?;
    forward(DType::BF16)
}

#[test]
fn gradients_agree_with_the_reference() -> Result<()> {
    backward(DType::F64, &SHAPES, 1e-12, 0.1)?;
    backward(DType::F32, &SHAPES, 1e-5, 0.1)
}

#[test]
fn gradients_of_halves_agree_with_the_reference() -> Result<()> {
    backward(DType::F16, &SHAPES[..6], 4.0 * 2f64.powi(-11), 1.0)?;
    backward(DType::BF16, &SHAPES[..6], 4.0 * 2f64.powi(-8), 1.0)
}

#[test]
fn every_instruction_set_agrees() -> Result<()> {
    on_every_instruction_set(module_path!(), &["f32_agrees_with_the_reference"])
}

#[test]
fn halves_agree_on_every_kernel() -> Result<()> {
    let tests = [
        "halves_agree_with_the_reference",
        "gradients_of_halves_agree_with_the_reference",
    ];
    on_every_kernel(module_path!(), &tests)
}

/// A cache in any chunks gives the rows of the whole sequence: token by token, in chunks, and in one.
#[test]
fn a_cache_agrees_with_the_whole_sequence() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        each_case(dtype, &SHAPES[2..6], |setting, case| {
            if !case.options.causal {
                return Ok(());
            }
            let [q, k, v] = &case.qkv;
            let expected = attend(q, k, v, &case.plan, &case.options)?;
            let shape = Shape(q.dim(0)?, q.dim(1)?, k.dim(1)?, q.dim(2)?, q.dim(3)?);
            for chunks in [&[1][..], &[40, 1, 7], &[1000]] {
                let strategies = setting.strategies(&shape)?;
                let mut cache = CompressedKvCache::new(strategies, setting.config.clone(), Default::default())?;
                let got = chunked(&mut cache, &case.qkv, chunks, |start, count| {
                    part_options(&case.options, start, count)
                })?;
                let [absolute, relative] = tolerances(dtype);
                let what = format!("{} in chunks of {chunks:?}", case.what);
                assert_close(&what, &got, &expected, 2.0 * absolute, 2.0 * relative)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Logits of 1e30 and more are capped, not NaN; a softcap far above all logits changes nothing to rounding.
#[test]
fn a_softcap_bounds_huge_logits_and_leaves_small_ones() -> Result<()> {
    let shape = Shape(1, 2, 1, 97, 32);
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        let [q, k, v] = shape.qkv(3, dtype)?;
        let plan = MergePlan::from_indicators(&Tensor::zeros((1, 2, 96), DType::U8, &CPU)?, &Default::default())?;
        let with = |softmax_scale, softcap| AttentionOptions {
            softmax_scale,
            softcap,
            ..Default::default()
        };
        let huge = attend(&(&q * 1e15)?, &(&k * 1e15)?, &v, &plan, &with(None, Some(2.0)))?;
        assert!(values(&huge)?.iter().all(|x| x.is_finite()), "{dtype:?}");
        let got = attend(&q, &k, &v, &plan, &with(Some(0.2), Some(1e6)))?;
        let plain = attend(&q, &k, &v, &plan, &with(Some(0.2), None))?;
        let [absolute, relative] = tolerances(dtype).map(|x| x.max(1e-9));
        assert_close(&format!("{dtype:?}"), &got, &plain, absolute, relative)?;
    }
    Ok(())
}

/// Sinks far below all logits change no bit, in a call and in a cache; sinks far above leave nearly nothing, no NaN.
#[test]
fn sinks_far_from_all_logits() -> Result<()> {
    let shape = Shape(1, 2, 1, 97, 32);
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
        let qkv = shape.qkv(3, dtype)?;
        let config = CompressionConfig {
            window: 9,
            similarity_threshold: 0.4,
            ..CompressionConfig::pretrained()
        };
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        let run = |sink: Option<f64>| -> Result<[Vec<f64>; 2]> {
            let options = AttentionOptions {
                sink_logits: sink.map(|sink| Tensor::new(&[sink, sink], &CPU)).transpose()?,
                ..Default::default()
            };
            let [q, k, v] = &qkv;
            let plan = MergePlan::new(q, k, v, &strategies, &config, &options)?;
            let whole = values(&attend(q, k, v, &plan, &options)?)?;
            let mut cache = CompressedKvCache::new(strategies.clone(), config.clone(), Default::default())?;
            let cached = chunked(&mut cache, &qkv, &[30, 1, 1, 40, 1], |_, _| Ok(options.clone()))?;
            Ok([whole, values(&cached)?])
        };
        let plain = run(None)?;
        for below in [f64::NEG_INFINITY, f64::MIN, f64::from(f32::MIN), -1e9, -300.0] {
            assert_eq!(run(Some(below))?, plain, "{dtype:?} {below}");
        }
        for above in [200.0, 1e9, f64::from(f32::MAX), f64::MAX] {
            let results = run(Some(above))?;
            let tiny = results.iter().flatten().all(|x| x.abs() < 1e-12);
            assert!(tiny, "{dtype:?} {above}");
        }
    }
    Ok(())
}

/// Results of a cache with tracked sinks refuse `backward`, in place of no gradient.
#[test]
fn a_cache_refuses_a_gradient_of_sinks() -> Result<()> {
    let [q, k, v] = Shape(1, 2, 1, 5, 8).qkv(3, DType::F32)?;
    let sinks = Var::new(&[0f32, 1.0], &CPU)?;
    let options = AttentionOptions {
        sink_logits: Some(sinks.as_tensor().clone()),
        ..Default::default()
    };
    let strategies = HeadStrategies::uniform(MergeStrategy::Off);
    let mut cache = CompressedKvCache::new(strategies, CompressionConfig::default(), Default::default())?;
    let output = cache.append_and_attend(&q, &k, &v, &options)?;
    let message = output.sum_all()?.backward().unwrap_err().to_string();
    assert!(message.contains("expected a forward pass only"), "{message}");
    Ok(())
}

/// A bias that does not depend on the row is one number a column: the same bits as the same bias for each row, forward
/// and backward, with sizes, softcap, hidden columns and more.
#[test]
fn a_bias_of_columns_is_the_bias_of_each_row() -> Result<()> {
    let tokens = 130;
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        let qkv = Shape(2, 4, 2, tokens, 32).qkv(3, dtype)?;
        for (fold, window, causal, softcap, hidden) in [
            (Fold::Mean, 0, true, None, 0.0),
            (Fold::Mean, 9, true, Some(6.0), 0.0),
            (Fold::PairSum, 5, true, None, f32::MIN),
            (Fold::Drop, 0, false, None, f32::NEG_INFINITY),
            (Fold::Drop, 0, true, None, f32::NEG_INFINITY),
        ] {
            let merges = hidden.is_finite();
            let bits = (0..8 * (tokens - 1)).map(|i| u8::from(merges && i % 3 == 1));
            let bits = Tensor::from_iter(bits, &CPU)?.reshape((2, 4, tokens - 1))?;
            let config = CompressionConfig {
                fold,
                window,
                ..Default::default()
            };
            let plan = MergePlan::from_indicators(&bits, &config)?;
            let entries = (0..2 * tokens).map(|i| match i % 11 == 0 || i < 7 {
                true => hidden,
                false => (i * 37 % 101) as f32 / 40.0,
            });
            let columns = Tensor::from_iter(entries, &CPU)?.reshape((2, 1, 1, tokens))?;
            let whole = columns.broadcast_as((2, 4, tokens, tokens))?.contiguous()?;
            let run = |bias: &Tensor| {
                let options = AttentionOptions {
                    bias: Some(bias.clone()),
                    causal,
                    softcap,
                    ..Default::default()
                };
                let results = differentiate(&qkv, &qkv[0], |q, k, v| Ok(attend(q, k, v, &plan, &options)?))?;
                results.iter().map(|x| Ok(values(x)?)).collect::<Result<Vec<_>>>()
            };
            let (got, expected) = (run(&columns)?, run(&whole)?);
            assert_eq!(got, expected, "{dtype:?} {fold:?} {window} {causal}");
            assert_eq!(got, run(&columns.broadcast_as((2, 4, tokens, tokens))?)?);
        }
    }
    Ok(())
}

/// Where tokens are hidden, -inf is refused with the same row and column as for a bias of each row.
#[test]
fn minus_infinity_in_a_bias_of_columns_is_found() -> Result<()> {
    let [q, k, v] = Shape(1, 1, 1, 9, 8).qkv(3, DType::F32)?;
    let entries: Vec<f32> = (0..9).map(|t| if t == 5 { f32::NEG_INFINITY } else { 0.0 }).collect();
    let columns = Tensor::from_vec(entries, 9, &CPU)?;
    let rows = columns.broadcast_as((9, 9))?.contiguous()?;
    for (causal, place) in [(true, "row 5, column 5"), (false, "row 0, column 5")] {
        let plan = MergePlan::from_indicators(&Tensor::ones((1, 1, 8), DType::U8, &CPU)?, &Default::default())?;
        for bias in [&columns, &rows] {
            let options = AttentionOptions {
                bias: Some(bias.clone()),
                causal,
                ..Default::default()
            };
            let message = attend(&q, &k, &v, &plan, &options).unwrap_err().to_string();
            assert!(message.contains(place), "{message}");
        }
    }
    Ok(())
}
