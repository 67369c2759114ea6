//! Batch rows that bring different numbers of tokens, come and go.

use crate::common::caches::with_thresholds;
use crate::common::inputs::{assert_close, values, Normal, Shape};
use crate::common::settings::{config, settings};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    AttentionOptions, CompressedKvCache, CompressionConfig, Criterion, Fold, HeadStrategies, MergeStrategy,
};

/// Sequences that step together: a prompt of one beside single tokens of others, and rows that wait.
const STEPS: [[usize; 3]; 8] = [
    [20, 1, 0],
    [1, 1, 7],
    [1, 30, 1],
    [1, 1, 1],
    [0, 1, 0],
    [5, 5, 5],
    [1, 0, 40],
    [1, 1, 1],
];

fn rows(x: &Tensor, row: usize, start: usize, count: usize) -> Result<Tensor> {
    Ok(x.narrow(0, row, 1)?.narrow(2, start, count)?)
}

/// The new tokens of all rows, padded with NaN behind the shorter ones: nothing may read these.
fn padded(x: &Tensor, starts: &[usize; 3], lens: &[usize; 3]) -> Result<Tensor> {
    let most = *lens.iter().max().unwrap_or(&0);
    let row = |row: usize| -> Result<Tensor> {
        let own = rows(x, row, starts[row], lens[row])?;
        let mut dims = own.dims().to_vec();
        dims[2] = most - lens[row];
        let nan = (Tensor::zeros(dims, x.dtype(), x.device())? + f64::NAN)?;
        Ok(Tensor::cat(&[own, nan], 2)?)
    };
    Ok(Tensor::cat(&[row(0)?, row(1)?, row(2)?], 0)?.contiguous()?)
}

fn step_together(
    name: &str,
    new: impl Fn() -> Result<CompressedKvCache>,
    qkv: &[Tensor; 3],
    scores: Option<&Tensor>,
    options: &AttentionOptions,
) -> Result<()> {
    let (mut cache, mut starts) = (new()?, [0; 3]);
    let mut alone = [new()?, new()?, new()?];
    for lens in STEPS {
        let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(|x| padded(x, &starts, &lens));
        let (q, k, v) = (q?, k?, v?);
        let got = match scores {
            None => cache.append_and_attend_ragged(&q, &k, &v, &lens, options)?,
            Some(scores) => {
                let scores = padded(&scores.unsqueeze(3)?, &starts, &lens)?.squeeze(3)?;
                cache.append_and_attend_ragged_scored(&q, &k, &v, &scores, &lens, options)?
            }
        };
        for row in 0..3 {
            let (start, len) = (starts[row], lens[row]);
            let beyond = got.narrow(0, row, 1)?.narrow(2, len, got.dim(2)? - len)?;
            assert!(values(&beyond)?.iter().all(|x| *x == 0.0), "{name}: rows beyond");
            if len == 0 {
                continue;
            }
            let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(|x| rows(x, row, start, len));
            let (q, k, v) = (q?, k?, v?);
            let expected = match scores {
                None => alone[row].append_and_attend(&q, &k, &v, options)?,
                Some(scores) => {
                    let scores = scores.narrow(0, row, 1)?.narrow(2, start, len)?;
                    alone[row].append_and_attend_scored(&q, &k, &v, &scores, options)?
                }
            };
            let got = rows(&got, row, 0, len)?;
            assert_close(&format!("{name}: row {row} at {start}"), &got, &expected, 1e-6, 1e-6)?;
            starts[row] += len;
            assert_eq!(cache.lens()[row], alone[row].lens()[0], "{name}: row {row}");
        }
    }
    Ok(())
}

/// Each row is that row alone, under every setting of the table without a bias or dropout.
#[test]
fn rows_of_any_lengths_equal_each_row_alone() -> Result<()> {
    let shape = Shape(3, 4, 2, 97, 16);
    let mut ran = 0;
    for (index, setting) in settings().into_iter().enumerate() {
        let strategies = setting.strategies(&shape)?;
        let new = || CompressedKvCache::new(strategies.clone(), setting.config.clone(), Default::default());
        let options = (setting.options)(&shape);
        if new().is_err() || options.bias.is_some() || options.dropout.is_some() || !options.causal {
            continue;
        }
        let qkv = shape.qkv(index as u64, DType::F32)?;
        step_together(setting.name, || Ok(new()?), &qkv, None, &options)?;
        ran += 1;
    }
    assert!(ran > 8, "{ran} settings");
    Ok(())
}

