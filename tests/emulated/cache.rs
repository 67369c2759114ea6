//! The KV cache's kernels under the emulator: any chunking gives the rows of attention over the whole sequence, lists
//! are as long as on the CPU, and batch rows move.

use crate::common::budget::Side;
use crate::common::caches::{part, part_options, with_thresholds};
use crate::common::inputs::{assert_close, laid_out, values, Memory, Shape};
use crate::common::judge::{Expected, Shares};
use crate::common::kernels::chunked;
use crate::common::settings::{settings, Setting};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::emulation::EmulatedCache;
use candle_sfattention::{
    attend, AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Criterion, HeadStrategies, MergePlan,
    MergeRule, MergeStrategy,
};

const SHAPES: [Shape; 4] = [
    Shape(2, 3, 1, 59, 16),
    Shape(1, 4, 2, 97, 72),
    Shape(1, 2, 2, 140, 64),
    Shape(1, 1, 1, 67, 256),
];

/// The settings of the table that a cache takes.
fn cached() -> Vec<Setting> {
    let causal = |setting: &Setting| (setting.options)(&SHAPES[0]).causal;
    let all = settings().into_iter();
    all.filter(|setting| causal(setting) && setting.config.rule == MergeRule::Causal)
        .collect()
}

fn check(dtype: DType, memory: Memory) -> Result<()> {
    let (mut shrunk, mut shares) = (0, Shares::default());
    for setting in cached() {
        for (seed, shape) in SHAPES.iter().enumerate() {
            let options = (setting.options)(shape);
            let qkv = shape.qkv(seed as u64, dtype)?;
            let expected = Expected::new(Side::Cuda, &qkv, &qkv[0], &setting, &options)?;
            let strategies = setting.strategies(shape)?;
            let mut on_cpu = CompressedKvCache::new(strategies.clone(), setting.config.clone(), Default::default())?;
            on_cpu.append_and_attend(&qkv[0], &qkv[1], &qkv[2], &options)?;
            let qkv = laid_out(&qkv, memory)?;
            for chunks in [&[1][..], &[shape.3], &[40, 1, 7]] {
                let what = format!("{} {shape:?} {dtype:?} chunks {chunks:?}", setting.name);
                let mut cache = EmulatedCache::new(&qkv, &strategies, &setting.config, &Default::default())?;
                let got = chunked(&mut cache, &qkv, &options, chunks).with_context(|| what.clone())?;
                expected.check_output(&what, &got, &mut shares)?;
                assert_eq!(cache.lens()?, on_cpu.lens(), "{what}");
                let (used, allocated) = cache.bytes()?;
                assert!(used <= allocated, "{what}: {used} of {allocated} bytes");
                shrunk += usize::from(cache.lens()?.concat().iter().any(|len| *len < shape.3));
            }
        }
    }
    assert!(shrunk > 20, "{shrunk} caches hid anything");
    shares.report()
}

#[test]
fn any_chunking_in_f32_equals_attention_over_all() -> Result<()> {
    check(DType::F32, Memory::Fused)
}

#[test]
fn any_chunking_in_f16_errs_by_its_roundings_alone() -> Result<()> {
    check(DType::F16, Memory::HeadMajor)
}

#[test]
fn any_chunking_in_bf16_errs_by_its_roundings_alone() -> Result<()> {
    check(DType::BF16, Memory::TokenMajor)
}

