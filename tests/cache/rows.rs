//! Batch rows of a cache taken apart and put together, the last token's row once more, and mixed dtypes.

use crate::common::caches::part;
use crate::common::files::TempFile;
use crate::common::inputs::{values, Shape};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Criterion, Fold, HeadStrategies,
    MergeStrategy,
};

const SHAPE: Shape = Shape(3, 4, 2, 60, 16);

fn config(fold: Fold, window: usize) -> CompressionConfig {
    CompressionConfig {
        fold,
        window,
        criterion: Criterion::KeyKey,
        similarity_threshold: 0.4,
        ..CompressionConfig::pretrained()
    }
}

fn cache(strategy: MergeStrategy, config: &CompressionConfig) -> Result<CompressedKvCache> {
    let strategies = HeadStrategies::uniform(strategy);
    Ok(CompressedKvCache::new(strategies, config.clone(), Default::default())?)
}

fn append(cache: &mut CompressedKvCache, [q, k, v]: &[Tensor; 3]) -> candle_core::Result<Tensor> {
    cache.append_and_attend(q, k, v, &Default::default())
}

fn row(qkv: &[Tensor; 3], row: usize) -> Result<[Tensor; 3]> {
    let one = |x: &Tensor| x.narrow(0, row, 1);
    Ok([one(&qkv[0])?, one(&qkv[1])?, one(&qkv[2])?])
}

/// Rows that are taken apart, and put together again in another order, go on as they were: bit for bit.
#[test]
fn rows_apart_and_together_go_on() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        for (fold, window) in [(Fold::Mean, 9), (Fold::Drop, 0), (Fold::PairSum, 5)] {
            let qkv = SHAPE.qkv(1, dtype)?;
            let mut whole = cache(MergeStrategy::Similarity, &config(fold, window))?;
            append(&mut whole, &part(&qkv, 0, 40)?)?;
            let mut rows = whole.clone().split()?;
            assert_eq!(rows.len(), 3);
            let mut turned = CompressedKvCache::cat(&[rows[2].clone(), rows[0].clone(), rows[1].clone()])?;
            assert_eq!((turned.seq_len(), turned.bytes()), (40, whole.bytes()));
            assert!(whole.bytes() < whole.bytes_dense() * 3);
            let next = part(&qkv, 40, 1)?;
            let expected = append(&mut whole, &next)?;
            let order = Tensor::new(&[2u32, 0, 1], &Device::Cpu)?;
            let next_turned = [0, 1, 2].map(|i| next[i].contiguous().and_then(|x| x.index_select(&order, 0)).unwrap());
            let together = append(&mut turned, &next_turned)?;
            assert_eq!(values(&together)?, values(&expected.index_select(&order, 0)?)?);
            for (index, alone) in rows.iter_mut().enumerate() {
                let output = append(alone, &row(&next, index)?)?;
                assert_eq!(values(&output)?, values(&expected.narrow(0, index, 1)?)?);
            }
        }
    }
    Ok(())
}

