//! Softcap and sink logits under the emulator: forward, gradients and caches against the f64 reference.

use crate::common::caches::{part, part_options};
use crate::common::inputs::{assert_close, values, Shape};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, D};
use candle_sfattention::emulation::{self, EmulatedCache};
use candle_sfattention::reference::{self, Array4, Indicators};
use candle_sfattention::{
    AttentionOptions, CompressionConfig, Criterion, Dropout, Fold, GroupRule, HeadStrategies, MergeStrategy,
};
use std::f64::consts::LOG2_E;

const CPU: Device = Device::Cpu;

/// Every padded head size, blocks and tiles exceeded by little.
const SHAPES: [Shape; 6] = [
    Shape(2, 3, 1, 2, 8),
    Shape(1, 4, 2, 97, 24),
    Shape(1, 2, 2, 59, 96),
    Shape(1, 1, 1, 130, 64),
    Shape(1, 2, 1, 70, 128),
    Shape(1, 2, 1, 67, 256),
];

/// Units of the largest number: f32 sums; for halves, some roundings.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 4.0 * 2f64.powi(-11),
        _ => 4.0 * 2f64.powi(-8),
    }
}

fn sinks(heads: usize) -> Result<Tensor> {
    let logits = (0..heads).map(|head| [1.5f32, f32::NEG_INFINITY, 30.0, -200.0][head % 4]);
    Ok(Tensor::from_iter(logits, &CPU)?)
}

/// A softcap, sinks, and both with all other options.
fn options(shape: &Shape) -> Result<[AttentionOptions; 3]> {
    let &Shape(_, heads, _, tokens, _) = shape;
    let scale = AttentionOptions {
        softmax_scale: Some(0.5),
        ..Default::default()
    };
    let bias = (0..tokens * tokens).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0);
    Ok([
        AttentionOptions {
            softcap: Some(3.0),
            ..scale.clone()
        },
        AttentionOptions {
            sink_logits: Some(sinks(heads)?),
            ..scale.clone()
        },
        AttentionOptions {
            softmax_scale: Some(-0.5),
            softcap: Some(3.0),
            sink_logits: Some(sinks(heads)?),
            dropout: Some(Dropout { p: 0.2, seed: 5 }),
            bias: Some(Tensor::from_iter(bias, &CPU)?.reshape((tokens, tokens))?),
            ..Default::default()
        },
    ])
}

fn configs() -> [(MergeStrategy, CompressionConfig); 4] {
    let key = |fold, window| CompressionConfig {
        fold,
        window,
        criterion: Criterion::KeyKey,
        group_rule: GroupRule::Unanimous,
        similarity_threshold: 0.35,
        ..Default::default()
    };
    [
        (MergeStrategy::Off, key(Fold::Drop, 0)),
        (MergeStrategy::Similarity, key(Fold::PairSum, 5)),
        (MergeStrategy::Similarity, key(Fold::Mean, 0)),
        (MergeStrategy::Similarity, key(Fold::Drop, 9)),
    ]
}

struct Case {
    what: String,
    arrays: [Array4; 3],
    bits: Indicators,
}

fn case(qkv: &[Tensor; 3], strategy: MergeStrategy, config: &CompressionConfig, what: String) -> Result<Case> {
    let arrays = [
        Array4::from_tensor(&qkv[0])?,
        Array4::from_tensor(&qkv[1])?,
        Array4::from_tensor(&qkv[2])?,
    ];
    let bits = reference::indicators(&arrays[0], &arrays[1], &HeadStrategies::uniform(strategy), config)?;
    Ok(Case { what, arrays, bits })
}

fn near(what: &str, got: &Tensor, expected: &Tensor, dtype: DType) -> Result<()> {
    let largest = values(expected)?.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
    Ok(assert_close(
        what,
        got,
        expected,
        tolerance(dtype) * largest,
        tolerance(dtype),
    )?)
}

