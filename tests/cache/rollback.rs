//! Going back: a cache with a journal equals, bit for bit, one that never saw the tokens that were taken back.

use crate::common::caches::{part, part_options, recorded, strategies, with_thresholds};
use crate::common::files::{Contents, TempFile};
use crate::common::inputs::{Normal, Shape};
use crate::common::saved::bits;
use crate::common::segments;
use crate::common::settings::{config, settings};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Criterion, Fold, HeadStrategies,
    MergeStrategy, Storage,
};
use rand::{rngs::StdRng, Rng, SeedableRng};

const ROLLBACK: usize = 7;

/// The tokens of one sequence, and all that decides what a cache makes of them.
struct Sequence {
    name: String,
    qkv: [Tensor; 3],
    scores: Option<Tensor>,
    strategies: HeadStrategies,
    config: CompressionConfig,
    options: AttentionOptions,
    storage: Option<Storage>,
}

impl Sequence {
    fn cache(&self) -> Result<CompressedKvCache> {
        recorded(&self.strategies, &self.config, self.storage, ROLLBACK)
    }

    fn append(&self, cache: &mut CompressedKvCache, start: usize, count: usize) -> Result<Tensor> {
        let [q, k, v] = &part(&self.qkv, start, count)?;
        let options = part_options(&self.options, start, count)?;
        Ok(match &self.scores {
            None => cache.append_and_attend(q, k, v, &options)?,
            Some(scores) => cache.append_and_attend_scored(q, k, v, &scores.narrow(2, start, count)?, &options)?,
        })
    }

    /// A cache that saw these calls alone, each a start and a count, and the rows of the last.
    fn fresh(&self, calls: &[(usize, usize)]) -> Result<(CompressedKvCache, Tensor)> {
        let (mut fresh, mut last) = (self.cache()?, None);
        for (start, count) in calls {
            last = Some(self.append(&mut fresh, *start, *count)?);
        }
        Ok((fresh, last.context("a call")?))
    }

    /// Appends calls of these lengths and takes back up to [`ROLLBACK`] tokens after some of them, twice over.
    fn run(&self, seed: u64) -> Result<()> {
        let tokens = self.qkv[0].dim(2)?;
        let mut rng = StdRng::seed_from_u64(seed);
        let mut below = |limit: usize| rng.random_range(0..limit);
        let (mut cache, mut calls) = (self.cache()?, Vec::<(usize, usize)>::new());
        let (mut longest, mut taken_back) = (0, 0);
        while cache.seq_len() < tokens {
            let start = cache.seq_len();
            let count = [1, 1, 1, 2, 5, 8, 30][below(7)].min(tokens - start);
            let got = self.append(&mut cache, start, count)?;
            calls.push((start, count));
            longest = longest.max(start + count);
            if below(3) == 0 {
                let (_, expected) = self.fresh(&calls)?;
                assert_eq!(bits(&got)?, bits(&expected)?, "{}: rows from {start} on", self.name);
            }
            let shortest = longest.saturating_sub(ROLLBACK).max(1);
            let to = start + count - below(ROLLBACK + 1).min((start + count).saturating_sub(shortest));
            if below(2) == 0 && to < start + count {
                cache.truncate(to).with_context(|| format!("{} to {to}", self.name))?;
                taken_back += 1;
                calls.retain(|(start, _)| *start < to);
                if let Some((start, count)) = calls.last_mut() {
                    *count = (*count).min(to - *start);
                }
                let (fresh, _) = self.fresh(&calls)?;
                assert_eq!(cache.seq_len(), to, "{}", self.name);
                assert_eq!(cache.lens(), fresh.lens(), "{}", self.name);
                assert_eq!(cache.bytes(), fresh.bytes(), "{}", self.name);
                assert_equal(&format!("{} at {to}", self.name), &content(&cache)?, &content(&fresh)?);
            }
        }
        assert!(taken_back > 1, "{}: {taken_back} times taken back", self.name);
        Ok(())
    }
}

