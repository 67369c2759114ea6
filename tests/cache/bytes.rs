//! Entries in 8 bits: the reference's rounding, everywhere, and half the bytes.

use crate::common::caches::{chunked, part, strategies};
use crate::common::inputs::{assert_close, Shape};
use crate::common::saved::{assert_go_on_alike, bits, through_a_file};
use crate::common::settings::{config, reference_bits};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{
    AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Criterion, Fold, HeadStrategies,
    MergeStrategy, Storage,
};

const BYTES: [Storage; 2] = [Storage::I8, Storage::F8E4M3];

fn cache(strategies: &HeadStrategies, config: &CompressionConfig, storage: Storage) -> Result<CompressedKvCache> {
    let options = CacheOptions {
        storage: Some(storage),
        ..Default::default()
    };
    Ok(CompressedKvCache::new(strategies.clone(), config.clone(), options)?)
}

fn cases() -> Vec<CompressionConfig> {
    let merging = [
        (Criterion::KeyKey, Fold::Mean, 5),
        (Criterion::KeyKey, Fold::Drop, 0),
        (Criterion::QueryKey, Fold::PairSum, 4),
        (Criterion::ObservedMass, Fold::Drop, 6),
    ];
    merging
        .map(|(criterion, fold, window)| config(fold, window, criterion))
        .to_vec()
}

fn expected(
    qkv: &[Tensor; 3],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    storage: Storage,
    options: &AttentionOptions,
) -> Result<Tensor> {
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
    let (q, k, v) = (q?, k?, v?);
    let bits = reference_bits([&q, &k, &v], strategies, config, options)?;
    let output = reference::attention_in_bytes((&q, &k, &v), &bits, storage, config, options)?;
    Ok(output.to_tensor(DType::F64, &Device::Cpu)?)
}

/// One call, chunks and single tokens equal the reference: far columns are rounded once, all else not at all. Head
/// sizes that fill registers and that do not, groups of one, three and five heads.
#[test]
fn any_chunking_equals_the_reference() -> Result<()> {
    let plain = |_, _| Ok(AttentionOptions::default());
    for storage in BYTES {
        for shape in [Shape(2, 3, 1, 150, 16), Shape(1, 2, 2, 150, 59), Shape(1, 5, 1, 80, 96)] {
            for (index, config) in cases().into_iter().enumerate() {
                let strategies = strategies(0, &shape, &config)?;
                // Decisions by stored f32 keys are those of f64: no number here is rounded before it decides.
                let qkv = shape.qkv(index as u64, DType::F64)?;
                let expected = expected(&qkv, &strategies, &config, storage, &Default::default())?;
                for chunks in [&[150usize][..], &[1], &[40, 1, 1, 7, 23]] {
                    let mut cache = cache(&strategies, &config, storage)?;
                    let got = chunked(&mut cache, &qkv, chunks, plain)?;
                    let name = format!("{storage} {shape:?} case {index} {chunks:?}");
                    assert_close(&name, &got, &expected, 1e-9, 1e-9)?;
                }
            }
        }
    }
    Ok(())
}

/// Beside f32, f16 and bf16 inputs, the error is that of the inputs' own rounding.
#[test]
fn other_inputs_round_no_more() -> Result<()> {
    let shape = Shape(1, 4, 2, 300, 64);
    let plain = |_, _| Ok(AttentionOptions::default());
    let config = config(Fold::Mean, 8, Criterion::KeyKey);
    let strategies = strategies(0, &shape, &config)?;
    for storage in BYTES {
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 2e-3), (DType::BF16, 1.6e-2)] {
            let qkv = shape.qkv(3, dtype)?;
            let wide = [
                qkv[0].to_dtype(DType::F64)?,
                qkv[1].to_dtype(DType::F64)?,
                qkv[2].to_dtype(DType::F64)?,
            ];
            let expected = expected(&wide, &strategies, &config, storage, &Default::default())?;
            for chunks in [&[300usize][..], &[200, 1, 1, 70, 1]] {
                let mut cache = cache(&strategies, &config, storage)?;
                let got = chunked(&mut cache, &qkv, chunks, plain)?;
                assert_close(
                    &format!("{storage} {dtype:?} {chunks:?}"),
                    &got,
                    &expected,
                    tolerance,
                    tolerance,
                )?;
            }
        }
    }
    Ok(())
}

/// Heads that never hide store their tokens in 8 bits too, all but the newest.
#[test]
fn heads_that_are_off_are_stored_alike() -> Result<()> {
    let shape = Shape(1, 4, 2, 200, 32);
    let qkv = shape.qkv(6, DType::F32)?;
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    for storage in BYTES {
        let mut cache = cache(&off, &CompressionConfig::pretrained(), storage)?;
        let got = chunked(&mut cache, &qkv, &[150, 1], |_, _| Ok(Default::default()))?;
        // Windows do not matter where nothing is hidden: 0 makes every earlier token a far column.
        let config = CompressionConfig {
            window: 0,
            ..CompressionConfig::pretrained()
        };
        let expected = expected(&qkv, &off, &config, storage, &Default::default())?;
        assert_close(&format!("{storage}"), &got, &expected, 1e-5, 1e-5)?;
        let message = cache.truncate(100).unwrap_err().to_string();
        assert!(
            message.contains(storage.name()) && message.contains("rollback"),
            "{message}"
        );
    }
    Ok(())
}

