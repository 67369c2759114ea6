//! Pass keys: a number somewhere in a long text, asked for at its end.

use anyhow::{ensure, Result};
use candle_core::{Tensor, D};

use crate::load::Checkpoint;
use crate::model::Llama;

/// A text with a number in it, up to and with the answer.
pub struct Passkey {
    pub tokens: Vec<u32>,
    answer: usize,
}

impl Passkey {
    /// `length` tokens of prose with the key at `depth` of them, 0 to 1; another key for each `index`.
    pub fn new(checkpoint: &Checkpoint, prose: &[u32], length: usize, depth: f64, index: usize) -> Result<Self> {
        let key = 10_000 + (index * 37_411 + 7_919) % 90_000;
        let encode = |text: &str| checkpoint.encode(text, false);
        let needle = encode(&format!(
            "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
        ))?;
        let question = encode("\n\nWhat is the pass key? The pass key is")?;
        let answer = encode(&format!(" {key}"))?;
        let filler = length.saturating_sub(needle.len() + question.len() + answer.len());
        ensure!(
            (0.0..=1.0).contains(&depth) && filler > 0 && filler <= prose.len(),
            "passkey: expected depths from 0 to 1, lengths above that of the question, and a text of {length} tokens, got \
             depth {depth} and {} tokens of text; change --depths or --passkey",
            prose.len()
        );
        let at = (depth * filler as f64) as usize;
        let parts = [&prose[..at], &needle, &prose[at..filler], &question, &answer];
        Ok(Self {
            tokens: parts.concat(),
            answer: answer.len(),
        })
    }

    /// Whether the likeliest token is right at each place of the answer: what greedy decoding would write.
    pub fn found(&self, model: &Llama, hidden: &Tensor) -> Result<bool> {
        let first = self.tokens.len() - self.answer;
        let logits = model.logits(hidden, first - 1, self.answer)?;
        Ok(logits.argmax(D::Minus1)?.to_vec1::<u32>()? == self.tokens[first..])
    }
}
