//! The text part of a checkpoint that reads images too: Gemma 3 from 4B on.

use anyhow::{ensure, Context, Result};
use serde_json::{json, Map, Value};

use super::hf_config::HARMLESS;
use super::unread::list;

/// Keys about images. The text part does not depend on them.
const OF_IMAGES: &[&str] = &[
    "boi_token_id",
    "boi_token_index",
    "eoi_token_id",
    "eoi_token_index",
    "image_token_id",
    "image_token_index",
    "mm_tokens_per_image",
    "vision_config",
];

/// Keys beside the text part's settings that belong to it.
const OF_TEXT: &[&str] = &["compression_config", "quantization_config", "tie_word_embeddings"];

/// config.json as the one of a text-only checkpoint; None if it is one.
pub fn config(json: &Value) -> Result<Option<Value>> {
    if json.get("model_type").and_then(Value::as_str) != Some("gemma3") {
        return Ok(None);
    }
    let keys = json.as_object().context("expected an object of settings")?;
    let text = keys.get("text_config").and_then(Value::as_object);
    let text = text.context("text_config: expected the settings of the text part, found none; fetch the file again")?;
    let known = |key: &str| {
        [OF_IMAGES, OF_TEXT, HARMLESS].iter().any(|keys| keys.contains(&key))
            || ["model_type", "text_config"].contains(&key)
            || key.starts_with('_')
    };
    let left: Vec<&str> = keys.keys().map(String::as_str).filter(|key| !known(key)).collect();
    ensure!(
        left.is_empty(),
        "expected settings of a Gemma 3 for text and images, got also {}, which is not read and may change what the \
         model computes; remove the key where it changes nothing",
        list(left.into_iter())
    );
    let mut config = defaults();
    let beside = keys.iter().filter(|(key, _)| OF_TEXT.contains(&key.as_str()));
    config.extend(beside.chain(text).map(|(key, value)| (key.clone(), value.clone())));
    Ok(Some(Value::Object(config)))
}

/// What transformers takes for keys that a text part leaves out.
fn defaults() -> Map<String, Value> {
    let defaults = json!({
        "model_type": "gemma3_text", "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6
    });
    match defaults {
        Value::Object(defaults) => defaults,
        _ => Map::new(),
    }
}

/// The names under which a checkpoint for text and images holds a text model's tensors.
#[derive(Clone, Copy)]
pub enum Names {
    Plain,
    /// `language_model.model.norm` for `model.norm`.
    LanguageModel,
    /// `model.language_model.norm` for `model.norm`, as newer versions of transformers write it.
    ModelLanguageModel,
}

impl Names {
    /// Those that `has` knows.
    pub fn of(has: impl Fn(&str) -> bool) -> Self {
        let names = [Self::LanguageModel, Self::ModelLanguageModel].into_iter();
        let mut known = names.filter(|names| has(&names.held("model.embed_tokens.weight")));
        known.next().unwrap_or(Self::Plain)
    }

    /// The name of a text model's tensor in the checkpoint.
    pub fn held(self, name: &str) -> String {
        match (self, name.strip_prefix("model.")) {
            (Self::Plain, _) | (Self::ModelLanguageModel, None) => name.into(),
            (Self::LanguageModel, _) => format!("language_model.{name}"),
            (Self::ModelLanguageModel, Some(name)) => format!("model.language_model.{name}"),
        }
    }

    /// Whether a tensor of the checkpoint belongs to the part for images.
    pub fn is_of_images(self, held: &str) -> bool {
        let prefixes: &[&str] = match self {
            Self::Plain => &[],
            Self::LanguageModel => &["vision_tower.", "multi_modal_projector."],
            Self::ModelLanguageModel => &["model.vision_tower.", "model.multi_modal_projector."],
        };
        prefixes.iter().any(|prefix| held.starts_with(prefix))
    }
}
