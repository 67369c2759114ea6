//! The architectures that a GGUF file may name, and the settings that follow from them.

use anyhow::{bail, ensure, Result};
use candle_core::quantized::gguf_file::Content;

use super::gguf::{count_or, string};
use crate::model::{Activation, LayerOptions, NormKind};
use crate::rope::Pairing;

/// An architecture. Mistral's files say llama.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
    Gemma,
    Gemma2,
    Gemma3,
    Granite,
    StableLm,
}

impl Architecture {
    /// That of the file, whose other kinds are refused.
    pub fn of(content: &Content) -> Result<Self> {
        if content.metadata.contains_key("general.type") {
            let kind = string(content, "general.type")?;
            ensure!(
                kind == "model",
                "general.type: expected model, got {kind}; give the model's own file"
            );
        }
        let architecture = match string(content, "general.architecture")? {
            "llama" => Self::Llama,
            "qwen2" => Self::Qwen2,
            "qwen3" => Self::Qwen3,
            "gemma" => Self::Gemma,
            "gemma2" => Self::Gemma2,
            "gemma3" => Self::Gemma3,
            "granite" => Self::Granite,
            "stablelm" => Self::StableLm,
            other => bail!(
                "architecture: expected llama, qwen2, qwen3, gemma, gemma2, gemma3, granite or stablelm, got {other}; \
                 this example runs these models only"
            ),
        };
        let experts = count_or(content, &format!("{}.expert_count", architecture.name()), 0)?;
        ensure!(
            experts <= 1,
            "experts: expected a dense model, got {experts} experts; mixtures are not supported"
        );
        Ok(architecture)
    }

    /// The first word of its keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma => "gemma",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3",
            Self::Granite => "granite",
            Self::StableLm => "stablelm",
        }
    }

    /// Which coordinates rotate together: of Llama's and Granite's files the rows of q and k were permuted, of others
    /// not.
    pub fn pairing(self) -> Pairing {
        match self {
            Self::Llama | Self::Granite => Pairing::Interleaved,
            Self::Qwen2 | Self::Qwen3 | Self::Gemma | Self::Gemma2 | Self::Gemma3 | Self::StableLm => Pairing::Halves,
        }
    }

    /// The key of the number that norms add to a variance.
    pub fn eps_key(self) -> &'static str {
        match self {
            Self::StableLm => "attention.layer_norm_epsilon",
            Self::Llama | Self::Qwen2 | Self::Qwen3 => "attention.layer_norm_rms_epsilon",
            Self::Gemma | Self::Gemma2 | Self::Gemma3 | Self::Granite => "attention.layer_norm_rms_epsilon",
        }
    }

    /// Whether rope.dimension_count may be a part of the head.
    pub fn rotates_a_part(self) -> bool {
        match self {
            Self::StableLm => true,
            Self::Llama | Self::Qwen2 | Self::Qwen3 => false,
            Self::Gemma | Self::Gemma2 | Self::Gemma3 | Self::Granite => false,
        }
    }

    /// The theta where the file names none.
    pub fn rope_theta(self) -> f64 {
        match self {
            Self::Gemma3 => 1e6,
            Self::Llama | Self::Qwen2 | Self::Qwen3 => 10_000.0,
            Self::Gemma | Self::Gemma2 | Self::Granite | Self::StableLm => 10_000.0,
        }
    }

    /// What the layers do without a key that says so.
    pub fn layer(self, shape: &GgufShape) -> LayerOptions {
        let plain = LayerOptions::default();
        let gemma = LayerOptions {
            activation: Activation::GeluTanh,
            embedding_scale: Some((shape.hidden_size as f64).sqrt()),
            ..LayerOptions::default()
        };
        // As llama.cpp: files do not say. The models of 27B have the scale of hidden size / heads.
        let scale = |layers| (shape.layers == layers).then(|| (shape.heads as f64 / shape.hidden_size as f64).sqrt());
        match self {
            Self::Llama | Self::Qwen2 | Self::Granite => plain,
            Self::Qwen3 => LayerOptions { qk_norm: true, ..plain },
            Self::Gemma => gemma,
            Self::Gemma2 => LayerOptions {
                sandwich_norms: true,
                softmax_scale: scale(46),
                ..gemma
            },
            Self::Gemma3 => LayerOptions {
                qk_norm: true,
                sandwich_norms: true,
                softmax_scale: scale(62),
                ..gemma
            },
            Self::StableLm => LayerOptions {
                norm: NormKind::Layer,
                ..plain
            },
        }
    }

    /// `model.layers.3.self_attn.q_proj` -> `blk.3.attn_q`.
    pub fn tensor(self, path: &str) -> String {
        let Some((layer, part)) = path.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
            return match path {
                "model.embed_tokens" => "token_embd",
                "model.norm" => "output_norm",
                "lm_head" => "output",
                other => other,
            }
            .into();
        };
        let part = match (part, self) {
            ("input_layernorm", _) => "attn_norm",
            ("self_attn.q_proj", _) => "attn_q",
            ("self_attn.k_proj", _) => "attn_k",
            ("self_attn.v_proj", _) => "attn_v",
            ("self_attn.o_proj", _) => "attn_output",
            ("self_attn.q_norm", _) => "attn_q_norm",
            ("self_attn.k_norm", _) => "attn_k_norm",
            ("post_attention_layernorm", Self::Gemma2 | Self::Gemma3) => "post_attention_norm",
            ("post_attention_layernorm", Self::Llama | Self::Qwen2 | Self::Qwen3) => "ffn_norm",
            ("post_attention_layernorm", Self::Gemma | Self::Granite | Self::StableLm) => "ffn_norm",
            ("pre_feedforward_layernorm", _) => "ffn_norm",
            ("post_feedforward_layernorm", _) => "post_ffw_norm",
            ("mlp.gate_proj", _) => "ffn_gate",
            ("mlp.up_proj", _) => "ffn_up",
            ("mlp.down_proj", _) => "ffn_down",
            (other, _) => other,
        };
        format!("blk.{layer}.{part}")
    }
}

/// The sizes that the settings follow from.
pub struct GgufShape {
    pub hidden_size: usize,
    pub layers: usize,
    pub heads: usize,
}
