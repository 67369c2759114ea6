//! A growing sequence: through KV caches, or recomputed at every step.

use std::time::Instant;

use anyhow::Result;
use candle_core::Tensor;
use candle_sfattention::{CacheOptions, CompressedKvCache};

use crate::finite;
use crate::model::{HiddenCounts, Llama};
use crate::stats::{Hidden, KvUse, Stats};
use crate::weights::Pass;

/// One sequence that a model reads and continues, with timings.
pub struct Session<'a> {
    model: &'a Llama,
    sequence: Sequence,
    prompt_tokens: usize,
    steps: usize,
    prefill_seconds: f64,
    decode_seconds: f64,
}

#[derive(Clone)]
enum Sequence {
    /// One cache per layer; `chunk` tokens are run at once.
    Cached {
        caches: Vec<CompressedKvCache>,
        chunk: usize,
    },
    /// All tokens so far, and the counts of the last step, which ran the longest sequence.
    Recomputed { tokens: Vec<u32>, counts: HiddenCounts },
}

impl<'a> Session<'a> {
    /// A session with caches. A prompt runs in chunks of `chunk` tokens, at least 1; on a GPU it runs at once, because
    /// a cache there appends later chunks row by row.
    pub fn cached(model: &'a Llama, options: &CacheOptions, chunk: usize) -> Result<Self> {
        let caches = model.caches(options)?;
        let chunk = if model.device().is_cpu() { chunk } else { usize::MAX };
        Ok(Self::new(model, Sequence::Cached { caches, chunk }))
    }

    /// A session without caches: every step runs the whole sequence again.
    pub fn recomputed(model: &'a Llama) -> Self {
        let (tokens, counts) = (Vec::new(), HiddenCounts::default());
        Self::new(model, Sequence::Recomputed { tokens, counts })
    }

    /// Another session at the same place, whose steps are counted from here.
    pub fn fork(&self) -> Self {
        Self::new(self.model, self.sequence.clone())
    }

    fn new(model: &'a Llama, sequence: Sequence) -> Self {
        Self {
            model,
            sequence,
            prompt_tokens: 0,
            steps: 0,
            prefill_seconds: 0.0,
            decode_seconds: 0.0,
        }
    }

    /// Runs the prompt and returns the logits `(vocabulary)` of its last token, which are finite or an error. `watch`
    /// sees the caches after each chunk.
    pub fn prefill(&mut self, prompt: &[u32], mut watch: impl FnMut(&KvUse)) -> Result<Tensor> {
        let start = Instant::now();
        let output = match &mut self.sequence {
            Sequence::Cached { caches, chunk } => {
                let windows = self.model.windows();
                let last = (prompt.len() - 1) / *chunk * *chunk;
                for tokens in prompt[..last].chunks(*chunk) {
                    self.model.forward_cached(tokens, caches)?;
                    watch(&KvUse::of(caches, &windows));
                }
                let hidden = self.model.forward_cached(&prompt[last..], caches)?;
                watch(&KvUse::of(caches, &windows));
                Output::of(self.model, hidden, Pass::Prompt)?
            }
            Sequence::Recomputed { tokens, counts } => again(self.model, tokens, prompt, counts)?,
        };
        self.prompt_tokens += prompt.len();
        self.prefill_seconds += start.elapsed().as_secs_f64();
        output.check(self.prompt_tokens + self.steps)
    }

    /// Runs one more token and returns its logits `(vocabulary)`, which are finite or an error.
    pub fn step(&mut self, token: u32) -> Result<Tensor> {
        self.step_as(token, Pass::Step)
    }

    /// As [`Self::step`], by the matrices for this pass.
    pub fn step_as(&mut self, token: u32, pass: Pass) -> Result<Tensor> {
        let start = Instant::now();
        let output = match &mut self.sequence {
            Sequence::Cached { caches, .. } => {
                let hidden = self.model.forward_as(&[token], caches, pass)?;
                Output::of(self.model, hidden, pass)?
            }
            Sequence::Recomputed { tokens, counts } => again(self.model, tokens, &[token], counts)?,
        };
        self.steps += 1;
        self.decode_seconds += start.elapsed().as_secs_f64();
        output.check(self.prompt_tokens + self.steps)
    }

