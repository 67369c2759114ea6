//! A column bias on a GPU, through candle's tensors: output and gradients against the f64 reference, segments and a
//! long call against the CPU path, and repeats. Without a GPU each test prints that it is skipped.

use crate::common::budget::Side;
use crate::common::device::gpu;
use crate::common::inputs::{values, Shape};
use crate::common::judge::{largest, largest_error, Expected, Shares};
use crate::common::settings::Setting;
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::{attend, AttentionOptions, CompressionConfig, Criterion, Fold, MergePlan, MergeStrategy};

const SHAPES: [Shape; 6] = [
    Shape(2, 3, 1, 2, 8),
    Shape(1, 4, 2, 97, 24),
    Shape(1, 2, 2, 300, 160),
    Shape(2, 2, 1, 513, 64),
    Shape(1, 3, 1, 260, 128),
    Shape(1, 1, 1, 90, 256),
];

fn setting(strategy: MergeStrategy, fold: Fold, window: usize) -> Setting {
    Setting {
        name: "",
        strategy,
        config: CompressionConfig {
            fold,
            window,
            similarity_threshold: 0.35,
            criterion: Criterion::KeyKey,
            ..Default::default()
        },
        options: |_| AttentionOptions::default(),
        hides: true,
    }
}

/// From 0 to -6, and -50 here and there.
fn bias(&Shape(batch, _, kv_heads, tokens, _): &Shape) -> Result<Tensor> {
    let entry = |i: usize| match i % 13 {
        0 => -50.0,
        _ => -((i * 37 % 101) as f32) / 17.0,
    };
    let entries: Vec<f32> = (0..batch * kv_heads * tokens).map(entry).collect();
    Ok(Tensor::from_vec(entries, (batch, kv_heads, tokens), &Device::Cpu)?)
}

/// Output, and gradients of query, key, value and column bias, on this device.
fn differentiated(
    qkv: &[Tensor; 3],
    grad: &Tensor,
    bits: &Tensor,
    config: &CompressionConfig,
    options: &AttentionOptions,
    device: &Device,
) -> Result<[Tensor; 5]> {
    let vars: Vec<Var> = qkv
        .iter()
        .chain(&options.column_bias)
        .map(|x| Var::from_tensor(&x.to_device(device)?))
        .collect::<candle_core::Result<_>>()?;
    let on = |x: &Option<Tensor>| x.as_ref().map(|x| x.to_device(device)).transpose();
    let options = AttentionOptions {
        column_bias: vars.get(3).map(|bias| bias.as_tensor().clone()),
        segments: on(&options.segments)?,
        ..options.clone()
    };
    let plan = MergePlan::from_indicators(&bits.to_device(device)?, config)?;
    let output = attend(&vars[0], &vars[1], &vars[2], &plan, &options)?;
    let store = (&output * grad.to_device(device)?)?.sum_all()?.backward()?;
    let of = |i: usize| store.get(&vars[i]).cloned().context("no gradient");
    Ok([output.detach(), of(0)?, of(1)?, of(2)?, of(3)?])
}

fn fades(dtype: DType) -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let mut shares = Shares::default();
    for (at, window) in [0, 5, 32, 5000].into_iter().enumerate() {
        for (seed, shape) in SHAPES.iter().enumerate() {
            let fold = [Fold::PairSum, Fold::Mean, Fold::Drop][(at + seed) % 3];
            for (strategy, fold) in [(MergeStrategy::Similarity, fold), (MergeStrategy::Off, Fold::Drop)] {
                let &Shape(batch, heads, _, tokens, dim) = shape;
                let (qkv, setting) = (shape.qkv(seed as u64, dtype)?, setting(strategy, fold, window));
                let grad = Shape(batch, heads, heads, tokens, dim).qkv(seed as u64 + 77, dtype)?[2].clone();
                for deterministic in [false, true] {
                    let options = AttentionOptions {
                        column_bias: Some(bias(shape)?),
                        deterministic,
                        ..Default::default()
                    };
                    let what = format!("{strategy:?} {fold:?} window {window} {shape:?} {dtype:?} {deterministic}");
                    let expected = Expected::new(Side::Cuda, &qkv, &grad, &setting, &options)?;
                    let run = || differentiated(&qkv, &grad, &expected.bits, &setting.config, &options, &device);
                    let [output, dq, dk, dv, column_bias] = &run().with_context(|| what.clone())?;
                    expected.check(&what, [output, dq, dk, dv], &mut shares)?;
                    expected.check_column_bias(&what, column_bias, &mut shares)?;
                    // The query's gradient alone is added up in any order.
                    ensure!(values(&run()?[4])? == values(column_bias)?, "{what}: other bits");
                }
            }
        }
    }
    shares.report()
}

#[test]
fn columns_fade_on_a_device_in_f32() -> Result<()> {
    fades(DType::F32)
}

#[test]
fn columns_fade_on_a_device_in_f16() -> Result<()> {
    fades(DType::F16)
}

#[test]
fn columns_fade_on_a_device_in_bf16() -> Result<()> {
    fades(DType::BF16)
}

/// Segments, and a call of many tiles, give what the CPU gives.
#[test]
fn long_and_packed_calls_agree_with_the_cpu() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let shape = Shape(2, 6, 2, 1500, 64);
    let &Shape(batch, heads, _, tokens, _) = &shape;
    let numbers: Vec<u32> = (0..batch * tokens).map(|i| (i % tokens / 400) as u32).collect();
    let segments = Tensor::from_vec(numbers, (batch, tokens), &Device::Cpu)?;
    let bits = Tensor::zeros((batch, heads, tokens - 1), DType::U8, &Device::Cpu)?;
    let config = setting(MergeStrategy::Off, Fold::Drop, 32).config;
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F16, 1e-2), (DType::BF16, 6e-2)] {
        let qkv = shape.qkv(1, dtype)?;
        let grad = Shape(batch, heads, heads, tokens, 64).qkv(2, dtype)?[2].clone();
        for segments in [None, Some(segments.clone())] {
            let options = AttentionOptions {
                column_bias: Some(bias(&shape)?),
                segments,
                ..Default::default()
            };
            let run = |device| differentiated(&qkv, &grad, &bits, &config, &options, device);
            let (expected, got) = (run(&Device::Cpu)?, run(&device)?);
            for (name, (got, expected)) in ["output", "dq", "dk", "dv", "column bias"]
                .into_iter()
                .zip(got.iter().zip(&expected))
            {
                let expected = expected.to_dtype(DType::F64)?;
                let error = largest_error(&got.to_device(&Device::Cpu)?.to_dtype(DType::F64)?, &expected)?;
                let allowed = tolerance * largest(&expected)?.max(1.0);
                ensure!(error <= allowed, "{dtype:?} {name}: {error}, allowed {allowed}");
            }
        }
    }
    Ok(())
}