/// After appends without attention, with strategies per head, selected batch rows continue as if they had always been
/// there.
#[test]
fn rows_move_with_all_that_they_need() -> Result<()> {
    let shape = Shape(3, 4, 2, 90, 32);
    let codes = Tensor::new(&[[0u32, 1, 2, 0], [1, 1, 0, 0], [0, 0, 2, 2]], &Device::Cpu)?;
    let strategies = HeadStrategies::from_tensor(&codes)?;
    let plain = AttentionOptions::default();
    for setting in cached().iter().filter(|setting| setting.strategy != MergeStrategy::Off) {
        let criterion = match setting.config.criterion {
            Criterion::ObservedMass => Criterion::ObservedMass,
            _ => Criterion::KeyKey,
        };
        let config = CompressionConfig {
            criterion,
            ..setting.config.clone()
        };
        let strategies = with_thresholds(strategies.clone(), &shape, &config)?;
        let qkv = shape.qkv(5, DType::F32)?;
        let rows = [2usize, 0, 0, 1];
        let moved: Vec<Tensor> = qkv
            .iter()
            .map(|x| x.index_select(&Tensor::new(&[2u32, 0, 0, 1], &Device::Cpu)?, 0))
            .collect::<candle_core::Result<_>>()?;
        let moved: [Tensor; 3] = moved.try_into().expect("three tensors");
        let mut cache = EmulatedCache::new(&qkv, &strategies, &config, &Default::default())?;
        assert!(cache.append(&part(&qkv, 0, 77)?, None)?.is_none());
        let mut cache = cache.select(&rows)?;
        let got = chunked(&mut cache, &part(&moved, 77, 13)?, &plain, &[1])?;
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

/// A token that is not finite makes the rows that see it NaN, now and later, and no earlier row, as on the CPU.
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
            let options = (setting.options)(&shape);
            let expected = on_cpu.append_and_attend(&qkv[0], &qkv[1], &qkv[2], &options)?;
            let nan = |x: &Tensor| -> Result<Vec<bool>> { Ok(values(x)?.iter().map(|x| x.is_nan()).collect()) };
            for chunks in [[1], [40]] {
                let mut cache = EmulatedCache::new(&qkv, &strategies, &setting.config, &Default::default())?;
                let got = chunked(&mut cache, &qkv, &options, &chunks)?;
                let what = format!("{} part {part} {bad} chunks {chunks:?}", setting.name);
                assert_eq!(nan(&got)?, nan(&expected)?, "{what}");
            }
        }
    }
    Ok(())
}

/// Storage in another dtype than the inputs': keys, values, queries and results are rounded as on the CPU.
#[test]
fn storage_in_another_dtype() -> Result<()> {
    let shape = Shape(1, 4, 2, 97, 32);
    for setting in cached() {
        for (dtype, storage, allowed) in [
            (DType::BF16, DType::F32, 2f64.powi(-7)),
            (DType::F32, DType::F16, 2f64.powi(-8)),
            (DType::F16, DType::BF16, 2f64.powi(-5)),
        ] {
            let (qkv, options) = (shape.qkv(3, dtype)?, (setting.options)(&shape));
            let (strategies, stored) = (
                setting.strategies(&shape)?,
                CacheOptions {
                    storage: Some(storage.try_into()?),
                    ..Default::default()
                },
            );
            let mut on_cpu = CompressedKvCache::new(strategies.clone(), setting.config.clone(), stored.clone())?;
            let mut cache = EmulatedCache::new(&qkv, &strategies, &setting.config, &stored)?;
            // Queries are rounded first, so that both caches decide alike.
            let rounded = qkv[0].to_dtype(storage)?.to_dtype(dtype)?;
            let expected = on_cpu.append_and_attend(&rounded, &qkv[1], &qkv[2], &options)?;
            let got = chunked(&mut cache, &qkv, &options, &[30, 1])?;
            let what = format!("{} {dtype:?} in {storage:?}", setting.name);
            assert_eq!(got.dtype(), dtype, "{what}");
            assert_eq!(cache.lens()?, on_cpu.lens(), "{what}");
            for (got, expected) in values(&got)?.into_iter().zip(values(&expected)?) {
                let error = (got - expected).abs();
                assert!(error <= allowed * expected.abs().max(1.0), "{what}: {got} {expected}");
            }
        }
    }
    Ok(())
}

/// The limit counts the entries that exist, as on the CPU, and a refused call changes nothing.
#[test]
fn a_limit_is_reached_where_the_cpu_reaches_it() -> Result<()> {
    let shape = Shape(2, 4, 2, 120, 16);
    for setting in cached().iter().filter(|setting| setting.hides) {
        let (qkv, options) = (shape.qkv(8, DType::F32)?, (setting.options)(&shape));
        let strategies = setting.strategies(&shape)?;
        let limit = CacheOptions {
            max_entries: Some(70),
            ..Default::default()
        };
        let mut on_cpu = CompressedKvCache::new(strategies.clone(), setting.config.clone(), limit.clone())?;
        let mut cache = EmulatedCache::new(&qkv, &strategies, &setting.config, &limit)?;
        for (start, count) in [
            (0, 60),
            (60, 8),
            (68, 1),
            (69, 1),
            (70, 1),
            (71, 20),
            (71, 3),
            (74, 30),
            (74, 1),
        ] {
            let ([q, k, v], options) = (part(&qkv, start, count)?, part_options(&options, start, count)?);
            if on_cpu.seq_len() != start {
                continue;
            }
            let expected = on_cpu.append_and_attend(&q, &k, &v, &options);
            let got = cache.append(&[q, k, v], Some(&options));
            let what = format!("{} {count} tokens at {start}", setting.name);
            assert_eq!(got.is_ok(), expected.is_ok(), "{what}");
            assert_eq!(cache.lens()?, on_cpu.lens(), "{what}");
        }
    }
    Ok(())
}

