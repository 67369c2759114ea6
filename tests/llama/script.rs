//! A Llama that recites a given sequence: after each token comes the next one. With any tokens, as a GGUF file or a
//! folder.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{safetensors, DType, Device, Tensor};
use serde_json::json;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::fixture::gguf_name;

/// GGUF's types of tokens.
pub const NORMAL: i32 = 1;
pub const UNKNOWN: i32 = 2;
pub const CONTROL: i32 = 3;
pub const USER_DEFINED: i32 = 4;
pub const BYTE: i32 = 6;

const INNER: usize = 8;
const HEAD_DIM: usize = 8;
const CONTEXT: usize = 256;

/// Tokens in the order of their ids, and their types.
#[derive(Clone)]
pub struct Tokens {
    pub names: Vec<String>,
    pub kinds: Vec<i32>,
}

impl Tokens {
    /// A token for each byte, as byte-level BPE writes it, followed by these.
    pub fn bytes_and(more: &[(&str, i32)]) -> Self {
        let mut alphabet: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
        alphabet.sort();
        let kinds = vec![NORMAL; alphabet.len()];
        let mut tokens = Self { names: alphabet, kinds };
        tokens.add(more);
        tokens
    }

    pub fn of(tokens: &[(&str, i32)]) -> Self {
        let mut all = Self {
            names: Vec::new(),
            kinds: Vec::new(),
        };
        all.add(tokens);
        all
    }

    pub fn add(&mut self, more: &[(&str, i32)]) {
        self.names.extend(more.iter().map(|(name, _)| name.to_string()));
        self.kinds.extend(more.iter().map(|(_, kind)| kind));
    }

    pub fn len(&self) -> usize {
        self.names.len()
    }

    pub fn id(&self, name: &str) -> u32 {
        let id = self.names.iter().position(|other| other == name);
        id.unwrap_or_else(|| panic!("{name} is no token")) as u32
    }
}

/// The weights of a model that recites `sequence` to its end, then the vocabulary's first token; each token occurs at
/// most once in `sequence`.
pub fn says(vocabulary: usize, sequence: &[u32]) -> HashMap<String, Tensor> {
    let hidden = vocabulary.next_multiple_of(HEAD_DIM);
    let cpu = &Device::Cpu;
    let zeros = |rows: usize, columns: usize| Tensor::zeros((rows, columns), DType::F32, cpu).unwrap();
    let ones = || Tensor::ones(hidden, DType::F32, cpu).unwrap();
    let mut embedding = vec![0f32; vocabulary * hidden];
    let mut head = embedding.clone();
    for token in 0..vocabulary {
        embedding[token * hidden + token] = 1.0;
    }
    for pair in sequence.windows(2) {
        head[pair[1] as usize * hidden + pair[0] as usize] = 1.0;
    }
    let table = |values: Vec<f32>| Tensor::from_vec(values, (vocabulary, hidden), cpu).unwrap();
    let mut weights = HashMap::new();
    let mut add = |name: &str, tensor| weights.insert(format!("{name}.weight"), tensor);
    add("model.embed_tokens", table(embedding));
    add("lm_head", table(head));
    add("model.norm", ones());
    for norm in ["input_layernorm", "post_attention_layernorm"] {
        add(&format!("model.layers.0.{norm}"), ones());
    }
    for (part, rows, columns) in [
        ("self_attn.q_proj", HEAD_DIM, hidden),
        ("self_attn.k_proj", HEAD_DIM, hidden),
        ("self_attn.v_proj", HEAD_DIM, hidden),
        ("self_attn.o_proj", hidden, HEAD_DIM),
        ("mlp.gate_proj", INNER, hidden),
        ("mlp.up_proj", INNER, hidden),
        ("mlp.down_proj", hidden, INNER),
    ] {
        add(&format!("model.layers.0.{part}"), zeros(rows, columns));
    }
    weights
}

/// Replaces one number of a weight.
pub fn damage(weights: &mut HashMap<String, Tensor>, name: &str, index: usize, value: f32) {
    let tensor = &weights[name];
    let mut values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values[index] = value;
    let tensor = Tensor::from_vec(values, tensor.shape(), &Device::Cpu).unwrap();
    weights.insert(name.into(), tensor);
}