/// What a saved file of the cache holds.
fn content(cache: &CompressedKvCache) -> Result<Contents> {
    let file = TempFile::new();
    cache.save(&file.0)?;
    Contents::read(&file.0)
}

fn assert_equal(what: &str, got: &Contents, expected: &Contents) {
    for (name, tensor) in &expected.tensors {
        assert!(got.tensors.get(name) == Some(tensor), "{what}: {name}");
    }
    assert_eq!(got.cache, expected.cache, "{what}");
    assert!(got == expected, "{what}");
}

/// Every criterion, fold and option of the table of settings that a cache accepts.
#[test]
fn any_setting_goes_back_exactly() -> Result<()> {
    let shape = Shape(2, 4, 2, 97, 16);
    let mut ran = 0;
    for (index, setting) in settings().into_iter().enumerate() {
        let options = (setting.options)(&shape);
        let refused = CompressedKvCache::new(setting.strategies(&shape)?, setting.config.clone(), Default::default());
        let masks = setting.name.contains("hid");
        if refused.is_err() || !options.causal || masks {
            continue;
        }
        for (dtype, storage) in [
            (DType::F32, None),
            (DType::F32, Some(Storage::BF16)),
            (DType::F32, Some(Storage::I8)),
            (DType::F64, None),
        ] {
            Sequence {
                name: format!("{} {dtype:?} {storage:?}", setting.name),
                qkv: shape.qkv(index as u64, dtype)?,
                scores: None,
                strategies: setting.strategies(&shape)?,
                config: setting.config.clone(),
                options: options.clone(),
                storage,
            }
            .run(index as u64)?;
        }
        ran += 1;
    }
    assert!(ran > 12, "{ran} settings");
    Ok(())
}

/// Sliding windows on both sides of the window: entries that have left come back.
#[test]
fn entries_that_left_a_sliding_window_come_back() -> Result<()> {
    let shape = Shape(1, 4, 2, 97, 16);
    for fold in [Fold::PairSum, Fold::Mean, Fold::Drop] {
        for (window, sliding_window) in [(0, 5), (4, 9), (9, 4), (4, 30), (3, 1)] {
            for strategy in 0..4 {
                let config = config(fold, window, Criterion::KeyKey);
                Sequence {
                    name: format!("{fold:?} {window} {sliding_window} {strategy}"),
                    qkv: shape.qkv(window as u64, DType::F32)?,
                    scores: None,
                    strategies: strategies(strategy, &shape, &config)?,
                    config,
                    options: AttentionOptions {
                        sliding_window: Some(sliding_window),
                        ..Default::default()
                    },
                    storage: None,
                }
                .run(strategy.into())?;
            }
        }
    }
    Ok(())
}

#[test]
fn given_scores_go_back_exactly() -> Result<()> {
    let shape = Shape(2, 4, 2, 97, 16);
    for window in [0, 5] {
        let config = config(Fold::Drop, window, Criterion::Given);
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        let scores = Normal::new(3).tensor(&[2, 2, 97])?.to_dtype(DType::F32)?;
        Sequence {
            name: format!("given, window {window}"),
            qkv: shape.qkv(5, DType::F32)?,
            scores: Some(scores),
            strategies: strategies.with_thresholds(&Tensor::new(vec![0.1f64, 0.1, -0.2, -0.2], &Device::Cpu)?)?,
            config,
            options: AttentionOptions::default(),
            storage: None,
        }
        .run(window as u64)?;
    }
    Ok(())
}

/// Lists that start anew at a segment's first token come back.
#[test]
fn segments_go_back_exactly() -> Result<()> {
    let shape = segments::SHAPE;
    let numbers = segments::numbers();
    for (index, (config, options)) in segments::configs().into_iter().enumerate() {
        Sequence {
            name: format!("segments {index}"),
            qkv: shape.qkv(index as u64, DType::F32)?,
            scores: None,
            strategies: with_thresholds(HeadStrategies::uniform(MergeStrategy::Similarity), &shape, &config)?,
            config,
            options: segments::with(segments::segments(&numbers, 0, shape.3)?, &options),
            storage: None,
        }
        .run(index as u64)?;
    }
    Ok(())
}

