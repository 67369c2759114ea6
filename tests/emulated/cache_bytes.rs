//! A cache on a device that stores closed chains in 8 bits: the reference's rounding, everywhere, and the CPU's codes.

use crate::cache_rollback::content;
use crate::common::caches::{part, strategies};
use crate::common::files::{Contents, TempFile};
use crate::common::inputs::{assert_close, values, Shape};
use crate::common::kernels::chunked;
use crate::common::saved::bits;
use crate::common::settings::{config, reference_bits};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::emulation::{launches, EmulatedCache};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{
    AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Criterion, Fold, HeadStrategies,
    MergeStrategy, Storage,
};
use std::collections::BTreeMap;

pub const BYTES: [Storage; 2] = [Storage::I8, Storage::F8E4M3];

pub fn stored(storage: Storage) -> CacheOptions {
    CacheOptions {
        storage: Some(storage),
        ..Default::default()
    }
}

/// Every criterion and fold that needs no scores, and heads that are off.
fn case(index: usize, shape: &Shape) -> Result<(CompressionConfig, HeadStrategies)> {
    let cases = [
        (Criterion::KeyKey, Fold::Mean, 5),
        (Criterion::KeyKey, Fold::Drop, 0),
        (Criterion::QueryKey, Fold::PairSum, 4),
        (Criterion::ObservedMass, Fold::Drop, 6),
    ];
    let Some((criterion, fold, window)) = cases.get(index % 5).copied() else {
        // Windows do not matter where nothing is hidden: with 0 the reference rounds all but the newest token.
        let off = HeadStrategies::uniform(MergeStrategy::Off);
        return Ok((config(Fold::Drop, 0, Criterion::KeyKey), off));
    };
    let config = config(fold, window, criterion);
    let strategies = strategies(0, shape, &config)?;
    Ok((config, strategies))
}

fn expected(
    qkv: &[Tensor; 3],
    (config, strategies): &(CompressionConfig, HeadStrategies),
    storage: Storage,
    options: &AttentionOptions,
) -> Result<Tensor> {
    let wide = |x: &Tensor| Ok::<_, anyhow::Error>(Array4::from_tensor(&x.to_dtype(DType::F64)?)?);
    let (q, k, v) = (wide(&qkv[0])?, wide(&qkv[1])?, wide(&qkv[2])?);
    let bits = reference_bits([&q, &k, &v], strategies, config, options)?;
    let output = reference::attention_in_bytes((&q, &k, &v), &bits, storage, config, options)?;
    Ok(output.to_tensor(DType::F64, &Device::Cpu)?)
}

/// A first chunk, a later one and single tokens: kernels for each, and head sizes with decode kernels and without.
fn check(dtype: DType, tolerance: f64) -> Result<()> {
    let mut number = 0;
    for storage in BYTES {
        for dim in [16, 64, 72, 128, 256] {
            for group in 1..=3 {
                let shape = Shape(1, group, 1, 90, dim);
                let qkv = shape.qkv(number as u64, dtype)?;
                let options = match number % 4 {
                    1 => AttentionOptions {
                        sliding_window: Some(37),
                        ..Default::default()
                    },
                    3 => AttentionOptions {
                        softcap: Some(4.0),
                        ..Default::default()
                    },
                    _ => AttentionOptions::default(),
                };
                let case = case(number, &shape)?;
                let expected = expected(&qkv, &case, storage, &options)?;
                for chunks in [&[70][..], &[40, 1, 9, 1, 1, 1]] {
                    let mut cache = EmulatedCache::new(&qkv, &case.1, &case.0, &stored(storage))?;
                    let name = format!("{storage} {dtype:?} {shape:?} case {} {chunks:?}", number % 5);
                    let got = chunked(&mut cache, &qkv, &options, chunks).with_context(|| name.clone())?;
                    assert_close(&name, &got, &expected, tolerance, tolerance)?;
                }
                number += 1;
            }
        }
    }
    Ok(())
}

#[test]
fn rows_in_f32_equal_the_reference() -> Result<()> {
    check(DType::F32, 1e-5)
}

#[test]
fn rows_in_f16_round_no_more() -> Result<()> {
    check(DType::F16, 2e-3)
}

#[test]
fn rows_in_bf16_round_no_more() -> Result<()> {
    check(DType::BF16, 1.6e-2)
}

