//! The llama example's text: tokenizers, chat templates, ends of texts, and tokens printed as they come.

mod ends;
mod sentencepiece;
mod splits;
mod templates;
mod vocabulary;

use crate::binary::{llama, text};
use crate::load::{Checkpoint, LoadOptions};
use crate::script::{says, strings, write_gguf, Tokens, BYTE};
use candle_core::quantized::gguf_file::Value;

fn open(model: &str) -> Checkpoint {
    let options = LoadOptions {
        dequantize: false,
        ..Default::default()
    };
    Checkpoint::open(model, options).unwrap()
}

fn string(text: &str) -> Value {
    Value::String(text.into())
}

/// The text that greedy generation prints after a prompt.
fn say(model: &str, prompt: &str, more: &[&str]) -> String {
    let args = ["generate", "--model", model, "--prompt", prompt, "--dense"];
    let output = llama(&[&args[..], &["--max-tokens", "20"], more].concat());
    assert!(output.status.success(), "{model}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// A GGUF file of byte tokens and these, whose pre-tokenizer is named `pre`.
fn split_by(pre: &str, tokens: &Tokens, merges: &[&str], more: &[(&str, Value)]) -> String {
    let metadata = [
        ("tokenizer.ggml.pre", string(pre)),
        ("tokenizer.ggml.merges", strings(merges)),
    ];
    write_gguf(pre, &says(tokens.len(), &[]), tokens, &[&metadata[..], more].concat())
}

/// Bytes as tokens, as vocabularies of SentencePiece have them.
fn byte_tokens() -> Vec<(String, i32)> {
    (0..=255).map(|byte| (format!("<0x{byte:02X}>"), BYTE)).collect()
}
