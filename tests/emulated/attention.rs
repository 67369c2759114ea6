//! The attention kernels under the emulator: the table of settings times odd shapes against the f64 reference.

use crate::common::budget::Side;
use crate::common::golden::cases;
use crate::common::inputs::{assert_close, laid_out, values, Memory, Shape};
use crate::common::judge::{Expected, Shares};
use crate::common::kernels::Kernels;
use crate::common::settings::{settings, Setting};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{emulation, AttentionOptions, CompressionConfig, Fold, GroupRule, MergeStrategy};

/// Odd sizes, with every padded head size. The emulator is slow, so sizes exceed blocks and tiles by little.
const SHAPES: [Shape; 10] = [
    Shape(1, 1, 1, 1, 32),
    Shape(2, 3, 1, 2, 8),
    Shape(1, 2, 2, 59, 96),
    Shape(1, 4, 2, 97, 24),
    Shape(1, 2, 1, 97, 72),
    Shape(1, 1, 1, 130, 64),
    Shape(1, 2, 1, 70, 128),
    Shape(1, 1, 1, 140, 128),
    Shape(1, 1, 1, 67, 256),
    Shape(1, 2, 1, 257, 16),
];

/// The settings whose name contains `SFA_CASE`, or all of them.
fn wanted(setting: &Setting) -> bool {
    std::env::var("SFA_CASE").map_or(true, |part| setting.name.contains(&part))
}

/// Output and gradients of the table, by the kernels of each setting and by those for nothing hidden.
fn check(dtype: DType, memory: Memory) -> Result<()> {
    let mut shares = Shares::default();
    for setting in settings().iter().filter(|setting| wanted(setting)) {
        for (seed, shape) in SHAPES.iter().enumerate() {
            let options = (setting.options)(shape);
            let qkv = shape.qkv(seed as u64, dtype)?;
            let &Shape(batch, heads, _, tokens, dim) = shape;
            let grad_output = Shape(batch, heads, heads, tokens, dim).qkv(seed as u64 + 77, dtype)?[2].clone();
            let expected = Expected::new(Side::Cuda, &qkv, &grad_output, setting, &options)?;
            let [q, k, v] = &laid_out(&qkv, memory)?;
            // Gradients have other kernels if nothing is hidden, and if sums must have one owner; halves have yet
            // others on devices with warpgroups.
            for (dense, kernels) in [false, true]
                .into_iter()
                .flat_map(|dense| Kernels::ALL.map(|kernels| (dense, kernels)))
            {
                if (dense && setting.strategy != MergeStrategy::Off)
                    || (dtype == DType::F32 && kernels != Kernels::Plain)
                {
                    continue;
                }
                // With these, the kernels without warpgroups run.
                let extras = options.bias.is_some() || options.dropout.is_some();
                if (extras || dim > 128) && matches!(kernels, Kernels::Warpgroups | Kernels::ShortWarpgroups) {
                    continue;
                }
                let deterministic = kernels == Kernels::Deterministic;
                let what = format!(
                    "{} {shape:?} {dtype:?} {memory:?} dense {dense} {kernels:?}",
                    setting.name
                );
                let options = AttentionOptions {
                    deterministic,
                    ..options.clone()
                };
                let attend = || {
                    let (config, grad) = (&setting.config, Some(&grad_output));
                    emulation::attend([q, k, v], &expected.bits, config, &options, dense, grad)
                };
                let pass = kernels.run(attend).with_context(|| what.clone())?;
                let [dq, dk, dv] = &pass.gradients.context("gradients were asked for")?;
                expected.check(&what, [&pass.output, dq, dk, dv], &mut shares)?;
            }
        }
    }
    // A part of the table need not come near the allowance.
    match std::env::var_os("SFA_CASE") {
        Some(_) => Ok(()),
        None => shares.report(),
    }
}

#[test]
fn f32_is_as_exact_as_the_cpu() -> Result<()> {
    check(DType::F32, Memory::HeadMajor)
}

#[test]
fn f16_errs_by_its_roundings_alone() -> Result<()> {
    check(DType::F16, Memory::TokenMajor)
}

#[test]
fn bf16_errs_by_its_roundings_alone() -> Result<()> {
    check(DType::BF16, Memory::Fused)
}

#[test]
fn golden_outputs_and_gradients_agree() -> Result<()> {
    let mut checked = 0;
    for case in cases("golden.safetensors")? {
        let (Some(bits), dim) = (case.get("indicators"), case.tensor("q")?.dim(3)?) else {
            continue;
        };
        if dim % 8 != 0 {
            continue;
        }
        let inputs = [case.tensor("q")?, case.tensor("k")?, case.tensor("v")?];
        let grad_output = case.tensor("grad_output")?;
        let pass = emulation::attend(inputs, bits, &case.config, &case.options, false, Some(grad_output))
            .map_err(|error| anyhow::anyhow!("{}: {error}", case.name))?;
        assert_close(&case.name, &pass.output, case.tensor("output")?, 1.2e-5, 1.2e-5)?;
        for (name, got) in ["dq", "dk", "dv"].iter().zip(pass.gradients.expect("asked for")) {
            let expected = case.tensor(name)?;
            let largest = values(expected)?.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
            let what = format!("{} {name}", case.name);
            assert_close(&what, &got, expected, 2e-5 * largest.max(0.01), 2e-5)?;
        }
        checked += 1;
    }
    assert!(checked > 20, "{checked} golden cases");
    Ok(())
}

