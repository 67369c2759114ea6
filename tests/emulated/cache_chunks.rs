//! A later chunk of a cache on a device is taken together: it leaves the lists that single tokens leave, bit for bit.

use crate::cache_bytes::{stored, BYTES};
use crate::cache_rollback::{content, every_rule};
use crate::common::caches::part;
use crate::common::inputs::{Normal, Shape};
use crate::common::saved::bits;
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Tensor};
use candle_sfattention::emulation::{launches, EmulatedCache};
use candle_sfattention::{AttentionOptions, CacheOptions, CompressionConfig, GroupRule, HeadStrategies};

const SHAPE: Shape = Shape(2, 4, 2, 150, 16);

/// One cache's tokens: those of a sequence, with scores where the criterion takes some.
struct Stream {
    qkv: [Tensor; 3],
    scores: Option<Tensor>,
    strategies: HeadStrategies,
    config: CompressionConfig,
    options: AttentionOptions,
    stored: CacheOptions,
}

impl Stream {
    fn new(
        config: CompressionConfig,
        strategies: HeadStrategies,
        dtype: DType,
        sliding: Option<usize>,
    ) -> Result<Self> {
        let scores = Normal::new(1).tensor(&[SHAPE.0, SHAPE.2, SHAPE.3])?;
        Ok(Self {
            qkv: SHAPE.qkv(11, dtype)?,
            scores: config.criterion.takes_scores().then_some(scores),
            strategies,
            config,
            options: AttentionOptions {
                softmax_scale: Some(0.4),
                sliding_window: sliding,
                ..Default::default()
            },
            stored: CacheOptions::default(),
        })
    }

    fn cache(&self) -> Result<EmulatedCache> {
        Ok(EmulatedCache::new(
            &self.qkv,
            &self.strategies,
            &self.config,
            &self.stored,
        )?)
    }

    fn append(&self, cache: &mut EmulatedCache, start: usize, count: usize, attend: bool) -> Result<Option<Tensor>> {
        let scores = match &self.scores {
            Some(scores) => Some(scores.narrow(2, start, count)?.contiguous()?),
            None => None,
        };
        let qkv = part(&self.qkv, start, count)?;
        match attend {
            true => Ok(cache.append_scored(&qkv, scores.as_ref(), Some(&self.options))?),
            false => {
                cache.append_again(&qkv, scores.as_ref(), &self.options)?;
                Ok(None)
            }
        }
    }
}

/// Checks one chunk after `before` tokens; returns how many entries a list hides at most.
fn check(stream: &Stream, before: usize, count: usize, attend: bool) -> Result<usize> {
    let (mut together, mut alone) = (stream.cache()?, stream.cache()?);
    for cache in [&mut together, &mut alone] {
        stream.append(cache, 0, before, true)?;
    }
    let launched = launches();
    stream.append(&mut together, before, count, attend)?;
    let launched = launches() - launched;
    ensure!(launched < 20, "{launched} launches for {count} tokens");
    for token in before..before + count {
        stream.append(&mut alone, token, 1, true)?;
    }
    ensure!(content(&together)? == content(&alone)?, "lists differ");
    // And later tokens find all that they need.
    for (start, count) in [(before + count, 1), (before + count + 1, 9), (before + count + 10, 1)] {
        let rows = stream.append(&mut together, start, count, true)?.context("rows")?;
        let expected = stream.append(&mut alone, start, count, true)?.context("rows")?;
        ensure!(bits(&rows)? == bits(&expected)?, "rows from {start} on differ");
    }
    let end = before + count + 11;
    let least = together.lens()?.concat().into_iter().min().context("lists")?;
    Ok(end - least)
}

#[test]
fn a_chunk_leaves_what_single_tokens_leave() -> Result<()> {
    for (mut config, strategies) in every_rule()? {
        let mut hidden = 0;
        for (dtype, sliding, sinks, level) in [
            (DType::F32, None, 0, 20),
            (DType::F32, Some(23), 9, 2),
            (DType::F32, Some(4), 0, 20),
            (DType::BF16, None, 4, 1000),
        ] {
            (config.sinks, config.max_merge_level) = (sinks, level);
            let stream = Stream::new(config.clone(), strategies.clone(), dtype, sliding)?;
            for (before, count, attend) in [(1, 7, true), (4, 8, false), (5, 30, true), (6, 7, true), (40, 97, true)] {
                let found = check(&stream, before, count, attend).with_context(|| {
                    let (criterion, fold) = (config.criterion, config.fold);
                    format!("{criterion:?} {fold:?} {dtype:?}, sliding {sliding:?}: {count} after {before}")
                })?;
                hidden += if sliding.is_none() { found } else { 0 };
            }
        }
        assert_eq!(
            hidden > 20,
            !strategies.all_off(),
            "{:?}: {hidden} hidden",
            config.criterion
        );
    }
    Ok(())
}

/// Without a window, and where every query head has a list of its own.
#[test]
fn so_it_does_for_lists_of_query_heads() -> Result<()> {
    for (mut config, strategies) in every_rule()? {
        if !config.criterion.compares_pairs() {
            continue;
        }
        (config.window, config.group_rule) = (0, GroupRule::PerQueryHead);
        for dtype in [DType::F32, DType::F16] {
            let stream = Stream::new(config.clone(), strategies.clone(), dtype, None)?;
            for (before, count) in [(1, 60), (33, 7)] {
                check(&stream, before, count, true)
                    .with_context(|| format!("{:?} {dtype:?}: {count} after {before}", config.fold))?;
            }
        }
    }
    Ok(())
}

/// In 8 bits: the same codes and scales.
#[test]
fn so_it_does_in_bytes() -> Result<()> {
    for (mut config, strategies) in every_rule()? {
        for (storage, dtype, sliding, window) in [
            (BYTES[0], DType::F32, None, 5),
            (BYTES[0], DType::BF16, Some(23), 5),
            (BYTES[1], DType::F16, None, 3),
            (BYTES[1], DType::BF16, None, 5),
        ] {
            config.window = window;
            let mut stream = Stream::new(config.clone(), strategies.clone(), dtype, sliding)?;
            stream.stored = stored(storage);
            for (before, count, attend) in [(1, 7, true), (4, 8, false), (40, 70, true)] {
                check(&stream, before, count, attend).with_context(|| {
                    let (criterion, fold) = (config.criterion, config.fold);
                    format!("{storage} {criterion:?} {fold:?} {dtype:?}, sliding {sliding:?}: {count} after {before}")
                })?;
            }
        }
    }
    Ok(())
}
