//! Budgets: lists of bounded length, by the reference's law, however the tokens come.

use crate::common::caches::{chunked, part, strategies};
use crate::common::inputs::{assert_close, Normal, Shape};
use crate::common::saved::{bits, through_a_file};
use crate::common::segments;
use crate::common::settings::{config, reference_bits};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{
    AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Criterion, Fold, GroupRule, HeadStrategies,
    MergeStrategy, Storage,
};

const SHAPE: Shape = Shape(2, 4, 2, 150, 16);

fn cache(strategies: &HeadStrategies, config: &CompressionConfig, budget: usize) -> Result<CompressedKvCache> {
    let options = CacheOptions {
        budget: Some(budget),
        ..Default::default()
    };
    Ok(CompressedKvCache::new(strategies.clone(), config.clone(), options)?)
}

/// Settings of every criterion and fold that needs no scores, with the budgets to try.
fn cases() -> Vec<(CompressionConfig, Vec<usize>)> {
    let mut cases = Vec::new();
    for (criterion, fold, window) in [
        (Criterion::KeyKey, Fold::Mean, 5),
        (Criterion::KeyKey, Fold::Drop, 0),
        (Criterion::QueryKey, Fold::PairSum, 4),
        (Criterion::ObservedMass, Fold::Drop, 6),
    ] {
        let unanimous = config(fold, window, criterion);
        // The least one, one whose period is 1, and one whose period is longer.
        let least = unanimous.sinks + window + 3;
        cases.push((unanimous.clone(), vec![least, least + 9, least + 38]));
        if !criterion.observes() {
            let alone = CompressionConfig {
                group_rule: GroupRule::PerQueryHead,
                ..unanimous
            };
            cases.push((alone, vec![least + 25]));
        }
    }
    cases
}

fn expected(
    qkv: &[Tensor; 3],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    budget: usize,
    options: &AttentionOptions,
) -> Result<Tensor> {
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
    let (q, k, v) = (q?, k?, v?);
    let bits = reference_bits([&q, &k, &v], strategies, config, options)?;
    let [batch, heads, tokens, _] = q.dims;
    let scores = match config.criterion.observes() {
        true => {
            // One list a KV head; tokens that are not decided yet have left no list.
            let masses = reference::observed_mass(&q, &k, &v, config, options)?;
            let group = heads / k.dims[1];
            let of = |batch: usize, head: usize| {
                let mut scores = masses[batch][head / group].clone();
                scores.resize(tokens, f64::INFINITY);
                scores
            };
            (0..batch).map(|b| (0..heads).map(|h| of(b, h)).collect()).collect()
        }
        false => reference::pair_scores(&q, &k, strategies, config)?,
    };
    let output =
        reference::attention_under_budget((&q, &k, &v), &bits, (&scores, budget), strategies, config, options)?;
    Ok(output.to_tensor(DType::F64, &Device::Cpu)?)
}

/// One call, chunks and single tokens equal the reference, and no list is ever longer than its budget.
#[test]
fn any_chunking_equals_the_reference() -> Result<()> {
    let options = AttentionOptions {
        softmax_scale: Some(0.4),
        ..Default::default()
    };
    let plain = |_, _| Ok(options.clone());
    let mut shorter = 0;
    for (index, (config, budgets)) in cases().into_iter().enumerate() {
        for kind in [0, 2, 3, 4] {
            let strategies = strategies(kind, &SHAPE, &config)?;
            let qkv = SHAPE.qkv(index as u64, DType::F64)?;
            for budget in &budgets {
                let expected = expected(&qkv, &strategies, &config, *budget, &options)?;
                let name = format!("{:?} {:?}, strategies {kind}, {budget}", config.criterion, config.fold);
                for chunks in [&[150usize][..], &[1], &[40, 1, 1, 7, 23], &[3, 64]] {
                    let mut cache = cache(&strategies, &config, *budget)?;
                    let got = chunked(&mut cache, &qkv, chunks, plain)?;
                    assert_close(&format!("{name} {chunks:?}"), &got, &expected, 1e-9, 1e-9)?;
                    let most = cache.lens().into_iter().flatten().max().unwrap_or(0);
                    assert!(most <= *budget, "{name}: {most} entries");
                }
                let mut free = CompressedKvCache::new(strategies.clone(), config.clone(), Default::default())?;
                chunked(&mut free, &qkv, &[150], plain)?;
                let longest = free.lens().into_iter().flatten().max().unwrap_or(0);
                shorter += usize::from(longest > *budget);
            }
        }
    }
    // The budgets had something to do.
    assert!(shorter > 40, "{shorter}");
    Ok(())
}