/// Files, forks, sliding windows and a budget keep codes and scales.
#[test]
fn codes_are_kept_through_files_and_forks() -> Result<()> {
    let shape = Shape(2, 4, 2, 700, 16);
    for storage in BYTES {
        for (index, config) in cases().into_iter().enumerate() {
            let qkv = shape.qkv(index as u64, DType::F32)?;
            let mut original = cache(&strategies(0, &shape, &config)?, &config, storage)?;
            let mut fresh = cache(&strategies(0, &shape, &config)?, &config, storage)?;
            let [q, k, v] = part(&qkv, 0, 650)?;
            for cache in [&mut original, &mut fresh] {
                cache.append_and_attend(&q, &k, &v, &Default::default())?;
            }
            let mut fork = original.fork();
            let [q, k, v] = part(&qkv, 10, 1)?;
            original.append_and_attend(&q, &k, &v, &Default::default())?;
            let mut loaded = through_a_file(&fork)?;
            assert_go_on_alike([&mut fresh, &mut fork], &qkv, 650, &[1, 7, 1])?;
            let mut fresh = cache(&strategies(0, &shape, &config)?, &config, storage)?;
            let [q, k, v] = part(&qkv, 0, 650)?;
            fresh.append_and_attend(&q, &k, &v, &Default::default())?;
            assert_go_on_alike([&mut fresh, &mut loaded], &qkv, 650, &[1, 7, 1])?;
        }
    }
    let sliding = AttentionOptions {
        sliding_window: Some(40),
        ..Default::default()
    };
    let config = config(Fold::Mean, 5, Criterion::KeyKey);
    let qkv = shape.qkv(9, DType::F64)?;
    let strategies = strategies(0, &shape, &config)?;
    let expected = expected(&qkv, &strategies, &config, Storage::I8, &sliding)?;
    let mut cache = cache(&strategies, &config, Storage::I8)?;
    let got = chunked(&mut cache, &qkv, &[300, 1, 1, 90], |_, _| Ok(sliding.clone()))?;
    Ok(assert_close("sliding", &got, &expected, 1e-9, 1e-9)?)
}

/// A row that is not finite stays so; rows that do not see it are untouched.
#[test]
fn nan_stays_nan() -> Result<()> {
    let shape = Shape(1, 2, 1, 60, 16);
    let config = config(Fold::Drop, 3, Criterion::KeyKey);
    for storage in BYTES {
        let [q, k, v] = shape.qkv(2, DType::F32)?;
        let broken = k.slice_assign(
            &[0..1, 0..1, 30..31, 4..5],
            &Tensor::full(f32::NAN, (1, 1, 1, 1), &Device::Cpu)?,
        )?;
        let run = |k: &Tensor| -> Result<Tensor> {
            let mut cache = cache(&strategies(0, &shape, &config)?, &config, storage)?;
            chunked(&mut cache, &[q.clone(), k.clone(), v.clone()], &[40, 1], |_, _| {
                Ok(Default::default())
            })
        };
        let (got, clean) = (run(&broken)?, run(&k)?);
        let before = |x: &Tensor| bits(&x.narrow(2, 0, 30)?);
        assert_eq!(before(&got)?, before(&clean)?);
        let row: Vec<f32> = got.narrow(2, 59, 1)?.flatten_all()?.to_vec1()?;
        assert!(row.iter().all(|x| x.is_nan()), "{storage}: {row:?}");
    }
    Ok(())
}

/// At D = 128 entries take at most 0.52 of bf16's bytes, and half of them hidden 0.27 of a dense bf16 cache.
#[test]
fn bytes_are_half_of_halves() -> Result<()> {
    let shape = Shape(1, 2, 1, 6000, 128);
    let qkv = shape.qkv(1, DType::BF16)?;
    let bytes = |strategies: &HeadStrategies, config: &CompressionConfig, storage| -> Result<usize> {
        let mut cache = cache(strategies, config, storage)?;
        let [q, k, v] = &qkv;
        cache.append(q, k, v)?;
        Ok(cache.bytes())
    };
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let config = config(Fold::Drop, 32, Criterion::KeyKey);
    let dense = bytes(&off, &config, Storage::BF16)?;
    for storage in BYTES {
        let share = bytes(&off, &config, storage)? as f64 / dense as f64;
        assert!(share <= 0.52, "{storage}: {share}");
    }
    let hiding = strategies(0, &shape, &config)?;
    let (halves, eighths) = (
        bytes(&hiding, &config, Storage::BF16)?,
        bytes(&hiding, &config, Storage::I8)?,
    );
    assert!(halves < dense * 7 / 10, "{halves} of {dense}");
    assert!(eighths as f64 <= 0.535 * halves as f64, "{eighths} of {halves}");
    Ok(())
}
