//! Sliding windows in the kernels under the emulator: every size, every fold, other options beside.

use crate::common::budget::Side;
use crate::common::inputs::{laid_out, values, Memory, Shape};
use crate::common::judge::{Expected, Shares};
use crate::common::kernels::Kernels;
use crate::common::settings::Setting;
use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use candle_sfattention::emulation;
use candle_sfattention::{AttentionOptions, Fold, MergeStrategy};

use super::exact::{all_options, bits, setting, slides, Exact, CPU};

const FOLDS: [Fold; 3] = [Fold::PairSum, Fold::Mean, Fold::Drop];

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
