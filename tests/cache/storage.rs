//! Numbers that a cache's storage dtype cannot hold: the append is refused, and the cache continues as if it had not
//! been called.

use crate::common::caches::part;
use crate::common::files::{Contents, TempFile};
use crate::common::inputs::{values, Shape};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    CacheOptions, CompressedKvCache, CompressionConfig, Criterion, Fold, HeadStrategies, MergeStrategy,
};

const SHAPE: Shape = Shape(2, 4, 2, 40, 8);

fn cache(strategy: MergeStrategy, config: &CompressionConfig, storage: DType) -> Result<CompressedKvCache> {
    let options = CacheOptions {
        storage: Some(storage.try_into()?),
        ..Default::default()
    };
    Ok(CompressedKvCache::new(
        HeadStrategies::uniform(strategy),
        config.clone(),
        options,
    )?)
}

fn config(fold: Fold, window: usize) -> CompressionConfig {
    CompressionConfig {
        fold,
        window,
        criterion: Criterion::KeyKey,
        similarity_threshold: 0.4,
        ..Default::default()
    }
}

/// The tensors with one number of `qkv[which]`, of token `at`, replaced by `number`.
fn with_number(qkv: &[Tensor; 3], which: usize, at: usize, number: f64) -> Result<[Tensor; 3]> {
    let mut qkv = qkv.clone();
    let mut data = values(&qkv[which])?;
    data[at] = number;
    let tensor = Tensor::from_vec(data, qkv[which].dims(), &Device::Cpu)?;
    qkv[which] = tensor.to_dtype(qkv[which].dtype())?;
    Ok(qkv)
}

fn append(cache: &mut CompressedKvCache, qkv: &[Tensor; 3]) -> candle_core::Result<Tensor> {
    cache.append_and_attend(&qkv[0], &qkv[1], &qkv[2], &Default::default())
}

fn contents(cache: &CompressedKvCache) -> Result<Contents> {
    let file = TempFile::new();
    cache.save(&file.0)?;
    Contents::read(&file.0)
}

/// Appends `good`, then `bad`, which is refused with `pattern`, then `rest`; compares with a cache that never saw
/// `bad`.
#[track_caller]
fn assert_refused(new: impl Fn() -> Result<CompressedKvCache>, [good, bad, rest]: [&[Tensor; 3]; 3], pattern: &str) {
    let run = || -> Result<()> {
        let (mut tried, mut alone) = (new()?, new()?);
        let error = append(&mut tried, bad).expect_err("a first call").to_string();
        assert!(error.contains(pattern), "expected {pattern:?} in: {error}");
        assert_eq!((tried.seq_len(), tried.bytes()), (0, 0));
        for cache in [&mut tried, &mut alone] {
            append(cache, good)?;
        }
        for _ in 0..2 {
            assert!(append(&mut tried, bad).is_err());
            assert!(tried.append(&bad[0], &bad[1], &bad[2]).is_err());
        }
        assert!(contents(&tried)? == contents(&alone)?, "{pattern}: the cache changed");
        let (got, expected) = (append(&mut tried, rest)?, append(&mut alone, rest)?);
        assert!(values(&expected)?.iter().all(|x| x.is_finite()));
        assert_eq!(values(&got)?, values(&expected)?);
        assert!(
            contents(&tried)? == contents(&alone)?,
            "{pattern}: the cache went on otherwise"
        );
        Ok(())
    };
    run().unwrap()
}

#[test]
fn numbers_beyond_the_storage_are_refused() -> Result<()> {
    for (input, storage, number, pattern) in [
        (
            DType::F32,
            DType::F16,
            70000.0,
            "up to 6.5504e4, the largest of the storage dtype F16, got 7e4; set CacheOptions::storage to bf16",
        ),
        (DType::F32, DType::F16, -1e30, "got 1.0000000150474662e30; set"),
        (DType::BF16, DType::F16, 66048.0, "got 6.6048e4; set"),
        (
            DType::F32,
            DType::BF16,
            3.4e38,
            "the storage dtype BF16, got 3.3999999521443642e38; set CacheOptions::storage to f32",
        ),
    ] {
        for (which, name) in [(1, "key: expected"), (2, "value: expected")] {
            for (fold, window) in [(Fold::PairSum, 0), (Fold::Mean, 3), (Fold::Drop, 0)] {
                let qkv = SHAPE.qkv(1, input)?;
                let bad = with_number(&part(&qkv, 20, 5)?, which, 2 * 5 * 8 + 13, number)?;
                let new = || cache(MergeStrategy::Similarity, &config(fold, window), storage);
                let tensors = [&part(&qkv, 0, 20)?, &bad, &part(&qkv, 25, 10)?];
                assert_refused(new, tensors, name);
                assert_refused(new, tensors, pattern);
            }
        }
    }
    Ok(())
}