fn check(dtype: DType) -> Result<()> {
    for (strategy, config) in configs() {
        for (seed, shape) in SHAPES.iter().enumerate() {
            let qkv = shape.qkv(seed as u64, dtype)?;
            let &Shape(batch, heads, _, tokens, dim) = shape;
            let [_, _, grad_output] = Shape(batch, heads, heads, tokens, dim).qkv(seed as u64 + 77, dtype)?;
            for (index, options) in options(shape)?.into_iter().enumerate() {
                let off = strategy == MergeStrategy::Off;
                let what = format!("{strategy:?} {:?} {shape:?} {dtype:?} options {index}", config.fold);
                let Case { what, arrays, bits } = case(&qkv, strategy, &config, what)?;
                let ([aq, ak, av], grad) = (&arrays, Array4::from_tensor(&grad_output)?);
                let exact = reference::attention(aq, ak, av, &bits, &config, &options)?;
                let exact = exact.to_tensor(DType::F64, &CPU)?;
                let (dq, dk, dv) = reference::attention_gradients(aq, ak, av, &grad, &bits, &config, &options)?;
                for (dense, deterministic) in [(false, false), (false, true), (true, false), (true, true)] {
                    if dense && !off || dtype == DType::F32 && deterministic {
                        continue;
                    }
                    let options = AttentionOptions {
                        deterministic,
                        ..options.clone()
                    };
                    let [q, k, v] = &qkv;
                    let bits = bits.to_tensor(&CPU)?;
                    let pass = emulation::attend([q, k, v], &bits, &config, &options, dense, Some(&grad_output));
                    let pass = pass.with_context(|| what.clone())?;
                    let what = format!("{what} dense {dense} deterministic {deterministic}");
                    near(&format!("{what} output"), &pass.output, &exact, dtype)?;
                    let gradients = pass.gradients.context("gradients were asked for")?;
                    for ((name, got), expected) in ["dq", "dk", "dv"].iter().zip(&gradients).zip([&dq, &dk, &dv]) {
                        let expected = expected.to_tensor(DType::F64, &CPU)?;
                        near(&format!("{what} {name}"), got, &expected, dtype)?;
                    }
                    if let Some(sinks) = &options.sink_logits {
                        // The sinks' gradient comes from the log-sum-exp, which has the sinks in it.
                        let sinks = (sinks.to_dtype(DType::F64)? * LOG2_E)?.reshape((1, heads, 1))?;
                        let sums = pass.log_sum_exp.to_dtype(DType::F64)?;
                        let weights = (sinks.broadcast_sub(&sums)? / LOG2_E)?.exp()?;
                        let delta = (&exact * grad_output.to_dtype(DType::F64)?)?.sum(D::Minus1)?;
                        let got = (weights * delta)?.sum((0, 2))?.neg()?;
                        let exact = reference::sink_gradients(
                            aq,
                            ak,
                            av,
                            &grad,
                            &Indicators::from_tensor(&bits)?,
                            &config,
                            &options,
                        )?;
                        near(&format!("{what} dsink"), &got, &Tensor::new(exact, &CPU)?, dtype)?;
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn f32_agrees_with_the_reference() -> Result<()> {
    check(DType::F32)
}

#[test]
fn halves_agree_with_the_reference() -> Result<()> {
    check(DType::F16)?;
    check(DType::BF16)
}

/// Any chunks of a cache give the rows of the whole call.
#[test]
fn caches_agree_with_the_reference() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        for (strategy, config) in configs() {
            for (seed, shape) in SHAPES[1..4].iter().enumerate() {
                let qkv = shape.qkv(seed as u64, dtype)?;
                for (index, options) in options(shape)?.into_iter().enumerate() {
                    let what = format!("{strategy:?} {:?} {shape:?} {dtype:?} options {index}", config.fold);
                    let Case { what, arrays, bits } = case(&qkv, strategy, &config, what)?;
                    let [aq, ak, av] = &arrays;
                    let exact = reference::attention(aq, ak, av, &bits, &config, &options)?;
                    let exact = exact.to_tensor(DType::F64, &CPU)?;
                    for chunks in [&[1][..], &[40, 1, 7], &[1000]] {
                        let strategies = HeadStrategies::uniform(strategy);
                        let mut cache = EmulatedCache::new(&qkv, &strategies, &config, &Default::default())?;
                        let (mut start, mut outputs) = (0, Vec::new());
                        for chunk in chunks.iter().cycle() {
                            let count = (*chunk).min(shape.3 - start);
                            if count == 0 {
                                break;
                            }
                            let options = part_options(&options, start, count)?;
                            let rows = cache.append(&part(&qkv, start, count)?, Some(&options))?;
                            outputs.push(rows.context("options were given")?);
                            start += count;
                        }
                        near(&format!("{what} {chunks:?}"), &Tensor::cat(&outputs, 2)?, &exact, dtype)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Rows that see nothing but a sink are zeros, and a key that is not finite is NaN under a softcap, not the cap.
#[test]
fn rows_without_columns_and_columns_without_sense() -> Result<()> {
    let tokens = 70;
    for dtype in [DType::F32, DType::BF16] {
        let [q, k, v] = Shape(1, 1, 1, tokens, 32).qkv(1, dtype)?;
        let bits = Tensor::zeros((1, 1, tokens - 1), DType::U8, &CPU)?;
        let config = CompressionConfig::default();
        let entry = |i: usize| if i / tokens == 40 { f32::NEG_INFINITY } else { 0.0 };
        let bias = Tensor::from_iter((0..tokens * tokens).map(entry), &CPU)?.reshape((tokens, tokens))?;
        let options = AttentionOptions {
            bias: Some(bias),
            sink_logits: Some(Tensor::zeros(1, DType::F32, &CPU)?),
            ..Default::default()
        };
        let pass = emulation::attend([&q, &k, &v], &bits, &config, &options, true, None)?;
        assert!(
            values(&pass.output.narrow(2, 40, 1)?)?.iter().all(|x| *x == 0.0),
            "{dtype:?}"
        );
        assert!(values(&pass.output)?.iter().all(|x| x.is_finite()), "{dtype:?}");

        let mut keys = values(&k)?;
        keys[20 * 32 + 3] = f64::INFINITY;
        let k = Tensor::from_vec(keys, (1, 1, tokens, 32), &CPU)?.to_dtype(dtype)?;
        let options = AttentionOptions {
            softcap: Some(5.0),
            ..Default::default()
        };
        let rows = values(&emulation::attend([&q, &k, &v], &bits, &config, &options, true, None)?.output)?;
        for (token, row) in rows.chunks(32).enumerate() {
            assert!(row.iter().all(|x| x.is_nan() == (token >= 20)), "{dtype:?} row {token}");
        }
    }
    Ok(())
}
