//! Tiny random models of every kind that the llama example reads, as Hugging Face folders and as GGUF files.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{safetensors, Device, Tensor};
use rand::{rngs::StdRng, Rng, SeedableRng};
use serde_json::json;

use crate::fixture::{gguf_metadata, save_gguf, tokenizer, tokens};

pub const HIDDEN: usize = 64;
pub const INNER: usize = 96;
pub const LAYERS: usize = 3;
pub const HEADS: usize = 4;
/// Not hidden size / heads: kinds that name it read it.
pub const WIDE_HEAD: usize = 32;
pub const CONTEXT: usize = 128;
pub const THETA: f64 = 20_000.0;
pub const LOCAL_THETA: f64 = 500.0;
/// Gemma 3's layers slide, except the last of each three.
pub const PATTERN: usize = 3;
/// Gemma 2's caps on logits of attention and of tokens: low enough that they bend those of these models.
pub const SOFTCAP: f64 = 3.0;
pub const FINAL_SOFTCAP: f64 = 6.0;
/// Numbers that StableLM rotates.
pub const ROTATED: usize = HIDDEN / HEADS / 2;
/// Granite's embedding_multiplier, residual_multiplier, attention_multiplier and logits_scaling. Powers of two: factors
/// that matrices take exactly.
pub const GRANITE: [f64; 4] = [4.0, 0.5, 0.125, 2.0];

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

pub const KINDS: [Kind; 10] = [
    Kind::Llama,
    Kind::Mistral,
    Kind::Qwen2,
    Kind::Qwen3,
    Kind::Gemma,
    Kind::Gemma2,
    Kind::Gemma3,
    Kind::Granite,
    Kind::Helium,
    Kind::StableLm,
];

