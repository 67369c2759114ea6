//! The KV cache's kernels under the emulator: any chunking gives the rows of attention over the whole sequence, lists are
//! as long as the CPU's, and batch rows move.
#![cfg(feature = "cuda-emu")]

mod common;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::emulation::EmulatedCache;
use candle_sfattention::{CompressedKvCache, CompressionConfig, Criterion, HeadStrategies, MergeRule, MergeStrategy};
use common::caches::part;
use common::inputs::{laid_out, values, Memory, Shape};
use common::judge::Expected;
use common::settings::{settings, Setting};

const SHAPES: [Shape; 4] = [
    Shape(2, 3, 1, 59, 16),
    Shape(1, 4, 2, 97, 72),
    Shape(1, 2, 2, 140, 64),
    Shape(1, 1, 1, 67, 256),
];

/// A criterion that decides later than a cache on a GPU can.
fn observed(setting: &Setting) -> bool {
    setting.config.criterion == Criterion::ObservedMass
}

/// The settings of the table that a cache takes.
fn cached() -> Vec<Setting> {
    let plain = |setting: &Setting| {
        let options = (setting.options)(&SHAPES[0]);
        options.causal && options.bias.is_none() && options.dropout.is_none()
    };
    let all = settings().into_iter();
    all.filter(|setting| plain(setting) && setting.config.rule == MergeRule::Causal && !observed(setting))
        .collect()
}

/// Appends chunks of the given lengths, over and over, until all tokens are in.
fn chunked(cache: &mut EmulatedCache, qkv: &[Tensor; 3], chunks: &[usize]) -> Result<Tensor> {
    let (tokens, mut start, mut outputs) = (qkv[0].dim(2)?, 0, Vec::new());
    for chunk in chunks.iter().cycle() {
        let count = (*chunk).min(tokens - start);
        if count == 0 {
            break;
        }
        let output = cache.append(&part(qkv, start, count)?, Some(&Default::default()))?;
        outputs.push(output.context("options were given")?);
        start += count;
    }
    Ok(Tensor::cat(&outputs, 2)?)
}

fn check(dtype: DType, memory: Memory) -> Result<()> {
    let mut shrunk = 0;
    for setting in cached() {
        for (seed, shape) in SHAPES.iter().enumerate() {
            let options = (setting.options)(shape);
            let qkv = shape.qkv(seed as u64, dtype)?;
            let expected = Expected::new(&qkv, &qkv[0], &setting, &options)?;
            let strategies = setting.strategies(shape)?;
            let mut on_cpu = CompressedKvCache::new(strategies.clone(), setting.config.clone(), Default::default())?;
            on_cpu.append(&qkv[0], &qkv[1], &qkv[2])?;
            let qkv = laid_out(&qkv, memory)?;
            for chunks in [&[1][..], &[shape.3], &[40, 1, 7]] {
                let what = format!("{} {shape:?} {dtype:?} chunks {chunks:?}", setting.name);
                let mut cache = EmulatedCache::new(&qkv, &strategies, &setting.config)?;
                let got = chunked(&mut cache, &qkv, chunks).with_context(|| what.clone())?;
                expected.check_output(&what, &got)?;
                assert_eq!(cache.lens()?, on_cpu.lens(), "{what}");
                let (used, allocated) = cache.bytes()?;
                assert!(used <= allocated, "{what}: {used} of {allocated} bytes");
                shrunk += usize::from(cache.lens()?.concat().iter().any(|len| *len < shape.3));
            }
        }
    }
    assert!(shrunk > 20, "{shrunk} caches hid anything");
    Ok(())
}

#[test]
fn any_chunking_in_f32_equals_attention_over_all() -> Result<()> {
    check(DType::F32, Memory::Fused)
}

#[test]
fn any_chunking_in_f16_errs_at_most_twice_as_much_as_candle() -> Result<()> {
    check(DType::F16, Memory::HeadMajor)
}

