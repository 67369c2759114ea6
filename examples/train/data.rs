//! The text, its tokenizer, and the order of its batches.

use std::fs;
use std::path::Path;

use anyhow::{anyhow, ensure, Context, Result};
use candle_core::{Device, Tensor};
use rand::{rngs::StdRng, Rng, SeedableRng};
use tokenizers::models::bpe::{BpeTrainerBuilder, BPE};
use tokenizers::models::TrainerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use crate::load::text::Start;

/// The token that ends a text. A training text is one piece, so the model never sees this token.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// A text in two parts.
pub struct Text {
    pub training: String,
    /// The last 5%, from the start of a line where there is one.
    pub held_out: String,
    pub hash: String,
}

impl Text {
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("text {}", path.display()))?;
        ensure!(
            !text.trim().is_empty(),
            "text {}: expected some text, got an empty file; give another with --text",
            path.display()
        );
        let mut split = text.len() - text.len() / 20;
        while !text.is_char_boundary(split) {
            split += 1;
        }
        split += text[split..].find('\n').map_or(0, |newline| newline + 1);
        Ok(Self {
            training: text[..split].into(),
            held_out: text[split..].into(),
            hash: hash(text.as_bytes()),
        })
    }
}

/// FNV-1a, 64 bits: the same on every machine and in every version.
pub fn hash(bytes: &[u8]) -> String {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    format!("{:016x}", bytes.iter().fold(0xcbf2_9ce4_8422_2325, step))
}

/// A byte-level BPE tokenizer of at most `vocab` tokens, trained on `text`.
pub fn train_tokenizer(text: &str, vocab: usize) -> Result<Tokenizer> {
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer
        .with_pre_tokenizer(Some(byte_level))
        .with_decoder(Some(byte_level));
    let trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocab)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut trainer = TrainerWrapper::BpeTrainer(trainer);
    let lines = text.split_inclusive('\n');
    let trained = tokenizer.train(&mut trainer, lines);
    trained.map_err(|error| anyhow!("tokenizer: {error}"))?;
    Ok(tokenizer)
}

/// How many rows an embedding needs: one more than the largest id. Ids may have gaps, but not so large ones that a few
/// bytes of a tokenizer.json ask for gigabytes.
pub fn vocabulary_size(tokenizer: &Tokenizer) -> Result<usize> {
    let vocabulary = tokenizer.get_vocab(true);
    let most = (2 * vocabulary.len()).max(1 << 16);
    let largest = vocabulary.values().copied().max();
    let largest = largest.context("tokenizer: expected some tokens, got none; give another tokenizer.json")?;
    ensure!(
        (largest as usize) < most,
        "tokenizer: expected ids below {most} for its {} tokens, got {largest}; the file is damaged",
        vocabulary.len()
    );
    Ok(largest as usize + 1)
}

pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode_fast(text, false);
    Ok(encoding
        .map_err(|error| anyhow!("tokenizer: {error}"))?
        .get_ids()
        .to_vec())
}

/// The batch of step `step`: inputs and targets (batch, context), from places that depend only on the seed and the
/// step. The start stands in place of the first tokens of an input.
pub fn batch(
    (tokens, start): (&[u32], &Start),
    batch: usize,
    context: usize,
    seed: u64,
    step: usize,
) -> Result<(Tensor, Tensor)> {
    let mut rng = StdRng::seed_from_u64(seed ^ (step as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let (mut inputs, mut targets) = (Vec::new(), Vec::new());
    for _ in 0..batch {
        let first = rng.random_range(0..(tokens.len() - context) as u64) as usize;
        let sequence = start.over(&tokens[first..=first + context]);
        inputs.extend_from_slice(&sequence[..context]);
        targets.extend_from_slice(&sequence[1..]);
    }
    let tensor = |ids| Tensor::from_vec(ids, (batch, context), &Device::Cpu);
    Ok((tensor(inputs)?, tensor(targets)?))
}
