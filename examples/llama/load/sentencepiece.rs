//! SentencePiece's BPE as in Llama 2's GGUF files: pieces and scores, without merges.
//!
//! Among neighbouring pieces that together form a piece, the pair with the highest score is joined first, the leftmost
//! of equal ones. So a piece's score ranks the merges that make it, one for every way to cut it into two pieces.

use std::collections::HashMap;

use anyhow::{anyhow, bail, ensure, Context, Result};
use candle_core::quantized::gguf_file::{Content, Value};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::bpe::{Merges, BPE};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::{NormalizerWrapper, Tokenizer};

use super::gguf_tokenizer::{array, flag, Kind, Vocabulary};

/// The sign for a space in pieces.
const SPACE: &str = "▁";

pub fn tokenizer(content: &Content, vocabulary: &Vocabulary) -> Result<Tokenizer> {
    let scores = scores(content, vocabulary.tokens.len())?;
    let mut bpe = BPE::builder()
        .vocab_and_merges(vocabulary.ids(), merges(vocabulary, &scores))
        .byte_fallback(true)
        .fuse_unk(true);
    let unknown = vocabulary.kinds.iter().position(|kind| *kind == Kind::Unknown);
    if let Some(id) = unknown {
        bpe = bpe.unk_token(vocabulary.tokens[id].clone());
    }
    let bpe = bpe.build().map_err(|error| anyhow!("tokenizer: {error}"))?;
    let prefix = flag(content, "add_space_prefix")?.unwrap_or(true);
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer
        .with_normalizer(Some(normalizer(prefix)?))
        .map_err(|error| anyhow!("tokenizer: {error}"))?;
    tokenizer.with_decoder(Some(decoder(prefix)?));
    Ok(tokenizer)
}

fn scores(content: &Content, tokens: usize) -> Result<Vec<f32>> {
    const KEY: &str = "tokenizer.ggml.scores";
    let value = content.metadata.get(KEY).with_context(|| {
        format!(
            "{KEY}: expected the scores of a SentencePiece vocabulary, found none; use the Hugging Face folder of the \
             model"
        )
    })?;
    let scores = array(KEY, value)?
        .iter()
        .map(|score| match *score {
            Value::F32(score) if !score.is_nan() => Ok(score),
            Value::I32(score) => Ok(score as f32),
            ref other => bail!("{KEY}: expected numbers, got {other:?}; the file is damaged"),
        })
        .collect::<Result<Vec<f32>>>()?;
    ensure!(
        scores.len() == tokens,
        "{KEY}: expected one for each of the {tokens} tokens, got {}; the file is damaged",
        scores.len()
    );
    Ok(scores)
}

/// All merges, in their order.
fn merges(vocabulary: &Vocabulary, scores: &[f32]) -> Merges {
    let pieces: HashMap<&str, usize> = vocabulary
        .tokens
        .iter()
        .enumerate()
        .filter(|(id, _)| vocabulary.kinds[*id] == Kind::Normal)
        .map(|(id, piece)| (piece.as_str(), id))
        .collect();
    let mut ranked: Vec<(usize, &str, &str)> = Vec::new();
    for (&piece, &id) in &pieces {
        for (cut, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(cut);
            if pieces.contains_key(left) && pieces.contains_key(right) {
                ranked.push((id, left, right));
            }
        }
    }
    // Equal scores are rare; then the lower id comes first, and among the cuts of one piece the longer left part.
    ranked.sort_by(|a, b| {
        let score = scores[b.0].total_cmp(&scores[a.0]);
        score.then(a.0.cmp(&b.0)).then(b.1.len().cmp(&a.1.len()))
    });
    ranked
        .into_iter()
        .map(|(_, left, right)| (left.into(), right.into()))
        .collect()
}

fn normalizer(prefix: bool) -> Result<NormalizerWrapper> {
    let spaces = Replace::new(" ", SPACE).map_err(|error| anyhow!("tokenizer: {error}"))?;
    Ok(match prefix {
        true => Normalizers::new(vec![Prepend::new(SPACE.into()).into(), spaces.into()]).into(),
        false => spaces.into(),
    })
}

/// Turns spaces and bytes into text, and removes the space that [`normalizer`] put in front.
fn decoder(prefix: bool) -> Result<DecoderWrapper> {
    let spaces = Replace::new(SPACE, " ").map_err(|error| anyhow!("tokenizer: {error}"))?;
    let mut steps: Vec<DecoderWrapper> = vec![spaces.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        steps.push(Strip::new(' ', 1, 0).into());
    }
    Ok(Decoders::new(steps).into())
}
