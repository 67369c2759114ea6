//! The text side of a GGUF file: its tokenizer, the tokens that end a text, its chat template.

use std::collections::HashMap;

use anyhow::{anyhow, bail, ensure, Context, Result};
use candle_core::quantized::gguf_file::{Content, Value};
use tokenizers::models::bpe::{Vocab, BPE};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use super::gguf::{count, string};
use super::pre_tokenizer::PreTokenizer;
use super::sentencepiece;
use super::text::{Edge, Text};
use crate::chat::ChatTemplate;

/// Names of special tokens in chat templates, and GGUF's names for their ids.
const SPECIALS: [(&str, &str); 7] = [
    ("bos", "bos"),
    ("eos", "eos"),
    ("unk", "unknown"),
    ("pad", "padding"),
    ("sep", "seperator"),
    ("cls", "cls"),
    ("mask", "mask"),
];

pub fn text(content: &Content) -> Result<Text> {
    let vocabulary = Vocabulary::read(content)?;
    let model = string(content, "tokenizer.ggml.model")?;
    let (mut tokenizer, add_bos) = match model {
        "gpt2" => byte_level(content, &vocabulary)?,
        "llama" => (sentencepiece::tokenizer(content, &vocabulary)?, true),
        other => bail!(
            "tokenizer.ggml.model: expected gpt2 (byte-level BPE) or llama (SentencePiece), got {other}; use the \
             Hugging Face folder of the model"
        ),
    };
    let ids = Ids::read(content, &vocabulary, model)?;
    add_tokens(&mut tokenizer, &vocabulary, &ids)?;
    let bos = Edge {
        id: ids.get("bos"),
        add: Some(flag(content, "add_bos_token")?.unwrap_or(add_bos && ids.get("bos").is_some())),
    };
    let eos = Edge {
        id: ids.get("eos"),
        add: Some(flag(content, "add_eos_token")?.unwrap_or(false)),
    };
    let ends = ["eos", "eot", "eom"].iter().filter_map(|name| ids.get(name)).collect();
    let chat = chat_template(content, &vocabulary, &ids)?;
    Text::new(tokenizer, bos, eos, ends, chat)
}

/// The tokens of a file.
pub struct Vocabulary {
    pub tokens: Vec<String>,
    /// As long as `tokens`.
    pub kinds: Vec<Kind>,
}

/// GGUF's token types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Vocabulary {
    fn read(content: &Content) -> Result<Self> {
        let tokens = strings(content, "tokenizer.ggml.tokens")?;
        let mut seen = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if let Some(other) = seen.insert(token.as_str(), id) {
                bail!(
                    "tokenizer.ggml.tokens: expected every token once, got {token:?} as {other} and {id}; the file is \
                     damaged"
                );
            }
        }
        let kinds = match content.metadata.get("tokenizer.ggml.token_type") {
            None => vec![Kind::Normal; tokens.len()],
            Some(value) => array("tokenizer.ggml.token_type", value)?
                .iter()
                .map(Kind::of)
                .collect::<Result<_>>()?,
        };
        ensure!(
            kinds.len() == tokens.len(),
            "tokenizer.ggml.token_type: expected one for each of the {} tokens, got {}; the file is damaged",
            tokens.len(),
            kinds.len()
        );
        Ok(Self { tokens, kinds })
    }

    /// Every token's id.
    pub fn ids(&self) -> Vocab {
        self.tokens.iter().cloned().zip(0..).collect()
    }
}

impl Kind {
    fn of(value: &Value) -> Result<Self> {
        Ok(match integer("tokenizer.ggml.token_type", value)? {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        })
    }
}

