//! The attention kernels under the emulator: the table of settings times odd shapes against the f64 reference.
#![cfg(feature = "cuda-emu")]

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{emulation, AttentionOptions, HeadStrategies, MergeStrategy};
use common::golden::cases;
use common::inputs::{assert_close, laid_out, values, Memory, Shape};
use common::settings::{settings, Setting};

/// Odd everything, with every padded head size; the emulator is slow, so blocks and tiles are passed by little.
const SHAPES: [Shape; 8] = [
    Shape(1, 1, 1, 1, 32),
    Shape(2, 3, 1, 2, 8),
    Shape(1, 2, 2, 59, 96),
    Shape(1, 2, 1, 97, 72),
    Shape(1, 1, 1, 130, 64),
    Shape(1, 1, 1, 140, 128),
    Shape(1, 1, 1, 67, 256),
    Shape(1, 2, 1, 257, 16),
];

/// Bits, and attention over them, of the values that the kernels are given.
fn expected(qkv: &[Tensor; 3], setting: &Setting, options: &AttentionOptions) -> Result<(Tensor, Tensor)> {
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
    let (q, k, v) = (q?, k?, v?);
    let strategies = HeadStrategies::uniform(setting.strategy);
    let bits = reference::indicators(&q, &k, &strategies, &setting.config)?;
    let output = reference::attention(&q, &k, &v, &bits, &setting.config, options)?;
    Ok((
        bits.to_tensor(&Device::Cpu)?,
        output.to_tensor(DType::F64, &Device::Cpu)?,
    ))
}

/// The part of the table that the environment asks for, or all of it: `SFA_CASE` is a part of a setting's name.
fn wanted(setting: &Setting) -> bool {
    std::env::var("SFA_CASE").map_or(true, |part| setting.name.contains(&part))
}

fn check_forward(dtype: DType, memory: Memory, shapes: &[Shape], absolute: f64, relative: f64) -> Result<()> {
    for setting in settings().iter().filter(|setting| wanted(setting)) {
        for (seed, shape) in shapes.iter().enumerate() {
            let what = format!("{} {shape:?} {dtype:?} {memory:?}", setting.name);
            let options = (setting.options)(shape);
            let qkv = shape.qkv(seed as u64, dtype)?;
            let (bits, expected) = expected(&qkv, setting, &options)?;
            let [q, k, v] = &laid_out(&qkv, memory)?;
            let off = setting.strategy == MergeStrategy::Off;
            for dense in [false, true] {
                if dense && !off {
                    continue;
                }
                let what = format!("{what} dense {dense}");
                let got = emulation::attend([q, k, v], &bits, &setting.config, &options, dense, None)
                    .map_err(|error| anyhow::anyhow!("{what}: {error}"))?;
                assert_close(&what, &got.output, &expected, absolute, relative)?;
            }
        }
    }
    Ok(())
}

#[test]
fn f32_agrees_with_the_reference() -> Result<()> {
    check_forward(DType::F32, Memory::HeadMajor, &SHAPES, 6e-6, 6e-6)
}

/// Folded rows and weights are rounded to the dtype before the tensor cores take them.
#[test]
fn f16_agrees_with_the_reference() -> Result<()> {
    check_forward(DType::F16, Memory::HeadMajor, &SHAPES, 3e-3, 3e-3)
}

#[test]
fn bf16_views_agree_with_the_reference() -> Result<()> {
    check_forward(DType::BF16, Memory::Fused, &SHAPES, 2.4e-2, 2.4e-2)
}

