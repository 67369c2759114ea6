//! What a row may see, under the emulator: sliding windows, segments, fewer queries than keys, and values of another
//! size, forward and gradients against the f64 reference. Caches are in `cuda_sliding_cache.rs`.

use crate::common::budget::Side;
use crate::common::inputs::{assert_close, laid_out, values, Memory, Shape};
use crate::common::judge::{differentiate, Expected, Shares};
use crate::common::kernels::Kernels;
use crate::common::settings::{reference_bits, Setting};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::emulation;
use candle_sfattention::reference::{self, Array4, Indicators};
use candle_sfattention::{
    AttentionOptions, CompressionConfig, Criterion, Dropout, Fold, GroupRule, MergePlan, MergeStrategy,
};

const CPU: Device = Device::Cpu;
const FOLDS: [Fold; 3] = [Fold::PairSum, Fold::Mean, Fold::Drop];

fn slides(length: usize) -> AttentionOptions {
    AttentionOptions {
        sliding_window: Some(length),
        ..Default::default()
    }
}

fn setting(strategy: MergeStrategy, fold: Fold, window: usize) -> Setting {
    Setting {
        name: "",
        strategy,
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

/// Output and gradients of one case, by these kernels.
fn agrees(
    what: &str,
    (shape, seed): (&Shape, u64),
    dtype: DType,
    setting: &Setting,
    options: &AttentionOptions,
    shares: &mut Shares,
) -> Result<()> {
    let &Shape(batch, heads, _, tokens, dim) = shape;
    let qkv = shape.qkv(seed, dtype)?;
    let grad = Shape(batch, heads, heads, tokens, dim).qkv(seed + 77, dtype)?[2].clone();
    let expected = Expected::new(Side::Cuda, &qkv, &grad, setting, options)?;
    let hidden = values(&expected.bits)?.contains(&1.0);
    let off = setting.strategy.is_off();
    assert!(off || tokens < 59 || hidden, "{what}: nothing hidden");
    let [q, k, v] = &laid_out(&qkv, Memory::Fused)?;
    for kernels in Kernels::ALL {
        let warpgroups = matches!(kernels, Kernels::Warpgroups | Kernels::ShortWarpgroups);
        if dtype == DType::F32 && kernels != Kernels::Plain || warpgroups && dim > 128 {
            continue;
        }
        let options = AttentionOptions {
            deterministic: kernels == Kernels::Deterministic,
            ..options.clone()
        };
        for dense in [false, true] {
            if dense && !off {
                continue;
            }
            let what = format!("{what} {shape:?} {dtype:?} dense {dense} {kernels:?}");
            let attend = || emulation::attend([q, k, v], &expected.bits, &setting.config, &options, dense, Some(&grad));
            let pass = kernels.run(attend).with_context(|| what.clone())?;
            let [dq, dk, dv] = &pass.gradients.context("gradients were asked for")?;
            expected.check(&what, [&pass.output, dq, dk, dv], shares)?;
        }
    }
    Ok(())
}

/// Every padded head size; blocks and tiles exceeded by little.
const SHAPES: [Shape; 6] = [
    Shape(2, 3, 1, 2, 8),
    Shape(1, 4, 2, 97, 24),
    Shape(1, 2, 2, 59, 96),
    Shape(1, 2, 1, 140, 64),
    Shape(1, 1, 1, 140, 128),
    Shape(1, 1, 1, 90, 256),
];

/// Both sides of compression windows of 0, 5 and 30 tokens, and longer than every shape.
const LENGTHS: [usize; 5] = [1, 5, 19, 64, 5000];

fn sliding_windows(dtype: DType) -> Result<()> {
    let mut shares = Shares::default();
    for (index, length) in LENGTHS.into_iter().enumerate() {
        for (seed, shape) in SHAPES.iter().enumerate() {
            // Each shape meets each length with one fold and one window, and with heads that are off.
            let (fold, window) = (FOLDS[(index + seed) % 3], [0, 5, 30][(index + seed / 2) % 3]);
            for (strategy, fold) in [(MergeStrategy::Similarity, fold), (MergeStrategy::Off, Fold::Drop)] {
                // Tokens that cancel in a mean make an exact 0, for which the judge allows f32 no rounding.
                if fold == Fold::Mean && length < 3 {
                    continue;
                }
                let what = format!("{strategy:?} {fold:?}, window {window}, L {length}");
                let setting = setting(strategy, fold, window);
                agrees(
                    &what,
                    (shape, seed as u64),
                    dtype,
                    &setting,
                    &slides(length),
                    &mut shares,
                )?;
            }
        }
        let everywhere = AttentionOptions {
            causal: false,
            softmax_scale: Some(0.2),
            ..slides(length.max(2))
        };
        let strategy = [MergeStrategy::Off, MergeStrategy::Similarity][index % 2];
        let what = format!("{strategy:?}, everywhere, L {length}");
        let setting = setting(strategy, Fold::PairSum, 0);
        agrees(&what, (&SHAPES[3], 3), dtype, &setting, &everywhere, &mut shares)?;
    }
    shares.report()
}

#[test]
fn sliding_windows_in_f32() -> Result<()> {
    sliding_windows(DType::F32)
}

#[test]
fn sliding_windows_in_f16() -> Result<()> {
    sliding_windows(DType::F16)
}

#[test]
fn sliding_windows_in_bf16() -> Result<()> {
    sliding_windows(DType::BF16)
}

/// Tiles between both borders that no row masks, and walks of several tiles, for kernels whose tiles are large.
#[test]
fn long_sliding_windows() -> Result<()> {
    let mut shares = Shares::default();
    for (shape, dtype, length) in [
        (Shape(1, 1, 1, 700, 64), DType::BF16, 450),
        (Shape(1, 1, 1, 600, 128), DType::F16, 390),
        (Shape(1, 1, 1, 300, 32), DType::F32, 150),
    ] {
        for (strategy, fold) in [
            (MergeStrategy::Off, Fold::Drop),
            (MergeStrategy::Similarity, Fold::Drop),
            (MergeStrategy::Similarity, Fold::Mean),
        ] {
            let what = format!("{strategy:?} {fold:?}, L {length}");
            let setting = setting(strategy, fold, 3);
            agrees(&what, (&shape, 5), dtype, &setting, &slides(length), &mut shares)?;
        }
    }
    shares.report()
}

/// A sliding window beside a bias, dropout, a softcap and sinks.
#[test]
fn sliding_windows_beside_other_options() -> Result<()> {
    for dtype in [DType::F32, DType::F16] {
        for (shape, fold, window, length) in [
            (Shape(1, 4, 2, 97, 24), Fold::Mean, 5, 20),
            (Shape(1, 2, 1, 140, 64), Fold::Drop, 30, 19),
            (Shape(1, 1, 1, 90, 256), Fold::PairSum, 0, 40),
        ] {
            let setting = setting(MergeStrategy::Similarity, fold, window);
            let options = AttentionOptions {
                sliding_window: Some(length),
                ..all_options(&shape)?
            };
            let qkv = shape.qkv(1, dtype)?;
            let bits = bits(&qkv, &setting, &options)?;
            let expected = Exact::new(&qkv, &bits, &setting.config, &options)?;
            for deterministic in [false, true] {
                let options = AttentionOptions {
                    deterministic,
                    ..options.clone()
                };
                let [q, k, v] = &qkv;
                let pass = emulation::attend([q, k, v], &bits, &setting.config, &options, false, Some(&expected.grad))?;
                let [dq, dk, dv] = &pass.gradients.context("gradients were asked for")?;
                let what = format!("{fold:?} {shape:?} {dtype:?} L {length} {deterministic}");
                expected.check(&what, [&pass.output, dq, dk, dv], dtype)?;
            }
        }
    }
    Ok(())
}

/// A token that is not finite makes the rows whose sliding window holds it NaN, and touches no other row.
#[test]
fn bad_numbers_stay_inside_the_sliding_window() -> Result<()> {
    let (shape, length) = (Shape(1, 2, 1, 300, 64), 90);
    let kernels = [
        (DType::F32, Kernels::Plain),
        (DType::BF16, Kernels::Plain),
        (DType::BF16, Kernels::Warpgroups),
    ];
    let bits = Tensor::zeros((1, 2, 299), DType::U8, &CPU)?;
    for (dtype, kernels) in kernels {
        for (dense, fold, window) in [(false, Fold::Mean, 5), (false, Fold::Drop, 120), (true, Fold::Drop, 0)] {
            let config = setting(MergeStrategy::Off, fold, window).config;
            let run = |qkv: &[Tensor; 3]| -> Result<Vec<f64>> {
                let inputs = [&qkv[0], &qkv[1], &qkv[2]];
                let attend = || emulation::attend(inputs, &bits, &config, &slides(length), dense, None);
                Ok(values(&kernels.run(attend)?.output)?)
            };
            let qkv = shape.qkv(3, dtype)?;
            let clean = run(&qkv)?;
            // Two tokens of one block of rows: the rows of the second one go on where those of the first end.
            for (part, bad) in [
                (1, f64::NAN),
                (1, f64::NEG_INFINITY),
                (1, f64::INFINITY),
                (2, f64::INFINITY),
            ] {
                let mut data = values(&qkv[part])?;
                data[77 * shape.4 + 5] = bad;
                data[84 * shape.4 + 5] = bad;
                let mut broken = qkv.clone();
                broken[part] = Tensor::from_vec(data, qkv[part].dims(), &CPU)?.to_dtype(dtype)?;
                for (index, (clean, got)) in clean.iter().zip(&run(&broken)?).enumerate() {
                    let row = index / shape.4 % 300;
                    let sees = (77..84 + length).contains(&row);
                    let what = format!("{dtype:?} {kernels:?} {fold:?} dense {dense} part {part} {bad} row {row}");
                    assert!(if sees { got.is_nan() } else { got == clean }, "{what}: {got}");
                }
            }
        }
    }
    Ok(())
}

/// Units of the largest number: f32 sums; for halves, some roundings.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 5.0 * 2f64.powi(-11),
        _ => 5.0 * 2f64.powi(-8),
    }
}

