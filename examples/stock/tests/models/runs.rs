//! Runs of models over the same tokens, outside a session and inside one.

use crate::zoo::{Model, OwnCache, Zoo, VOCABULARY};
use anyhow::{ensure, Result};
use candle_core::{Device, Tensor};
use candle_sfattention::session::{ModelCache, Session, SessionOptions};
use candle_sfattention::{CompressionConfig, HeadStrategies, MergeStrategy};
use std::ops::Range;

/// The model's own cache, and what a session is told of it.
pub const BOTH_CACHES: [(OwnCache, ModelCache); 2] = [
    (OwnCache::Kept, ModelCache::Kept),
    (OwnCache::Cleared, ModelCache::Cleared),
];
/// A prompt, three single tokens, a chunk, and a single one.
pub const COUNTS: [usize; 6] = [90, 1, 1, 1, 7, 1];
pub const TOKENS: usize = 101;

/// Logits of each call: those of all rows, one after the other.
pub type Logits = Vec<Vec<f32>>;

pub fn options(model_cache: ModelCache) -> SessionOptions {
    SessionOptions {
        model_cache,
        ..Default::default()
    }
}

pub fn config() -> CompressionConfig {
    CompressionConfig {
        window: 8,
        ..CompressionConfig::pretrained()
    }
}

pub fn session(zoo: &Zoo, strategy: MergeStrategy, model_cache: ModelCache) -> Result<Session> {
    let strategies = HeadStrategies::uniform(strategy);
    Ok(Session::uniform(
        zoo.shape(),
        &strategies,
        &config(),
        options(model_cache),
    )?)
}

/// Tokens `(rows, range)`. Each row has runs of equal tokens, which give keys that merge, and its own lengths of runs.
pub fn tokens(rows: &[usize], range: Range<usize>) -> Result<Tensor> {
    let token = |row: usize, at: usize| ((at / (9 - row) * 7 + row * 11) % VOCABULARY) as u32;
    let all = rows.iter().flat_map(|row| range.clone().map(move |at| token(*row, at)));
    Ok(Tensor::from_iter(all, &Device::Cpu)?.reshape((rows.len(), range.len()))?)
}

/// Calls `step` with the tokens of each call and the position where they begin.
pub fn steps(rows: &[usize], counts: &[usize], mut step: impl FnMut(&Tensor, usize) -> Result<()>) -> Result<()> {
    let mut position = 0;
    for count in counts {
        step(&tokens(rows, position..position + count)?, position)?;
        position += count;
    }
    Ok(())
}

/// Logits of each call of `forward`, which gets the model, its own cache cleared where `own` says so.
fn run_by(
    model: &mut dyn Model,
    own: OwnCache,
    rows: &[usize],
    mut forward: impl FnMut(&mut dyn Model, &Tensor, usize) -> candle_core::Result<Tensor>,
) -> Result<Logits> {
    let mut logits = Vec::new();
    steps(rows, &COUNTS, |tokens, position| {
        if own == OwnCache::Cleared {
            model.clear();
        }
        logits.push(flat(&forward(model, tokens, position)?)?);
        Ok(())
    })?;
    Ok(logits)
}

/// Logits outside a session.
pub fn run(model: &mut dyn Model, own: OwnCache, rows: &[usize]) -> Result<Logits> {
    run_by(model, own, rows, |model, tokens, position| model.step(tokens, position))
}

/// Logits inside the session.
pub fn run_in(session: &mut Session, model: &mut dyn Model, own: OwnCache, rows: &[usize]) -> Result<Logits> {
    run_by(model, own, rows, |model, tokens, position| {
        session.scope(|| model.step(tokens, position))
    })
}

pub fn flat(logits: &Tensor) -> Result<Vec<f32>> {
    Ok(logits.flatten_all()?.to_vec1()?)
}

pub fn bits(run: &Logits) -> Vec<u32> {
    run.iter().flatten().map(|x| x.to_bits()).collect()
}

/// Entries that all lists of a session keep.
pub fn entries(session: &Session) -> usize {
    session.layers().iter().flat_map(|layer| layer.lens().concat()).sum()
}

pub fn largest_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> Result<f32> {
    ensure!(
        a.len() == b.len() && !a.is_empty(),
        "steps: {} and {}",
        a.len(),
        b.len()
    );
    let mut largest = 0f32;
    for (x, y) in a.iter().zip(b) {
        ensure!(x.len() == y.len(), "logits: {} and {}", x.len(), y.len());
        for (x, y) in x.iter().zip(y) {
            ensure!((x - y).is_finite(), "{x} and {y}");
            largest = largest.max((x - y).abs());
        }
    }
    let spread = a.iter().flatten().fold(0f32, |most, x| most.max(x.abs()));
    ensure!(spread > 1e-2, "logits of at most {spread} prove nothing");
    Ok(largest)
}