/// Sliding windows and given scores.
#[test]
fn ragged_rows_slide_and_take_scores() -> Result<()> {
    let shape = Shape(3, 4, 2, 97, 16);
    let qkv = shape.qkv(3, DType::F32)?;
    let sliding = AttentionOptions {
        sliding_window: Some(11),
        ..Default::default()
    };
    let new = |config: &CompressionConfig| -> Result<CompressedKvCache> {
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        let strategies = match config.criterion.takes_scores() {
            true => strategies.with_thresholds(&Tensor::new(vec![0f64; 4], &Device::Cpu)?)?,
            false => with_thresholds(strategies, &shape, config)?,
        };
        Ok(CompressedKvCache::new(strategies, config.clone(), Default::default())?)
    };
    let merging = config(Fold::Mean, 4, Criterion::KeyKey);
    step_together("sliding", || new(&merging), &qkv, None, &sliding)?;
    let given = config(Fold::Drop, 4, Criterion::Given);
    let scores = Normal::new(4).tensor(&[3, 2, 97])?;
    step_together("given", || new(&given), &qkv, Some(&scores), &Default::default())
}

/// A server's life: rows are admitted, step together at different lengths, and leave.
#[test]
fn rows_come_and_go() -> Result<()> {
    let shape = Shape(3, 4, 2, 90, 16);
    let qkv = shape.qkv(8, DType::F32)?;
    let config = config(Fold::Mean, 4, Criterion::KeyKey);
    let new = || {
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        CompressedKvCache::new(strategies, config.clone(), Default::default())
    };
    let options = AttentionOptions::default();
    let call = |cache: &mut CompressedKvCache, row, start, count| -> Result<Tensor> {
        let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(|x| rows(x, row, start, count));
        Ok(cache.append_and_attend(&q?, &k?, &v?, &options)?)
    };
    // Each row alone, in the calls that it will make.
    let mut expected = Vec::new();
    for (row, prompt) in [(0, 30), (1, 7), (2, 51)] {
        let mut cache = new()?;
        call(&mut cache, row, 0, prompt)?;
        let steps: Vec<Tensor> = (0..6)
            .map(|step| call(&mut cache, row, prompt + step, 1))
            .collect::<Result<_>>()?;
        expected.push((prompt, steps, cache));
    }
    let prompt = |row: usize| -> Result<CompressedKvCache> {
        let mut cache = new()?;
        call(&mut cache, row, 0, expected[row].0)?;
        Ok(cache)
    };
    // Which sequences run, from which of their steps on.
    let (mut running, mut batch) = (vec![(0, 0)], prompt(0)?);
    let step = |running: &mut Vec<(usize, usize)>, batch: &mut CompressedKvCache| -> Result<()> {
        let token = |x: &Tensor| -> Result<Tensor> {
            let one = |(row, step): &(usize, usize)| rows(x, *row, expected[*row].0 + step, 1);
            Ok(Tensor::cat(&running.iter().map(one).collect::<Result<Vec<_>>>()?, 0)?)
        };
        let got = batch.append_and_attend(&token(&qkv[0])?, &token(&qkv[1])?, &token(&qkv[2])?, &options)?;
        for (index, (row, step)) in running.iter_mut().enumerate() {
            let got = rows(&got, index, 0, 1)?;
            assert_close(&format!("{row} {step}"), &got, &expected[*row].1[*step], 1e-6, 1e-6)?;
            *step += 1;
        }
        Ok(())
    };
    step(&mut running, &mut batch)?;
    // Two sequences are admitted.
    batch = CompressedKvCache::cat(&[batch, prompt(1)?, prompt(2)?])?;
    running.extend([(1, 0), (2, 0)]);
    for _ in 0..3 {
        step(&mut running, &mut batch)?;
    }
    // The one in the midst retires.
    let mut parts = batch.split()?;
    let retired = parts.remove(1);
    running.remove(1);
    let mut alone = new()?;
    call(&mut alone, 1, 0, 10)?;
    // 7 tokens of its prompt and 3 steps.
    assert_eq!(retired.lens(), alone.lens());
    batch = CompressedKvCache::cat(&parts)?;
    for _ in 0..2 {
        step(&mut running, &mut batch)?;
    }
    for (cache, (row, steps)) in batch.split()?.iter().zip(&running) {
        assert!(*steps >= 5, "{steps}");
        if *steps == 6 {
            assert_eq!(cache.lens(), expected[*row].2.lens());
        }
    }
    Ok(())
}

/// Lengths that do not fit are refused, and nothing changes.
#[test]
fn lens_that_do_not_fit_are_refused() -> Result<()> {
    let [q, k, v] = Shape(2, 2, 1, 4, 8).qkv(1, DType::F32)?;
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let mut cache = CompressedKvCache::new(strategies, CompressionConfig::pretrained(), Default::default())?;
    let segments = AttentionOptions {
        segments: Some(Tensor::ones((2, 4), DType::U32, &Device::Cpu)?),
        ..Default::default()
    };
    let plain = AttentionOptions::default();
    for (lens, options, expected) in [
        (&[1usize][..], &plain, "expected 2"),
        (&[5, 1], &plain, "at most the call's 4"),
        (&[0, 0], &plain, "at least one token"),
        (&[1, 2], &segments, "expected None beside lens"),
    ] {
        let message = cache
            .append_and_attend_ragged(&q, &k, &v, lens, options)
            .unwrap_err()
            .to_string();
        assert!(message.contains(expected), "{message}");
        assert_eq!(cache.seq_len(), 0);
    }
    Ok(())
}
