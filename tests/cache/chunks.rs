//! The KV cache: memory shrinks, batch rows move, tokens go and come. Any chunking: peers/tests/properties/cache.rs.

use crate::common::caches::{chunked, part, strategies};
use crate::common::files::{Contents, TempFile};
use crate::common::inputs::{assert_close, values, Shape};
use crate::common::settings::settings;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    compressed_attention, AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Criterion, Dropout,
    Fold, GroupRule, HeadStrategies, MergePlan, MergeStrategy,
};

/// Bias by token index and dropout by absolute position, over chunks and single tokens.
#[test]
fn bias_and_dropout_follow_absolute_positions() -> Result<()> {
    let shape = Shape(2, 4, 2, 77, 16);
    let qkv = shape.qkv(5, DType::F32)?;
    let config = CompressionConfig {
        fold: Fold::Mean,
        criterion: Criterion::KeyKey,
        group_rule: GroupRule::Unanimous,
        similarity_threshold: 0.4,
        window: 6,
        ..Default::default()
    };
    let bias: Vec<f32> = (0..4 * 77 * 77)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) / 30.0)
        .collect();
    let bias = Tensor::from_vec(bias, (1, 4, 77, 77), &Device::Cpu)?;
    let dropout = Some(Dropout { p: 0.2, seed: 11 });
    let whole = AttentionOptions {
        bias: Some(bias.clone()),
        dropout,
        ..Default::default()
    };
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let [q, k, v] = &qkv;
    let expected = compressed_attention(q, k, v, &strategies, &config, &whole)?;
    assert!(expected.plan.stats()?.hidden > 0);
    for chunks in [&[1usize][..], &[40, 1, 7], &[77]] {
        let mut cache = CompressedKvCache::new(strategies.clone(), config.clone(), Default::default())?;
        let got = chunked(&mut cache, &qkv, chunks, |start, count| {
            let bias = bias.narrow(2, start, count)?.narrow(3, 0, start + count)?;
            Ok(AttentionOptions {
                bias: Some(bias),
                dropout,
                ..Default::default()
            })
        })?;
        assert_close("bias and dropout", &got, &expected.output, 6e-6, 6e-6)?;
    }
    Ok(())
}

/// The bytes follow the entries kept; a dense cache has those of its keys and values.
#[test]
fn bytes_shrink_with_what_is_hidden() -> Result<()> {
    let shape = Shape(1, 4, 4, 1024, 32);
    let [q, k, v] = shape.qkv(0, DType::F32)?;
    let config = CompressionConfig {
        similarity_threshold: 0.5,
        fold: Fold::Mean,
        criterion: Criterion::KeyKey,
        ..Default::default()
    };
    let run = |strategy| -> Result<(CompressedKvCache, f64)> {
        let strategies = HeadStrategies::uniform(strategy);
        let plan = MergePlan::new(&q, &k, &v, &strategies, &config, &Default::default())?;
        let mut cache = CompressedKvCache::new(strategies, config.clone(), Default::default())?;
        cache.append_and_attend(&q, &k, &v, &Default::default())?;
        Ok((cache, plan.stats()?.hidden_ratio()))
    };
    let (dense, _) = run(MergeStrategy::Off)?;
    let (merged, ratio) = run(MergeStrategy::Similarity)?;
    assert!(ratio > 0.3, "hidden ratio {ratio}");
    assert_eq!(dense.bytes_dense(), 2 * 4 * 1024 * 32 * 4);
    // Token indices and open chains add a few percent to the rows.
    let expected = (1.0 - ratio) * dense.bytes() as f64;
    assert!(
        (merged.bytes() as f64 - expected).abs() <= 0.03 * expected,
        "{} bytes, expected {expected}",
        merged.bytes()
    );
    assert!(dense.bytes() as f64 <= 1.05 * dense.bytes_dense() as f64);
    for cache in [&dense, &merged] {
        let slack = cache.bytes_allocated() as f64 / cache.bytes() as f64;
        assert!((1.0..=1.3).contains(&slack), "allocated {slack} times what is used");
    }
    Ok(())
}

