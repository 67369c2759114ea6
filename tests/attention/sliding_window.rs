//! The sliding window of a model: row i sees a column of token s only where s > i - L. Every fold, on both sides of the
//! compression window, forward and backward, against the reference in every dtype.

use crate::common::again::on_every_kernel;
use crate::common::budget::Side;
use crate::common::inputs::{assert_close, values, Shape};
use crate::common::judge::{differentiate, Expected, Shares};
use crate::common::settings::Setting;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    attend, compressed_attention, AttentionOptions, CompressionConfig, Criterion, Dropout, Fold, GroupRule,
    HeadStrategies, MergePlan, MergeStrategy,
};

const CPU: Device = Device::Cpu;
const FOLDS: [Fold; 3] = [Fold::PairSum, Fold::Mean, Fold::Drop];
/// None, smaller than 7 and 64, equal to 7, and larger than both.
const WINDOWS: [usize; 4] = [0, 5, 7, 70];
const LENGTHS: [usize; 5] = [1, 2, 7, 64, 5000];
const SHAPES: [Shape; 5] = [
    Shape(1, 1, 1, 1, 32),
    Shape(2, 2, 1, 2, 64),
    Shape(1, 2, 2, 59, 59),
    Shape(1, 4, 2, 97, 32),
    Shape(1, 2, 1, 257, 24),
];

fn slides(length: usize, causal: bool) -> AttentionOptions {
    AttentionOptions {
        sliding_window: Some(length),
        causal,
        ..Default::default()
    }
}

fn setting(fold: Fold, window: usize) -> Setting {
    Setting {
        name: "",
        strategy: MergeStrategy::Similarity,
        config: CompressionConfig {
            fold,
            window,
            similarity_threshold: 0.35,
            criterion: Criterion::KeyKey,
            group_rule: GroupRule::Unanimous,
            ..Default::default()
        },
        options: |_| AttentionOptions::default(),
        hides: true,
    }
}

/// Every fold, compression window and sliding window, causal and not.
fn each_case(mut body: impl FnMut(&str, Setting, AttentionOptions) -> Result<()>) -> Result<()> {
    for (fold, length) in FOLDS.iter().flat_map(|fold| LENGTHS.map(|length| (*fold, length))) {
        for window in WINDOWS {
            body(
                &format!("{fold:?}, window {window}, L {length}"),
                setting(fold, window),
                slides(length, true),
            )?;
        }
        body(
            &format!("{fold:?}, everywhere, L {length}"),
            setting(fold, 0),
            slides(length, false),
        )?;
    }
    Ok(())
}

fn grad_output(shape: &Shape, dtype: DType) -> Result<Tensor> {
    let &Shape(batch, heads, _, tokens, dim) = shape;
    Ok(Shape(batch, heads, heads, tokens, dim).qkv(77, dtype)?[2].clone())
}

/// Output and gradients against the reference's; `tolerance` is relative to the largest number, or to 0.1.
fn agrees(dtype: DType, tolerance: f64) -> Result<()> {
    each_case(|name, setting, options| {
        for (seed, shape) in SHAPES.iter().enumerate() {
            let (qkv, grad) = (shape.qkv(seed as u64, dtype)?, grad_output(shape, dtype)?);
            let expected = Expected::new(Side::Cpu, &qkv, &grad, &setting, &options)?;
            let plan = MergePlan::from_indicators(&expected.bits, &setting.config)?;
            assert!(shape.3 < 59 || plan.stats()?.hidden > 0, "{name}: nothing hidden");
            let got = differentiate(&qkv, &grad, |q, k, v| Ok(attend(q, k, v, &plan, &options)?))?;
            for (part, (got, expected)) in ["output", "dq", "dk", "dv"].iter().zip(got.iter().zip(&expected.exact)) {
                let largest = values(expected)?.iter().fold(0.1, |m: f64, x| m.max(x.abs()));
                assert_close(
                    &format!("{name}, {shape:?} {dtype:?}: {part}"),
                    got,
                    expected,
                    tolerance * largest,
                    tolerance,
                )?;
            }
        }
        Ok(())
    })
}

