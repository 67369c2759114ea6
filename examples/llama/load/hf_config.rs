//! config.json. A key that nothing reads is an error, unless it does not change the computation.

use anyhow::{bail, ensure, Context, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::fp8::Quantization;
use super::hf_kind::Kind;
use super::unread::list;
use crate::model::LlamaConfig;
use crate::rope::{Llama3Scaling, RopeScaling};

/// Keys that do not change the computation: about the making of the file, training, the tokenizer and generation. So
/// are keys that begin with `_`.
pub(super) const HARMLESS: &[&str] = &[
    "architectures",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_implementation",
    "attn_pdrop",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "hidden_dropout",
    "hidden_dropout_prob",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_seq_len",
    "max_sequence_length",
    "min_length",
    "model_max_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "output_router_logits",
    "output_scores",
    "pad_token_id",
    "prefix",
    // This only splits products into parts.
    "pretraining_tp",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_flash_attention",
    "use_flash_attention_2",
    "vocab_file",
];

/// Keys that this file reads for every model; [`Kind::reads`] has the others.
const READ: &[&str] = &[
    "compression_config",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
];

/// The numbers that every model has.
#[derive(Deserialize)]
struct RawConfig {
    hidden_size: usize,
    intermediate_size: usize,
    vocab_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rope_theta: Option<f64>,
    tie_word_embeddings: Option<bool>,
}

/// The kind of model that config.json names.
pub fn kind(json: &Value) -> Result<Kind> {
    let model_type = json.get("model_type").and_then(Value::as_str);
    Kind::named(model_type.unwrap_or("no model_type"))
}

pub fn read(json: &Value) -> Result<LlamaConfig> {
    let keys = json
        .as_object()
        .with_context(|| format!("expected an object of settings, got {json}"))?;
    let kind = kind(json)?;
    check_all_read(keys, kind)?;
    let raw = RawConfig::deserialize(json)?;
    let heads = raw.num_attention_heads;
    ensure!(heads > 0, "num_attention_heads: expected at least 1, got 0");
    let eps = keys.get(kind.eps_key()).unwrap_or(&Value::Null);
    let norm_eps = eps
        .as_f64()
        .with_context(|| format!("{}: expected a number, got {eps}; fetch the file again", kind.eps_key()))?;
    let (theta, rope_scaling) = rope(json, kind, raw.rope_theta)?;
    let mut own = kind.read(json, raw.num_hidden_layers, raw.hidden_size)?;
    if let (Some(sliding), Some(theta)) = (&mut own.layer.sliding, sliding_theta(json, kind)?) {
        sliding.rope_theta = Some(theta);
    }
    let head_dim = raw.head_dim.or(own.head_dim).unwrap_or(raw.hidden_size / heads);
    if let Some(share) = rotated_share(json, kind)? {
        own.layer.rotated = Some((share * head_dim as f64) as usize);
    }
    Ok(LlamaConfig {
        hidden_size: raw.hidden_size,
        intermediate_size: raw.intermediate_size,
        vocab_size: raw.vocab_size,
        layers: raw.num_hidden_layers,
        heads,
        kv_heads: raw.num_key_value_heads.unwrap_or(heads),
        head_dim,
        norm_eps,
        rope_theta: theta.unwrap_or(own.rope_theta),
        rope_scaling,
        rope_pairing: own.pairing,
        context_length: raw.max_position_embeddings,
        attention_bias: own.attention_bias,
        mlp_bias: own.mlp_bias,
        tied: raw.tie_word_embeddings.unwrap_or(own.tied),
        layer: own.layer,
    })
}

/// How the weights are quantized, if config.json has a quantization.
pub fn quantization(json: &Value) -> Result<Option<Quantization>> {
    let keys = ["quantization_config", "compression_config"];
    let configs: Vec<&Value> = keys
        .iter()
        .filter_map(|key| json.get(key))
        .filter(|config| !config.is_null())
        .collect();
    match configs[..] {
        [] => Ok(None),
        [config] => Quantization::read(config).map(Some),
        _ => bail!("quantization_config: expected one such key, got compression_config too; remove one"),
    }
}

/// Refuses unread keys, except null, false, 0 and empty values, which count as absent.
fn check_all_read(keys: &Map<String, Value>, kind: Kind) -> Result<()> {
    let mut left = Vec::new();
    for (key, value) in keys {
        let name = key.as_str();
        let known = [READ, kind.reads(), HARMLESS, &[kind.eps_key()]]
            .iter()
            .any(|keys| keys.contains(&name))
            || name.starts_with('_');
        if !known && !says_nothing(key, value, keys) {
            left.push(key.as_str());
        }
    }
    ensure!(
        left.is_empty(),
        "expected settings of a plain {}, got also {}, which is not read and may change what the model computes; use \
         a plain {0}, or remove the key where it changes nothing",
        kind.name(),
        list(left.into_iter())
    );
    Ok(())
}

fn says_nothing(key: &str, value: &Value, keys: &Map<String, Value>) -> bool {
    match (key, value) {
        // True in every Llama.
        ("is_causal" | "scale_attn_weights" | "use_rope" | "use_rms_norm", Value::Bool(on)) => *on,
        ("partial_rotary_factor" | "rotary_pct", _) => value.as_f64() == Some(1.0),
        ("layer_types", Value::Array(types)) => types.iter().all(|layer| layer == "full_attention"),
        ("sliding_window" | "max_window_layers", _) => {
            value.is_null() || keys.get("use_sliding_window") == Some(&Value::Bool(false))
        }
        (_, Value::Null | Value::Bool(false)) => true,
        (_, Value::Number(number)) => number.as_f64() == Some(0.0),
        (_, Value::Array(values)) => values.is_empty(),
        (_, Value::Object(values)) => values.is_empty(),
        _ => false,
    }
}

/// One of the objects that scale the frequencies.
#[derive(Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct RawRope {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

/// Theta and scaling, from `rope_scaling` (`rope_parameters` in newer files) and from theta's own key.
fn rope(json: &Value, kind: Kind, own_theta: Option<f64>) -> Result<(Option<f64>, RopeScaling)> {
    let (mut theta, mut scaling) = (own_theta, None);
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(value) = json.get(key).filter(|value| !value.is_null()) else {
            continue;
        };
        let value = by_layer_type(value, kind, "full_attention").unwrap_or(value);
        let raw = RawRope::deserialize(value).with_context(|| key.to_string())?;
        if let Some(here) = raw.rope_theta {
            ensure!(
                theta.is_none_or(|theta| theta == here),
                "{key}: expected the rope_theta named before, {}, got {here}; the file contradicts itself",
                theta.unwrap_or_default()
            );
            theta = Some(here);
        }
        ensure!(
            kind.rotates_a_part() || raw.partial_rotary_factor.is_none_or(|factor| factor == 1.0),
            "{key}: partial_rotary_factor: expected 1, got {}; not supported",
            raw.partial_rotary_factor.unwrap_or_default()
        );
        let here = raw.scaling().with_context(|| key.to_string())?;
        ensure!(
            scaling.as_ref().is_none_or(|scaling| *scaling == here),
            "{key}: expected what rope_scaling says, got something else; the file contradicts itself"
        );
        scaling = Some(here);
    }
    Ok((theta, scaling.unwrap_or(RopeScaling::None)))
}