/// Growth reserves at most an eighth and a block.
#[test]
fn growth_is_in_small_blocks() -> Result<()> {
    let shape = Shape(1, 1, 1, 3000, 8);
    let [q, k, v] = shape.qkv(0, DType::F32)?;
    let strategies = HeadStrategies::uniform(MergeStrategy::Off);
    let mut cache = CompressedKvCache::new(strategies, CompressionConfig::default(), Default::default())?;
    for token in 0..3000 {
        let [q, k, v] = part(&[q.clone(), k.clone(), v.clone()], token, 1)?;
        cache.append_and_attend(&q, &k, &v, &Default::default())?;
        let reserved = cache.bytes_allocated() - cache.bytes();
        assert!(
            reserved <= (65 + token / 8) * (2 * 8 * 4 + 4),
            "{reserved} bytes reserved at token {token}"
        );
    }
    Ok(())
}

fn cache_of(shape: Shape, strategy: MergeStrategy) -> Result<(CompressedKvCache, [Tensor; 3])> {
    let qkv = shape.qkv(9, DType::F32)?;
    let config = CompressionConfig {
        similarity_threshold: 0.4,
        ..CompressionConfig::pretrained()
    };
    let mut cache = CompressedKvCache::new(HeadStrategies::uniform(strategy), config, Default::default())?;
    let [q, k, v] = part(&qkv, 0, shape.3 - 10)?;
    cache.append_and_attend(&q, &k, &v, &Default::default())?;
    Ok((cache, part(&qkv, shape.3 - 10, 10)?))
}

/// Beam search: selected batch rows continue as if each had been alone.
#[test]
fn index_select_reorders_the_batch() -> Result<()> {
    let (mut cache, [q, k, v]) = cache_of(Shape(3, 4, 2, 90, 8), MergeStrategy::Similarity)?;
    let rows = Tensor::new(&[2u32, 0, 0, 1], &Device::Cpu)?;
    let expected = cache.clone().append_and_attend(&q, &k, &v, &Default::default())?;
    cache.index_select(&rows)?;
    let pick = |x: &Tensor| x.contiguous()?.index_select(&rows, 0);
    let got = cache.append_and_attend(&pick(&q)?, &pick(&k)?, &pick(&v)?, &Default::default())?;
    assert_eq!(values(&got)?, values(&pick(&expected)?)?);
    assert_eq!(cache.lens().len(), 4);
    Ok(())
}

/// Truncation is exact if nothing merges, and refused otherwise.
#[test]
fn truncate_is_exact_or_refused() -> Result<()> {
    let shape = Shape(1, 2, 1, 60, 8);
    let (mut cache, rest) = cache_of(shape, MergeStrategy::Off)?;
    let before = cache.clone();
    let [q, k, v] = &rest;
    let expected = cache.append_and_attend(q, k, v, &Default::default())?;
    cache.truncate(50)?;
    assert_eq!((cache.seq_len(), cache.lens()), (50, before.lens()));
    assert_eq!(
        values(&cache.append_and_attend(q, k, v, &Default::default())?)?,
        values(&expected)?
    );

    let (mut cache, _) = cache_of(shape, MergeStrategy::Similarity)?;
    let (lens, message) = (cache.lens(), cache.truncate(20).unwrap_err().to_string());
    assert!(
        message.contains("cannot be taken apart") && message.contains("got 20"),
        "{message}"
    );
    assert_eq!(cache.lens(), lens);
    cache.truncate(50)?;
    assert!(cache.truncate(51).is_err());
    cache.truncate(0)?;
    assert_eq!((cache.seq_len(), cache.bytes()), (0, 0));
    Ok(())
}

/// The cap refuses a call before it changes the cache.
#[test]
fn the_cap_refuses_and_changes_nothing() -> Result<()> {
    let shape = Shape(1, 2, 2, 50, 8);
    let qkv = shape.qkv(1, DType::F32)?;
    let options = CacheOptions {
        max_entries: Some(30),
        ..Default::default()
    };
    let strategies = HeadStrategies::uniform(MergeStrategy::Off);
    let mut cache = CompressedKvCache::new(strategies, CompressionConfig::default(), options)?;
    let append = |cache: &mut CompressedKvCache, start, count| -> Result<Tensor> {
        let [q, k, v] = part(&qkv, start, count)?;
        Ok(cache.append_and_attend(&q, &k, &v, &Default::default())?)
    };
    append(&mut cache, 0, 30)?;
    let message = append(&mut cache, 30, 1).unwrap_err().to_string();
    assert!(message.contains("expected at most 30 entries"), "{message}");
    assert_eq!((cache.seq_len(), cache.lens()), (30, vec![vec![30, 30]]));
    Ok(())
}