fn short(rollback: usize) -> Result<(CompressedKvCache, [Tensor; 3])> {
    let options = CacheOptions {
        rollback,
        max_entries: Some(40),
        ..Default::default()
    };
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let cache = CompressedKvCache::new(strategies, config(Fold::Mean, 4, Criterion::KeyKey), options)?;
    Ok((cache, Shape(1, 2, 1, 200, 8).qkv(1, DType::F32)?))
}

/// Lengths that the journal does not cover are refused by name, and nothing changes.
#[test]
fn older_lengths_are_refused() -> Result<()> {
    let (mut cache, qkv) = short(4)?;
    for start in 0..30 {
        let [q, k, v] = part(&qkv, start, 1)?;
        cache.append_and_attend(&q, &k, &v, &Default::default())?;
    }
    let before = content(&cache)?;
    let message = cache.truncate(10).unwrap_err().to_string();
    assert!(
        message.contains("got 10") && message.contains("CacheOptions::rollback"),
        "{message}"
    );
    assert_equal("refused", &content(&cache)?, &before);
    let copied = cache.fork();
    cache.truncate(26)?;
    assert_eq!((cache.seq_len(), copied.seq_len()), (26, 30));
    // Batch rows that moved begin a new journal.
    let mut moved = copied.fork();
    moved.index_select(&Tensor::new(&[0u32, 0], &Device::Cpu)?)?;
    assert!(moved.truncate(29).is_err());
    Ok(())
}

/// A call that is refused in its second part leaves the cache and the journal as they were.
#[test]
fn a_refused_call_changes_nothing() -> Result<()> {
    let (mut cache, qkv) = short(5)?;
    let [q, k, v] = part(&qkv, 0, 20)?;
    cache.append_and_attend(&q, &k, &v, &Default::default())?;
    let before = content(&cache)?;
    // The first 145 of these tokens, or the last 5, exceed the limit.
    for count in [150, 60, 45, 35, 30] {
        let [q, k, v] = part(&qkv, 20, count)?;
        match cache.fork().append_and_attend(&q, &k, &v, &Default::default()) {
            Ok(_) => continue,
            Err(_) => assert!(cache.append_and_attend(&q, &k, &v, &Default::default()).is_err()),
        }
        assert_equal("refused", &content(&cache)?, &before);
        let mut shorter = cache.fork();
        shorter.truncate(16)?;
        assert_eq!(shorter.seq_len(), 16);
    }
    Ok(())
}

/// The journal is no larger than its options say.
#[test]
fn the_journal_stays_small() -> Result<()> {
    let (rollback, shape) = (8, Shape(1, 2, 1, 3000, 16));
    let config = config(Fold::Mean, 6, Criterion::KeyKey);
    let qkv = shape.qkv(1, DType::F32)?;
    let run = |rollback| -> Result<CompressedKvCache> {
        let options = CacheOptions {
            rollback,
            ..Default::default()
        };
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        let mut cache = CompressedKvCache::new(strategies, config.clone(), options)?;
        let mut start = 0;
        for count in [2900].into_iter().chain([1; 100]) {
            let [q, k, v] = part(&qkv, start, count)?;
            cache.append_and_attend(&q, &k, &v, &Default::default())?;
            start += count;
        }
        Ok(cache)
    };
    let (plain, recorded) = (run(0)?, run(rollback)?);
    assert_eq!(plain.bytes(), recorded.bytes());
    let journal = recorded.bytes_allocated() - plain.bytes_allocated();
    // Query and key and value of 16 tokens; of six marks the window, the chain and the last key.
    let token = 4 * 16 * 4;
    let most = 2 * rollback * token + 6 * (6 * 2 * 16 * 4 + 8 * 16 * 4 + 200);
    assert!((1..=most).contains(&journal), "{journal} bytes, at most {most}");
    Ok(())
}