#[test]
fn any_chunking_in_bf16_errs_at_most_twice_as_much_as_candle() -> Result<()> {
    check(DType::BF16, Memory::TokenMajor)
}

/// Tokens that are only appended, strategies per head, and batch rows that were moved: as if they had always been there.
#[test]
fn rows_move_with_all_that_they_need() -> Result<()> {
    let shape = Shape(3, 4, 2, 90, 32);
    let codes = Tensor::new(&[[0u32, 1, 2, 0], [1, 1, 0, 0], [0, 0, 2, 2]], &Device::Cpu)?;
    let strategies = HeadStrategies::from_tensor(&codes)?;
    for setting in cached().iter().filter(|setting| setting.strategy != MergeStrategy::Off) {
        let config = CompressionConfig {
            criterion: Criterion::KeyKey,
            ..setting.config.clone()
        };
        let qkv = shape.qkv(5, DType::F32)?;
        let rows = [2usize, 0, 0, 1];
        let moved: Vec<Tensor> = qkv
            .iter()
            .map(|x| x.index_select(&Tensor::new(&[2u32, 0, 0, 1], &Device::Cpu)?, 0))
            .collect::<candle_core::Result<_>>()?;
        let moved: [Tensor; 3] = moved.try_into().expect("three tensors");
        let mut cache = EmulatedCache::new(&qkv, &strategies, &config)?;
        assert!(cache.append(&part(&qkv, 0, 77)?, None)?.is_none());
        let mut cache = cache.select(&rows)?;
        let got = chunked(&mut cache, &part(&moved, 77, 13)?, &[1])?;
        let mut on_cpu = CompressedKvCache::new(strategies.clone(), config, Default::default())?;
        let [q, k, v] = part(&qkv, 0, 77)?;
        on_cpu.append(&q, &k, &v)?;
        on_cpu.index_select(&Tensor::new(&[2u32, 0, 0, 1], &Device::Cpu)?)?;
        let [q, k, v] = part(&moved, 77, 13)?;
        let expected = on_cpu.append_and_attend(&q, &k, &v, &Default::default())?;
        for (got, expected) in values(&got)?.into_iter().zip(values(&expected)?) {
            assert!((got - expected).abs() <= 2e-5, "{}: {got} {expected}", setting.name);
        }
    }
    Ok(())
}

/// A bad token in the cache spoils the rows that see it, now and later, and no row before it: as on the CPU.
#[test]
fn bad_numbers_stay_with_the_rows_that_see_them() -> Result<()> {
    let shape = Shape(1, 2, 1, 60, 16);
    for setting in cached() {
        for (part, bad) in [
            (0, f32::NAN),
            (1, f32::INFINITY),
            (1, f32::NAN),
            (2, f32::NEG_INFINITY),
            (2, f32::NAN),
        ] {
            let mut qkv = shape.qkv(7, DType::F32)?;
            let mut data = qkv[part].flatten_all()?.to_vec1::<f32>()?;
            data[20 * shape.4 + 3] = bad;
            qkv[part] = Tensor::from_vec(data, qkv[part].dims(), &Device::Cpu)?;
            let strategies = setting.strategies(&shape)?;
            let mut on_cpu = CompressedKvCache::new(strategies.clone(), setting.config.clone(), Default::default())?;
            let expected = on_cpu.append_and_attend(&qkv[0], &qkv[1], &qkv[2], &Default::default())?;
            let nan = |x: &Tensor| -> Result<Vec<bool>> { Ok(values(x)?.iter().map(|x| x.is_nan()).collect()) };
            for chunks in [[1], [40]] {
                let mut cache = EmulatedCache::new(&qkv, &strategies, &setting.config)?;
                let got = chunked(&mut cache, &qkv, &chunks)?;
                let what = format!("{} part {part} {bad} chunks {chunks:?}", setting.name);
                assert_eq!(nan(&got)?, nan(&expected)?, "{what}");
            }
        }
    }
    Ok(())
}
