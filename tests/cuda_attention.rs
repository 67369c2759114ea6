//! The attention kernels under the emulator: the table of settings times odd shapes against the f64 reference.
#![cfg(feature = "cuda-emu")]

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{emulation, AttentionOptions, HeadStrategies, MergeStrategy};
use common::inputs::{assert_close, laid_out, Memory, Shape};
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
                let got = emulation::attend([q, k, v], &bits, &setting.config, &options, dense)
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
