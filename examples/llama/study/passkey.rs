//! Pass keys: a number inside a long text, whose end asks for it.

use anyhow::{ensure, Result};

use super::tasks::Sample;
use crate::load::text::Start;
use crate::load::Checkpoint;

/// The end of a text: the words that preceded the number. With "What is the pass key?" before them SmolLM2-135M often
/// continues the prose, and finds 3 keys of 10 at 2048 tokens instead of 10 of 10, with nothing hidden.
pub const QUESTION: &str = "\n\nThe pass key is";

/// `length` tokens: the start, and prose with the key at `depth` of it, 0 to 1; each `index` has another key.
pub fn passkey(
    checkpoint: &Checkpoint,
    (prose, start): (&[u32], &Start),
    length: usize,
    depth: f64,
    index: usize,
) -> Result<Sample> {
    let key = 10_000 + (index * 37_411 + 7_919) % 90_000;
    let encode = |text: &str| checkpoint.encode(text, false);
    let needle = encode(&format!(
        "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
    ))?;
    let question = encode(QUESTION)?;
    let answer = encode(&format!(" {key}"))?;
    let filler = length.saturating_sub(start.count() + needle.len() + question.len() + answer.len());
    ensure!(
        (0.0..=1.0).contains(&depth) && filler > 0 && filler <= prose.len(),
        "passkey: expected depths from 0 to 1, lengths above that of the question, and a text of {length} tokens, got \
         depth {depth} and {} tokens of text; change --depths or --passkey",
        prose.len()
    );
    let at = (depth * filler as f64) as usize;
    let context = [&prose[..at], &needle, &prose[at..filler]].concat();
    Ok(Sample::new(start, &context, &question, &answer))
}
