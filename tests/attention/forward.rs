//! A table of settings times a table of odd shapes: the CPU path against the f64 reference, in every dtype.

use crate::common::again::{full_name, on_every_instruction_set, on_every_kernel, KERNEL};
use crate::common::budget::Side;
use crate::common::inputs::{assert_close, laid_out, Memory, Shape};
use crate::common::judge::{Expected, Shares};
use crate::common::settings::{reference_bits, settings, Setting};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{attend, compressed_attention, AttentionOptions, HeadStrategies, MergePlan};
use std::process::Command;

/// Odd sizes: one token, one more than a lane, a block and a tile, head sizes that fill no register, GQA and MQA.
const SHAPES: [Shape; 12] = [
    Shape(1, 1, 1, 1, 32),
    Shape(2, 3, 1, 2, 8),
    Shape(2, 2, 2, 33, 1),
    Shape(1, 4, 2, 59, 59),
    Shape(3, 2, 1, 64, 16),
    Shape(1, 6, 3, 97, 96),
    Shape(2, 2, 2, 129, 32),
    Shape(1, 4, 1, 257, 64),
    Shape(1, 2, 1, 300, 128),
    Shape(1, 1, 1, 259, 256),
    Shape(1, 2, 2, 705, 24),
    Shape(1, 1, 1, 1153, 20),
];

/// Logits reach 20 here, where the f32 spacing is about 1e-6.
const F32_TOLERANCE: f64 = 6e-6;

/// The reference's output for the values that the fast path was given.
fn reference_output(
    qkv: &[Tensor; 3],
    setting: &Setting,
    strategies: &HeadStrategies,
    options: &AttentionOptions,
) -> Result<(Tensor, Tensor)> {
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
    let (q, k, v) = (q?, k?, v?);
    let bits = reference_bits([&q, &k, &v], strategies, &setting.config, options)?;
    let output = reference::attention(&q, &k, &v, &bits, &setting.config, options)?;
    Ok((
        bits.to_tensor(&Device::Cpu)?,
        output.to_tensor(DType::F64, &Device::Cpu)?,
    ))
}

fn check(
    dtype: DType,
    memory: Memory,
    shapes: &[Shape],
    judge: impl Fn(&str, &Tensor, &Tensor) -> Result<()>,
) -> Result<()> {
    for setting in settings() {
        for (seed, shape) in shapes.iter().enumerate() {
            let what = format!("{} {shape:?} {dtype:?} {memory:?}", setting.name);
            let options = (setting.options)(shape);
            let qkv = shape.qkv(seed as u64, dtype)?;
            let strategies = setting.strategies(shape)?;
            let (bits, expected) = reference_output(&qkv, &setting, &strategies, &options)?;
            let [q, k, v] = laid_out(&qkv, memory)?;
            let result = compressed_attention(&q, &k, &v, &strategies, &setting.config, &options)?;
            assert_eq!(result.output.dtype(), dtype, "{what}");
            assert_eq!(
                result.plan.indicators().to_vec3::<u8>()?,
                bits.to_vec3::<u8>()?,
                "{what}"
            );
            if setting.hides && shape.3 >= 59 {
                assert!(
                    result.plan.stats()?.hidden > 0,
                    "{what}: nothing hidden, the case tests nothing"
                );
            }
            judge(&what, &result.output, &expected)?;
        }
    }
    Ok(())
}

#[test]
fn f32_agrees_with_the_reference() -> Result<()> {
    check(DType::F32, Memory::HeadMajor, &SHAPES, |what, got, expected| {
        Ok(assert_close(what, got, expected, F32_TOLERANCE, F32_TOLERANCE)?)
    })
}

#[test]
fn f32_views_agree_with_the_reference() -> Result<()> {
    check(DType::F32, Memory::Fused, &SHAPES[..8], |what, got, expected| {
        Ok(assert_close(what, got, expected, F32_TOLERANCE, F32_TOLERANCE)?)
    })
}

#[test]
fn f64_agrees_with_the_reference() -> Result<()> {
    check(DType::F64, Memory::TokenMajor, &SHAPES[..9], |what, got, expected| {
        Ok(assert_close(what, got, expected, 1e-13, 1e-13)?)
    })
}

/// If halves are multiplied in f32, sums are f32 and the output is rounded once, so the error is one rounding of the
/// exact result. If they are multiplied in bf16 pairs, weights and folded rows are rounded too: to 16 bits in f16, and
/// to 8 bits in bf16.
#[test]
fn half_types_round_once() -> Result<()> {
    let off = std::env::var_os(KERNEL).is_some_and(|kernel| kernel == "off");
    // Half a unit in the last place, a little for the f32 sums before it, and the roundings of weights and rows: they
    // enter sums of values up to 4, through logits up to 20.
    for (dtype, unit, parts) in [
        (DType::F16, 2f64.powi(-11), 2f64.powi(-16)),
        (DType::BF16, 2f64.powi(-8), 2f64.powi(-8)),
    ] {
        let rows = if off { 0.0 } else { 4.0 * parts };
        check(dtype, Memory::TokenMajor, &SHAPES[..8], |what, got, expected| {
            Ok(assert_close(what, got, expected, 4e-6 + rows, unit * 1.01)?)
        })?;
    }
    Ok(())
}

/// In every setting, and in every shape with nothing hidden, each element errs by no more than its last rounding and
/// the intermediate roundings explain.
#[test]
fn half_types_err_by_their_roundings_alone() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let mut shares = Shares::default();
        for setting in settings() {
            let few = if setting.name == "off" { SHAPES.len() } else { 7 };
            for (seed, shape) in SHAPES[..few].iter().enumerate() {
                let qkv = shape.qkv(seed as u64, dtype)?;
                let options = (setting.options)(shape);
                let expected = Expected::new(Side::Cpu, &qkv, &qkv[0], &setting, &options)?;
                let plan = MergePlan::from_indicators(&expected.bits, &setting.config)?;
                let output = attend(&qkv[0], &qkv[1], &qkv[2], &plan, &options)?;
                expected.check_output(&format!("{} {shape:?} {dtype:?}", setting.name), &output, &mut shares)?;
            }
        }
        shares.report()?;
    }
    Ok(())
}

/// The tests of halves again, with every kind of half instructions that this CPU has, and with none.
#[test]
fn half_types_agree_on_every_kernel() -> Result<()> {
    let tests = ["half_types_round_once", "half_types_err_by_their_roundings_alone"];
    on_every_kernel(module_path!(), &tests)
}

/// The whole table in f32 again, with the loops of each instruction set.
#[test]
fn every_instruction_set_agrees() -> Result<()> {
    on_every_instruction_set(module_path!(), &["f32_agrees_with_the_reference"])
}

#[test]
fn a_kernel_that_is_not_there_is_refused() -> Result<()> {
    let output = Command::new(std::env::current_exe()?)
        .env(KERNEL, "fast")
        .args(["--exact", &full_name(module_path!(), "half_types_round_once")])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && text.contains("expected one of"), "{text}");
    Ok(())
}
