//! What a GGUF file says of text: its tokenizer, the tokens that end one, its chat template.

use anyhow::{Context, Result};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::Tokenizer;

use super::gguf::count;
use crate::chat::ChatTemplate;

/// The tokenizer that candle makes of the file, with what it lacks: names that llama.cpp writes for Llama 3, and
/// SmolLM2's way to split. (For names it does not know, candle also puts a space before every text.)
pub(super) fn tokenizer(content: &mut Content) -> Result<Tokenizer> {
    let pre = match content.metadata.get("tokenizer.ggml.pre") {
        Some(value) => value.to_string()?.clone(),
        None => String::from("default"),
    };
    if matches!(pre.as_str(), "llama-bpe" | "llama-v3" | "llama3") {
        for key in ["tokenizer.ggml.ignore_merges", "tokenizer.ggml.add_bos_token"] {
            content.metadata.entry(key.into()).or_insert(Value::Bool(true));
        }
        content
            .metadata
            .insert("tokenizer.ggml.pre".into(), Value::String("llama3".into()));
    }
    let mut tokenizer = Tokenizer::from_gguf(content)
        .context("expected a byte-level BPE (tokenizer.ggml.model gpt2); for another, use the Hugging Face folder")?;
    let prefix = content
        .metadata
        .get("tokenizer.ggml.add_space_prefix")
        .is_some_and(|value| matches!(value, Value::Bool(true)));
    let bytes = ByteLevel::new(prefix, true, true);
    match pre.as_str() {
        "llama-bpe" | "llama-v3" | "llama3" | "qwen2" | "smaug-bpe" | "lfm2" => {}
        "smollm" => {
            let split = Sequence::new(vec![Digits::new(true).into(), bytes.into()]);
            tokenizer.with_pre_tokenizer(Some(split));
        }
        _ => {
            tokenizer.with_pre_tokenizer(Some(bytes));
        }
    }
    Ok(tokenizer)
}

pub(super) fn end_tokens(content: &Content) -> Vec<u32> {
    ["eos", "eot", "eom"]
        .iter()
        .filter_map(|name| count(content, &format!("tokenizer.ggml.{name}_token_id")).ok())
        .filter_map(|id| u32::try_from(id).ok())
        .collect()
}

pub(super) fn chat_template(content: &Content) -> Option<ChatTemplate> {
    let token = |name: &str| {
        let id = count(content, &format!("tokenizer.ggml.{name}_token_id")).ok()?;
        content
            .metadata
            .get("tokenizer.ggml.tokens")?
            .to_vec()
            .ok()?
            .get(id)?
            .to_string()
            .ok()
            .cloned()
    };
    Some(ChatTemplate {
        source: content
            .metadata
            .get("tokenizer.chat_template")?
            .to_string()
            .ok()?
            .clone(),
        bos_token: token("bos").unwrap_or_default(),
        eos_token: token("eos").unwrap_or_default(),
    })
}