#[test]
fn f64_agrees_with_the_reference() -> Result<()> {
    agrees(DType::F64, 1e-12)
}

#[test]
fn f32_agrees_with_the_reference() -> Result<()> {
    agrees(DType::F32, 1e-5)
}

#[test]
fn half_types_err_by_their_roundings_alone() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let mut shares = Shares::default();
        each_case(|name, setting, options| {
            // Rows of a single mean: tokens that cancel make an exact 0, for which the judge allows no rounding in f32.
            if setting.config.fold == Fold::Mean && options.sliding_window < Some(3) {
                return Ok(());
            }
            for (seed, shape) in SHAPES.iter().enumerate() {
                let (qkv, grad) = (shape.qkv(seed as u64, dtype)?, grad_output(shape, dtype)?);
                let expected = Expected::new(Side::Cpu, &qkv, &grad, &setting, &options)?;
                let plan = MergePlan::from_indicators(&expected.bits, &setting.config)?;
                let got = differentiate(&qkv, &grad, |q, k, v| Ok(attend(q, k, v, &plan, &options)?))?;
                let what = format!("{name}, {shape:?} {dtype:?}");
                expected.check(&what, [&got[0], &got[1], &got[2], &got[3]], &mut shares)?;
            }
            Ok(())
        })?;
        shares.report()?;
    }
    Ok(())
}

#[test]
fn half_types_agree_on_every_kernel() -> Result<()> {
    on_every_kernel(module_path!(), &["half_types_err_by_their_roundings_alone"])
}

/// -inf outside of the window, L or more tokens back.
fn band(tokens: usize, length: usize) -> Result<Tensor> {
    let entry = |i: usize| match i / tokens >= i % tokens + length {
        true => f32::NEG_INFINITY,
        false => 0.0,
    };
    Ok(Tensor::from_vec(
        (0..tokens * tokens).map(entry).collect(),
        (tokens, tokens),
        &CPU,
    )?)
}