/// Rows of different lengths in one cache: each is the row alone, through single tokens and a chunk.
#[test]
fn rows_of_different_lengths_go_on_together() -> Result<()> {
    let config = config(Fold::Mean, 7);
    let qkv = SHAPE.qkv(2, DType::F32)?;
    let lengths = [5, 40, 23];
    let mut alone = Vec::new();
    for (index, length) in lengths.into_iter().enumerate() {
        let mut cache = cache(MergeStrategy::Similarity, &config)?;
        append(&mut cache, &part(&row(&qkv, index)?, 0, length)?)?;
        alone.push(cache);
    }
    let mut together = CompressedKvCache::cat(&alone)?;
    assert_eq!(together.seq_len(), 40);
    let lens: Vec<Vec<usize>> = alone.iter().flat_map(CompressedKvCache::lens).collect();
    assert_eq!(together.lens(), lens);
    for (start, count) in [(0, 1), (1, 1), (2, 12), (14, 1)] {
        let parts = lengths.iter().enumerate();
        let parts = parts.map(|(index, length)| part(&row(&qkv, index)?, length + start, count));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let next = [0, 1, 2].map(|i| Tensor::cat(&[&parts[0][i], &parts[1][i], &parts[2][i]], 0).unwrap());
        let output = append(&mut together, &next)?;
        for (index, cache) in alone.iter_mut().enumerate() {
            let expected = append(cache, &parts[index])?;
            assert_eq!(
                values(&output.narrow(0, index, 1)?)?,
                values(&expected)?,
                "row {index}, {start}"
            );
        }
    }
    let file = TempFile::new();
    together.save(&file.0)?;
    let mut loaded = CompressedKvCache::load(&file.0, &Device::Cpu)?;
    let next = part(&qkv, 59, 1)?;
    let [expected, got] = [&mut together.clone(), &mut loaded].map(|cache| append(cache, &next));
    assert_eq!(values(&got?)?, values(&expected?)?);
    // Apart again, each goes on from its own place.
    let rows = together.split()?;
    let lens: Vec<_> = rows.iter().flat_map(CompressedKvCache::lens).collect();
    assert_eq!(lens, alone.iter().flat_map(CompressedKvCache::lens).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn caches_that_do_not_fit_are_refused() -> Result<()> {
    let qkv = SHAPE.qkv(3, DType::F32)?;
    let filled = |config: &CompressionConfig, qkv: &[Tensor; 3]| -> Result<CompressedKvCache> {
        let mut cache = cache(MergeStrategy::Similarity, config)?;
        append(&mut cache, qkv)?;
        Ok(cache)
    };
    let (mean, drop) = (config(Fold::Mean, 7), config(Fold::Drop, 7));
    let first = filled(&mean, &qkv)?;
    let other_size = filled(&mean, &Shape(3, 4, 2, 5, 8).qkv(3, DType::F32)?)?;
    let other_dtype = filled(&mean, &SHAPE.qkv(3, DType::F16)?)?;
    for (caches, part) in [
        (vec![], "expected at least one cache"),
        (
            vec![first.clone(), cache(MergeStrategy::Similarity, &mean)?],
            "got cache 1 without",
        ),
        (vec![first.clone(), filled(&drop, &qkv)?], "got others in cache 1"),
        (vec![first.clone(), other_size], "of different models"),
        (vec![first, other_dtype], "of different models"),
    ] {
        let message = CompressedKvCache::cat(&caches).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    Ok(())
}

/// Append first, attend then: the row of doing both, bit for bit, and nothing changes.
#[test]
fn the_last_row_once_more() -> Result<()> {
    let sinks = Tensor::new(&[0.5f32, -1.0, 0.0, 2.0], &Device::Cpu)?;
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        for (strategy, fold, window) in [
            (MergeStrategy::Similarity, Fold::Mean, 9),
            (MergeStrategy::Similarity, Fold::Drop, 0),
            (MergeStrategy::Off, Fold::PairSum, 4),
        ] {
            for options in [
                AttentionOptions::default(),
                AttentionOptions {
                    softmax_scale: Some(0.7),
                    softcap: Some(1.5),
                    sink_logits: Some(sinks.clone()),
                    ..Default::default()
                },
            ] {
                let qkv = SHAPE.qkv(4, dtype)?;
                let mut cache = cache(strategy, &config(fold, window))?;
                for (start, count) in [(0, 50), (50, 1), (51, 1)] {
                    let [q, k, v] = part(&qkv, start, count)?;
                    let expected = cache.append_and_attend(&q, &k, &v, &options)?.narrow(2, count - 1, 1)?;
                    let bytes = cache.bytes();
                    let again = cache.attend(&q.narrow(2, count - 1, 1)?, &options)?;
                    assert_eq!(again.dims(), expected.dims());
                    // A chunk takes other products than a single row.
                    if count == 1 {
                        assert_eq!(values(&again)?, values(&expected)?, "{dtype:?} {fold:?}");
                    } else {
                        let largest = |x: &Tensor, y: &Tensor| -> Result<f64> {
                            let (x, y) = (values(x)?, values(y)?);
                            Ok(x.iter().zip(&y).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max))
                        };
                        let bound = match dtype {
                            DType::F64 => 1e-12,
                            DType::F32 => 1e-5,
                            _ => 2e-2,
                        };
                        let difference = largest(&again, &expected)?;
                        assert!(difference <= bound, "{dtype:?} {fold:?}: {difference:e}");
                    }
                    assert_eq!(cache.bytes(), bytes);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn another_row_than_the_last_is_refused() -> Result<()> {
    let qkv = SHAPE.qkv(5, DType::F32)?;
    let [q, ..] = part(&qkv, 10, 1)?;
    let with = |change: fn(&mut AttentionOptions)| {
        let mut options = AttentionOptions::default();
        change(&mut options);
        options
    };
    let plain = || with(|_| ());
    let bias = |options: &mut AttentionOptions| options.bias = Tensor::zeros(1, DType::F32, &Device::Cpu).ok();
    let slides = with(|options| options.sliding_window = Some(4));
    for (fold, q, options, part) in [
        (Fold::Mean, qkv[0].clone(), plain(), "expected [3, 4, 1, 16]"),
        (Fold::Mean, q.clone(), with(bias), "expected no bias"),
        (Fold::Mean, q.clone(), slides, "expected no sliding window"),
        (Fold::PairSum, q.clone(), plain(), "expected the fold Mean or Drop"),
    ] {
        let mut cache = cache(MergeStrategy::Similarity, &config(fold, 3))?;
        let empty = cache.attend(&q, &options).unwrap_err().to_string();
        assert!(empty.contains("got an empty one"), "{empty}");
        append(&mut cache, &qkv)?;
        let message = cache.attend(&q, &options).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    Ok(())
}

/// An f32 query over f16 keys is the f32 call on the same numbers, stored as the keys came.
#[test]
fn queries_and_keys_of_different_dtypes() -> Result<()> {
    for (query, keys) in [
        (DType::F32, DType::F16),
        (DType::F32, DType::BF16),
        (DType::F16, DType::BF16),
        (DType::BF16, DType::F32),
    ] {
        let qkv = SHAPE.qkv(6, DType::F32)?;
        let new = || cache(MergeStrategy::Similarity, &config(Fold::Mean, 6));
        let (mut mixed, mut taken) = (new()?, new()?);
        let options = CacheOptions {
            storage: Some(keys.try_into()?),
            ..Default::default()
        };
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        let mut wide = CompressedKvCache::new(strategies, config(Fold::Mean, 6), options)?;
        for (start, count) in [(0, 30), (30, 1), (31, 20)] {
            let [q, k, v] = part(&qkv, start, count)?;
            let (q, k, v) = (q.to_dtype(query)?, k.to_dtype(keys)?, v.to_dtype(keys)?);
            let output = mixed.append_and_attend(&q, &k, &v, &Default::default())?;
            assert_eq!(output.dtype(), query);
            // Appended first, and attended to then.
            taken.append(&q, &k, &v)?;
            let last = q.narrow(2, count - 1, 1)?;
            let again = |cache: &CompressedKvCache| values(&cache.attend(&last, &Default::default())?);
            assert_eq!(again(&taken)?, again(&mixed)?, "{query:?}, {keys:?}");
            assert_eq!(taken.bytes(), mixed.bytes());
            let [q, k, v] = [
                q.to_dtype(DType::F32)?,
                k.to_dtype(DType::F32)?,
                v.to_dtype(DType::F32)?,
            ];
            let expected = wide.append_and_attend(&q, &k, &v, &Default::default())?;
            assert_eq!(
                values(&output)?,
                values(&expected.to_dtype(query)?)?,
                "{query:?}, {keys:?}"
            );
            assert_eq!(mixed.bytes(), wide.bytes());
        }
    }
    let [q, k, v] = SHAPE.qkv(6, DType::F64)?;
    let mut cache = cache(MergeStrategy::Off, &config(Fold::Mean, 6))?;
    let message = cache.append_and_attend(&q, &k.to_dtype(DType::F32)?, &v, &Default::default());
    assert!(message
        .unwrap_err()
        .to_string()
        .contains("expected the query's dtype F64"));
    Ok(())
}