/// Dtypes and kernels that are given numbers that are not finite.
const BAD_CASES: [(DType, Kernels); 4] = [
    (DType::F32, Kernels::Plain),
    (DType::BF16, Kernels::Plain),
    (DType::BF16, Kernels::Warpgroups),
    (DType::BF16, Kernels::ShortWarpgroups),
];

/// A NaN or infinite token makes the rows that see it NaN throughout, and touches no other row.
#[test]
fn bad_numbers_stay_where_they_are() -> Result<()> {
    let shape = Shape(1, 2, 1, 300, 64);
    let options = AttentionOptions::default();
    for setting in settings()
        .iter()
        .filter(|setting| ["off", "off, window"].contains(&setting.name))
    {
        for (dtype, kernels) in BAD_CASES {
            // In different parts of a tile.
            for (token, part, bad) in [
                (77, 1, f64::NAN),
                (77, 1, f64::INFINITY),
                (77, 1, f64::NEG_INFINITY),
                (77, 2, f64::INFINITY),
                (77, 0, f64::NAN),
                (121, 1, f64::NEG_INFINITY),
                (121, 2, f64::INFINITY),
            ] {
                let dim = shape.4;
                let qkv = shape.qkv(3, dtype)?;
                let mut data = values(&qkv[part])?;
                data[token * dim + 5] = bad;
                let mut broken = qkv.clone();
                broken[part] = Tensor::from_vec(data, qkv[part].dims(), &Device::Cpu)?.to_dtype(dtype)?;
                let bits = Tensor::zeros((1, 2, 299), DType::U8, &Device::Cpu)?;
                for (dense, fold) in [(false, Fold::PairSum), (false, Fold::Drop), (true, Fold::PairSum)] {
                    let config = CompressionConfig {
                        fold,
                        ..setting.config.clone()
                    };
                    let run = |qkv: &[Tensor; 3]| -> Result<Vec<f64>> {
                        let inputs = [&qkv[0], &qkv[1], &qkv[2]];
                        let pass = kernels.run(|| emulation::attend(inputs, &bits, &config, &options, dense, None))?;
                        Ok(values(&pass.output)?)
                    };
                    let (clean, got) = (run(&qkv)?, run(&broken)?);
                    for (index, (clean, got)) in clean.iter().zip(&got).enumerate() {
                        let (head, row) = (index / dim / 300, index / dim % 300);
                        let sees = if part == 0 {
                            head == 0 && row == token
                        } else {
                            row >= token
                        };
                        let what = format!(
                            "{} {fold:?} {dtype:?} {kernels:?} token {token} part {part} {bad} dense {dense} row {row}",
                            setting.name
                        );
                        assert!(if sees { got.is_nan() } else { got == clean }, "{what}: {got}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// The same under `Drop`: rows see a hidden token up to their window's border, and no later row sees it.
#[test]
fn bad_numbers_of_dropped_tokens_stay_where_they_are() -> Result<()> {
    let (shape, window) = (Shape(1, 2, 1, 300, 64), 20);
    let hides = |t: usize| !t.is_multiple_of(3);
    let bits: Vec<u8> = (0..2 * 299).map(|i| hides(i % 299).into()).collect();
    let bits = Tensor::from_vec(bits, (1, 2, 299), &Device::Cpu)?;
    let options = AttentionOptions::default();
    let rules = [GroupRule::Unanimous, GroupRule::PerQueryHead];
    for ((dtype, kernels), group_rule) in BAD_CASES.into_iter().flat_map(|case| rules.map(|rule| (case, rule))) {
        let config = CompressionConfig {
            fold: Fold::Drop,
            window,
            group_rule,
            ..Default::default()
        };
        let run = |qkv: &[Tensor; 3]| -> Result<Vec<f64>> {
            let inputs = [&qkv[0], &qkv[1], &qkv[2]];
            let pass = kernels.run(|| emulation::attend(inputs, &bits, &config, &options, false, None))?;
            Ok(values(&pass.output)?)
        };
        let qkv = shape.qkv(3, dtype)?;
        let clean = run(&qkv)?;
        for (token, part, bad) in [
            (77, 1, f64::NEG_INFINITY),
            (78, 1, f64::INFINITY),
            (79, 2, f64::NAN),
            (81, 2, f64::INFINITY),
            (291, 2, f64::INFINITY),
        ] {
            let mut data = values(&qkv[part])?;
            data[token * shape.4 + 5] = bad;
            let mut broken = qkv.clone();
            broken[part] = Tensor::from_vec(data, qkv[part].dims(), &Device::Cpu)?.to_dtype(dtype)?;
            for (index, (clean, got)) in clean.iter().zip(&run(&broken)?).enumerate() {
                let row = index / shape.4 % 300;
                let sees = row >= token && (!hides(token) || row <= token + window);
                let what = format!("{dtype:?} {kernels:?} {group_rule:?} token {token} part {part} {bad} row {row}");
                assert!(if sees { got.is_nan() } else { got == clean }, "{what}: {got}");
            }
        }
    }
    Ok(())
}
