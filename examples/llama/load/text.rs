//! The text side of a checkpoint: how text becomes tokens, which tokens end it, how a conversation is written.

use std::iter::repeat_n;

use anyhow::{anyhow, ensure, Result};
use tokenizers::Tokenizer;

use crate::chat::ChatTemplate;

/// Names of tokens that end a turn or a text. A checkpoint's own `eos` is often the end of a document, which a
/// conversation never reaches.
const ENDS: [&str; 18] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|EOT|>",
    "<|im_end|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<eos>",
    "</s>",
    "<EOT>",
    "▁<EOT>",
    "[EOT]",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
];

/// A tokenizer and the checkpoint's settings for it.
pub struct Text {
    pub tokenizer: Tokenizer,
    pub bos: Edge,
    pub eos: Edge,
    /// Token ids that end a text.
    pub ends: Vec<u32>,
    pub chat_template: Option<ChatTemplate>,
}

/// The tokens that a checkpoint puts before every sequence that its model reads: BOS, or none. Windows and questions
/// are made with it, so that no command can leave it out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start(Vec<u32>);

impl Start {
    /// How many tokens it has. They are read, and never scored.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    pub fn tokens(&self) -> &[u32] {
        &self.0
    }

    /// Refuses sequences of `context` tokens that have no place for two after the start.
    #[allow(dead_code)] // the train example does so
    pub fn check_room(&self, context: usize) -> Result<()> {
        let least = 2 + self.count();
        ensure!(
            context >= least,
            "context: expected at least {least} tokens, {} of them before the text, got {context}; change --context",
            self.count()
        );
        Ok(())
    }

    /// The start, then `tokens`. Tokens that have it already get no second one.
    pub fn before(&self, tokens: &[u32]) -> Vec<u32> {
        match tokens.starts_with(&self.0) {
            true => tokens.to_vec(),
            false => [&self.0, tokens].concat(),
        }
    }

    /// `tokens`, at least as many as the start has, with the start in place of the first.
    pub fn over(&self, tokens: &[u32]) -> Vec<u32> {
        [&self.0, &tokens[self.count()..]].concat()
    }

    /// As [`Self::over`], with the first half of the other tokens twice.
    pub fn over_twice(&self, tokens: &[u32]) -> Vec<u32> {
        let text = &tokens[self.count()..];
        let half = &text[..text.len() / 2];
        [&self.0, half, half].concat()
    }
}

/// A token at an edge of texts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Edge {
    pub id: Option<u32>,
    /// Whether it is added; None: the tokenizer's own post-processor decides.
    pub add: Option<bool>,
}

impl Text {
    /// `ends`: the ids that the checkpoint names; known names of turn ends are added.
    pub fn new(
        tokenizer: Tokenizer,
        bos: Edge,
        eos: Edge,
        mut ends: Vec<u32>,
        chat: Option<ChatTemplate>,
    ) -> Result<Self> {
        for (name, edge) in [("bos", bos), ("eos", eos)] {
            ensure!(
                edge.add != Some(true) || edge.id.is_some(),
                "tokenizer: expected a {name} token, as add_{name}_token is true, found none; the checkpoint is damaged"
            );
        }
        ends.extend(ENDS.iter().filter_map(|name| tokenizer.token_to_id(name)));
        ends.extend(eos.id);
        ends.sort_unstable();
        ends.dedup();
        Ok(Self {
            tokenizer,
            bos,
            eos,
            ends,
            chat_template: chat,
        })
    }

    /// Token ids of `text`; `special` adds the tokens around a text, such as BOS. A text that already has BOS gets no
    /// second one.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encode = |special| -> Result<Vec<u32>> {
            let encoding = self.tokenizer.encode_fast(text, special);
            Ok(encoding
                .map_err(|error| anyhow!("tokenizer: {error}"))?
                .get_ids()
                .to_vec())
        };
        let own = encode(false)?;
        if !special {
            return Ok(own);
        }
        let mut ids = encode(true)?;
        if let Some(eos) = self.eos.id {
            let there = trailing(&ids, eos);
            ids.truncate(ids.len() - there);
            ids.extend(repeat_n(eos, self.eos.wanted(trailing(&own, eos), there)));
        }
        if let Some(bos) = self.bos.id {
            let there = leading(&ids, bos);
            ids.splice(..there, repeat_n(bos, self.bos.wanted(leading(&own, bos), there)));
        }
        Ok(ids)
    }

    /// What [`Self::encode`] adds before a text.
    pub fn start(&self) -> Result<Start> {
        const TEXT: &str = "a";
        let own = self.encode(TEXT, false)?;
        let mut ids = self.encode(TEXT, true)?;
        let place = ids.windows(own.len().max(1)).position(|part| part == own);
        ids.truncate(place.unwrap_or(0));
        Ok(Start(ids))
    }
}

impl Edge {
    /// How many copies of the token belong at the edge. The text itself has `own`, and `processed` with the additions
    /// of the tokenizer's post-processor.
    fn wanted(self, own: usize, processed: usize) -> usize {
        match self.add {
            Some(true) => own.max(1),
            Some(false) => own,
            None => own.max(processed.min(1)),
        }
    }
}

fn leading(ids: &[u32], id: u32) -> usize {
    ids.iter().take_while(|other| **other == id).count()
}

fn trailing(ids: &[u32], id: u32) -> usize {
    ids.iter().rev().take_while(|other| **other == id).count()
}