/// No list is longer than its budget after any token.
#[test]
fn no_list_outgrows_its_budget() -> Result<()> {
    for (config, budgets) in cases() {
        for budget in budgets {
            let strategies = strategies(3, &SHAPE, &config)?;
            let qkv = SHAPE.qkv(2, DType::F32)?;
            let mut cache = cache(&strategies, &config, budget)?;
            let mut full = 0;
            for token in 0..SHAPE.3 {
                let [q, k, v] = part(&qkv, token, 1)?;
                cache.append_and_attend(&q, &k, &v, &Default::default())?;
                let most = cache.lens().into_iter().flatten().max().unwrap_or(0);
                assert!(most <= budget, "{most} entries of {budget} at token {token}");
                full = full.max(most);
            }
            // The budget is used, but for what one period takes.
            assert!(full + 6 >= budget, "{full} of {budget}");
        }
    }
    Ok(())
}

/// Given scores: the reference by the same law, written out here.
#[test]
fn given_scores_go_by_themselves() -> Result<()> {
    let (config, budget) = (config(Fold::Drop, 3, Criterion::Given), 30);
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let strategies = strategies.with_thresholds(&Tensor::new(vec![-0.5f64; 4], &Device::Cpu)?)?;
    let qkv = SHAPE.qkv(5, DType::F64)?;
    let scores = Normal::new(6).tensor(&[2, 2, 150])?;
    let rows: Vec<Vec<Vec<f32>>> = scores.to_vec3()?;
    let wide: Vec<Vec<Vec<f64>>> = rows
        .iter()
        .map(|lists| {
            lists
                .iter()
                .map(|list| list.iter().map(|x| f64::from(*x)).collect())
                .collect()
        })
        .collect();
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
    let (q, k, v) = (q?, k?, v?);
    let options = AttentionOptions::default();
    let bits = reference::given_indicators(&wide, 4, &strategies, &config)?;
    let by_head: Vec<Vec<Vec<f64>>> = wide
        .iter()
        .map(|lists| (0..4).map(|head| lists[head / 2].clone()).collect())
        .collect();
    let expected =
        reference::attention_under_budget((&q, &k, &v), &bits, (&by_head, budget), &strategies, &config, &options)?;
    let expected = expected.to_tensor(DType::F64, &Device::Cpu)?;
    for chunks in [&[150usize][..], &[1], &[20, 1, 1]] {
        let mut cache = cache(&strategies, &config, budget)?;
        let (mut outputs, mut start) = (Vec::new(), 0);
        for count in chunks.iter().cycle() {
            let count = (*count).min(150 - start);
            if count == 0 {
                break;
            }
            let [q, k, v] = part(&qkv, start, count)?;
            let scores = scores.narrow(2, start, count)?.contiguous()?;
            outputs.push(cache.append_and_attend_scored(&q, &k, &v, &scores, &options)?);
            start += count;
        }
        assert_close(
            &format!("{chunks:?}"),
            &Tensor::cat(&outputs, 2)?,
            &expected,
            1e-9,
            1e-9,
        )?;
    }
    Ok(())
}

/// A long stream: memory stays where it was.
#[test]
fn a_long_stream_runs_in_constant_memory() -> Result<()> {
    let shape = Shape(1, 2, 1, 512, 8);
    let qkv = shape.qkv(1, DType::F32)?;
    for (config, kind) in [
        (config(Fold::Mean, 8, Criterion::KeyKey), 0),
        (config(Fold::Drop, 8, Criterion::ObservedMass), 1),
        (config(Fold::Drop, 8, Criterion::KeyKey), 2),
    ] {
        let mut cache = cache(&strategies(kind, &shape, &config)?, &config, 120)?;
        let mut most = [0; 2];
        for round in 0..40 {
            let [q, k, v] = &qkv;
            cache.append_and_attend(q, k, v, &Default::default())?;
            most[usize::from(round >= 10)] = most[usize::from(round >= 10)].max(cache.bytes_allocated());
        }
        assert_eq!(cache.seq_len(), 40 * 512);
        // A run that goes on and a key more or less.
        assert!(most[1] <= most[0] + 200, "{} bytes, later {}", most[0], most[1]);
        assert!(cache.lens()[0][0] <= 120);
    }
    Ok(())
}

