#!/usr/bin/env bash
# candle-transformers 0.11.1: settings that checkpoints' config.json give and its models do not compute, on random
# models of two layers. No error says so.
#   1. granite: embedding_multiplier, attention_multiplier, residual_multiplier and logits_scaling (12, 0.0156, 0.22 and
#      16, as in IBM's granite-3 files) change no logit. The reader of config.json has no such fields.
#   2. gemma2: query_pre_attn_scalar is read and changes no logit; logits are scaled by head_dim. In the 27B checkpoint
#      the two differ (144, 128).
#   3. gemma2: sliding_window applies to every layer; in the model's definition every other layer sees all tokens. With
#      a window of 2 the first of 9 tokens does not reach the last logits at all.
#
#   findings/granite-and-gemma2-lose-settings.sh     prints this, and fails if it is otherwise
set -euo pipefail
lock=$(cd "$(dirname "$0")/.." && pwd)/Cargo.lock
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cp "$lock" Cargo.lock
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "granite-and-gemma2-lose-settings"
version = "0.0.0"
edition = "2021"

[dependencies]
candle-core = "=0.11.1"
candle-nn = "=0.11.1"
candle-transformers = "=0.11.1"
serde_json = "1"
TOML
cat >src/main.rs <<'RUST'
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::{gemma2, granite};
use serde_json::{json, Value};

/// The sizes that both models share, with `more` on top.
fn config(more: Value) -> Value {
    let mut config = json!({
        "hidden_size": 64, "intermediate_size": 96, "vocab_size": 50, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 64,
    });
    for (name, value) in more.as_object().unwrap() {
        config[name.as_str()] = value.clone();
    }
    config
}

/// The last logits of granite, by the weights of `vars`.
fn granite(vars: &VarMap, more: Value, prompt: &Tensor) -> Result<Vec<f32>> {
    let config: granite::GraniteConfig = serde_json::from_value(config(more)).unwrap();
    let config = config.into_config(false);
    let vb = VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu);
    let mut cache = granite::Cache::new(true, DType::F32, &config, &Device::Cpu)?;
    let model = granite::Granite::load(vb, &config)?;
    model.forward(prompt, 0, &mut cache)?.flatten_all()?.to_vec1()
}

fn gemma2(vars: &VarMap, scalar: usize, window: Option<usize>, prompt: &Tensor) -> Result<Vec<f32>> {
    let more = json!({
        "attention_bias": false, "head_dim": 32, "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": scalar,
        "sliding_window": window,
    });
    let config: gemma2::Config = serde_json::from_value(config(more)).unwrap();
    let vb = VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu);
    gemma2::Model::new(false, &config, vb)?.forward(prompt, 0)?.flatten_all()?.to_vec1()
}

fn main() -> Result<()> {
    let prompt = |first: u32| Tensor::new(&[[first, 4, 8, 15, 16, 23, 42, 7, 9]], &Device::Cpu);
    let vars = VarMap::new();
    let factors = json!({
        "embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22,
        "logits_scaling": 16.0,
    });
    let plain = granite(&vars, json!({}), &prompt(1)?)?;
    let same = plain == granite(&vars, factors, &prompt(1)?)?;
    assert_ne!(plain, granite(&vars, json!({}), &prompt(2)?)?);
    println!("granite: four factors leave the logits as they are: {same}");

    let vars = VarMap::new();
    let plain = gemma2(&vars, 32, None, &prompt(1)?)?;
    let scaled = plain == gemma2(&vars, 3200, None, &prompt(1)?)?;
    println!("gemma2: query_pre_attn_scalar 3200 in place of 32 leaves the logits as they are: {scaled}");
    let reaches = |window| -> Result<bool> {
        let logits = |first| gemma2(&vars, 32, window, &prompt(first)?);
        Ok(logits(1)? != logits(2)?)
    };
    let (whole, sliding) = (reaches(None)?, reaches(Some(2))?);
    println!("gemma2: the first of 9 tokens reaches the last: without a window {whole}, with one of 2 {sliding}");
    assert!(same && scaled && whole && !sliding);
    Ok(())
}
RUST
cargo run --quiet
