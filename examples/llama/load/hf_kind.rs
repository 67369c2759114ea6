//! The models that config.json may name, and the settings that only some of them have.

use anyhow::{bail, ensure, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::model::{Activation, LayerOptions, NormKind, Sliding, MOST_LAYERS};
use crate::rope::Pairing;

/// A model type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma,
    Gemma2,
    Gemma3,
    Granite,
    Helium,
    StableLm,
}

/// Settings that follow from the kind, or that only some kinds have.
pub struct Own {
    /// The head dimension where config.json names none; None: hidden size / heads.
    pub head_dim: Option<usize>,
    /// The theta where config.json names none.
    pub rope_theta: f64,
    pub pairing: Pairing,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    /// Whether matrices are tied where config.json does not say.
    pub tied: bool,
    pub layer: LayerOptions,
}

/// The keys that [`Kind::reads`] may name.
#[derive(Deserialize)]
struct Raw {
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    use_qkv_bias: Option<bool>,
    sliding_window: Option<usize>,
    sliding_window_size: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    sliding_window_pattern: Option<usize>,
    #[serde(rename = "_sliding_window_pattern")]
    newer_pattern: Option<usize>,
    rope_local_base_freq: Option<f64>,
    query_pre_attn_scalar: Option<f64>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    embedding_multiplier: Option<f64>,
    attention_multiplier: Option<f64>,
    residual_multiplier: Option<f64>,
    logits_scaling: Option<f64>,
}

impl Kind {
    pub fn named(model_type: &str) -> Result<Self> {
        Ok(match model_type {
            "llama" => Self::Llama,
            "mistral" => Self::Mistral,
            "qwen2" => Self::Qwen2,
            "qwen3" => Self::Qwen3,
            "gemma" => Self::Gemma,
            "gemma2" => Self::Gemma2,
            "gemma3_text" => Self::Gemma3,
            "granite" => Self::Granite,
            "helium" => Self::Helium,
            "stablelm" => Self::StableLm,
            other => bail!(
                "model_type: expected llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, gemma3, granite, \
                 helium or stablelm, got {other}; this example runs these models only"
            ),
        })
    }