pub fn vocabulary(weights: &HashMap<String, Tensor>) -> (usize, usize) {
    weights["model.embed_tokens.weight"].dims2().unwrap()
}

/// A folder for this test binary's files.
pub fn folder(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(env!("CARGO_CRATE_NAME"))
        .join(name);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// A folder of Hugging Face files; `files` are written beside config.json and the weights.
pub fn write_folder(name: &str, weights: &HashMap<String, Tensor>, files: &[(&str, serde_json::Value)]) -> String {
    let folder = folder(name);
    let (vocab_size, hidden_size) = vocabulary(weights);
    let config = json!({
        "model_type": "llama", "hidden_size": hidden_size, "intermediate_size": INNER, "vocab_size": vocab_size,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": CONTEXT, "tie_word_embeddings": false,
        "hidden_act": "silu",
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    for (name, file) in files {
        let text = file.as_str().map_or_else(|| file.to_string(), String::from);
        fs::write(folder.join(name), text).unwrap();
    }
    safetensors::save(weights, folder.join("model.safetensors")).unwrap();
    folder.to_str().unwrap().into()
}

/// A tokenizer.json of a byte-level BPE. Types other than normal are added tokens; user-defined ones are not special.
pub fn tokenizer_json(tokens: &Tokens, merges: &[(&str, &str)]) -> serde_json::Value {
    let vocab: serde_json::Map<_, _> = tokens
        .names
        .iter()
        .zip(0..)
        .map(|(name, id)| (name.clone(), json!(id)))
        .collect();
    let added: Vec<_> = tokens
        .names
        .iter()
        .zip(&tokens.kinds)
        .enumerate()
        .filter(|(_, (_, kind))| **kind != NORMAL)
        .map(|(id, (name, kind))| {
            json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *kind != USER_DEFINED})
        })
        .collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges.iter().map(|(a, b)| [a, b]).collect::<Vec<_>>()}})
}

/// A GGUF file; `metadata` is added to the keys of every Llama, and replaces keys of the same name.
pub fn write_gguf(
    name: &str,
    weights: &HashMap<String, Tensor>,
    tokens: &Tokens,
    metadata: &[(&str, Value)],
) -> String {
    let path = folder("gguf").join(format!("{name}.gguf"));
    let (_, hidden) = vocabulary(weights);
    let count = |n: usize| Value::U32(n as u32);
    let mut all: Vec<(&str, Value)> = vec![
        ("general.architecture", Value::String("llama".into())),
        ("llama.block_count", count(1)),
        ("llama.context_length", count(CONTEXT)),
        ("llama.embedding_length", count(hidden)),
        ("llama.feed_forward_length", count(INNER)),
        ("llama.attention.head_count", count(1)),
        ("llama.attention.head_count_kv", count(1)),
        ("llama.attention.key_length", count(HEAD_DIM)),
        ("llama.attention.value_length", count(HEAD_DIM)),
        ("llama.rope.dimension_count", count(HEAD_DIM)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.tokens", strings(&tokens.names)),
        (
            "tokenizer.ggml.token_type",
            Value::Array(tokens.kinds.iter().map(|kind| Value::I32(*kind)).collect()),
        ),
    ];
    all.retain(|(key, _)| !metadata.iter().any(|(other, _)| other == key));
    all.extend(metadata.iter().cloned());
    let all: Vec<(&str, &Value)> = all.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(String, QTensor)> = weights
        .iter()
        // Queries and keys are zeros, so the order of their rows does not matter.
        .map(|(name, tensor)| (gguf_name(name), QTensor::quantize(tensor, GgmlDType::F32).unwrap()))
        .collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    write(&path, &all, &tensors);
    path.to_str().unwrap().into()
}

fn write(path: &Path, metadata: &[(&str, &Value)], tensors: &[(&str, &QTensor)]) {
    gguf_file::write(&mut File::create(path).unwrap(), metadata, tensors).unwrap();
}

pub fn strings<S: AsRef<str>>(list: &[S]) -> Value {
    Value::Array(list.iter().map(|text| Value::String(text.as_ref().into())).collect())
}