/// The largest number that fits is accepted. A number that is not finite is no error: its rows are NaN.
#[test]
fn the_largest_number_and_numbers_that_are_not_finite_are_taken() -> Result<()> {
    let (shape, dim) = (Shape(1, 1, 1, 6, 4), 4);
    let qkv = shape.qkv(2, DType::F32)?;
    for (number, bad) in [
        (65504.0, false),
        (f64::INFINITY, true),
        (f64::NEG_INFINITY, true),
        (f64::NAN, true),
    ] {
        for which in [1, 2] {
            let given = with_number(&qkv, which, 3 * dim + 1, number)?;
            let mut cache = cache(MergeStrategy::Off, &config(Fold::PairSum, 0), DType::F16)?;
            let output = values(&append(&mut cache, &given)?)?;
            for (at, x) in output.iter().enumerate() {
                assert_eq!(
                    x.is_nan(),
                    bad && at / dim >= 3,
                    "{number} in {which}: element {at} is {x}"
                );
            }
        }
    }
    Ok(())
}

/// Two equal numbers fit and their sum does not; the pair comes in one chunk, or in two with raw tokens between.
#[test]
fn sums_beyond_the_storage_are_refused() -> Result<()> {
    let shape = Shape(1, 2, 1, 12, 4);
    for (storage, number, pattern) in [
        (
            DType::F16,
            40000.0,
            "the largest number of F16, got 8e4; set CacheOptions::storage to bf16 or f32",
        ),
        (
            DType::BF16,
            2f64.powi(127),
            "the largest number of BF16, got 3.402823669209385e38; scale",
        ),
        (
            DType::F32,
            2f64.powi(127),
            "the largest number of F32, got 3.402823669209385e38; scale",
        ),
    ] {
        for (window, which) in [(0, 2), (2, 2), (50, 2), (0, 1), (2, 1)] {
            // The cosine of two keys of 2^127 overflows, so they do not merge.
            if which == 1 && storage != DType::F16 {
                continue;
            }
            let config = CompressionConfig {
                similarity_threshold: 1.5,
                max_merge_level: 1,
                ..config(Fold::PairSum, window)
            };
            let mut qkv = shape.qkv(3, DType::F32)?;
            // Nearly equal keys: every second pair merges, (4, 5) among them.
            let ones = qkv[1].ones_like()?;
            qkv[1] = ((qkv[1].clone() * 0.1)? + ones)?;
            let at = |token: usize| token * 4 + 2;
            // A logit must not overflow where a key is large.
            qkv[0] = (qkv[0].zeros_like()? + 1e-4)?;
            let large = with_number(&with_number(&qkv, which, at(4), number)?, which, at(5), number)?;
            let new = || cache(MergeStrategy::Similarity, &config, storage);
            // The two large numbers come in one chunk, after four other tokens, and as the first.
            assert_refused(
                new,
                [&part(&qkv, 0, 4)?, &part(&large, 4, 4)?, &part(&qkv, 8, 4)?],
                pattern,
            );
            // The left token is already in the cache when the right one comes.
            let (mut tried, mut alone) = (new()?, new()?);
            for cache in [&mut tried, &mut alone] {
                append(cache, &part(&large, 0, 5)?)?;
            }
            let error = append(&mut tried, &part(&large, 5, 1)?).unwrap_err().to_string();
            assert!(error.contains(pattern), "{error}");
            assert!(
                contents(&tried)? == contents(&alone)?,
                "{storage:?} {window} {which}: the cache changed"
            );
            let rest = part(&qkv, 5, 3)?;
            assert_eq!(
                values(&append(&mut tried, &rest)?)?,
                values(&append(&mut alone, &rest)?)?
            );
            // Without a fold there is no sum. (Attention to two values of 2^127 overflows in f32 anyway.)
            let mut off = cache(MergeStrategy::Off, &config, storage)?;
            let output = values(&append(&mut off, &large)?)?;
            assert!(storage != DType::F16 || output.iter().all(|x| x.is_finite()));
        }
    }
    Ok(())
}

/// The mean of numbers that fit also fits, even if their sum does not: while folding and in attention.
#[test]
fn means_of_large_numbers_are_means() -> Result<()> {
    for (storage, large) in [(DType::F16, 65504.0), (DType::BF16, 3e38), (DType::F32, 3e38)] {
        let config = CompressionConfig {
            similarity_threshold: 1.5,
            ..config(Fold::Mean, 0)
        };
        let (tokens, dim) = (9, 4);
        let k = Tensor::ones((1, 1, tokens, dim), DType::F32, &Device::Cpu)?;
        let q = (&k * 1e-3)?;
        let v = (&k * large)?.to_dtype(storage)?.to_dtype(DType::F32)?;
        let mut cache = cache(MergeStrategy::Similarity, &config, storage)?;
        let mut outputs = Vec::new();
        for token in 0..tokens {
            outputs.push(append(
                &mut cache,
                &part(&[q.clone(), k.clone(), v.clone()], token, 1)?,
            )?);
        }
        assert!(cache.lens()[0][0] < tokens, "nothing was folded");
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        let whole = candle_sfattention::compressed_attention(&q, &k, &v, &strategies, &config, &Default::default())?;
        assert!(whole.plan.stats()?.hidden > 0);
        for output in [Tensor::cat(&outputs, 2)?, whole.output] {
            for x in values(&output)? {
                let expected = values(&v)?[0];
                assert!(
                    (x - expected).abs() <= 1e-3 * expected,
                    "{storage:?}: {x}, expected {expected}"
                );
            }
        }
    }
    Ok(())
}