/// Single tokens in halves past a page of closed chains, at every head size that has a kernel, and at two that have
/// none; values of all magnitudes, some of them zero.
#[test]
fn tokens_decode_from_codes() -> Result<()> {
    for storage in BYTES {
        for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 1.6e-2)] {
            for (dim, group) in [(16, 1), (48, 2), (64, 9), (96, 1), (112, 4), (128, 2), (40, 2)] {
                let shape = Shape(1, group, 1, 160, dim);
                let [q, k, v] = shape.qkv(dim as u64, dtype)?;
                // Values from 2^-9 to 2^3.
                let sizes: Vec<f32> = (0..160).map(|t| ((t * 5 % 13) as f32 - 9.0).exp2()).collect();
                let sizes: Vec<f32> = sizes
                    .iter()
                    .enumerate()
                    .map(|(t, x)| if t % 31 == 7 { 0.0 } else { *x })
                    .collect();
                let sizes = Tensor::from_vec(sizes, (1, 1, 160, 1), &Device::Cpu)?.to_dtype(dtype)?;
                let qkv = [q, k, v.broadcast_mul(&sizes)?];
                for number in [0, 4] {
                    let case = case(number, &shape)?;
                    let expected = expected(&qkv, &case, storage, &Default::default())?;
                    let mut cache = EmulatedCache::new(&qkv, &case.1, &case.0, &stored(storage))?;
                    cache.append(&part(&qkv, 0, 140)?, Some(&Default::default()))?;
                    let launched = launches();
                    let got = chunked(&mut cache, &part(&qkv, 140, 20)?, &Default::default(), &[1])?;
                    let name = format!("{storage} {dtype:?} {shape:?} case {number}");
                    let each = if dim % 16 == 0 { 1 } else { 2 };
                    assert_eq!(launches() - launched, 20 * each, "{name}: launches");
                    assert_close(&name, &got, &expected.narrow(2, 140, 20)?, tolerance, tolerance)?;
                }
            }
        }
    }
    Ok(())
}

/// Tokens of every magnitude, down to subnormal ones and zeros, get the CPU's codes and scales, bit for bit.
#[test]
fn codes_are_those_of_the_cpu() -> Result<()> {
    let shape = Shape(1, 2, 2, 140, 24);
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let config = CompressionConfig::pretrained();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let [q, k, v] = shape.qkv(5, DType::F32)?;
        // Up to the largest numbers of the dtype.
        let (step, least) = if dtype == DType::F16 {
            (0.25, -24.0)
        } else {
            (1.9, -140.0)
        };
        let power = |t: usize| {
            if t % 47 == 9 {
                0.0
            } else {
                (t as f32 * step + least).exp2()
            }
        };
        let powers: Vec<f32> = (0..140).map(power).collect();
        let powers = Tensor::from_vec(powers, (1, 1, 140, 1), &Device::Cpu)?;
        // Whole and half codes: rows whose scale is 1, or nearly.
        let halves: Vec<f32> = (0..140 * 24)
            .map(|i| {
                if i % 24 == 0 {
                    127.0
                } else {
                    (i * 37 % 509) as f32 / 2.0 - 127.0
                }
            })
            .collect();
        let halves = Tensor::from_vec(halves, (1, 1, 140, 24), &Device::Cpu)?.broadcast_as((1, 2, 140, 24))?;
        let of = |x: &Tensor| x.to_dtype(dtype);
        let qkv = [
            of(&q)?,
            of(&k.broadcast_mul(&powers)?)?,
            of(&Tensor::cat(&[v.narrow(2, 0, 70)?, halves.narrow(2, 0, 70)?], 2)?)?,
        ];
        for storage in BYTES {
            let mut on_cpu = CompressedKvCache::new(off.clone(), config.clone(), stored(storage))?;
            on_cpu.append(&qkv[0], &qkv[1], &qkv[2])?;
            let file = TempFile::new();
            on_cpu.save(&file.0)?;
            let expected = Contents::read(&file.0)?;
            for chunks in [&[140][..], &[60, 20, 1]] {
                let mut cache = EmulatedCache::new(&qkv, &off, &config, &stored(storage))?;
                let mut start = 0;
                for chunk in chunks.iter().cycle() {
                    let count = (*chunk).min(140 - start);
                    if count == 0 {
                        break;
                    }
                    cache.append(&part(&qkv, start, count)?, None)?;
                    start += count;
                }
                assert!(content(&cache)? == expected, "{storage} {dtype:?} {chunks:?}");
            }
        }
    }
    Ok(())
}

