//! KV heads of a cache taken apart and put together: the shards go on as the whole cache, bit for bit.

use crate::common::caches::{part, strategies};
use crate::common::inputs::Shape;
use crate::common::saved::{bits, through_a_file};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    CacheOptions, CompressedKvCache, CompressionConfig, Criterion, Fold, GroupRule, HeadStrategies, MergeStrategy,
    Storage,
};

/// 2 query heads on each of 6 KV heads.
const SHAPE: Shape = Shape(2, 12, 6, 60, 16);

fn configs() -> [CompressionConfig; 4] {
    let keys = |fold, window| CompressionConfig {
        fold,
        window,
        criterion: Criterion::KeyKey,
        similarity_threshold: 0.4,
        difference_threshold: 0.2,
        ..CompressionConfig::pretrained()
    };
    [
        keys(Fold::Mean, 9),
        // A list per query head.
        CompressionConfig {
            group_rule: GroupRule::PerQueryHead,
            criterion: Criterion::QueryKey,
            ..keys(Fold::PairSum, 5)
        },
        keys(Fold::Drop, 0),
        CompressionConfig {
            window: 6,
            sinks: 2,
            ..CompressionConfig::calibrated()
        },
    ]
}

fn append(cache: &mut CompressedKvCache, [q, k, v]: &[Tensor; 3]) -> candle_core::Result<Tensor> {
    cache.append_and_attend(q, k, v, &Default::default())
}

/// The heads of one rank.
fn heads_of(qkv: &[Tensor; 3], rank: usize, world: usize) -> Result<[Tensor; 3]> {
    let own = |x: &Tensor| {
        let each = x.dim(1)? / world;
        x.narrow(1, rank * each, each)?.contiguous()
    };
    Ok([own(&qkv[0])?, own(&qkv[1])?, own(&qkv[2])?])
}

/// The shards append as the whole does: rows and lengths are its heads'.
fn assert_go_on(whole: &mut CompressedKvCache, ranks: &mut [CompressedKvCache], next: &[Tensor; 3]) -> Result<()> {
    let world = ranks.len();
    let expected = append(whole, next)?;
    let mut lens = vec![Vec::new(); SHAPE.0];
    for (rank, cache) in ranks.iter_mut().enumerate() {
        let output = append(cache, &heads_of(next, rank, world)?)?;
        let own = expected.narrow(1, rank * SHAPE.1 / world, SHAPE.1 / world)?;
        assert_eq!(bits(&output)?, bits(&own)?, "rank {rank} of {world}");
        for (all, own) in lens.iter_mut().zip(cache.lens()) {
            all.extend(own);
        }
    }
    assert_eq!(lens, whole.lens());
    assert_eq!(ranks.iter().map(CompressedKvCache::bytes).sum::<usize>(), whole.bytes());
    assert_eq!(
        ranks.iter().map(CompressedKvCache::bytes_dense).sum::<usize>(),
        whole.bytes_dense()
    );
    Ok(())
}

#[test]
fn shards_go_on_as_the_whole_cache() -> Result<()> {
    for (config, kind) in configs().iter().flat_map(|config| [0, 3, 4].map(|kind| (config, kind))) {
        for (dtype, storage) in [
            (DType::F32, None),
            (DType::F64, None),
            (DType::BF16, None),
            (DType::F32, Some(Storage::I8)),
        ] {
            let options = CacheOptions {
                storage,
                ..Default::default()
            };
            let all = strategies(kind, &SHAPE, config)?;
            let mut first = CompressedKvCache::new(all.clone(), config.clone(), options)?;
            let qkv = SHAPE.qkv(1, dtype)?;
            append(&mut first, &part(&qkv, 0, 40)?)?;
            assert!(kind == 4 || first.bytes() < 2 * first.bytes_dense());
            for world in [1, 2, 3] {
                let mut whole = first.clone();
                let mut ranks = whole.split_heads(world)?;
                assert_eq!(ranks.len(), world);
                for (rank, cache) in ranks.iter().enumerate() {
                    assert_eq!(*cache.strategies(), all.shard(rank, world, SHAPE.2)?);
                }
                assert_go_on(&mut whole, &mut ranks, &part(&qkv, 40, 1)?)?;
                assert_go_on(&mut whole, &mut ranks, &part(&qkv, 41, 12)?)?;
                let mut joined = CompressedKvCache::cat_heads(&ranks)?;
                // Debug shows length, bytes and the settings to the last bit.
                assert_eq!(format!("{joined:?}"), format!("{whole:?}"));
                assert_eq!(joined.lens(), whole.lens());
                for (start, count) in [(53, 1), (54, 6)] {
                    let next = part(&qkv, start, count)?;
                    assert_eq!(bits(&append(&mut joined, &next)?)?, bits(&append(&mut whole, &next)?)?);
                }
            }
        }
    }
    Ok(())
}

