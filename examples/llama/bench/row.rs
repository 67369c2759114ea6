//! A row of `bench`: the tokens that run, and what they took.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

use crate::load::Checkpoint;
use crate::stats::{mib, KvUse, Stats};

/// Bytes of text that surely hold a token: the text beyond them need not be tokenized.
const BYTES_PER_TOKEN: usize = 16;

/// The first `count` tokens of a text, among them the checkpoint's BOS.
pub fn first_tokens(text: &Path, checkpoint: &Checkpoint, count: usize) -> Result<Vec<u32>> {
    let whole = fs::read_to_string(text).with_context(|| format!("text {}: give one with --text", text.display()))?;
    let mut end = whole.len().min(count * BYTES_PER_TOKEN);
    while !whole.is_char_boundary(end) {
        end += 1;
    }
    let mut tokens = checkpoint.encode(&whole[..end], false)?;
    if tokens.len() < count && end < whole.len() {
        tokens = checkpoint.encode(&whole, false)?;
    }
    tokens = checkpoint.start()?.before(&tokens);
    ensure!(
        tokens.len() >= count,
        "text: expected at least {count} tokens, the longest prompt and those to decode, got {}; give a longer text or \
         a shorter prompt",
        tokens.len()
    );
    tokens.truncate(count);
    Ok(tokens)
}

/// What one configuration took, in a process of its own.
#[derive(Serialize, Deserialize)]
pub struct Run {
    #[serde(flatten)]
    pub stats: Stats,
    /// Tokens decoded per second by the weights that prompts go through.
    pub decode_by_prompt_weights: Option<f64>,
    /// Memory held after loading the weights, before the first run.
    pub loaded_rss_bytes: Option<u64>,
    /// Tokens and cache bytes after each chunk of the prompt.
    pub curve: Vec<(usize, usize)>,
}

impl Run {
    /// The line above rows.
    pub fn print_header(out: &mut dyn Write) -> Result<()> {
        let header =
            "prompt  attention   prefill tok/s  decode tok/s   as prompt  KV MiB  allocated  of dense  hidden  \
             peak RSS MiB";
        Ok(writeln!(out, "{header}")?)
    }

    pub fn print(&self, attention: &str, out: &mut dyn Write) -> Result<()> {
        let stats = &self.stats;
        let number = |number: Option<f64>| number.map_or("-".into(), |number| format!("{number:.1}"));
        let ratio = |number: Option<f64>| number.map_or("-".into(), |number| format!("{number:.3}"));
        let kv = stats.kv.as_ref();
        writeln!(
            out,
            "{:>6}  {:<10}  {:>13}  {:>12}  {:>10}  {:>6}  {:>9}  {:>8}  {:>6}  {:>12}",
            stats.prompt_tokens,
            attention,
            number(stats.prefill_tokens_per_second),
            number(stats.decode_tokens_per_second),
            number(self.decode_by_prompt_weights),
            number(kv.map(|kv| mib(kv.kv_bytes as u64))),
            number(kv.map(|kv| mib(kv.kv_bytes_allocated as u64))),
            ratio(kv.map(KvUse::ratio)),
            ratio(kv.map(|_| stats.hidden.hidden_ratio)),
            stats
                .peak_rss_bytes
                .map_or("-".into(), |bytes| format!("{:.0}", mib(bytes))),
        )?;
        Ok(())
    }

    /// The line below rows.
    pub fn print_loaded(&self, out: &mut dyn Write) -> Result<()> {
        if let Some(bytes) = self.loaded_rss_bytes {
            writeln!(out, "Weights loaded, nothing run: {:.0} MiB.", mib(bytes))?;
        }
        Ok(())
    }
}