    /// Its caches, one per layer; None if it recomputes.
    pub fn into_caches(self) -> Option<Vec<CompressedKvCache>> {
        match self.sequence {
            Sequence::Cached { caches, .. } => Some(caches),
            Sequence::Recomputed { .. } => None,
        }
    }

    /// The cost of the sequence so far; `generated`: tokens generated, the first of them from the prompt's logits.
    pub fn stats(&self, generated: usize) -> Stats {
        let (kv, hidden) = match &self.sequence {
            Sequence::Cached { caches, .. } => {
                let kv = KvUse::of(caches, &self.model.windows());
                let hidden = kv.hidden();
                (Some(kv), hidden)
            }
            Sequence::Recomputed { counts, .. } => (None, Hidden::of(counts, &self.model.windows())),
        };
        let speed = |tokens: usize, seconds: f64| (tokens > 0).then(|| tokens as f64 / seconds);
        Stats {
            prompt_tokens: self.prompt_tokens,
            generated_tokens: generated,
            prefill_tokens_per_second: speed(self.prompt_tokens, self.prefill_seconds),
            decode_tokens_per_second: speed(self.steps, self.decode_seconds),
            kv,
            hidden,
            peak_rss_bytes: crate::stats::memory("VmHWM"),
        }
    }
}

fn again(model: &Llama, tokens: &mut Vec<u32>, more: &[u32], counts: &mut HiddenCounts) -> Result<Output> {
    tokens.extend_from_slice(more);
    *counts = HiddenCounts::default();
    Output::of(model, model.forward(tokens, counts)?, Pass::Prompt)
}

/// The logits `(sequences, vocabulary)` of the next token of each sequence, which are finite or an error; its caches
/// append it.
pub fn step_all(model: &Llama, tokens: &[u32], caches: &mut [&mut Vec<CompressedKvCache>]) -> Result<Tensor> {
    let hidden = model.forward_batch(tokens, caches, Pass::Step)?;
    let logits = model.logits_as(&hidden, 0, tokens.len(), Pass::Step)?;
    for (index, caches) in caches.iter().enumerate() {
        let position = caches.first().map_or(0, |cache| cache.seq_len() - 1);
        let hidden = hidden.narrow(1, index, 1)?.squeeze(0)?;
        finite::check("hidden state", &hidden, position)?;
        finite::check("logits", &logits.narrow(0, index, 1)?, position)?;
    }
    Ok(logits)
}

/// A model's output for some tokens.
struct Output {
    /// `(1, n, hidden)`
    hidden: Tensor,
    /// `(vocabulary)`, of the last token.
    logits: Tensor,
}

impl Output {
    fn of(model: &Llama, hidden: Tensor, pass: Pass) -> Result<Self> {
        let last = hidden.dim(1)? - 1;
        let logits = model.logits_as(&hidden, last, 1, pass)?.squeeze(0)?;
        Ok(Self { hidden, logits })
    }

    /// The logits, if they are finite; `tokens`: the length of the sequence.
    fn check(self, tokens: usize) -> Result<Tensor> {
        let n = self.hidden.dim(1)?;
        let last = self.hidden.narrow(1, n - 1, 1)?.squeeze(0)?;
        let logits = self.logits.unsqueeze(0)?;
        // A quantized product reads NaN as 0, so logits alone do not show it.
        let checked = finite::check("hidden state", &last, tokens - 1)
            .and_then(|()| finite::check("logits", &logits, tokens - 1));
        if checked.is_err() {
            finite::check("hidden state", &self.hidden.squeeze(0)?, tokens - n)?;
        }
        checked.map(|()| self.logits)
    }
}