/// Ids of the special tokens that the file names.
struct Ids(HashMap<&'static str, u32>);

impl Ids {
    fn read(content: &Content, vocabulary: &Vocabulary, model: &str) -> Result<Self> {
        let mut ids = HashMap::new();
        for (name, key) in SPECIALS.into_iter().chain([("eot", "eot"), ("eom", "eom")]) {
            let key = format!("tokenizer.ggml.{key}_token_id");
            let id = match (content.metadata.contains_key(&key), model, name) {
                (true, ..) => count(content, &key)?,
                // SentencePiece's default ids, if the file leaves them out.
                (false, "llama", "unk") => 0,
                (false, "llama", "bos") => 1,
                (false, "llama", "eos") => 2,
                (false, ..) => continue,
            };
            ensure!(
                id < vocabulary.tokens.len(),
                "{key}: expected the id of one of the {} tokens, got {id}; the file is damaged",
                vocabulary.tokens.len()
            );
            ids.insert(name, id as u32);
        }
        Ok(Self(ids))
    }

    fn get(&self, name: &str) -> Option<u32> {
        self.0.get(name).copied()
    }
}

/// A byte-level BPE, and whether texts begin with BOS by default.
fn byte_level(content: &Content, vocabulary: &Vocabulary) -> Result<(Tokenizer, bool)> {
    let merges = strings(content, "tokenizer.ggml.merges")?
        .into_iter()
        .map(|merge| match merge.split_once(' ') {
            Some((left, right)) => Ok((left.to_string(), right.to_string())),
            None => bail!(
                "tokenizer.ggml.merges: expected two tokens and a space between them, got {merge:?}; the file is \
                 damaged"
            ),
        })
        .collect::<Result<_>>()?;
    let pre = match content.metadata.contains_key("tokenizer.ggml.pre") {
        true => string(content, "tokenizer.ggml.pre")?,
        false => "default",
    };
    let prefix = flag(content, "add_space_prefix")?.unwrap_or(false);
    let pre = PreTokenizer::named(pre, prefix)?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary.ids(), merges)
        .ignore_merges(flag(content, "ignore_merges")?.unwrap_or(pre.ignore_merges))
        .build()
        .map_err(|error| anyhow!("tokenizer.ggml.merges: expected merges of known tokens, got: {error}"))?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer
        .with_normalizer(pre.normalizer)
        .map_err(|error| anyhow!("tokenizer: {error}"))?;
    tokenizer.with_pre_tokenizer(Some(pre.splits));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok((tokenizer, pre.add_bos))
}

/// Adds tokens that are matched before a text is split. User-defined ones are text and are printed; the others are
/// marks.
fn add_tokens(tokenizer: &mut Tokenizer, vocabulary: &Vocabulary, ids: &Ids) -> Result<()> {
    let marks = ["bos", "eos", "eot", "eom"].map(|name| ids.get(name));
    let tokens = vocabulary.tokens.iter().zip(&vocabulary.kinds).zip(0..);
    let added = tokens.filter_map(|((token, kind), id)| {
        let special = match kind {
            Kind::UserDefined => false,
            Kind::Control | Kind::Unknown | Kind::Unused => true,
            Kind::Normal | Kind::Byte if marks.contains(&Some(id)) => true,
            Kind::Normal | Kind::Byte => return None,
        };
        Some(AddedToken::from(token.clone(), special).normalized(false))
    });
    let added: Vec<AddedToken> = added.collect();
    tokenizer
        .add_tokens(added)
        .map_err(|error| anyhow!("tokenizer: {error}"))?;
    Ok(())
}

fn chat_template(content: &Content, vocabulary: &Vocabulary, ids: &Ids) -> Result<Option<ChatTemplate>> {
    const KEY: &str = "tokenizer.chat_template";
    if !content.metadata.contains_key(KEY) {
        return Ok(None);
    }
    let mut template = ChatTemplate::new(string(content, KEY)?.to_string());
    for (name, _) in SPECIALS {
        if let Some(id) = ids.get(name) {
            template.name_token(&format!("{name}_token"), &vocabulary.tokens[id as usize]);
        }
    }
    Ok(Some(template))
}

/// `tokenizer.ggml.NAME`, if the file has it.
pub fn flag(content: &Content, name: &str) -> Result<Option<bool>> {
    let key = format!("tokenizer.ggml.{name}");
    match content.metadata.get(&key) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(other) => bail!("{key}: expected true or false, got {other:?}; the file is damaged"),
    }
}

pub fn array<'a>(key: &str, value: &'a Value) -> Result<&'a Vec<Value>> {
    value
        .to_vec()
        .with_context(|| format!("{key}: expected an array; the file is damaged"))
}

fn strings(content: &Content, key: &str) -> Result<Vec<String>> {
    let value = content.metadata.get(key).with_context(|| {
        format!("{key}: expected this metadata, found none; use the Hugging Face folder of the model")
    })?;
    array(key, value)?
        .iter()
        .map(|value| match value {
            Value::String(text) => Ok(text.clone()),
            other => bail!("{key}: expected strings, got {other:?}; the file is damaged"),
        })
        .collect()
}

fn integer(key: &str, value: &Value) -> Result<i64> {
    Ok(match *value {
        Value::I8(v) => v.into(),
        Value::I16(v) => v.into(),
        Value::I32(v) => v.into(),
        Value::I64(v) => v,
        Value::U8(v) => v.into(),
        Value::U16(v) => v.into(),
        Value::U32(v) => v.into(),
        _ => bail!("{key}: expected integers, got {value:?}; the file is damaged"),
    })
}
