//! The text side of a Hugging Face checkpoint: its tokenizer, the tokens that end a text, its chat template.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{anyhow, Context, Result};
use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use super::hf::{read_json, Origin};
use super::text::{Edge, Text};
use crate::chat::ChatTemplate;

/// The files about text.
pub struct TextFiles {
    config: PathBuf,
    tokenizer: PathBuf,
    /// tokenizer_config.json and chat_template.jinja: where a chat template may be.
    tokenizer_config: Option<PathBuf>,
    chat_template: Option<PathBuf>,
    generation_config: Option<PathBuf>,
}

impl TextFiles {
    pub(super) fn collect(origin: &dyn Origin) -> Result<Self> {
        Ok(Self {
            config: origin.required("config.json")?,
            tokenizer: origin.required("tokenizer.json")?,
            tokenizer_config: origin.optional("tokenizer_config.json")?,
            chat_template: origin.optional("chat_template.jinja")?,
            generation_config: origin.optional("generation_config.json")?,
        })
    }
}

/// Reads a tokenizer.json, as JSON first: tokenizers 0.23.2 panics on an invalid decoder. All of it becomes a value:
/// serde_json does not check the strings of fields that are ignored.
pub fn tokenizer(path: &Path) -> Result<Tokenizer> {
    let read = || -> Result<Tokenizer> {
        let json = fs::read(path)?;
        serde_json::from_slice::<Value>(&json)?;
        Tokenizer::from_bytes(json).map_err(|error| anyhow!("{error}"))
    };
    read().map_err(|error| anyhow!("{}: expected a tokenizer, got: {error}", path.display()))
}

pub fn text(files: &TextFiles) -> Result<Text> {
    let mut tokenizer = tokenizer(&files.tokenizer)?;
    // Truncation and padding belong to training: a text that is read here is neither cut nor padded.
    tokenizer.with_padding(None);
    tokenizer
        .with_truncation(None)
        .map_err(|error| anyhow!("{}: {error}", files.tokenizer.display()))?;
    let config: TokenizerConfig = match &files.tokenizer_config {
        Some(path) => read_json(path)?,
        None => TokenizerConfig::default(),
    };
    let edge = |name: &str, add| Edge {
        id: config.token(name).and_then(|token| tokenizer.token_to_id(token)),
        add,
    };
    let (bos, eos) = (
        edge("bos_token", config.add_bos_token),
        edge("eos_token", config.add_eos_token),
    );
    let chat = chat_template(files, &config)?;
    let source = || match &files.tokenizer_config {
        Some(path) => path.display().to_string(),
        None => files.tokenizer.display().to_string(),
    };
    Text::new(tokenizer, bos, eos, ends(files)?, chat).with_context(source)
}

/// The ends of config.json and of generation_config.json.
fn ends(files: &TextFiles) -> Result<Vec<u32>> {
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
#[serde(untagged, expecting = "eos_token_id: expected a token id or a list of them")]
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

/// The parts of tokenizer_config.json that are read.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Templates>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    /// All other keys; the special tokens are among them.
    #[serde(flatten)]
    others: HashMap<String, Value>,
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

impl TokenizerConfig {
    /// The text of a special token.
    fn token(&self, name: &str) -> Option<&str> {
        text_of(self.others.get(name)?)
    }

    /// Lets the template name all special tokens, including those that only this model has.
    fn name_tokens(&self, template: &mut ChatTemplate) {
        for name in ["bos", "eos", "unk", "pad", "sep", "cls", "mask"] {
            let name = format!("{name}_token");
            if let Some(token) = self.token(&name) {
                template.name_token(&name, token);
            }
        }
        for name in ["additional_special_tokens", "extra_special_tokens"] {
            match self.others.get(name) {
                Some(Value::Array(tokens)) => {
                    template.name_tokens(name, tokens.iter().filter_map(text_of).map(String::from).collect());
                }
                Some(Value::Object(tokens)) => tokens
                    .iter()
                    .filter_map(|(name, token)| Some((name, text_of(token)?)))
                    .for_each(|(name, token)| template.name_token(name, token)),
                _ => {}
            }
        }
    }
}

/// A token's text, which files write plainly or inside an object.
fn text_of(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

fn chat_template(files: &TextFiles, config: &TokenizerConfig) -> Result<Option<ChatTemplate>> {
    let source = match (&config.chat_template, &files.chat_template) {
        (_, Some(path)) => Some(fs::read_to_string(path).with_context(|| format!("{}", path.display()))?),
        (Some(Templates::One(template)), None) => Some(template.clone()),
        (Some(Templates::Named(named)), None) => named
            .iter()
            .find(|named| named.name == "default")
            .map(|named| named.template.clone()),
        (None, None) => None,
    };
    Ok(source.map(|source| {
        let mut template = ChatTemplate::new(source);
        config.name_tokens(&mut template);
        template
    }))
}