/// Tokens that were only appended count like tokens whose rows were computed.
#[test]
fn append_alone_builds_the_same_cache() -> Result<()> {
    let shape = Shape(2, 4, 2, 90, 8);
    let (attended, [q, k, v]) = cache_of(shape, MergeStrategy::Similarity)?;
    let config = CompressionConfig {
        similarity_threshold: 0.4,
        ..CompressionConfig::pretrained()
    };
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let mut appended = CompressedKvCache::new(strategies, config, Default::default())?;
    let past = part(&shape.qkv(9, DType::F32)?, 0, 80)?;
    appended.append(&past[0], &past[1], &past[2])?;
    assert_eq!((appended.lens(), appended.bytes()), (attended.lens(), attended.bytes()));
    let next = |mut cache: CompressedKvCache| cache.append_and_attend(&q, &k, &v, &Default::default());
    assert_eq!(values(&next(appended)?)?, values(&next(attended)?)?);
    Ok(())
}

/// Keys and values without queries, over chunks, give the same file and the same later rows as with the tokens' own
/// queries.
#[test]
fn tokens_without_queries_build_the_same_cache() -> Result<()> {
    let shape = Shape(2, 4, 2, 90, 8);
    let qkv = shape.qkv(9, DType::F32)?;
    let key = |fold, group_rule| CompressionConfig {
        fold,
        group_rule,
        similarity_threshold: 0.4,
        ..CompressionConfig::pretrained()
    };
    let off = CompressionConfig {
        window: 5,
        ..CompressionConfig::default()
    };
    for (strategy, config) in [
        (MergeStrategy::Similarity, key(Fold::Mean, GroupRule::Unanimous)),
        (MergeStrategy::Similarity, key(Fold::Drop, GroupRule::PerQueryHead)),
        (MergeStrategy::Off, key(Fold::PairSum, GroupRule::Unanimous)),
        (MergeStrategy::Off, off),
        (MergeStrategy::Off, CompressionConfig::calibrated()),
    ] {
        let new = || CompressedKvCache::new(HeadStrategies::uniform(strategy), config.clone(), Default::default());
        let (mut attended, mut appended) = (new()?, new()?);
        for (start, count) in [(0, 50), (50, 1), (51, 29)] {
            let [q, k, v] = part(&qkv, start, count)?;
            attended.append_and_attend(&q, &k, &v, &Default::default())?;
            appended.append_without_queries(&k, &v, 4)?;
            assert!(
                saved(&attended)? == saved(&appended)?,
                "{config:?} after {start} and {count}"
            );
        }
        assert_eq!(appended.lens(), attended.lens());
        let next = |mut cache: CompressedKvCache| {
            let [q, k, v] = part(&qkv, 80, 10)?;
            Ok(values(&cache.append_and_attend(&q, &k, &v, &Default::default())?)?)
        };
        let (got, expected): (Result<_>, Result<_>) = (next(appended), next(attended));
        assert_eq!(got?, expected?);
    }
    Ok(())
}

fn saved(cache: &CompressedKvCache) -> Result<Contents> {
    let file = TempFile::new();
    cache.save(&file.0)?;
    Contents::read(&file.0)
}