/// The codes, scales and tokens of closed chains.
fn entries(contents: Contents) -> BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)> {
    let mut tensors = contents.tensors;
    tensors.retain(|name, _| ["codes", "scales", "tokens"].iter().any(|end| name.ends_with(end)));
    tensors
}

/// From the CPU to a device and back, with every criterion and fold: codes and scales stay, and both go on alike.
#[test]
fn codes_stay_between_devices() -> Result<()> {
    let shape = Shape(2, 4, 2, 130, 32);
    for storage in BYTES {
        for number in 0..5 {
            for (dtype, allowed) in [(DType::F32, 1e-5), (DType::BF16, 1.6e-2)] {
                for sliding_window in [None, Some(50)] {
                    let (config, strategies) = case(number, &shape)?;
                    let options = AttentionOptions {
                        sliding_window,
                        ..Default::default()
                    };
                    let name = format!("{storage} case {number} {dtype:?} {sliding_window:?}");
                    let qkv = shape.qkv(number as u64, dtype)?;
                    let mut on_cpu = CompressedKvCache::new(strategies, config, stored(storage))?;
                    let [q, k, v] = part(&qkv, 0, 100)?;
                    on_cpu.append_and_attend(&q, &k, &v, &options)?;
                    let file = TempFile::new();
                    on_cpu.save(&file.0)?;
                    let before = entries(Contents::read(&file.0)?);
                    assert!(
                        before.values().any(|(_, _, bytes)| bytes.iter().any(|byte| *byte != 0)),
                        "{name}"
                    );
                    let mut moved = EmulatedCache::from_cpu(&on_cpu, &stored(storage), dtype)?;
                    assert!(entries(content(&moved)?) == before, "{name}: other entries");
                    assert_eq!(moved.lens()?, on_cpu.lens(), "{name}");
                    for (start, count) in [(100, 1), (101, 9), (110, 1)] {
                        let [q, k, v] = part(&qkv, start, count)?;
                        let expected = on_cpu.append_and_attend(&q, &k, &v, &options)?;
                        let got = moved.append(&[q, k, v], Some(&options))?.context("rows")?;
                        assert_close(&name, &got, &expected, allowed, allowed)?;
                    }
                    let mut back = moved.to_cpu()?;
                    let [q, k, v] = part(&qkv, 111, 1)?;
                    let expected = on_cpu.append_and_attend(&q, &k, &v, &options)?;
                    let got = back.append_and_attend(&q, &k, &v, &options)?;
                    assert_close(&name, &got, &expected, allowed, allowed)?;
                    assert_eq!(back.lens(), on_cpu.lens(), "{name}");
                }
            }
        }
    }
    Ok(())
}

/// Heads that are off beside heads that merge work on a device, but their windows do not come from the CPU.
#[test]
fn mixed_heads_are_refused_on_their_way_to_a_device() -> Result<()> {
    let shape = Shape(1, 2, 2, 60, 16);
    let (config, _) = case(0, &shape)?;
    let mixed = HeadStrategies::per_head(vec![MergeStrategy::Similarity, MergeStrategy::Off]);
    let qkv = shape.qkv(1, DType::F32)?;
    let mut cache = EmulatedCache::new(&qkv, &mixed, &config, &stored(Storage::I8))?;
    chunked(&mut cache, &qkv, &Default::default(), &[50, 1])?;
    let on_cpu = cache.to_cpu()?;
    assert_eq!(on_cpu.lens(), cache.lens()?);
    let message = EmulatedCache::from_cpu(&on_cpu, &stored(Storage::I8), DType::F32).err();
    let message = message.context("an error")?.to_string();
    assert!(
        message.contains("i8") && message.contains("MergeStrategy::Off"),
        "{message}"
    );
    Ok(())
}

