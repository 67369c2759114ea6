//! The architectures that a GGUF file may name, and the settings that follow from them.

use anyhow::{bail, ensure, Context, Result};
use candle_core::quantized::gguf_file::Content;

use super::gguf::{count_or, string};
use crate::model::{Activation, LayerOptions, Sliding};
use crate::rope::Pairing;

/// An architecture. Mistral's files say llama.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
    Gemma3,
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
            "gemma3" => Self::Gemma3,
            other => bail!(
                "architecture: expected llama, qwen2, qwen3 or gemma3, got {other}; this example runs these models only"
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
            Self::Gemma3 => "gemma3",
        }
    }

    /// Which coordinates rotate together: of Llama files the rows of q and k were permuted, of others not.
    pub fn pairing(self) -> Pairing {
        match self {
            Self::Llama => Pairing::Interleaved,
            Self::Qwen2 | Self::Qwen3 | Self::Gemma3 => Pairing::Halves,
        }
    }

    /// The theta where the file names none.
    pub fn rope_theta(self) -> f64 {
        match self {
            Self::Llama | Self::Qwen2 | Self::Qwen3 => 10_000.0,
            Self::Gemma3 => 1e6,
        }
    }

    /// What the layers do; `sliding` is read for Gemma only.
    pub fn layer(self, shape: &GgufShape, sliding: impl FnOnce() -> Result<Option<Sliding>>) -> Result<LayerOptions> {
        let plain = LayerOptions::default();
        Ok(match self {
            Self::Llama | Self::Qwen2 => plain,
            Self::Qwen3 => LayerOptions { qk_norm: true, ..plain },
            Self::Gemma3 => LayerOptions {
                activation: Activation::GeluTanh,
                qk_norm: true,
                sandwich_norms: true,
                embedding_scale: Some((shape.hidden_size as f64).sqrt()),
                // As llama.cpp: files do not say. The model of 62 layers (27B) has the scale of hidden size / heads.
                softmax_scale: (shape.layers == 62).then(|| (shape.heads as f64 / shape.hidden_size as f64).sqrt()),
                sliding: sliding().context("gemma3.attention.sliding_window")?,
                ..plain
            },
        })
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
            ("post_attention_layernorm", Self::Gemma3) => "post_attention_norm",
            ("post_attention_layernorm", Self::Llama | Self::Qwen2 | Self::Qwen3) => "ffn_norm",
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
