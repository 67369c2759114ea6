//! A small valid checkpoint in both formats, and the steps from a file to a loaded model.

use crate::load::{Checkpoint, LoadOptions};
use candle_core::{Device, Tensor};
use candle_sfattention::{CompressedAttention, CompressionConfig, HeadStrategies, MergeStrategy};
use std::path::Path;
use tokenizers::models::bpe::{Vocab, BPE};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

pub const HIDDEN: usize = 8;
pub const INNER: usize = 8;
pub const HEADS: usize = 2;
pub const KV_HEADS: usize = 1;
pub const HEAD_DIM: usize = HIDDEN / HEADS;
pub const CONTEXT: usize = 16;
pub const SPECIAL: [&str; 2] = ["<s>", "</s>"];

/// Opens, loads and runs a checkpoint; a refusal is as good as a result. Returns whether it gave logits.
pub fn try_out(path: &Path) -> bool {
    let Ok(mut checkpoint) = Checkpoint::open(path.to_str().expect("a path of text"), LoadOptions::default()) else {
        return false;
    };
    if let Some(template) = &checkpoint.text.chat_template {
        let _ = template.render("a whale");
    }
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let attention = CompressedAttention::new(off, CompressionConfig::default(), Default::default());
    let layers = vec![attention.expect("settings"); checkpoint.config.layers];
    let Ok(model) = checkpoint.load(layers) else {
        return false;
    };
    let Ok(tokens) = checkpoint.encode("the whale", true) else {
        return false;
    };
    if tokens.is_empty() || tokens.len() > checkpoint.config.context_length {
        return false;
    }
    let hidden = model.forward(&tokens, &mut Default::default());
    hidden
        .and_then(|hidden| model.logits(&hidden, tokens.len() - 1, 1))
        .is_ok()
}

/// Tokens in the order of their ids: bytes, a merge, specials.
pub fn tokens() -> Vec<String> {
    let mut alphabet: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    alphabet.sort();
    alphabet.push("th".into());
    alphabet.into_iter().chain(SPECIAL.map(String::from)).collect()
}

pub fn tokenizer() -> Tokenizer {
    let vocab: Vocab = tokens().into_iter().zip(0..).collect();
    let merges = vec![("t".to_string(), "h".to_string())];
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .build()
        .expect("a tokenizer");
    let mut tokenizer = Tokenizer::new(model);
    let bytes = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
    let special = SPECIAL.map(|token| AddedToken::from(token, true));
    tokenizer.add_special_tokens(special).expect("special tokens");
    tokenizer
}

/// The weights of one layer, the embedding and the rest, by their Hugging Face names.
pub fn weights() -> Vec<(String, Tensor)> {
    let vocab = tokens().len();
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let shapes = [
        ("model.embed_tokens.weight".to_string(), vec![vocab, HIDDEN]),
        (layer("self_attn.q_proj"), vec![HIDDEN, HIDDEN]),
        (layer("self_attn.k_proj"), vec![KV_HEADS * HEAD_DIM, HIDDEN]),
        (layer("self_attn.v_proj"), vec![KV_HEADS * HEAD_DIM, HIDDEN]),
        (layer("self_attn.o_proj"), vec![HIDDEN, HIDDEN]),
        (layer("mlp.gate_proj"), vec![INNER, HIDDEN]),
        (layer("mlp.up_proj"), vec![INNER, HIDDEN]),
        (layer("mlp.down_proj"), vec![HIDDEN, INNER]),
        (layer("input_layernorm"), vec![HIDDEN]),
        (layer("post_attention_layernorm"), vec![HIDDEN]),
        ("model.norm.weight".to_string(), vec![HIDDEN]),
    ];
    let tensor = |shape: Vec<usize>| {
        let count: usize = shape.iter().product();
        let data: Vec<f32> = (0..count).map(|i| (i * 37 % 23) as f32 / 23.0 - 0.5).collect();
        Tensor::from_vec(data, shape, &Device::Cpu).expect("a tensor")
    };
    shapes.into_iter().map(|(name, shape)| (name, tensor(shape))).collect()
}
