//! Batches of rows that hold memory of their own, and the time of their steps.

use std::time::Instant;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::CompressedKvCache;
use serde::{Deserialize, Serialize};

use crate::finite;
use crate::model::Llama;
use crate::random::RandomTokens;
use crate::weights::Pass;

/// Steps before those that are timed: a device loads kernels and takes memory in them.
pub const WARM_UP: usize = 4;

/// The rows of a batch: one cache per layer.
pub struct Rows {
    caches: Vec<CompressedKvCache>,
    count: usize,
}

/// A batch that was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Decoded {
    pub rows: usize,
    /// After the last step, of one row of all layers, on all ranks.
    pub kv_bytes: usize,
    pub kv_bytes_allocated: usize,
    /// The median of a step of all rows.
    pub step_seconds: f64,
    /// The same with attention and its caches left out.
    pub unattended_seconds: f64,
    pub tokens_per_second: f64,
}

impl Rows {
    /// `count` copies of a prompt's caches of one row.
    ///
    /// # Errors
    /// Memory that is not there, or rows that share some.
    pub fn copies(prompt: &[CompressedKvCache], count: usize) -> Result<Self> {
        let caches = prompt.iter().map(|cache| repeated(cache.clone(), count));
        Self::of(caches.collect::<Result<_>>()?, count)
    }

    /// As [`Self::copies`], where the last holder of the prompt gives it up, layer by layer.
    pub fn in_place_of(prompt: Vec<CompressedKvCache>, count: usize) -> Result<Self> {
        let caches = prompt.into_iter().map(|cache| repeated(cache, count));
        Self::of(caches.collect::<Result<_>>()?, count)
    }

    fn of(caches: Vec<CompressedKvCache>, count: usize) -> Result<Self> {
        let shared: usize = caches.iter().map(CompressedKvCache::bytes_shared).sum();
        ensure!(
            shared == 0,
            "rows: expected memory of their own, got {shared} shared bytes; this is a defect of the bench, report it"
        );
        Ok(Self { caches, count })
    }

    /// Runs one step of all rows; returns its hidden states `(rows, 1, hidden)` and its seconds, in which the likeliest
    /// tokens came to the host.
    fn step(&mut self, model: &Llama, tokens: &[u32]) -> Result<(Tensor, f64)> {
        let start = Instant::now();
        let hidden = model.forward_rows(tokens, &mut self.caches, Pass::Step)?;
        model.likeliest(&hidden, Pass::Step)?;
        Ok((hidden, start.elapsed().as_secs_f64()))
    }

    /// Runs a step with attention left out, and returns its seconds.
    fn step_unattended(&self, model: &Llama, tokens: &[u32]) -> Result<f64> {
        let position = self.caches.first().map_or(0, CompressedKvCache::seq_len);
        let start = Instant::now();
        let hidden = model.forward_rows_unattended(tokens, position, Pass::Step)?;
        model.likeliest(&hidden, Pass::Step)?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// One step, to see whether its memory is there.
    pub fn try_step(mut self, model: &Llama, tokens: &mut RandomTokens) -> Result<()> {
        self.step(model, &tokens.draw(self.count)).map(|_| ())
    }

    /// Decodes random tokens in every row. Each timed step has its turn before one with attention left out.
    ///
    /// # Errors
    /// Memory that is not there, or rows that are not finite.
    pub fn decode(mut self, model: &Llama, tokens: &mut RandomTokens, steps: usize) -> Result<Decoded> {
        let (mut whole, mut unattended) = (Vec::new(), Vec::new());
        for step in 0..WARM_UP + steps {
            let drawn = tokens.draw(self.count);
            let (hidden, seconds) = self.step(model, &drawn)?;
            let without = self.step_unattended(model, &drawn)?;
            if step >= WARM_UP {
                whole.push(seconds);
                unattended.push(without);
            }
            if step + 1 == WARM_UP + steps {
                let position = self.caches.first().map_or(0, CompressedKvCache::seq_len) - 1;
                for row in 0..self.count {
                    finite::check("hidden state", &hidden.get(row)?, position)?;
                }
            }
        }
        let sum = |bytes: fn(&CompressedKvCache) -> usize| self.caches.iter().map(bytes).sum::<usize>() as f64;
        let own = vec![sum(CompressedKvCache::bytes), sum(CompressedKvCache::bytes_allocated)];
        let all = model.ranks().gather(own)?;
        let of_row = |index: usize| all.iter().map(|rank| rank[index] as usize).sum::<usize>() / self.count;
        let step_seconds = median(whole).context("steps: expected at least one")?;
        Ok(Decoded {
            rows: self.count,
            kv_bytes: of_row(0),
            kv_bytes_allocated: of_row(1),
            step_seconds,
            unattended_seconds: median(unattended).context("steps: expected at least one")?,
            tokens_per_second: self.count as f64 / step_seconds,
        })
    }
}

/// A cache of `count` copies of the one row of `cache`, each with memory of its own.
fn repeated(mut cache: CompressedKvCache, count: usize) -> Result<CompressedKvCache> {
    cache.index_select(&Tensor::zeros(count, DType::U32, &Device::Cpu)?)?;
    cache.unshare()?;
    Ok(cache)
}

fn median(mut numbers: Vec<f64>) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    let upper = numbers.get(middle)?;
    Some(match numbers.len() % 2 {
        0 => (numbers[middle - 1] + upper) / 2.0,
        _ => *upper,
    })
}