/// A bias per head and row, dropout, a softcap and sinks.
fn all_options(shape: &Shape) -> Result<AttentionOptions> {
    let &Shape(_, heads, _, tokens, _) = shape;
    let bias = (0..heads * tokens * tokens).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0);
    Ok(AttentionOptions {
        bias: Some(Tensor::from_iter(bias, &CPU)?.reshape((heads, tokens, tokens))?),
        dropout: Some(Dropout { p: 0.2, seed: 5 }),
        softcap: Some(3.0),
        sink_logits: Some(Tensor::from_iter((0..heads).map(|head| head as f32 - 1.0), &CPU)?),
        ..Default::default()
    })
}

/// The reference's decisions.
fn bits(qkv: &[Tensor; 3], setting: &Setting, options: &AttentionOptions) -> Result<Tensor> {
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
    let (q, k, v) = (q?, k?, v?);
    let [batch, heads, _, dim] = q.dims;
    let strategies = setting.strategies(&Shape(batch, heads, k.dims[1], k.dims[2], dim))?;
    Ok(reference_bits([&q, &k, &v], &strategies, &setting.config, options)?.to_tensor(&CPU)?)
}

/// The reference's output and gradients for some output gradient.
struct Exact {
    grad: Tensor,
    parts: [Tensor; 4],
}