/// With nothing hidden the option is a mask, with dropout, too.
#[test]
fn it_is_a_band_of_minus_infinity() -> Result<()> {
    let shape = Shape(1, 2, 1, 200, 32);
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 0.02)] {
        for length in [1, 2, 7, 64, 199] {
            for causal in [true, false] {
                for dropout in [None, Some(Dropout { p: 0.3, seed: 5 })] {
                    let (qkv, grad) = (shape.qkv(1, dtype)?, grad_output(&shape, dtype)?);
                    let under = |options: AttentionOptions| {
                        let options = AttentionOptions {
                            causal,
                            dropout,
                            ..options
                        };
                        differentiate(&qkv, &grad, |q, k, v| {
                            Ok(compressed_attention(q, k, v, &off, &Default::default(), &options)?.output)
                        })
                    };
                    let band = AttentionOptions {
                        bias: Some(band(shape.3, length)?),
                        ..Default::default()
                    };
                    let (got, expected) = (under(slides(length, causal))?, under(band)?);
                    for (got, expected) in got.iter().zip(&expected) {
                        let what = format!("{dtype:?} L {length}, causal {causal}, {dropout:?}");
                        assert_close(&what, got, expected, tolerance, tolerance)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Tokens that only unseen columns hold have gradients that are exactly 0, and their NaN reaches no row.
#[test]
fn tokens_outside_stay_outside() -> Result<()> {
    let (tokens, dim, row) = (201, 32, 200);
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for (fold, window, length) in [
            (Fold::Drop, 0, 40),
            (Fold::Mean, 9, 70),
            (Fold::PairSum, 9, 70),
            (Fold::Mean, 80, 33),
        ] {
            let qkv = Shape(1, 1, 1, tokens, dim).qkv(3, dtype)?;
            let setting = setting(fold, window);
            let bits: Vec<u8> = (0..tokens - 1).map(|t| u8::from(t % 3 == 1)).collect();
            let bits = Tensor::from_vec(bits, (1, 1, tokens - 1), &CPU)?;
            let plan = MergePlan::from_indicators(&bits, &setting.config)?;
            let options = slides(length, true);
            let what = format!("{dtype:?} {fold:?} {window} {length}");
            let mut grad = vec![0f64; tokens * dim];
            grad[row * dim..].fill(1.0);
            let grad = Tensor::from_vec(grad, (1, 1, tokens, dim), &CPU)?.to_dtype(dtype)?;
            let [_, _, dk, dv] = differentiate(&qkv, &grad, |q, k, v| Ok(attend(q, k, v, &plan, &options)?))?;
            // A column at the border may hold the token before it.
            for (part, gradient) in [("dk", dk), ("dv", dv)] {
                let outside = values(&gradient.narrow(2, 0, row - length)?)?;
                assert!(outside.iter().all(|x| *x == 0.0), "{what}: {part}");
                let inside = values(&gradient.narrow(2, row, 1)?)?;
                assert!(inside.iter().any(|x| *x != 0.0), "{what}: {part}");
            }
            let [_, k, v] = &qkv;
            let bad = |x: &Tensor| -> Result<Tensor> {
                let nan = Tensor::full(f64::NAN, (1, 1, 1, dim), &CPU)?.to_dtype(dtype)?;
                Ok(Tensor::cat(&[nan, x.narrow(2, 1, tokens - 1)?], 2)?)
            };
            let output = attend(&qkv[0], &bad(k)?, &bad(v)?, &plan, &options)?;
            let rows = |start, count| values(&output.narrow(2, start, count).unwrap()).unwrap();
            assert!(rows(length, tokens - length).iter().all(|x| x.is_finite()), "{what}");
            assert!(rows(0, length).iter().all(|x| x.is_nan()), "{what}");
        }
    }
    Ok(())
}

/// A bias hides all of a row if it hides the window; -inf beside hidden tokens is refused inside the window only.
#[test]
fn a_bias_is_judged_inside_the_window() -> Result<()> {
    let (tokens, length) = (90, 7);
    let blank: Vec<usize> = vec![30, 89];
    let entry = |i: usize| {
        let (row, column) = (i / tokens, i % tokens);
        match blank.contains(&row) && column + length > row {
            true => f32::NEG_INFINITY,
            false => 0.0,
        }
    };
    let bias = Tensor::from_vec((0..tokens * tokens).map(entry).collect(), (tokens, tokens), &CPU)?;
    let options = AttentionOptions {
        bias: Some(bias.clone()),
        ..slides(length, true)
    };
    let bits = |hidden: u8| Tensor::full(hidden, (1, 2, tokens - 1), &CPU);
    for dtype in [DType::F32, DType::BF16] {
        let qkv = Shape(1, 2, 1, tokens, 32).qkv(4, dtype)?;
        let config = setting(Fold::Mean, 3).config;
        let none = MergePlan::from_indicators(&bits(0)?, &config)?;
        let ones = qkv[0].ones_like()?;
        let got = differentiate(&qkv, &ones, |q, k, v| Ok(attend(q, k, v, &none, &options)?))?;
        for row in 0..tokens {
            let zero = |x: &Tensor| values(&x.narrow(2, row, 1).unwrap()).unwrap().iter().all(|x| *x == 0.0);
            assert_eq!(zero(&got[0]), blank.contains(&row), "{dtype:?}: output of row {row}");
            assert!(!blank.contains(&row) || zero(&got[1]), "{dtype:?}: dq of row {row}");
        }
        let some = MergePlan::from_indicators(&bits(1)?, &config)?;
        let message = attend(&qkv[0], &qkv[1], &qkv[2], &some, &options)
            .unwrap_err()
            .to_string();
        assert!(message.contains("row 30, column 24"), "{message}");
        let outside = AttentionOptions {
            bias: Some(band(tokens, length)?),
            ..slides(length, true)
        };
        let got = attend(&qkv[0], &qkv[1], &qkv[2], &some, &outside)?;
        let expected = attend(&qkv[0], &qkv[1], &qkv[2], &some, &slides(length, true))?;
        assert_close("-inf outside of the window", &got, &expected, 1e-6, 1e-6)?;
    }
    Ok(())
}

#[test]
fn a_window_of_none_is_refused() {
    let message = slides(0, true).check().unwrap_err().to_string();
    assert!(
        message.contains("sliding_window: expected at least 1, got 0"),
        "{message}"
    );
}
