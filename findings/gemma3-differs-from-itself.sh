#!/usr/bin/env bash
# candle-transformers 0.11.1: three ways in which its Gemma 3 differs from itself or fails, on a random model of three
# layers with a window of 4 tokens.
#   1. gemma3: a prompt of 9 tokens at once has other last logits than the same tokens one by one. In a prompt a row
#      sees window + 1 tokens (`j + window < i` hides), in the rotating cache it sees window.
#   2. gemma3: a prompt fails for a model of 2 KV heads; its cache takes contiguous values only.
#   3. quantized_gemma3: alone a token sees all tokens before it in every layer (no mask for one token, a cache that
#      forgets none), in a prompt window + 1. And a second chunk of a prompt fails.
#
#   findings/gemma3-differs-from-itself.sh     prints this, and fails if it is otherwise
set -euo pipefail
lock=$(cd "$(dirname "$0")/.." && pwd)/Cargo.lock
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cp "$lock" Cargo.lock
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "gemma3-differs-from-itself"
version = "0.0.0"
edition = "2021"

[dependencies]
candle-core = "=0.11.1"
candle-nn = "=0.11.1"
candle-transformers = "=0.11.1"
TOML
cat >src/main.rs <<'RUST'
use std::collections::HashMap;
use std::io::Cursor;

use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{gemma3, quantized_gemma3};

const HIDDEN: usize = 64;
const HEAD: usize = 32;
const INNER: usize = 96;
const VOCAB: usize = 50;
const LAYERS: usize = 3;
const WINDOW: usize = 4;

/// Every weight by its name in Hugging Face's and in GGUF files; vectors are norms.
fn weights(kv_heads: usize) -> Vec<(String, String, Tensor)> {
    let mut state = 1u64;
    let mut random = |shape: &[usize]| {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) as f32 / (1u32 << 24) as f32 - 0.5) * 0.5
            })
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let mut all = vec![
        ("model.embed_tokens".into(), "token_embd".into(), random(&[VOCAB, HIDDEN])),
        ("model.norm".into(), "output_norm".into(), random(&[HIDDEN])),
    ];
    for layer in 0..LAYERS {
        for (name, gguf, shape) in [
            ("input_layernorm", "attn_norm", vec![HIDDEN]),
            ("post_attention_layernorm", "post_attention_norm", vec![HIDDEN]),
            ("pre_feedforward_layernorm", "ffn_norm", vec![HIDDEN]),
            ("post_feedforward_layernorm", "post_ffw_norm", vec![HIDDEN]),
            ("self_attn.q_norm", "attn_q_norm", vec![HEAD]),
            ("self_attn.k_norm", "attn_k_norm", vec![HEAD]),
            ("self_attn.q_proj", "attn_q", vec![2 * HEAD, HIDDEN]),
            ("self_attn.k_proj", "attn_k", vec![kv_heads * HEAD, HIDDEN]),
            ("self_attn.v_proj", "attn_v", vec![kv_heads * HEAD, HIDDEN]),
            ("self_attn.o_proj", "attn_output", vec![HIDDEN, 2 * HEAD]),
            ("mlp.gate_proj", "ffn_gate", vec![INNER, HIDDEN]),
            ("mlp.up_proj", "ffn_up", vec![INNER, HIDDEN]),
            ("mlp.down_proj", "ffn_down", vec![HIDDEN, INNER]),
        ] {
            all.push((format!("model.layers.{layer}.{name}"), format!("blk.{layer}.{gguf}"), random(&shape)));
        }
    }
    all
}

fn model(kv_heads: usize) -> Result<gemma3::Model> {
    let config = gemma3::Config {
        attention_bias: false,
        head_dim: HEAD,
        hidden_activation: Activation::GeluPytorchTanh,
        hidden_size: HIDDEN,
        intermediate_size: INNER,
        num_attention_heads: 2,
        num_hidden_layers: LAYERS,
        num_key_value_heads: kv_heads,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        rope_local_base_freq: 1e4,
        vocab_size: VOCAB,
        final_logit_softcapping: None,
        attn_logit_softcapping: None,
        query_pre_attn_scalar: HEAD,
        sliding_window: WINDOW,
        sliding_window_pattern: 3,
        max_position_embeddings: 64,
    };
    let named = weights(kv_heads).into_iter().map(|(name, _, tensor)| (format!("{name}.weight"), tensor));
    gemma3::Model::new(false, &config, VarBuilder::from_tensors(named.collect(), DType::F32, &Device::Cpu))
}