/// Gradients of sum(output * grad_output); `tolerance` is relative to the largest of the tensor, or to `floor`.
fn check_backward(dtype: DType, shapes: &[Shape], tolerance: f64, floor: f64) -> Result<()> {
    for setting in settings().iter().filter(|setting| wanted(setting)) {
        for (seed, shape) in shapes.iter().enumerate() {
            let options = (setting.options)(shape);
            let qkv = shape.qkv(seed as u64, dtype)?;
            let &Shape(batch, heads, _, tokens, dim) = shape;
            let grad_output = Shape(batch, heads, heads, tokens, dim).qkv(seed as u64 + 77, dtype)?[2].clone();
            let array = |x: &Tensor| Array4::from_tensor(x);
            let (q, k, v) = (array(&qkv[0])?, array(&qkv[1])?, array(&qkv[2])?);
            let strategies = HeadStrategies::uniform(setting.strategy);
            let bits = reference::indicators(&q, &k, &strategies, &setting.config)?;
            let (dq, dk, dv) =
                reference::attention_gradients(&q, &k, &v, &array(&grad_output)?, &bits, &setting.config, &options)?;
            let bits = bits.to_tensor(&Device::Cpu)?;
            for dense in [false, true] {
                if dense && setting.strategy != MergeStrategy::Off {
                    continue;
                }
                let what = format!("{} {shape:?} {dtype:?} dense {dense}", setting.name);
                let inputs = [&qkv[0], &qkv[1], &qkv[2]];
                let pass = emulation::attend(inputs, &bits, &setting.config, &options, dense, Some(&grad_output))
                    .map_err(|error| anyhow::anyhow!("{what}: {error}"))?;
                let got = pass.gradients.expect("asked for");
                for (name, got, expected) in [("dq", &got[0], &dq), ("dk", &got[1], &dk), ("dv", &got[2], &dv)] {
                    let expected = expected.to_tensor(DType::F64, &Device::Cpu)?;
                    let largest = values(&expected)?.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
                    let absolute = tolerance * largest.max(floor);
                    assert_close(&format!("{what} {name}"), got, &expected, absolute, tolerance)?;
                }
            }
        }
    }
    Ok(())
}

const BACKWARD_SHAPES: [Shape; 7] = [
    Shape(1, 1, 1, 1, 32),
    Shape(2, 3, 1, 2, 8),
    Shape(1, 2, 2, 59, 96),
    Shape(1, 4, 2, 97, 24),
    Shape(1, 1, 1, 130, 64),
    Shape(1, 2, 1, 70, 128),
    Shape(1, 1, 1, 67, 256),
];

#[test]
fn f32_gradients_agree_with_the_reference() -> Result<()> {
    check_backward(DType::F32, &BACKWARD_SHAPES, 2e-5, 0.1)
}

#[test]
fn f16_gradients_agree_with_the_reference() -> Result<()> {
    check_backward(DType::F16, &BACKWARD_SHAPES, 4e-3, 1.0)
}

#[test]
fn bf16_gradients_agree_with_the_reference() -> Result<()> {
    check_backward(DType::BF16, &BACKWARD_SHAPES, 3e-2, 1.0)
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

/// A token that is not a number, or infinite, makes the rows that see it NaN throughout and touches no other row.
#[test]
fn bad_numbers_stay_where_they_are() -> Result<()> {
    let shape = Shape(1, 2, 1, 300, 64);
    let options = AttentionOptions::default();
    for setting in settings()
        .iter()
        .filter(|setting| ["off", "off, window"].contains(&setting.name))
    {
        for dtype in [DType::F32, DType::BF16] {
            for (part, bad) in [
                (1, f64::NAN),
                (1, f64::INFINITY),
                (1, f64::NEG_INFINITY),
                (2, f64::INFINITY),
                (0, f64::NAN),
            ] {
                let (token, dim) = (77, shape.4);
                let qkv = shape.qkv(3, dtype)?;
                let mut data = values(&qkv[part])?;
                data[token * dim + 5] = bad;
                let mut broken = qkv.clone();
                broken[part] = Tensor::from_vec(data, qkv[part].dims(), &Device::Cpu)?.to_dtype(dtype)?;
                let bits = Tensor::zeros((1, 2, 299), DType::U8, &Device::Cpu)?;
                for dense in [false, true] {
                    let run = |qkv: &[Tensor; 3]| -> Result<Vec<f64>> {
                        let inputs = [&qkv[0], &qkv[1], &qkv[2]];
                        let pass = emulation::attend(inputs, &bits, &setting.config, &options, dense, None)?;
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
                        let what = format!("{} {dtype:?} part {part} {bad} dense {dense} row {row}", setting.name);
                        assert!(if sees { got.is_nan() } else { got == clean }, "{what}: {got}");
                    }
                }
            }
        }
    }
    Ok(())
}