/// A row that sees a token that is not finite is NaN, now and later; no other row is.
#[test]
fn nan_stays_nan() -> Result<()> {
    for (dtype, dim) in [(DType::F32, 16), (DType::F16, 64), (DType::BF16, 128)] {
        let shape = Shape(1, 2, 1, 60, dim);
        for storage in BYTES {
            for (which, bad) in [(1, f32::NAN), (2, f32::INFINITY)] {
                let mut qkv = shape.qkv(2, DType::F32)?;
                let mut data = qkv[which].flatten_all()?.to_vec1::<f32>()?;
                data[20 * dim + 3] = bad;
                qkv[which] = Tensor::from_vec(data, qkv[which].dims(), &Device::Cpu)?;
                let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(|x| x.to_dtype(dtype));
                let qkv = [q?, k?, v?];
                let off = HeadStrategies::uniform(MergeStrategy::Off);
                let config = config(Fold::Drop, 3, Criterion::KeyKey);
                for chunks in [&[1][..], &[40, 1, 1], &[30, 9]] {
                    let mut cache = EmulatedCache::new(&qkv, &off, &config, &stored(storage))?;
                    let got = values(&chunked(&mut cache, &qkv, &Default::default(), chunks)?)?;
                    let rows = got.chunks_exact(dim).enumerate();
                    for (row, numbers) in rows {
                        let seen = row % 60 >= 20;
                        let right = numbers.iter().all(|x| x.is_nan() == seen);
                        assert!(right, "{storage} {dtype:?} {bad} {chunks:?}: row {row}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// Forks share pages and then copy them, and a mark is exact: codes and scales stay.
#[test]
fn forks_and_marks_keep_codes() -> Result<()> {
    let shape = Shape(2, 4, 2, 150, 16);
    for storage in BYTES {
        for number in 0..5 {
            let (config, strategies) = case(number, &shape)?;
            let options = AttentionOptions::default();
            let qkv = shape.qkv(number as u64, DType::BF16)?;
            let new = || EmulatedCache::new(&qkv, &strategies, &config, &stored(storage));
            let append = |cache: &mut EmulatedCache, start, count| -> Result<Tensor> {
                cache
                    .append(&part(&qkv, start, count)?, Some(&options))?
                    .context("rows")
            };
            let name = format!("{storage} case {number}");
            let (mut cache, mut fresh) = (new()?, new()?);
            for cache in [&mut cache, &mut fresh] {
                append(cache, 0, 90)?;
            }
            let mut fork = cache.select(&[0, 1])?;
            let mark = cache.mark()?;
            append(&mut cache, 90, 40)?;
            append(&mut cache, 130, 1)?;
            assert!(content(&fork)? == content(&fresh)?, "{name}: a fork");
            fork.unshare()?;
            assert!(content(&fork)? == content(&fresh)?, "{name}: a fork of its own");
            let mut cache = cache.at_mark(&mark)?;
            assert!(content(&cache)? == content(&fresh)?, "{name}: a mark");
            for (start, count) in [(90, 1), (91, 8), (99, 1)] {
                let expected = bits(&append(&mut fresh, start, count)?)?;
                assert_eq!(
                    bits(&append(&mut cache, start, count)?)?,
                    expected,
                    "{name}: {count} at {start}"
                );
                assert_eq!(
                    bits(&append(&mut fork, start, count)?)?,
                    expected,
                    "{name}: {count} at {start}"
                );
            }
            assert!(content(&cache)? == content(&fork)?, "{name}: after all");
            assert!(!cache.truncate(95)?, "{name}: 8 bits do not give raw tokens back");
        }
    }
    Ok(())
}

/// At D = 128 closed chains take at most 0.52 of bf16's bytes, in use and allocated.
#[test]
fn bytes_are_half_of_halves() -> Result<()> {
    let shape = Shape(1, 1, 1, 2000, 128);
    let qkv = shape.qkv(1, DType::BF16)?;
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let config = config(Fold::Drop, 8, Criterion::KeyKey);
    let bytes = |storage| -> Result<(usize, usize)> {
        let mut cache = EmulatedCache::new(&qkv, &off, &config, &stored(storage))?;
        cache.append(&qkv, None)?;
        Ok(cache.bytes()?)
    };
    let halves = bytes(Storage::BF16)?;
    for storage in BYTES {
        let (used, allocated) = bytes(storage)?;
        assert!(used <= allocated, "{storage}: {used} of {allocated}");
        for (bytes, of) in [(used, halves.0), (allocated, halves.1)] {
            let share = bytes as f64 / of as f64;
            assert!(share <= 0.52, "{storage}: {share}");
        }
    }
    Ok(())
}
