//! The llama example on several ranks: each holds some KV heads, and all together compute what one does.

mod commands;
mod models;
mod parts;
mod threads;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Once;

use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{safetensors, Device, Tensor};
use rand::{rngs::StdRng, Rng, SeedableRng};
use serde_json::json;

use crate::fixture::{gguf_metadata, gguf_name, save_gguf, tokenizer, tokens, Fixture};

const HIDDEN: usize = 96;
const INNER: usize = 192;
const HEADS: usize = 6;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = HIDDEN / HEADS;
const LAYERS: usize = 2;

/// Random weights of a Llama with 3 KV heads, and biases of all its matrices where `biased`.
fn weights(biased: bool) -> HashMap<String, Tensor> {
    let mut rng = StdRng::seed_from_u64(11);
    let mut random = |shape: &[usize], center: f32, spread: f32| {
        let values = (0..shape.iter().product()).map(|_| center + rng.random_range(-spread..spread));
        Tensor::from_vec(values.collect::<Vec<f32>>(), shape, &Device::Cpu).unwrap()
    };
    let vocab = tokens().len();
    let mut weights = HashMap::new();
    weights.insert(
        "model.embed_tokens.weight".to_string(),
        random(&[vocab, HIDDEN], 0.0, 1.0),
    );
    weights.insert("model.norm.weight".to_string(), random(&[HIDDEN], 1.0, 0.2));
    if !biased {
        weights.insert("lm_head.weight".to_string(), random(&[vocab, HIDDEN], 0.0, 0.4));
    }
    for layer in 0..LAYERS {
        let path = |name: &str| format!("model.layers.{layer}.{name}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            weights.insert(path(norm) + ".weight", random(&[HIDDEN], 1.0, 0.2));
        }
        let (queries, keys) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        for (part, rows, columns) in [
            ("self_attn.q_proj", queries, HIDDEN),
            ("self_attn.k_proj", keys, HIDDEN),
            ("self_attn.v_proj", keys, HIDDEN),
            ("self_attn.o_proj", HIDDEN, queries),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ] {
            weights.insert(path(part) + ".weight", random(&[rows, columns], 0.0, 0.2));
            if biased {
                weights.insert(path(part) + ".bias", random(&[rows], 0.0, 0.3));
            }
        }
    }
    weights
}

/// A folder with these weights; tied and with biases where `biased`.
fn write_folder(folder: &Path, weights: &HashMap<String, Tensor>, biased: bool) {
    fs::create_dir_all(folder).unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": tokens().len(),
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "max_position_embeddings": 128,
        "tie_word_embeddings": biased, "attention_bias": biased, "mlp_bias": biased, "hidden_act": "silu",
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    tokenizer().save(folder.join("tokenizer.json"), false).unwrap();
    safetensors::save(weights, folder.join("model.safetensors")).unwrap();
}

/// A GGUF file of the weights without biases.
fn write_gguf(path: &Path, weights: &HashMap<String, Tensor>, dtype: GgmlDType) {
    let count = |n: usize| Value::U32(n as u32);
    let sizes = HashMap::from([
        ("llama.block_count", count(LAYERS)),
        ("llama.embedding_length", count(HIDDEN)),
        ("llama.feed_forward_length", count(INNER)),
        ("llama.attention.head_count", count(HEADS)),
        ("llama.attention.head_count_kv", count(KV_HEADS)),
        ("llama.rope.dimension_count", count(HEAD_DIM)),
    ]);
    let mut metadata = gguf_metadata("llama");
    for (key, value) in &mut metadata {
        if let Some(size) = sizes.get(key.as_str()) {
            *value = size.clone();
        }
    }
    let mut names: Vec<_> = weights.keys().collect();
    names.sort();
    let tensor = |name: &String| {
        let mut tensor = weights[name].clone();
        if name.contains("q_proj") || name.contains("k_proj") {
            // GGUF interleaves the halves of each head.
            let halves = tensor.reshape(((), 2, HEAD_DIM / 2, HIDDEN)).unwrap();
            tensor = halves
                .transpose(1, 2)
                .unwrap()
                .contiguous()
                .unwrap()
                .reshape(tensor.shape())
                .unwrap();
        }
        let dtype = if tensor.rank() == 1 { GgmlDType::F32 } else { dtype };
        (gguf_name(name), QTensor::quantize(&tensor, dtype).unwrap())
    };
    save_gguf(path, &metadata, &names.into_iter().map(tensor).collect::<Vec<_>>());
}

/// A model with 3 KV heads: `three` and `biased` are folders, `f32.gguf` and `q8.gguf` files. All are written once.
fn model(name: &str) -> String {
    static WRITTEN: Once = Once::new();
    let path = |name: &str| Fixture::get().folder.join(format!("ranks-{name}"));
    WRITTEN.call_once(|| {
        let plain = weights(false);
        write_folder(&path("three"), &plain, false);
        write_folder(&path("biased"), &weights(true), true);
        write_gguf(&path("f32.gguf"), &plain, GgmlDType::F32);
        write_gguf(&path("q8.gguf"), &plain, GgmlDType::Q8_0);
    });
    path(name).to_str().unwrap().into()
}