impl Exact {
    fn new(qkv: &[Tensor; 3], bits: &Tensor, config: &CompressionConfig, options: &AttentionOptions) -> Result<Self> {
        let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
        let (q, k, v, bits) = (q?, k?, v?, Indicators::from_tensor(bits)?);
        let [batch, heads, queries, _] = q.dims;
        let [_, _, grad] = Shape(batch, heads, heads, queries, v.dims[3]).qkv(77, qkv[0].dtype())?;
        let given = Array4::from_tensor(&grad)?;
        let output = reference::attention(&q, &k, &v, &bits, config, options)?;
        let (dq, dk, dv) = reference::attention_gradients(&q, &k, &v, &given, &bits, config, options)?;
        let tensor = |x: Array4| x.to_tensor(DType::F64, &CPU);
        Ok(Self {
            grad,
            parts: [tensor(output)?, tensor(dq)?, tensor(dk)?, tensor(dv)?],
        })
    }

    fn check(&self, what: &str, got: [&Tensor; 4], dtype: DType) -> Result<()> {
        for ((name, got), expected) in ["output", "dq", "dk", "dv"].iter().zip(got).zip(&self.parts) {
            let largest = values(expected)?.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
            let (absolute, relative) = (tolerance(dtype) * largest, tolerance(dtype));
            assert_close(&format!("{what} {name}"), got, expected, absolute, relative)?;
        }
        Ok(())
    }
}

