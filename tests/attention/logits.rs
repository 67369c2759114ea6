//! Options that change logits: the CPU path against the f64 reference, forward, backward and through a cache, over
//! folds, windows, dtypes and odd shapes.

mod cases;

use crate::common::again::{on_every_instruction_set, on_every_kernel};
use crate::common::caches::{chunked, part_options};
use crate::common::inputs::{assert_close, values, Shape};
use crate::common::judge::differentiate;
use crate::common::settings::Setting;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{
    attend, AttentionOptions, CompressedKvCache, CompressionConfig, Fold, HeadStrategies, MergePlan, MergeStrategy,
};
use cases::{each_case, Case, SHAPES};

const CPU: Device = Device::Cpu;

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