    /// The name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "Llama",
            Self::Mistral => "Mistral",
            Self::Qwen2 => "Qwen2",
            Self::Qwen3 => "Qwen3",
            Self::Gemma => "Gemma",
            Self::Gemma2 => "Gemma 2",
            Self::Gemma3 => "Gemma 3",
            Self::Granite => "Granite",
            Self::Helium => "Helium",
            Self::StableLm => "StableLM",
        }
    }

    /// The key of the number that norms add to a variance.
    pub fn eps_key(self) -> &'static str {
        match self {
            Self::StableLm => "layer_norm_eps",
            Self::Llama | Self::Mistral | Self::Qwen2 | Self::Qwen3 => "rms_norm_eps",
            Self::Gemma | Self::Gemma2 | Self::Gemma3 | Self::Granite | Self::Helium => "rms_norm_eps",
        }
    }

    /// What the file's vectors of norms lack: Gemma's files hold them less 1, its GGUF files hold them whole.
    pub fn norm_offset(self) -> f64 {
        match self {
            Self::Gemma | Self::Gemma2 | Self::Gemma3 => 1.0,
            Self::Llama | Self::Mistral | Self::Qwen2 | Self::Qwen3 => 0.0,
            Self::Granite | Self::Helium | Self::StableLm => 0.0,
        }
    }

    /// Whether config.json says how much of a head is rotated.
    pub fn rotates_a_part(self) -> bool {
        match self {
            Self::StableLm => true,
            Self::Llama | Self::Mistral | Self::Qwen2 | Self::Qwen3 => false,
            Self::Gemma | Self::Gemma2 | Self::Gemma3 | Self::Granite | Self::Helium => false,
        }
    }

    /// The keys that this kind reads and not every kind does.
    pub fn reads(self) -> &'static [&'static str] {
        match self {
            Self::Llama => &["attention_bias", "hidden_act", "mlp_bias"],
            Self::Mistral => &["hidden_act", "layer_types", "sliding_window"],
            Self::Qwen2 => &[
                "hidden_act",
                "layer_types",
                "max_window_layers",
                "sliding_window",
                "use_sliding_window",
            ],
            Self::Qwen3 => &[
                "attention_bias",
                "hidden_act",
                "layer_types",
                "max_window_layers",
                "sliding_window",
                "use_sliding_window",
            ],
            Self::Gemma => &[
                "attention_bias",
                "cache_implementation",
                "hidden_act",
                "hidden_activation",
            ],
            Self::Gemma2 => &[
                "attention_bias",
                "attn_logit_softcapping",
                "cache_implementation",
                "final_logit_softcapping",
                "hidden_act",
                "hidden_activation",
                "layer_types",
                "query_pre_attn_scalar",
                "sliding_window",
                "sliding_window_size",
            ],
            Self::Gemma3 => &[
                "attention_bias",
                // Chooses among caches of the same result.
                "cache_implementation",
                "hidden_activation",
                "layer_types",
                "query_pre_attn_scalar",
                "rope_local_base_freq",
                "sliding_window",
                "sliding_window_pattern",
            ],
            Self::Granite => &[
                "attention_bias",
                "attention_multiplier",
                "embedding_multiplier",
                "hidden_act",
                "logits_scaling",
                "mlp_bias",
                "residual_multiplier",
            ],
            // Not attention_bias: with it transformers has no bias of o, candle-transformers has one.
            Self::Helium => &["hidden_act", "mlp_bias"],
            Self::StableLm => &["hidden_act", "partial_rotary_factor", "use_qkv_bias"],
        }
    }

    /// Reads the settings of this kind; `layers` and `hidden` are the model's.
    pub fn read(self, json: &Value, layers: usize, hidden: usize) -> Result<Own> {
        ensure!(
            (1..=MOST_LAYERS).contains(&layers),
            "number of layers: expected 1 to {MOST_LAYERS}, got {layers} for num_hidden_layers; the file is damaged"
        );
        let raw = Raw::deserialize(json)?;
        let act = |key: &str, act: &Option<String>, known: &[&str]| -> Result<()> {
            let act = act.as_deref().unwrap_or(known[0]);
            ensure!(
                known.contains(&act),
                "{key}: expected {}, got {act}; not supported",
                known[0]
            );
            Ok(())
        };
        const TANH: &str = "gelu_pytorch_tanh";
        match self {
            Self::Gemma => {
                // The first files say gelu. transformers took the approximation by tanh for them.
                act("hidden_act", &raw.hidden_act, &[TANH, "gelu"])?;
                act("hidden_activation", &raw.hidden_activation, &[TANH])?;
            }
            Self::Gemma2 => {
                act("hidden_act", &raw.hidden_act, &[TANH])?;
                act("hidden_activation", &raw.hidden_activation, &[TANH])?;
            }
            Self::Gemma3 => act("hidden_activation", &raw.hidden_activation, &[TANH])?,
            Self::Llama | Self::Mistral | Self::Qwen2 | Self::Qwen3 | Self::Granite | Self::Helium | Self::StableLm => {
                act("hidden_act", &raw.hidden_act, &["silu", "swish"])?
            }
        }
        let given = |key: &str, value: Option<f64>, default: f64| match json.get(key) {
            Some(_) => value,
            None => Some(default),
        };
        let bias = raw.attention_bias.unwrap_or(false);
        let sliding = self.sliding(json, &raw, layers)?;
        let plain = Own {
            head_dim: None,
            rope_theta: 10_000.0,
            pairing: Pairing::Halves,
            attention_bias: false,
            mlp_bias: false,
            tied: false,
            layer: LayerOptions {
                sliding,
                ..LayerOptions::default()
            },
        };
        Ok(match self {
            Self::Llama => Own {
                attention_bias: bias,
                mlp_bias: raw.mlp_bias.unwrap_or(false),
                ..plain
            },
            Self::Mistral => plain,
            Self::Qwen2 => Own {
                attention_bias: true,
                layer: LayerOptions {
                    output_without_bias: true,
                    ..plain.layer
                },
                ..plain
            },
            Self::Qwen3 => Own {
                head_dim: Some(128),
                attention_bias: bias,
                layer: LayerOptions {
                    qk_norm: true,
                    ..plain.layer
                },
                ..plain
            },
            Self::Gemma => Own {
                head_dim: Some(256),
                attention_bias: bias,
                tied: true,
                layer: LayerOptions {
                    activation: Activation::GeluTanh,
                    embedding_scale: Some((hidden as f64).sqrt()),
                    ..plain.layer
                },
                ..plain
            },
            Self::Gemma2 => Own {
                head_dim: Some(256),
                attention_bias: bias,
                tied: true,
                layer: LayerOptions {
                    activation: Activation::GeluTanh,
                    sandwich_norms: true,
                    embedding_scale: Some((hidden as f64).sqrt()),
                    softmax_scale: Some(raw.query_pre_attn_scalar.unwrap_or(256.0).powf(-0.5)),
                    // null says that there is no cap.
                    softcap: given("attn_logit_softcapping", raw.attn_logit_softcapping, 50.0),
                    final_softcap: given("final_logit_softcapping", raw.final_logit_softcapping, 30.0),
                    ..plain.layer
                },
                ..plain
            },
            Self::Gemma3 => Own {
                head_dim: Some(256),
                rope_theta: 1e6,
                attention_bias: bias,
                tied: true,
                layer: LayerOptions {
                    activation: Activation::GeluTanh,
                    qk_norm: true,
                    sandwich_norms: true,
                    embedding_scale: Some((hidden as f64).sqrt()),
                    softmax_scale: Some(raw.query_pre_attn_scalar.unwrap_or(256.0).powf(-0.5)),
                    ..plain.layer
                },
                ..plain
            },
            Self::Granite => Own {
                attention_bias: bias,
                mlp_bias: raw.mlp_bias.unwrap_or(false),
                layer: LayerOptions {
                    embedding_scale: raw.embedding_multiplier,
                    residual_scale: raw.residual_multiplier,
                    softmax_scale: Some(raw.attention_multiplier.unwrap_or(1.0)),
                    logit_divisor: raw.logits_scaling,
                    ..plain.layer
                },
                ..plain
            },
            Self::Helium => Own {
                head_dim: Some(128),
                rope_theta: 100_000.0,
                pairing: Pairing::Interleaved,
                mlp_bias: raw.mlp_bias.unwrap_or(false),
                ..plain
            },
            Self::StableLm => Own {
                attention_bias: raw.use_qkv_bias.unwrap_or(false),
                layer: LayerOptions {
                    norm: NormKind::Layer,
                    output_without_bias: true,
                    ..plain.layer
                },
                ..plain
            },
        })
    }

    /// The layers that slide, from their types, or from the older keys.
    fn sliding(self, json: &Value, raw: &Raw, layers: usize) -> Result<Option<Sliding>> {
        let (window, slides, rope_theta): (_, Box<dyn Fn(usize) -> bool>, _) = match self {
            // A Llama's layer_types may only say what all Llamas do.
            Self::Llama | Self::Gemma | Self::Granite | Self::Helium | Self::StableLm => return Ok(None),
            // Mistral's default; null says that there is no window.
            Self::Mistral if json.get("sliding_window").is_none() => (Some(4096), Box::new(|_| true), None),
            Self::Mistral => (raw.sliding_window, Box::new(|_| true), None),
            Self::Qwen2 | Self::Qwen3 => {
                let first = raw.max_window_layers.unwrap_or(28);
                let window = raw.sliding_window.filter(|_| raw.use_sliding_window == Some(true));
                (window, Box::new(move |layer| layer >= first), None)
            }
            Self::Gemma2 => {
                let window = match json.get("sliding_window") {
                    Some(_) => raw.sliding_window,
                    None => Some(4096),
                };
                ensure!(
                    raw.sliding_window_size.is_none() || raw.sliding_window_size == window,
                    "sliding_window_size: expected the sliding_window, {window:?}, got {:?}; the file contradicts \
                     itself",
                    raw.sliding_window_size
                );
                (window, Box::new(|layer: usize| layer.is_multiple_of(2)), None)
            }
            Self::Gemma3 => {
                let pattern = raw.sliding_window_pattern.or(raw.newer_pattern).unwrap_or(6);
                ensure!(pattern > 0, "sliding_window_pattern: expected at least 1, got 0");
                (
                    Some(raw.sliding_window.unwrap_or(4096)),
                    Box::new(move |layer| !(layer + 1).is_multiple_of(pattern)),
                    Some(raw.rope_local_base_freq.unwrap_or(10_000.0)),
                )
            }
        };
        let slides: Vec<bool> = match &raw.layer_types {
            None => (0..layers).map(slides).collect(),
            Some(types) => {
                ensure!(
                    types.len() == layers,
                    "layer_types: expected one for each of the {layers} layers, got {}",
                    types.len()
                );
                let slides = types.iter().map(|layer| match layer.as_str() {
                    "sliding_attention" => Ok(true),
                    "full_attention" => Ok(false),
                    other => bail!("layer_types: expected full_attention or sliding_attention, got {other}"),
                });
                slides.collect::<Result<_>>()?
            }
        };
        let any = slides.contains(&true);
        let Some(window) = window else {
            ensure!(
                !any || raw.layer_types.is_none(),
                "layer_types: expected full_attention without a sliding_window in use, got sliding_attention; the file \
                 contradicts itself"
            );
            return Ok(None);
        };
        Ok(any.then_some(Sliding {
            window,
            layers: slides,
            rope_theta,
        }))
    }
}