/// Output and gradients of a composed call against the reference.
fn composes(
    what: &str,
    qkv: &[Tensor; 3],
    setting: &Setting,
    bits: &Tensor,
    options: &AttentionOptions,
    kernels: Kernels,
) -> Result<()> {
    let plan = MergePlan::from_indicators(bits, &setting.config)?;
    let expected = Exact::new(qkv, bits, &setting.config, options)?;
    let got = kernels.run(|| {
        differentiate(qkv, &expected.grad, |q, k, v| {
            Ok(emulation::composed([q, k, v], &plan, options)?)
        })
    })?;
    expected.check(what, [&got[0], &got[1], &got[2], &got[3]], qkv[0].dtype())
}

/// Heads that are off, and folds with and without a window.
fn folded() -> Vec<Setting> {
    vec![
        setting(MergeStrategy::Off, Fold::Drop, 0),
        setting(MergeStrategy::Similarity, Fold::Mean, 5),
        setting(MergeStrategy::Similarity, Fold::Drop, 9),
        setting(MergeStrategy::Similarity, Fold::PairSum, 0),
    ]
}

/// Plain options, a sliding window, and one with all other options.
fn each_options(shape: &Shape) -> Result<[AttentionOptions; 3]> {
    let all = AttentionOptions {
        sliding_window: Some(30),
        ..all_options(shape)?
    };
    Ok([AttentionOptions::default(), slides(11), all])
}

/// Values that are smaller and larger than keys, and sizes that no kernel has.
#[test]
fn values_of_another_size() -> Result<()> {
    for (seed, (shape, value_dim)) in [
        (Shape(2, 2, 1, 59, 64), 24),
        (Shape(1, 4, 2, 97, 24), 96),
        (Shape(1, 2, 2, 70, 20), 59),
        (Shape(1, 2, 1, 2, 8), 1),
    ]
    .into_iter()
    .enumerate()
    {
        let Shape(batch, heads, kv_heads, tokens, _) = shape;
        for dtype in [DType::F32, DType::BF16] {
            let [q, k, _] = shape.qkv(seed as u64, dtype)?;
            let [_, _, v] = Shape(batch, heads, kv_heads, tokens, value_dim).qkv(seed as u64 + 1, dtype)?;
            let qkv = [q, k, v];
            for (index, setting) in folded().into_iter().enumerate() {
                let options = &each_options(&shape)?[(index + seed) % 3];
                let bits = bits(&qkv, &setting, options)?;
                let kernels = Kernels::ALL[if options.bias.is_some() { 0 } else { index % 3 }];
                let what = format!("{:?} {shape:?} {value_dim} {dtype:?} {kernels:?}", setting.config.fold);
                composes(&what, &qkv, &setting, &bits, options, kernels)?;
            }
        }
    }
    Ok(())
}

/// The last rows of a causal call: their bias and dropout are those of the whole call's last rows.
#[test]
fn fewer_queries_than_keys() -> Result<()> {
    for (seed, (shape, counts)) in [
        (Shape(1, 2, 1, 2, 32), [1, 1]),
        (Shape(2, 4, 2, 97, 24), [1, 58]),
        (Shape(1, 2, 1, 300, 64), [65, 140]),
        (Shape(1, 1, 1, 140, 128), [7, 80]),
        (Shape(1, 1, 1, 150, 256), [1, 70]),
    ]
    .into_iter()
    .enumerate()
    {
        for dtype in [DType::F32, DType::F16] {
            let [q, k, v] = shape.qkv(seed as u64, dtype)?;
            for (index, setting) in folded().into_iter().take(3).enumerate() {
                let queries = counts[index % 2];
                let last = |x: &Tensor, axis| x.narrow(axis, x.dim(axis)? - queries, queries);
                let whole = &each_options(&shape)?[(index + seed) % 3];
                let options = AttentionOptions {
                    bias: whole.bias.as_ref().map(|bias| last(bias, 1)).transpose()?,
                    ..whole.clone()
                };
                let qkv = [last(&q, 2)?, k.clone(), v.clone()];
                let bits = bits(&qkv, &setting, &options)?;
                let strategies = setting.strategies(&shape)?;
                let decided = emulation::decide([&qkv[0], &k, &v], &strategies, &setting.config, &options)?;
                assert_eq!(decided.to_vec3::<u8>()?, bits.to_vec3::<u8>()?);
                let kernels = Kernels::ALL[if options.bias.is_some() { 0 } else { (index + seed) % 3 }];
                let what = format!("{:?} {shape:?} {queries} {dtype:?} {kernels:?}", setting.config.fold);
                composes(&what, &qkv, &setting, &bits, &options, kernels)?;
            }
        }
    }
    Ok(())
}