/// Criteria and folds that read queries refuse tokens without them, and the error says where queries go.
#[test]
fn tokens_without_queries_are_refused_where_queries_decide() -> Result<()> {
    let shape = Shape(1, 4, 2, 40, 8);
    let [q, k, v] = shape.qkv(9, DType::F32)?;
    let pretrained = CompressionConfig::pretrained;
    let observed = CompressionConfig::calibrated();
    for (config, reads) in [
        (
            CompressionConfig {
                criterion: Criterion::QueryKey,
                ..pretrained()
            },
            "criterion QueryKey",
        ),
        (observed, "criterion ObservedMass"),
        (
            CompressionConfig {
                fold: Fold::PairSum,
                ..pretrained()
            },
            "fold PairSum",
        ),
    ] {
        let strategies = strategies(0, &shape, &config)?;
        let mut cache = CompressedKvCache::new(strategies, config, Default::default())?;
        for _ in 0..2 {
            let seen = cache.seq_len();
            let error = cache.append_without_queries(&k, &v, 4).unwrap_err().to_string();
            assert!(
                error.contains(&format!("got {reads}, which reads queries; give")),
                "{error}"
            );
            assert_eq!(cache.seq_len(), seen);
            cache.append(&q, &k, &v)?;
        }
    }
    let mut cache = CompressedKvCache::new(
        HeadStrategies::uniform(MergeStrategy::Similarity),
        pretrained(),
        Default::default(),
    )?;
    for (heads, pattern) in [
        (3, "heads: expected a multiple of the 2 KV heads, got 3"),
        (0, "expected at least one batch row, head, token and dimension"),
    ] {
        let error = cache.append_without_queries(&k, &v, heads).unwrap_err().to_string();
        assert!(error.contains(pattern), "{error}");
    }
    let flat = cache
        .append_without_queries(&k.flatten_from(2)?, &v, 4)
        .unwrap_err()
        .to_string();
    assert!(
        flat.contains("key: expected 4 axes (batch, kv_heads, tokens, head_dim), got shape [1, 2, 320]"),
        "{flat}"
    );
    cache.append_without_queries(&k, &v, 4)?;
    let error = cache.append_without_queries(&k, &v, 2).unwrap_err().to_string();
    assert!(error.contains("expected the cache's batch, heads, KV heads"), "{error}");
    assert_eq!(cache.seq_len(), 40);
    Ok(())
}

/// The raw tokens of a window have room for up to four windows; folded tokens have an eighth and a block to spare.
#[test]
fn a_window_has_room_for_four() -> Result<()> {
    let (window, dim) = (100, 8);
    let config = CompressionConfig {
        window,
        ..CompressionConfig::pretrained()
    };
    for chunk in [1, 7, 90, 1000] {
        let qkv = Shape(1, 1, 1, 3000, dim).qkv(0, DType::F32)?;
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        let mut cache = CompressedKvCache::new(strategies, config.clone(), Default::default())?;
        let mut most: usize = 0;
        for start in (0..3000 / chunk).map(|index| index * chunk) {
            let [q, k, v] = part(&qkv, start, chunk)?;
            cache.append(&q, &k, &v)?;
            let reserved = cache.bytes_allocated() - cache.bytes();
            most = most.max(reserved);
            let row = 2 * dim * 4;
            let folded = (65 + (start + chunk) / 8) * (row + 4);
            // The bytes in use count one window.
            assert!(
                reserved <= folded + (3 * window + 1) * row,
                "{reserved} bytes reserved at token {start}, chunks of {chunk}"
            );
        }
        assert!(
            chunk > window || most > window * 2 * dim * 4,
            "at most {most} bytes reserved: the window has none"
        );
    }
    Ok(())
}

/// A draft's few tokens in one call are single tokens, bit for bit.
#[test]
fn few_tokens_are_single_tokens() -> Result<()> {
    let shape = Shape(2, 6, 2, 90, 16);
    let mut ran = 0;
    for (index, setting) in settings().into_iter().enumerate() {
        let options = (setting.options)(&shape);
        let strategies = setting.strategies(&shape)?;
        let new = || CompressedKvCache::new(strategies.clone(), setting.config.clone(), Default::default());
        if new().is_err() || options.bias.is_some() || options.dropout.is_some() || !options.causal {
            continue;
        }
        let qkv = shape.qkv(index as u64, DType::F32)?;
        let (mut together, mut alone) = (new()?, new()?);
        let mut start = 0;
        for count in [3, 60, 2, 6, 5, 4] {
            let [q, k, v] = part(&qkv, start, count)?;
            let got = together.append_and_attend(&q, &k, &v, &options)?;
            let expected = match count {
                60 => alone.append_and_attend(&q, &k, &v, &options)?,
                _ => chunked(&mut alone, &part(&qkv, start, count)?, &[1], |_, _| Ok(options.clone()))?,
            };
            assert_eq!(
                values(&got)?,
                values(&expected)?,
                "{}: {count} at {start}",
                setting.name
            );
            start += count;
        }
        ran += 1;
    }
    assert!(ran > 8, "{ran} settings");
    Ok(())
}
