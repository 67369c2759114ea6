//! What a Hugging Face checkpoint says of text: its tokenizer, the tokens that end one, its chat template.

use std::fs;
use std::path::PathBuf;

use anyhow::{anyhow, Context, Result};
use serde::Deserialize;
use tokenizers::Tokenizer;

use super::hf::{read_json, Origin};
use crate::chat::ChatTemplate;

/// The files that say it.
pub struct TextFiles {
    config: PathBuf,
    tokenizer: PathBuf,
    /// tokenizer_config.json and chat_template.jinja: where a chat template may be.
    tokenizer_config: Option<PathBuf>,
    chat_template: Option<PathBuf>,
    generation_config: Option<PathBuf>,
}

impl TextFiles {
    pub fn collect(origin: &dyn Origin) -> Result<Self> {
        Ok(Self {
            config: origin.required("config.json")?,
            tokenizer: origin.required("tokenizer.json")?,
            tokenizer_config: origin.optional("tokenizer_config.json")?,
            chat_template: origin.optional("chat_template.jinja")?,
            generation_config: origin.optional("generation_config.json")?,
        })
    }
}

pub fn tokenizer(files: &TextFiles) -> Result<Tokenizer> {
    Tokenizer::from_file(&files.tokenizer)
        .map_err(|error| anyhow!("{}: expected a tokenizer, got: {error}", files.tokenizer.display()))
}

/// Those of config.json and of generation_config.json.
pub fn end_tokens(files: &TextFiles) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for path in [Some(&files.config), files.generation_config.as_ref()]
        .into_iter()
        .flatten()
    {
        let ends: Ends = read_json(path)?;
        ids.extend(ends.eos_token_id.map_or_else(Vec::new, OneOrMany::into_vec));
    }
    Ok(ids)
}

/// config.json or generation_config.json.
#[derive(Deserialize)]
struct Ends {
    eos_token_id: Option<OneOrMany>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

/// tokenizer_config.json, as far as it is read.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Templates>,
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Object { content: String },
}

pub fn chat_template(files: &TextFiles) -> Result<Option<ChatTemplate>> {
    let config: TokenizerConfig = match &files.tokenizer_config {
        Some(path) => read_json(path)?,
        None => TokenizerConfig::default(),
    };
    let text = |token: Option<SpecialToken>| match token {
        Some(SpecialToken::Text(text) | SpecialToken::Object { content: text }) => text,
        None => String::new(),
    };
    let source = match (config.chat_template, &files.chat_template) {
        (_, Some(path)) => Some(fs::read_to_string(path).with_context(|| format!("{}", path.display()))?),
        (Some(Templates::One(template)), None) => Some(template),
        (Some(Templates::Named(named)), None) => named
            .into_iter()
            .find(|named| named.name == "default")
            .map(|named| named.template),
        (None, None) => None,
    };
    let (bos_token, eos_token) = (text(config.bos_token), text(config.eos_token));
    Ok(source.map(|source| ChatTemplate {
        source,
        bos_token,
        eos_token,
    }))
}
