//! A growing sequence: through KV caches, or recomputed at every step.

use std::time::Instant;

use anyhow::{bail, Result};
use candle_core::Tensor;
use candle_sfattention::{CacheOptions, CompressedKvCache};

use crate::finite;
use crate::model::{HiddenCounts, Llama};
use crate::stats::{DraftUse, Hidden, KvUse, Stats};
use crate::weights::Pass;

/// One sequence that a model reads and continues, with timings.
pub struct Session<'a> {
    model: &'a Llama,
    sequence: Sequence,
    prompt_tokens: usize,
    steps: usize,
    prefill_seconds: f64,
    decode_seconds: f64,
    drafts: Option<DraftUse>,
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
    /// A session with caches. A prompt runs in chunks of `chunk` tokens, at least 1.
    pub fn cached(model: &'a Llama, options: &CacheOptions, chunk: Option<usize>) -> Result<Self> {
        let caches = model.caches(options)?;
        let chunk = chunk.unwrap_or(if model.device().is_cpu() { 512 } else { 32_768 });
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
            drafts: None,
        }
    }

    /// Runs the prompt and returns the logits `(vocabulary)` of its last token, which are finite or an error.
    pub fn prefill(&mut self, prompt: &[u32]) -> Result<Tensor> {
        self.prefill_watched(prompt, None)
    }

    /// [`Self::prefill`]; `watch` sees the caches after each chunk, for which it waits for the device.
    pub fn prefill_watched(&mut self, prompt: &[u32], mut watch: Option<&mut dyn FnMut(&KvUse)>) -> Result<Tensor> {
        let start = Instant::now();
        let output = match &mut self.sequence {
            Sequence::Cached { caches, chunk } => {
                let last = (prompt.len() - 1) / *chunk * *chunk;
                let mut see = |caches: &[CompressedKvCache]| -> Result<()> {
                    if let Some(watch) = &mut watch {
                        watch(&KvUse::of(caches, self.model)?);
                    }
                    Ok(())
                };
                for tokens in prompt[..last].chunks(*chunk) {
                    self.model.forward_cached(tokens, caches)?;
                    see(caches)?;
                }
                let hidden = self.model.forward_cached(&prompt[last..], caches)?;
                see(caches)?;
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

    /// Runs one more token and the draft of those after it, in one pass. `choose` takes a token from the logits
    /// `(vocabulary)` after each of them, which are finite or an error, until it takes another one than the draft has.
    /// Returns the chosen tokens: one more than the draft's that it took. The caches go back to the last token before
    /// these that the model has read, as if each had run alone; so they need a
    /// [`CacheOptions::rollback`](candle_sfattention::CacheOptions::rollback) of the draft's length.
    pub fn step_drafted(
        &mut self,
        token: u32,
        draft: &[u32],
        mut choose: impl FnMut(&Tensor) -> Result<u32>,
    ) -> Result<Vec<u32>> {
        let start = Instant::now();
        let Sequence::Cached { caches, .. } = &mut self.sequence else {
            bail!("draft: expected a sequence with caches, got one that recomputes; leave the draft out")
        };
        let before = self.prompt_tokens + self.steps;
        let tokens = [&[token], draft].concat();
        let hidden = self.model.forward_as(&tokens, caches, Pass::Step)?;
        let logits = self.model.logits_as(&hidden, 0, tokens.len(), Pass::Step)?;
        self.decode_seconds += start.elapsed().as_secs_f64();
        let mut chosen = Vec::with_capacity(tokens.len());
        for row in 0..tokens.len() {
            let logits = logits.narrow(0, row, 1)?;
            finite::check("hidden state", &hidden.narrow(1, row, 1)?.squeeze(0)?, before + row)?;
            finite::check("logits", &logits, before + row)?;
            let token = choose(&logits.squeeze(0)?)?;
            chosen.push(token);
            if draft.get(row) != Some(&token) {
                break;
            }
        }
        let start = Instant::now();
        if chosen.len() < tokens.len() {
            for cache in caches {
                cache.truncate(before + chosen.len())?;
            }
        }
        self.decode_seconds += start.elapsed().as_secs_f64();
        self.steps += chosen.len();
        let drafts = self.drafts.get_or_insert_default();
        drafts.passes += 1;
        drafts.drafted += draft.len();
        drafts.accepted += chosen.len() - 1;
        Ok(chosen)
    }

    /// Its caches, one per layer; None if it recomputes.
    pub fn into_caches(self) -> Option<Vec<CompressedKvCache>> {
        match self.sequence {
            Sequence::Cached { caches, .. } => Some(caches),
            Sequence::Recomputed { .. } => None,
        }
    }

    /// The cost of the sequence so far; `generated`: tokens generated, the first of them from the prompt's logits.
    pub fn stats(&self, generated: usize) -> Result<Stats> {
        let (kv, hidden) = match &self.sequence {
            Sequence::Cached { caches, .. } => {
                let kv = KvUse::of(caches, self.model)?;
                let hidden = kv.hidden();
                (Some(kv), hidden)
            }
            Sequence::Recomputed { counts, .. } => (None, Hidden::of(counts, self.model)?),
        };
        let speed = |tokens: usize, seconds: f64| (tokens > 0).then(|| tokens as f64 / seconds);
        Ok(Stats {
            prompt_tokens: self.prompt_tokens,
            generated_tokens: generated,
            prefill_tokens_per_second: speed(self.prompt_tokens, self.prefill_seconds),
            decode_tokens_per_second: speed(self.steps, self.decode_seconds),
            draft: self.drafts,
            kv,
            hidden,
            peak_rss_bytes: crate::stats::memory("VmHWM"),
        })
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