fn quantized() -> Result<quantized_gemma3::ModelWeights> {
    let count = |n: usize| Value::U32(n as u32);
    let metadata = HashMap::from([
        ("gemma3.attention.head_count", count(2)),
        ("gemma3.attention.head_count_kv", count(1)),
        ("gemma3.block_count", count(LAYERS)),
        ("gemma3.embedding_length", count(HIDDEN)),
        ("gemma3.attention.key_length", count(HEAD)),
        ("gemma3.attention.value_length", count(HEAD)),
        ("gemma3.attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
        ("gemma3.attention.sliding_window", count(WINDOW)),
        ("gemma3.attention.sliding_window_type", count(3)),
    ]);
    let tensors: Vec<(String, QTensor)> = weights(1)
        .into_iter()
        .map(|(_, gguf, tensor)| {
            let tensor = if tensor.rank() == 1 { (tensor + 1.0)? } else { tensor };
            Ok((format!("{gguf}.weight"), QTensor::quantize(&tensor, GgmlDType::F32)?))
        })
        .collect::<Result<_>>()?;
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = Cursor::new(Vec::new());
    gguf_file::write(&mut file, &metadata, &tensors)?;
    file.set_position(0);
    let content = Content::read(&mut file)?;
    quantized_gemma3::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)
}

/// The largest difference between the last logits of a prompt of `n` tokens and of the same tokens one by one.
fn difference(n: u32, mut whole: impl FnMut(&Tensor, usize) -> Result<Tensor>,
              mut alone: impl FnMut(&Tensor, usize) -> Result<Tensor>) -> Result<f32> {
    let ids: Vec<u32> = (0..n).map(|i| (i * i * 7 + 3) % VOCAB as u32).collect();
    let whole = whole(&Tensor::new(&ids[..], &Device::Cpu)?.unsqueeze(0)?, 0)?.flatten_all()?;
    let mut last = whole.clone();
    for (position, id) in ids.iter().enumerate() {
        last = alone(&Tensor::new(&[*id], &Device::Cpu)?.unsqueeze(0)?, position)?.flatten_all()?;
    }
    (whole - last)?.abs()?.max(0)?.to_scalar()
}

fn say(what: &str, difference: f32) {
    let word = if difference < 1e-3 { "equal" } else if difference > 0.05 { "different" } else { "unclear" };
    println!("{what}: {word}");
}

fn main() -> Result<()> {
    for n in [4, 9] {
        let (mut whole, mut alone) = (model(1)?, model(1)?);
        let other = difference(n, |ids, at| whole.forward(ids, at), |ids, at| alone.forward(ids, at))?;
        say(&format!("gemma3, {n} tokens at once and one by one"), other);
    }
    let ids = Tensor::new(&[1u32, 2, 3], &Device::Cpu)?.unsqueeze(0)?;
    let error = model(2)?.forward(&ids, 0).unwrap_err().to_string();
    println!("gemma3, 2 KV heads: {}", error.lines().next().unwrap());
    for n in [4, 9] {
        let (mut whole, mut alone) = (quantized()?, quantized()?);
        let other = difference(n, |ids, at| whole.forward(ids, at), |ids, at| alone.forward(ids, at))?;
        say(&format!("quantized_gemma3, {n} tokens at once and one by one"), other);
    }
    let mut chunks = quantized()?;
    chunks.forward(&ids, 0)?;
    let error = chunks.forward(&ids, 3).unwrap_err().to_string();
    println!("quantized_gemma3, a second chunk: {}", error.lines().next().unwrap());
    Ok(())
}
RUST
cargo run --quiet | tee got
diff got - <<'EXPECTED'
gemma3, 4 tokens at once and one by one: equal
gemma3, 9 tokens at once and one by one: different
gemma3, 2 KV heads: slice-set only supports contiguous tensors
quantized_gemma3, 4 tokens at once and one by one: equal
quantized_gemma3, 9 tokens at once and one by one: different
quantized_gemma3, a second chunk: dtype mismatch in cat, lhs: F32, rhs: U32
EXPECTED