impl Kind {
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma => "gemma",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3_text",
            Self::Granite => "granite",
            Self::Helium => "helium",
            Self::StableLm => "stablelm",
        }
    }

    /// The architecture of a GGUF file, where llama.cpp has one.
    pub fn architecture(self) -> Option<&'static str> {
        match self {
            Self::Llama | Self::Mistral => Some("llama"),
            Self::Qwen2 => Some("qwen2"),
            Self::Qwen3 => Some("qwen3"),
            Self::Gemma => Some("gemma"),
            Self::Gemma2 => Some("gemma2"),
            Self::Gemma3 => Some("gemma3"),
            Self::Granite => Some("granite"),
            Self::Helium => None,
            Self::StableLm => Some("stablelm"),
        }
    }

    pub fn head_dim(self) -> usize {
        match self {
            Self::Llama | Self::Mistral | Self::Qwen2 | Self::Granite | Self::Helium | Self::StableLm => HIDDEN / HEADS,
            Self::Qwen3 | Self::Gemma | Self::Gemma2 | Self::Gemma3 => WIDE_HEAD,
        }
    }

    /// candle-transformers 0.11.1 fails on a prompt for a Gemma 3 of more KV heads: its cache takes contiguous values
    /// only.
    pub fn kv_heads(self) -> usize {
        match self {
            Self::Gemma3 => 1,
            _ => 2,
        }
    }

    fn has_head_norms(self) -> bool {
        matches!(self, Self::Qwen3 | Self::Gemma3)
    }

    /// Whether norms stand after attention and the feed-forward part too.
    fn has_sandwich_norms(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }

    /// Whether it is a Gemma: its output matrix is the embedding, and its norms are stored less 1.
    fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma | Self::Gemma2 | Self::Gemma3)
    }

    /// config.json, with a window of `window` tokens where the kind has one.
    pub fn config(self, window: usize) -> serde_json::Value {
        let mut config = json!({
            "model_type": self.model_type(), "hidden_size": HIDDEN, "intermediate_size": INNER,
            "vocab_size": tokens().len(), "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "num_key_value_heads": self.kv_heads(), "rope_theta": THETA, "max_position_embeddings": CONTEXT
        });
        let eps = match self {
            Self::StableLm => "layer_norm_eps",
            _ => "rms_norm_eps",
        };
        config[eps] = 1e-6.into();
        let own = match self {
            Self::Llama => json!({"tie_word_embeddings": false, "hidden_act": "silu"}),
            Self::Mistral => json!({"tie_word_embeddings": false, "hidden_act": "silu", "sliding_window": window}),
            Self::Qwen2 => json!({"tie_word_embeddings": false, "hidden_act": "silu", "use_sliding_window": false,
                "sliding_window": CONTEXT, "max_window_layers": LAYERS}),
            Self::Qwen3 => json!({"tie_word_embeddings": false, "hidden_act": "silu", "use_sliding_window": false,
                "sliding_window": null, "max_window_layers": LAYERS, "attention_bias": false, "head_dim": WIDE_HEAD}),
            Self::Gemma => json!({"hidden_activation": "gelu_pytorch_tanh", "attention_bias": false,
                "head_dim": WIDE_HEAD}),
            Self::Gemma2 => json!({"hidden_activation": "gelu_pytorch_tanh", "attention_bias": false,
                "head_dim": WIDE_HEAD, "query_pre_attn_scalar": WIDE_HEAD, "sliding_window": window,
                "final_logit_softcapping": FINAL_SOFTCAP, "attn_logit_softcapping": SOFTCAP,
                "cache_implementation": "hybrid"}),
            Self::Gemma3 => json!({"hidden_activation": "gelu_pytorch_tanh", "attention_bias": false,
                "head_dim": WIDE_HEAD, "query_pre_attn_scalar": WIDE_HEAD, "sliding_window": window,
                "sliding_window_pattern": PATTERN, "rope_local_base_freq": LOCAL_THETA,
                "final_logit_softcapping": null, "attn_logit_softcapping": null, "cache_implementation": "hybrid"}),
            Self::Granite => {
                let [embedding, residual, attention, logits] = GRANITE;
                json!({"tie_word_embeddings": false, "hidden_act": "silu", "attention_bias": false, "mlp_bias": false,
                    "embedding_multiplier": embedding, "residual_multiplier": residual,
                    "attention_multiplier": attention, "logits_scaling": logits})
            }
            Self::Helium => json!({"tie_word_embeddings": false, "hidden_act": "silu", "attention_bias": false,
                "mlp_bias": false, "head_dim": HIDDEN / HEADS, "bos_token_id": 1, "eos_token_id": 2}),
            Self::StableLm => json!({"tie_word_embeddings": false, "hidden_act": "silu", "use_qkv_bias": true,
                "partial_rotary_factor": ROTATED as f64 / (HIDDEN / HEADS) as f64, "use_cache": true,
                "qk_layernorm": false, "use_parallel_residual": false}),
        };
        for (key, value) in own.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    /// Every weight by its Hugging Face name.
    pub fn weights(self) -> HashMap<String, Tensor> {
        let mut rng = StdRng::seed_from_u64(3);
        let mut random = |shape: &[usize], center: f32, spread: f32| {
            let n = shape.iter().product();
            let values: Vec<f32> = (0..n).map(|_| center + rng.random_range(-spread..spread)).collect();
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let norm_center = if self.is_gemma() { 0.0 } else { 1.0 };
        let (queries, keys) = (HEADS * self.head_dim(), self.kv_heads() * self.head_dim());
        let mut weights = HashMap::new();
        let mut add = |name: String, tensor| weights.insert(name, tensor);
        // Gemma multiplies rows of the embedding by 8, the root of its hidden size.
        add(
            "model.embed_tokens.weight".into(),
            random(&[tokens().len(), HIDDEN], 0.0, 0.3),
        );
        if !self.is_gemma() {
            add("lm_head.weight".into(), random(&[tokens().len(), HIDDEN], 0.0, 0.5));
        }
        add("model.norm.weight".into(), random(&[HIDDEN], norm_center, 0.2));
        for layer in 0..LAYERS {
            let path = format!("model.layers.{layer}");
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                add(format!("{path}.{norm}.weight"), random(&[HIDDEN], norm_center, 0.2));
            }
            if self.has_sandwich_norms() {
                for norm in ["pre_feedforward_layernorm", "post_feedforward_layernorm"] {
                    add(format!("{path}.{norm}.weight"), random(&[HIDDEN], norm_center, 0.2));
                }
            }
            if self.has_head_norms() {
                for norm in ["q_norm", "k_norm"] {
                    add(
                        format!("{path}.self_attn.{norm}.weight"),
                        random(&[self.head_dim()], norm_center, 0.2),
                    );
                }
            }
            for (part, rows, columns) in [
                ("self_attn.q_proj", queries, HIDDEN),
                ("self_attn.k_proj", keys, HIDDEN),
                ("self_attn.v_proj", keys, HIDDEN),
                ("self_attn.o_proj", HIDDEN, queries),
                ("mlp.gate_proj", INNER, HIDDEN),
                ("mlp.up_proj", INNER, HIDDEN),
                ("mlp.down_proj", HIDDEN, INNER),
            ] {
                add(format!("{path}.{part}.weight"), random(&[rows, columns], 0.0, 0.25));
                let biased = matches!(self, Self::Qwen2 | Self::StableLm);
                if biased && part.starts_with("self_attn") && !part.contains("o_proj") {
                    add(format!("{path}.{part}.bias"), random(&[rows], 0.0, 0.5));
                }
            }
        }
        if self == Self::StableLm {
            let norms = weights.keys().filter(|name| name.contains("norm.weight"));
            let mut norms: Vec<String> = norms.cloned().collect();
            norms.sort();
            for name in norms {
                weights.insert(name.replace("weight", "bias"), random(&[HIDDEN], 0.0, 0.2));
            }
        }
        weights
    }

    /// The weights with which candle-transformers' model, which computes none of Granite's multipliers, is this model.
    pub fn folded(self, weights: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
        if self != Self::Granite {
            return weights.clone();
        }
        let [embedding, residual, attention, logits] = GRANITE;
        let factor = |name: &str| match name {
            "model.embed_tokens.weight" => embedding,
            "lm_head.weight" => 1.0 / logits,
            _ if name.ends_with("q_proj.weight") => attention * (self.head_dim() as f64).sqrt(),
            _ if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") => residual,
            _ => 1.0,
        };
        let fold = |(name, tensor): (&String, &Tensor)| (name.clone(), (tensor * factor(name)).unwrap());
        weights.iter().map(fold).collect()
    }

    /// Writes config.json, the tokenizer and the weights.
    pub fn write_folder(self, folder: &Path, config: &serde_json::Value, weights: &HashMap<String, Tensor>) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        tokenizer().save(folder.join("tokenizer.json"), false).unwrap();
        safetensors::save(weights, folder.join("model.safetensors")).unwrap();
    }

    /// The metadata of a GGUF file.
    pub fn gguf_metadata(self, window: usize) -> Vec<(String, Value)> {
        let architecture = self.architecture().expect("a GGUF architecture");
        let mut metadata: Vec<(String, Value)> = gguf_metadata(architecture)
            .into_iter()
            .filter(|(key, _)| !key.starts_with("llama."))
            .collect();
        let mut set = |key: &str, value| metadata.push((format!("{architecture}.{key}"), value));
        for (key, count) in [
            ("block_count", LAYERS),
            ("context_length", CONTEXT),
            ("embedding_length", HIDDEN),
            ("feed_forward_length", INNER),
            ("attention.head_count", HEADS),
            ("attention.head_count_kv", self.kv_heads()),
        ] {
            set(key, Value::U32(count as u32));
        }
        match self {
            Self::StableLm => set("attention.layer_norm_epsilon", Value::F32(1e-6)),
            _ => set("attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
        }
        set("rope.freq_base", Value::F32(THETA as f32));
        let head = Value::U32(self.head_dim() as u32);
        match self {
            Self::Llama | Self::Mistral => set("rope.dimension_count", head),
            Self::Qwen2 => {}
            Self::Qwen3 => {
                set("attention.key_length", head.clone());
                set("attention.value_length", head);
                // candle-transformers keeps keys and values in this dtype, by default f16.
                metadata.push(("general.dtype".into(), Value::U32(0)));
            }
            Self::Gemma => {
                set("attention.key_length", head.clone());
                set("attention.value_length", head);
            }
            Self::Gemma2 => {
                set("attention.key_length", head.clone());
                set("attention.value_length", head);
                set("attention.sliding_window", Value::U32(window as u32));
                set("attn_logit_softcapping", Value::F32(SOFTCAP as f32));
                set("final_logit_softcapping", Value::F32(FINAL_SOFTCAP as f32));
            }
            Self::Gemma3 => {
                set("attention.key_length", head.clone());
                set("attention.value_length", head);
                set("attention.sliding_window", Value::U32(window as u32));
            }
            Self::Granite => {
                set("rope.dimension_count", head);
                let keys = ["embedding_scale", "residual_scale", "attention.scale", "logit_scale"];
                for (key, number) in keys.into_iter().zip(GRANITE) {
                    set(key, Value::F32(number as f32));
                }
            }
            Self::Helium => {}
            Self::StableLm => {
                set("rope.dimension_count", Value::U32(ROTATED as u32));
                set("use_parallel_residual", Value::Bool(true));
            }
        }
        metadata
    }

    /// The weights under their GGUF names and in GGUF's order, vectors as f32.
    pub fn gguf_tensors(self, weights: &HashMap<String, Tensor>, dtype: GgmlDType) -> Vec<(String, QTensor)> {
        let mut names: Vec<&String> = weights.keys().collect();
        names.sort();
        let quantized = |name: &String| {
            let tensor = self.gguf_tensor(name, &weights[name]);
            let dtype = if tensor.rank() == 1 { GgmlDType::F32 } else { dtype };
            (self.gguf_name(name), QTensor::quantize(&tensor, dtype).unwrap())
        };
        names.into_iter().map(quantized).collect()
    }

    pub fn write_gguf(self, path: &Path, window: usize, weights: &HashMap<String, Tensor>, dtype: GgmlDType) {
        save_gguf(path, &self.gguf_metadata(window), &self.gguf_tensors(weights, dtype));
    }

    fn gguf_tensor(self, name: &str, tensor: &Tensor) -> Tensor {
        match self {
            Self::Gemma | Self::Gemma2 | Self::Gemma3 if tensor.rank() == 1 => (tensor + 1.0).unwrap(),
            Self::Llama | Self::Mistral | Self::Granite if name.contains("q_proj") || name.contains("k_proj") => {
                // The halves of each head interleaved.
                let head_dim = self.head_dim();
                let halves = tensor.reshape((tensor.dim(0).unwrap() / head_dim, 2, head_dim / 2, ()));
                let pairs = halves.unwrap().transpose(1, 2).unwrap().contiguous().unwrap();
                pairs.reshape(tensor.shape()).unwrap()
            }
            _ => tensor.clone(),
        }
    }

    fn gguf_name(self, name: &str) -> String {
        let after_attention = match self.has_sandwich_norms() {
            true => "post_attention_norm",
            false => "ffn_norm",
        };
        let mut gguf = name.replace("model.layers.", "blk.");
        for (hf, short) in [
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("post_attention_layernorm", after_attention),
            ("pre_feedforward_layernorm", "ffn_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
            ("input_layernorm", "attn_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
        ] {
            gguf = gguf.replace(hf, short);
        }
        gguf
    }
}
