//! Bytes as a GGUF file of the llama example.

use crate::checkpoint::{tokens, try_out, weights, CONTEXT, HEADS, HEAD_DIM, HIDDEN, INNER, KV_HEADS, SPECIAL};
use crate::edits::edit;
use crate::scratch::Scratch;
use arbitrary::Unstructured;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use std::io::Cursor;
use std::sync::OnceLock;

thread_local! {
    static SCRATCH: Scratch = Scratch::new("gguf");
}

pub fn run(data: &[u8]) {
    static VALID: OnceLock<Vec<u8>> = OnceLock::new();
    let mut input = Unstructured::new(data);
    let file = match input.int_in_range(0..=3u8) {
        Ok(0) => input.take_rest().to_vec(),
        _ => {
            let mut file = VALID.get_or_init(valid).clone();
            let _ = edit(&mut file, &mut input);
            file
        }
    };
    SCRATCH.with(|scratch| try_out(&scratch.write("model.gguf", &file)));
}

fn valid() -> Vec<u8> {
    let tokens = tokens();
    let strings = |list: &[String]| Value::Array(list.iter().cloned().map(Value::String).collect());
    let count = |n: usize| Value::U32(n as u32);
    let first_special = tokens.len() - SPECIAL.len();
    let types = (0..tokens.len()).map(|id| Value::I32(if id < first_special { 1 } else { 3 }));
    let metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("llama.block_count", count(1)),
        ("llama.context_length", count(CONTEXT)),
        ("llama.embedding_length", count(HIDDEN)),
        ("llama.feed_forward_length", count(INNER)),
        ("llama.attention.head_count", count(HEADS)),
        ("llama.attention.head_count_kv", count(KV_HEADS)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.freq_base", Value::F32(10_000.0)),
        ("llama.rope.dimension_count", count(HEAD_DIM)),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("smollm".into())),
        ("tokenizer.ggml.merges", strings(&["t h".to_string()])),
        ("tokenizer.ggml.token_type", Value::Array(types.collect())),
        ("tokenizer.ggml.bos_token_id", count(first_special)),
        ("tokenizer.ggml.eos_token_id", count(first_special + 1)),
        // The tokens come last, so that the keys before them lie within the first 2^16 bytes, which edits reach.
        ("tokenizer.ggml.tokens", strings(&tokens)),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(name, value)| (*name, value)).collect();
    let tensors: Vec<(String, QTensor)> = weights()
        .into_iter()
        .map(|(name, tensor)| {
            (
                gguf_name(&name),
                QTensor::quantize(&tensor, GgmlDType::F32).expect("f32"),
            )
        })
        .collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = Cursor::new(Vec::new());
    gguf_file::write(&mut file, &metadata, &tensors).expect("a GGUF file");
    file.into_inner()
}

#[test]
fn the_file_that_is_edited_is_valid() {
    SCRATCH.with(|scratch| assert!(try_out(&scratch.write("model.gguf", &valid()))));
}

fn gguf_name(name: &str) -> String {
    [
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
    ]
    .iter()
    .fold(name.to_string(), |name, (hf, gguf)| name.replace(hf, gguf))
}