/// Files of 2 ranks load on 3, and on 1.
#[test]
fn saved_shards_load_on_other_ranks() -> Result<()> {
    for config in configs() {
        let all = strategies(3, &SHAPE, &config)?;
        let mut whole = CompressedKvCache::new(all, config, Default::default())?;
        let qkv = SHAPE.qkv(2, DType::F32)?;
        append(&mut whole, &part(&qkv, 0, 30)?)?;
        let two = whole
            .split_heads(2)?
            .iter()
            .map(through_a_file)
            .collect::<Result<Vec<_>>>()?;
        let three = CompressedKvCache::cat_heads(&two)?.split_heads(3)?;
        let mut three = three.iter().map(through_a_file).collect::<Result<Vec<_>>>()?;
        let mut one = [CompressedKvCache::cat_heads(&three)?];
        for (start, count) in [(30, 1), (31, 20), (51, 1)] {
            let next = part(&qkv, start, count)?;
            assert_go_on(&mut whole.clone(), &mut three, &next)?;
            assert_go_on(&mut whole, &mut one, &next)?;
        }
    }
    Ok(())
}

/// Caches of ranks that were made apart join too: one strategy for all heads of each, and another on each.
#[test]
fn other_strategies_on_each_rank_join() -> Result<()> {
    let config = &configs()[0];
    let qkv = SHAPE.qkv(3, DType::F32)?;
    let mut ranks = Vec::new();
    for (rank, strategy) in MergeStrategy::ALL.into_iter().enumerate() {
        let strategies = HeadStrategies::uniform(strategy);
        let mut cache = CompressedKvCache::new(strategies, config.clone(), Default::default())?;
        append(&mut cache, &heads_of(&part(&qkv, 0, 40)?, rank, 3)?)?;
        ranks.push(cache);
    }
    let mut joined = CompressedKvCache::cat_heads(&ranks)?;
    let each = MergeStrategy::ALL.into_iter().flat_map(|strategy| [strategy; 4]);
    assert_eq!(*joined.strategies(), HeadStrategies::per_head(each.collect()));
    assert_go_on(&mut joined, &mut ranks, &part(&qkv, 40, 5)?)
}

#[test]
fn caches_that_do_not_fit_are_refused() -> Result<()> {
    let config = &configs()[0];
    let qkv = SHAPE.qkv(4, DType::F32)?;
    let new = |config: &CompressionConfig| -> Result<CompressedKvCache> {
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        Ok(CompressedKvCache::new(strategies, config.clone(), Default::default())?)
    };
    let filled = |config: &CompressionConfig, qkv: &[Tensor; 3]| -> Result<CompressedKvCache> {
        let mut cache = new(config)?;
        append(&mut cache, qkv)?;
        Ok(cache)
    };
    let first = filled(config, &qkv)?;
    for (world, said) in [
        (0, "world: expected at least 1 rank, got 0"),
        (4, "world: expected a divisor of the 6 KV heads, got 4"),
        (12, "world: expected at most 6 ranks"),
    ] {
        let error = first.split_heads(world).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    let error = new(config)?.split_heads(2).unwrap_err().to_string();
    assert!(
        error.contains("got the cache without; make empty ones with HeadStrategies::shard"),
        "{error}"
    );
    let owned = HeadStrategies::uniform(MergeStrategy::Similarity);
    let owned = owned.with_thresholds(&Tensor::full(0.4f64, 12, &Device::Cpu)?)?;
    let mut with_thresholds = CompressedKvCache::new(owned, config.clone(), Default::default())?;
    append(&mut with_thresholds, &qkv)?;
    for (other, said) in [
        (new(config)?, "got cache 1 without"),
        (filled(&configs()[2], &qkv)?, "got others in cache 1"),
        (
            filled(config, &Shape(2, 12, 6, 60, 8).qkv(4, DType::F32)?)?,
            "join those of all ranks",
        ),
        (filled(config, &SHAPE.qkv(4, DType::F16)?)?, "join those of all ranks"),
        (filled(config, &part(&qkv, 0, 59)?)?, "same 60 tokens, got 59"),
        (
            with_thresholds,
            "expected thresholds in all 2 caches or in none, got them in 1",
        ),
    ] {
        let error = CompressedKvCache::cat_heads(&[first.clone(), other])
            .unwrap_err()
            .to_string();
        assert!(error.contains(said), "{error}");
    }
    let error = CompressedKvCache::cat_heads(&[]).unwrap_err().to_string();
    assert!(error.contains("expected at least one cache, got none"), "{error}");
    Ok(())
}
