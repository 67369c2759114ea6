//! Tokens as text, one after another.

use std::collections::HashSet;
use std::mem::take;

use anyhow::{anyhow, Result};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::Tokenizer;

/// Tokens that are decoded again before a new one, whose text may depend on them.
const CONTEXT: usize = 4;

/// The sign for a broken character.
const BROKEN: char = char::REPLACEMENT_CHARACTER;

/// Text as tokens come. A character of several tokens appears when it is whole; one that no token can complete, as
/// U+FFFD. Marks such as BOS are not shown.
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    marks: HashSet<u32>,
    /// Whether tokens such as `<0xE2>` are bytes.
    byte_tokens: bool,
    /// Bytes of such tokens that do not form a whole character yet.
    bytes: Vec<u8>,
    /// Tokens that have been shown, and their text.
    context: Vec<u32>,
    shown: String,
    /// Tokens that end in the middle of a character.
    pending: Vec<u32>,
}

impl<'t> TextStream<'t> {
    /// A stream of tokens that continue `before`. If `before` is empty, they are a text of their own, and the space
    /// that some tokenizers put in front is removed.
    pub fn new(tokenizer: &'t Tokenizer, before: &[u32]) -> Result<Self> {
        let added = tokenizer.get_added_tokens_decoder();
        let marks = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id);
        let mut stream = Self {
            tokenizer,
            marks: marks.collect(),
            byte_tokens: tokenizer.get_decoder().is_some_and(has_byte_fallback),
            bytes: Vec::new(),
            context: Vec::new(),
            shown: String::new(),
            pending: Vec::new(),
        };
        let before: Vec<u32> = before.iter().copied().filter(|id| !stream.marks.contains(id)).collect();
        match before.last() {
            Some(last) if stream.byte(*last).is_some() => stream.follow_bytes()?,
            _ => stream.follow(before[before.len().saturating_sub(CONTEXT)..].to_vec())?,
        }
        Ok(stream)
    }

    /// The text that one more token completes, possibly none.
    pub fn step(&mut self, id: u32) -> Result<String> {
        if self.marks.contains(&id) {
            return Ok(String::new());
        }
        if let Some(byte) = self.byte(id) {
            let mut text = self.take_pending()?;
            self.bytes.push(byte);
            text.push_str(&take_whole(&mut self.bytes));
            self.follow_bytes()?;
            return Ok(text);
        }
        let mut text = self.take_bytes();
        self.pending.push(id);
        let new = self.decode_pending()?;
        if !new.ends_with(BROKEN) {
            text.push_str(&new);
            let pending = take(&mut self.pending);
            let mut context = take(&mut self.context);
            context.extend(pending);
            context.drain(..context.len().saturating_sub(CONTEXT));
            self.follow(context)?;
        }
        Ok(text)
    }

    /// The rest at the end: an unfinished character.
    pub fn finish(mut self) -> Result<String> {
        Ok(self.take_pending()? + &self.take_bytes())
    }

    /// The byte that a token stands for.
    fn byte(&self, id: u32) -> Option<u8> {
        if !self.byte_tokens {
            return None;
        }
        let token = self.tokenizer.id_to_token(id)?;
        let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
        (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
    }

    fn take_bytes(&mut self) -> String {
        match take(&mut self.bytes) {
            bytes if bytes.is_empty() => String::new(),
            bytes => String::from_utf8_lossy(&bytes).into_owned(),
        }
    }

    fn take_pending(&mut self) -> Result<String> {
        let text = self.decode_pending()?;
        self.pending.clear();
        Ok(text)
    }

    fn decode_pending(&self) -> Result<String> {
        if self.pending.is_empty() {
            return Ok(String::new());
        }
        let whole = self.decode(&[&self.context[..], &self.pending].concat())?;
        match whole.strip_prefix(&self.shown) {
            Some(new) => Ok(new.to_string()),
            None => self.decode(&self.pending),
        }
    }

    /// Continues after these tokens.
    fn follow(&mut self, context: Vec<u32>) -> Result<()> {
        self.shown = self.decode(&context)?;
        self.context = context;
        Ok(())
    }

    /// Continues after bytes. A letter as a byte token stands in for them, so that the next token is not the first of a
    /// text.
    fn follow_bytes(&mut self) -> Result<()> {
        let letter = self.tokenizer.token_to_id("<0x41>");
        self.follow(letter.into_iter().collect())
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer
            .decode(ids, true)
            .map_err(|error| anyhow!("tokenizer: {error}"))
    }
}

/// The characters at the beginning of `bytes` that are whole or broken; bytes that may still become one stay.
fn take_whole(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(whole) => {
                text.push_str(whole);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let valid = error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[..valid]));
                let Some(broken) = error.error_len() else {
                    bytes.drain(..valid);
                    return text;
                };
                text.push(BROKEN);
                bytes.drain(..valid + broken);
            }
        }
    }
}

fn has_byte_fallback(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteFallback(_) => true,
        DecoderWrapper::Sequence(steps) => steps.get_decoders().iter().any(has_byte_fallback),
        _ => false,
    }
}
