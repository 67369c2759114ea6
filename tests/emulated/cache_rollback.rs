//! A cache on a device goes back to a mark: what it then holds and computes is that of a cache that never went on.

use crate::common::caches::part;
use crate::common::files::{Contents, TempFile};
use crate::common::inputs::{Normal, Shape};
use crate::common::saved::bits;
use crate::common::settings::config;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::emulation::EmulatedCache;
use candle_sfattention::{AttentionOptions, CompressionConfig, Criterion, Fold, HeadStrategies, MergeStrategy};

pub fn content(cache: &EmulatedCache) -> Result<Contents> {
    let file = TempFile::new();
    cache.to_cpu()?.save(&file.0)?;
    Contents::read(&file.0)
}

/// Settings of four heads: every criterion and fold, and heads that are off.
pub fn every_rule() -> Result<Vec<(CompressionConfig, HeadStrategies)>> {
    let cases = [
        (Criterion::QueryKey, Fold::PairSum, MergeStrategy::Similarity),
        (Criterion::KeyKey, Fold::Mean, MergeStrategy::Similarity),
        (Criterion::KeyKey, Fold::Drop, MergeStrategy::Off),
        (Criterion::ObservedMass, Fold::Drop, MergeStrategy::Similarity),
        (Criterion::Given, Fold::Drop, MergeStrategy::Similarity),
    ];
    let settings = cases.map(|(criterion, fold, strategy)| {
        let mut strategies = HeadStrategies::uniform(strategy);
        if criterion.needs_thresholds() {
            let threshold = if criterion == Criterion::Given { 0.0 } else { 1.2 };
            strategies = strategies.with_thresholds(&Tensor::new(vec![threshold; 4], &Device::Cpu)?)?;
        }
        Ok((config(fold, 5, criterion), strategies))
    });
    settings.into_iter().collect()
}

/// Every criterion and fold, and heads that are off, from before the window is full to after the buffers have grown.
#[test]
fn a_mark_is_exact() -> Result<()> {
    let shape = Shape(2, 4, 2, 130, 16);
    for (config, strategies) in every_rule()? {
        let (criterion, fold) = (config.criterion, config.fold);
        let options = AttentionOptions {
            softmax_scale: Some(0.4),
            ..Default::default()
        };
        for (dtype, before, after) in [(DType::F32, 3, 90), (DType::F32, 40, 9), (DType::BF16, 40, 70)] {
            let name = format!("{criterion:?} {fold:?} {dtype:?} {before}");
            let qkv = shape.qkv(7, dtype)?;
            let scores = Normal::new(1).tensor(&[2, 2, 130])?;
            let scores = |start, count| match criterion.takes_scores() {
                true => scores.narrow(2, start, count)?.contiguous().map(Some),
                false => Ok(None),
            };
            let new = || EmulatedCache::new(&qkv, &strategies, &config, &Default::default());
            let append = |cache: &mut EmulatedCache, start, count| -> Result<Tensor> {
                let scores = scores(start, count)?;
                let rows = cache.append_scored(&part(&qkv, start, count)?, scores.as_ref(), Some(&options))?;
                rows.context("rows")
            };
            let (mut cache, mut fresh) = (new()?, new()?);
            for cache in [&mut cache, &mut fresh] {
                append(cache, 0, before)?;
            }
            let mark = cache.mark()?;
            append(&mut cache, before, after)?;
            append(&mut cache, before + after, 1)?;
            let mut cache = cache.at_mark(&mark)?;
            assert!(content(&cache)? == content(&fresh)?, "{name}");
            // Two tokens once more, without rows, as the journal does.
            append(&mut fresh, before, 2)?;
            cache.append_again(&part(&qkv, before, 2)?, scores(before, 2)?.as_ref(), &options)?;
            assert!(content(&cache)? == content(&fresh)?, "{name}: two tokens later");
            for (start, count) in [(before + 2, 1), (before + 3, 6)] {
                let (got, expected) = (append(&mut cache, start, count)?, append(&mut fresh, start, count)?);
                assert_eq!(bits(&got)?, bits(&expected)?, "{name}: {count} at {start}");
            }
            // The mark is as good a second time.
            let cache = cache.at_mark(&mark)?;
            let mut fresh = new()?;
            append(&mut fresh, 0, before)?;
            assert!(content(&cache)? == content(&fresh)?, "{name}: again");
        }
    }
    Ok(())
}