/// The share of a head's numbers that is rotated, of a kind that rotates a part.
fn rotated_share(json: &Value, kind: Kind) -> Result<Option<f64>> {
    if !kind.rotates_a_part() {
        return Ok(None);
    }
    const KEY: &str = "partial_rotary_factor";
    let places = [json.get(KEY)].into_iter();
    let within = ["rope_scaling", "rope_parameters"].map(|key| json.get(key).and_then(|rope| rope.get(KEY)));
    let mut share = None;
    for value in places.chain(within).flatten().filter(|value| !value.is_null()) {
        let here = value.as_f64().filter(|here| (0.0..=1.0).contains(here));
        let here = here.with_context(|| format!("{KEY}: expected a number from 0 to 1, got {value}"))?;
        ensure!(
            share.is_none_or(|share| share == here),
            "{KEY}: expected the same share at every place, got {} and {here}; the file contradicts itself",
            share.unwrap_or_default()
        );
        share = Some(here);
    }
    Ok(share.or(Some(0.25)))
}

/// The part of a newer Gemma's `rope_parameters` for one type of layers.
fn by_layer_type<'v>(value: &'v Value, kind: Kind, layer_type: &str) -> Option<&'v Value> {
    value.get(layer_type).filter(|_| kind == Kind::Gemma3)
}

/// The theta of sliding layers in a newer Gemma's `rope_parameters`.
fn sliding_theta(json: &Value, kind: Kind) -> Result<Option<f64>> {
    let all = json.get("rope_parameters").unwrap_or(&Value::Null);
    let Some(value) = by_layer_type(all, kind, "sliding_attention") else {
        return Ok(None);
    };
    let raw = RawRope::deserialize(value).context("rope_parameters: sliding_attention")?;
    ensure!(
        raw.scaling()? == RopeScaling::None && raw.partial_rotary_factor.is_none_or(|factor| factor == 1.0),
        "rope_parameters: expected sliding_attention without scaling, got {value}; not supported"
    );
    Ok(raw.rope_theta)
}

impl RawRope {
    fn scaling(&self) -> Result<RopeScaling> {
        let kind = match (&self.rope_type, &self.old_type) {
            (Some(new), Some(old)) if new != old => {
                bail!("expected one type, got rope_type {new} and type {old}; the file contradicts itself")
            }
            (new, old) => new.as_deref().or(old.as_deref()),
        };
        let number = |name: &str, value: Option<f64>| -> Result<f64> {
            let value = value.with_context(|| format!("expected {name}, found none"))?;
            ensure!(value.is_finite() && value > 0.0, "expected {name} above 0, got {value}");
            Ok(value)
        };
        // Keys that only other types read.
        let ramp = [
            ("low_freq_factor", self.low_freq_factor),
            ("high_freq_factor", self.high_freq_factor),
        ];
        let unused: Vec<&str> = match kind {
            None | Some("default") => [("factor", self.factor.filter(|&factor| factor != 1.0))]
                .into_iter()
                .chain(ramp)
                .filter_map(|(name, value)| value.map(|_| name))
                .collect(),
            Some("linear") => ramp
                .into_iter()
                .filter_map(|(name, value)| value.map(|_| name))
                .collect(),
            Some(_) => Vec::new(),
        };
        ensure!(
            unused.is_empty(),
            "expected a rope_type that reads {}, got {}; the file contradicts itself",
            unused.join(", "),
            kind.unwrap_or("none")
        );
        Ok(match kind {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear(number("factor", self.factor)?),
            Some("llama3") => RopeScaling::Llama3(Llama3Scaling {
                factor: number("factor", self.factor)?,
                low_freq_factor: number("low_freq_factor", self.low_freq_factor)?,
                high_freq_factor: number("high_freq_factor", self.high_freq_factor)?,
                original_context: number(
                    "original_max_position_embeddings",
                    self.original_max_position_embeddings,
                )?,
            }),
            Some(other) => bail!("rope scaling: expected default, linear or llama3, got {other}; not supported"),
        })
    }
}