/// Rows that see another sequence, where every head is off: fewer of them than keys, or more.
#[test]
fn all_rows_see_another_sequence() -> Result<()> {
    for (queries, tokens) in [(1, 59), (97, 31), (70, 257), (5, 1)] {
        for dtype in [DType::F32, DType::BF16] {
            let [q, _, _] = Shape(2, 4, 4, queries, 32).qkv(1, dtype)?;
            let [_, k, v] = Shape(2, 4, 2, tokens, 32).qkv(2, dtype)?;
            let bias = (0..queries * tokens).map(|i| (i % 7) as f32 / 3.0);
            let options = AttentionOptions {
                causal: false,
                softmax_scale: Some(0.3),
                bias: Some(Tensor::from_iter(bias, &CPU)?.reshape((queries, tokens))?),
                dropout: Some(Dropout { p: 0.2, seed: 5 }),
                ..Default::default()
            };
            let none = Tensor::zeros((2, 4, tokens - 1), DType::U8, &CPU)?;
            let (setting, what) = (&folded()[0], format!("{queries} of {tokens} {dtype:?}"));
            composes(&what, &[q, k, v], setting, &none, &options, Kernels::Plain)?;
        }
    }
    let [q, _, _] = Shape(1, 1, 1, 9, 8).qkv(1, DType::F32)?;
    let [_, k, v] = Shape(1, 1, 1, 4, 8).qkv(1, DType::F32)?;
    let plan = MergePlan::from_indicators(&Tensor::zeros((1, 1, 3), DType::U8, &CPU)?, &Default::default())?;
    let options = AttentionOptions {
        causal: false,
        ..slides(2)
    };
    let error = emulation::composed([&q, &k, &v], &plan, &options)
        .unwrap_err()
        .to_string();
    assert!(error.contains("9 queries and 4 keys"), "{error}");
    Ok(())
}

/// Packed documents, left and right padding, segments of one token, and a row of padding alone.
#[test]
fn segments_are_computed_alone() -> Result<()> {
    let numbers = |runs: &[&[(u32, usize)]]| -> Result<Tensor> {
        let row = |runs: &&[(u32, usize)]| {
            let numbers: Vec<u32> = runs.iter().flat_map(|(number, count)| vec![*number; *count]).collect();
            let count = numbers.len();
            Tensor::from_vec(numbers, (1, count), &CPU)
        };
        let rows: Vec<Tensor> = runs.iter().map(row).collect::<candle_core::Result<_>>()?;
        Ok(Tensor::cat(&rows, 0)?)
    };
    for (seed, segments) in [
        numbers(&[&[(1, 37), (2, 1), (3, 20), (0, 12)], &[(0, 9), (5, 61)], &[(0, 70)]])?,
        numbers(&[&[(1, 1), (2, 1), (0, 1), (3, 129)]])?,
    ]
    .into_iter()
    .enumerate()
    {
        let (batch, tokens) = segments.dims2()?;
        let shape = Shape(batch, 4, 2, tokens, 24);
        for (index, setting) in folded().into_iter().enumerate() {
            for dtype in [DType::F32, DType::BF16] {
                let options = AttentionOptions {
                    segments: Some(segments.clone()),
                    ..each_options(&shape)?[(index + seed) % 3].clone()
                };
                let qkv = shape.qkv(seed as u64, dtype)?;
                let bits = bits(&qkv, &setting, &options)?;
                let kernels = Kernels::ALL[if options.bias.is_some() { 0 } else { index % 3 }];
                let what = format!("{:?} {shape:?} {dtype:?} {kernels:?}", setting.config.fold);
                composes(&what, &qkv, &setting, &bits, &options, kernels)?;
            }
        }
    }
    Ok(())
}