/// Given scores: any chunking leaves the rows of a plan by all scores and the entries that it keeps, also after a way
/// to the CPU and back.
#[test]
fn given_scores_decide_in_a_cache() -> Result<()> {
    let shape = Shape(2, 4, 2, 60, 16);
    let score = |i: usize| match i % 17 {
        0 => f32::NAN,
        1 => f32::NEG_INFINITY,
        i => (i * 7 % 17) as f32 / 4.0,
    };
    let scores: Vec<f32> = (0..2 * 2 * 60).map(|i| score(i * 5)).collect();
    let scores = Tensor::from_vec(scores, (2, 2, 60), &Device::Cpu)?;
    let thresholds = Tensor::new(&[2.0f64, 2.5, 3.0, 2.2], &Device::Cpu)?;
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity).with_thresholds(&thresholds)?;
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F16, 5e-3)] {
        let qkv = shape.qkv(3, dtype)?;
        for (window, sinks, softcap) in [(0, 0, None), (1, 2, None), (7, 3, Some(5.0)), (70, 0, None)] {
            let config = CompressionConfig {
                criterion: Criterion::Given,
                window,
                sinks,
                ..CompressionConfig::calibrated()
            };
            let options = AttentionOptions {
                softcap,
                ..Default::default()
            };
            let plan = MergePlan::from_scores(&scores, &strategies, &config, true)?;
            let expected = attend(&qkv[0], &qkv[1], &qkv[2], &plan, &options)?;
            let hidden = &plan.stats()?.per_head;
            for chunks in [&[1usize][..], &[60], &[17, 1, 1, 5]] {
                let mut cache = EmulatedCache::new(&qkv, &strategies, &config, &Default::default())?;
                let (mut rows, mut start) = (Vec::new(), 0);
                for chunk in chunks.iter().cycle() {
                    let count = (*chunk).min(60 - start);
                    if count == 0 {
                        break;
                    }
                    let part = part(&qkv, start, count)?;
                    let scores = scores.narrow(2, start, count)?.contiguous()?;
                    let output = cache.append_scored(&part, Some(&scores), Some(&options))?;
                    rows.push(output.context("no rows")?);
                    start += count;
                    if start % 4 == 1 {
                        cache = EmulatedCache::from_cpu(&cache.to_cpu()?, &Default::default(), dtype)?;
                    }
                }
                let what = format!("{dtype:?}, window {window}, chunks {chunks:?}");
                assert_close(&what, &Tensor::cat(&rows, 2)?, &expected, tolerance, tolerance)?;
                for (lens, hidden) in cache.lens()?.iter().zip(hidden) {
                    let kept: Vec<_> = hidden.iter().step_by(2).map(|hidden| 60 - hidden).collect();
                    assert_eq!(*lens, kept, "{what}");
                }
                let mut filled = EmulatedCache::new(&qkv, &strategies, &config, &Default::default())?;
                filled.append_scored(&part(&qkv, 0, 59)?, Some(&scores.narrow(2, 0, 59)?.contiguous()?), None)?;
                let last = scores.narrow(2, 59, 1)?.contiguous()?;
                let row = filled.append_scored(&part(&qkv, 59, 1)?, Some(&last), Some(&options))?;
                let row = row.context("no row")?;
                assert_close(&what, &row, &expected.narrow(2, 59, 1)?, tolerance, tolerance)?;
            }
            assert!(window == 70 || hidden[0][0] > 10, "{hidden:?}");
        }
    }
    Ok(())
}