/// Saved, forked and cut back, a cache with a budget goes on as it would have.
#[test]
fn files_forks_and_journals_keep_the_scores() -> Result<()> {
    for (index, (config, budgets)) in cases().into_iter().enumerate() {
        let qkv = SHAPE.qkv(index as u64, DType::F32)?;
        for storage in [Storage::F32, Storage::BF16, Storage::I8] {
            let options = CacheOptions {
                budget: Some(budgets[budgets.len() - 1]),
                rollback: 9,
                storage: Some(storage),
                ..Default::default()
            };
            let strategies = strategies(4, &SHAPE, &config)?;
            let mut original = CompressedKvCache::new(strategies, config.clone(), options)?;
            let mut start = 0;
            for count in [70, 1, 1, 5, 1, 30] {
                let [q, k, v] = part(&qkv, start, count)?;
                original.append_and_attend(&q, &k, &v, &Default::default())?;
                start += count;
            }
            let mut loaded = through_a_file(&original)?;
            let mut fork = original.fork();
            let mut back = original.fork();
            for (start, count) in [(0, 4), (50, 5)] {
                let [q, k, v] = part(&qkv, start, count)?;
                back.append_and_attend(&q, &k, &v, &Default::default())?;
            }
            back.truncate(start)?;
            while start < 150 {
                let count = [1, 1, 13][start % 3].min(150 - start);
                let [q, k, v] = part(&qkv, start, count)?;
                let expected = original.append_and_attend(&q, &k, &v, &Default::default())?;
                for cache in [&mut loaded, &mut fork, &mut back] {
                    let got = cache.append_and_attend(&q, &k, &v, &Default::default())?;
                    assert_eq!(
                        bits(&got)?,
                        bits(&expected)?,
                        "case {index}, {storage:?}, {count} at {start}"
                    );
                    assert_eq!(cache.lens(), original.lens());
                }
                start += count;
            }
        }
    }
    Ok(())
}

/// Rows with segments of their own drop entries as each would alone.
#[test]
fn segments_count_their_own_tokens() -> Result<()> {
    let shape = segments::SHAPE;
    let config = config(Fold::Mean, 4, Criterion::KeyKey);
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let qkv = shape.qkv(4, DType::F64)?;
    let numbers = segments::numbers();
    for chunks in [&[90usize][..], &[1], &[31, 1, 8]] {
        let mut whole = cache(&strategies, &config, 15)?;
        let got = chunked(&mut whole, &qkv, chunks, |start, count| {
            Ok(segments::with(
                segments::segments(&numbers, start, count)?,
                &Default::default(),
            ))
        })?;
        for (row, numbers) in numbers.iter().enumerate() {
            let mut start = 0;
            for run in numbers.chunk_by(|a, b| a == b) {
                let tokens = start..start + run.len();
                start = tokens.end;
                if run[0] == 0 {
                    continue;
                }
                let mut alone = cache(&strategies, &config, 15)?;
                let [q, k, v] = part(&qkv, tokens.start, run.len())?;
                let row_of = |x: &Tensor| x.narrow(0, row, 1);
                let expected =
                    alone.append_and_attend(&row_of(&q)?, &row_of(&k)?, &row_of(&v)?, &Default::default())?;
                let got = got.narrow(0, row, 1)?.narrow(2, tokens.start, run.len())?;
                assert_close(&format!("row {row} {tokens:?} {chunks:?}"), &got, &expected, 1e-9, 1e-9)?;
            }
        }
    }
    Ok(())
}

/// A call that is refused in a later part changes nothing, and budgets that leave nothing to drop are refused.
#[test]
fn refusals_change_nothing() -> Result<()> {
    let config = config(Fold::PairSum, 4, Criterion::KeyKey);
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let message = cache(&strategies, &config, 8).unwrap_err().to_string();
    assert!(message.contains("budget: expected at least 9"), "{message}");
    let options = CacheOptions {
        budget: Some(20),
        storage: Some(Storage::F16),
        ..Default::default()
    };
    let mut cache = CompressedKvCache::new(strategies, config, options)?;
    let qkv = SHAPE.qkv(1, DType::F32)?;
    let [q, k, v] = part(&qkv, 0, 60)?;
    cache.append_and_attend(&q, &k, &v, &Default::default())?;
    let (lens, bytes) = (cache.lens(), cache.bytes());
    // A number that f16 cannot hold, in the last part of the call.
    let [q, k, v] = part(&qkv, 60, 50)?;
    let large = Tensor::cat(&[v.narrow(2, 0, 49)?, (v.narrow(2, 49, 1)? + 1e9)?], 2)?;
    assert!(cache.append_and_attend(&q, &k, &large, &Default::default()).is_err());
    assert_eq!((cache.seq_len(), cache.lens(), cache.bytes()), (60, lens, bytes));
    let mut fresh = cache.fork();
    let [a, b] = [&mut cache, &mut fresh].map(|cache| cache.append_and_attend(&q, &k, &v, &Default::default()));
    assert_eq!(bits(&a?)?, bits(&b?)?);
    Ok(())
}
