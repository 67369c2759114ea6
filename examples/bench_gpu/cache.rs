//! Times a cache: one token over the tokens that it holds, and a prompt in chunks.

use crate::{config, time, Ceilings, Shape};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Criterion, HeadStrategies, MergeStrategy,
};
use std::time::Instant;

/// A cache's decisions.
struct Hiding {
    strategies: HeadStrategies,
    config: CompressionConfig,
}

impl Hiding {
    /// Hides a token where its random score is below a share.
    fn given(shape: &Shape, share: f64) -> Result<Self> {
        match share {
            0.0 => Ok(Self {
                strategies: HeadStrategies::uniform(MergeStrategy::Off),
                config: config(),
            }),
            _ => Self::by(Criterion::Given, shape, share),
        }
    }

    /// Hides a token whose observed mass, times its value's norm, is below that of an even softmax: about half of
    /// random tokens.
    fn observed(shape: &Shape) -> Result<Self> {
        let (group, window, sinks) = (shape.heads / shape.kv_heads, config().window, config().sinks);
        let even = (group * window / 2) as f64 / (window + sinks) as f64;
        Self::by(Criterion::ObservedMass, shape, even * (shape.dim as f64).sqrt())
    }

    fn by(criterion: Criterion, shape: &Shape, threshold: f64) -> Result<Self> {
        let thresholds = Tensor::full(threshold, shape.heads, &Device::Cpu)?;
        Ok(Self {
            strategies: HeadStrategies::uniform(MergeStrategy::Similarity).with_thresholds(&thresholds)?,
            config: CompressionConfig { criterion, ..config() },
        })
    }

    fn cache(&self) -> Result<CompressedKvCache> {
        let options = CacheOptions::default();
        Ok(CompressedKvCache::new(
            self.strategies.clone(),
            self.config.clone(),
            options,
        )?)
    }

    /// Scores of a call's tokens.
    fn scores(&self, shape: &Shape, tokens: usize, device: &Device) -> Result<Option<Tensor>> {
        let shape = (shape.batch, shape.kv_heads, tokens);
        match self.config.criterion.takes_scores() {
            false => Ok(None),
            true => Ok(Some(Tensor::rand(0f32, 1.0, shape, device)?)),
        }
    }
}

fn append(cache: &mut CompressedKvCache, qkv: &[Tensor; 3], scores: Option<&Tensor>) -> Result<Tensor> {
    let ([q, k, v], options) = (qkv, AttentionOptions::default());
    Ok(match scores {
        Some(scores) => cache.append_and_attend_scored(q, k, v, scores, &options)?,
        None => cache.append_and_attend(q, k, v, &options)?,
    })
}

/// Times one token against a cache of `shape.tokens`, a share of them hidden; the bytes are those of the keys and
/// values that stay.
pub fn decode(device: &Device, ceilings: &Ceilings, shape: Shape, share: f64) -> Result<()> {
    let hiding = Hiding::given(&shape, share)?;
    let mut cache = hiding.cache()?;
    let scores = hiding.scores(&shape, shape.tokens, device)?;
    append(&mut cache, &shape.qkv(device, DType::BF16)?, scores.as_ref())?;
    let held_first: usize = cache.lens().concat().iter().sum();
    let one = Shape { tokens: 1, ..shape };
    let (qkv, scores) = (one.qkv(device, DType::BF16)?, hiding.scores(&shape, 1, device)?);
    let mut step = || append(&mut cache, &qkv, scores.as_ref()).map(drop);
    let seconds = time(device, &mut step)?;
    // The host's time to enqueue a step, which matters only if it exceeds the device's time.
    let start = Instant::now();
    (0..50).try_for_each(|_| step())?;
    let enqueued = start.elapsed().as_secs_f64() / 50.0;
    device.synchronize()?;
    // Every timed step added a token, so the bytes are those held halfway.
    let held = (held_first + cache.lens().concat().iter().sum::<usize>()) / 2;
    let bytes = 4.0 * (held * shape.dim) as f64;
    let speed = bytes / seconds / 1e12;
    println!(
        "{:<17} {} r {share:<4} {:>9.3} ms {speed:>7.3} TB/s {:>5.1}% of a copy, {:.3} ms of the host",
        "decode",
        shape.name(),
        seconds * 1e3,
        100.0 * speed / ceilings.copy,
        enqueued * 1e3
    );
    Ok(())
}

/// Times a prompt in one call and in chunks: nothing hidden, half by scores and half by observed mass.
pub fn prompts(device: &Device, shape: Shape) -> Result<()> {
    prompt(device, shape, ("r 0", &Hiding::given(&shape, 0.0)?), 512)?;
    prompt(device, shape, ("r 0.5", &Hiding::given(&shape, 0.5)?), 512)?;
    prompt(device, shape, ("observed", &Hiding::observed(&shape)?), 512)
}

fn prompt(device: &Device, shape: Shape, (name, hiding): (&str, &Hiding), chunk: usize) -> Result<()> {
    let (qkv, scores) = (
        shape.qkv(device, DType::BF16)?,
        hiding.scores(&shape, shape.tokens, device)?,
    );
    let run = |chunk: usize| -> Result<Tensor> {
        let (mut cache, mut rows) = (hiding.cache()?, Vec::new());
        for start in (0..shape.tokens).step_by(chunk) {
            let count = chunk.min(shape.tokens - start);
            let part = |x: &Tensor| x.narrow(2, start, count);
            let [q, k, v] = &qkv;
            let scores = match &scores {
                Some(scores) => Some(part(scores)?.contiguous()?),
                None => None,
            };
            rows.push(append(&mut cache, &[part(q)?, part(k)?, part(v)?], scores.as_ref())?);
        }
        Ok(Tensor::cat(&rows, 2)?)
    };
    // Both are the same rows, up to rounding.
    let error = (run(shape.tokens)? - run(chunk)?)?.abs()?.to_dtype(DType::F32)?;
    let error = error.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    anyhow::ensure!(
        error < 0.03,
        "rows of chunks differ by {error}, expected less than 0.03"
    );
    let (whole, chunks) = (
        time(device, || run(shape.tokens).map(drop))?,
        time(device, || run(chunk).map(drop))?,
    );
    println!(
        "{:<17} {} {name:<8} {:>9.3} ms in one call, {:.3} in chunks of {chunk}: {:.2}",
        "prompt",
        shape.name(),
        whole * 1e3,
        chunks * 1e3,
        chunks / whole
    );
    Ok(())
}
