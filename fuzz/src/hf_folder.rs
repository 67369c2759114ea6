//! Bytes as a folder of Hugging Face files: edits of its configuration, its tokenizer's two files and its weights.

use crate::checkpoint::{tokenizer, tokens, try_out, weights, CONTEXT, HEADS, HIDDEN, INNER, KV_HEADS, SPECIAL};
use crate::edits::edit;
use crate::scratch::Scratch;
use arbitrary::{Result, Unstructured};
use serde_json::{json, Value};
use std::sync::OnceLock;

const NAMES: [&str; 4] = [
    "config.json",
    "tokenizer_config.json",
    "model.safetensors",
    "tokenizer.json",
];

/// Models of the same tensors; a Gemma's embedding is its output matrix, as this folder's is.
const MODELS: [&str; 4] = ["llama", "gemma", "granite", "helium"];

thread_local! {
    static SCRATCH: Scratch = Scratch::new("hf");
}

pub fn run(data: &[u8]) {
    static VALID: OnceLock<[[Vec<u8>; 4]; 4]> = OnceLock::new();
    let model = usize::from(data.first().copied().unwrap_or(0) >> 4) % MODELS.len();
    let mut files = VALID.get_or_init(|| MODELS.map(valid))[model].clone();
    let _ = edit_some(&mut files, &mut Unstructured::new(data));
    SCRATCH.with(|scratch| {
        for (name, file) in NAMES.iter().zip(&files) {
            scratch.write(name, file);
        }
        try_out(scratch.folder());
    });
}

/// The input's first bits choose files, the next ones the model; each chosen file gets an equal part of the rest.
fn edit_some(files: &mut [Vec<u8>; 4], input: &mut Unstructured) -> Result<()> {
    let chosen: u8 = input.arbitrary()?;
    let count = (chosen & 0xf).count_ones().max(1) as usize;
    let part = input.len() / count;
    for (index, file) in files.iter_mut().enumerate() {
        if chosen >> index & 1 == 1 {
            edit(file, &mut Unstructured::new(input.bytes(part)?))?;
        }
    }
    Ok(())
}

/// The settings that only this model has.
fn own(model: &str) -> Value {
    match model {
        "gemma" => json!({"hidden_act": "gelu", "head_dim": HIDDEN / HEADS}),
        "granite" => json!({"hidden_act": "silu", "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
            "attention_multiplier": 0.0625, "logits_scaling": 8.0}),
        "helium" => json!({"hidden_act": "silu", "head_dim": HIDDEN / HEADS}),
        _ => json!({"hidden_act": "silu"}),
    }
}

fn valid(model: &str) -> [Vec<u8>; 4] {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": model,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 1,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
        "vocab_size": tokens().len(),
        "bos_token_id": tokens().len() - 2,
        "eos_token_id": tokens().len() - 1,
        "torch_dtype": "float32"
    });
    for (key, value) in own(model).as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    let tokenizer_config = json!({
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "chat_template": "{% for message in messages %}{{ bos_token + message['content'] }}{% endfor %}"
    });
    let weights = safetensors::serialize(weights(), None).expect("weights");
    let tokenizer = tokenizer().to_string(false).expect("a tokenizer");
    [
        config.to_string().into(),
        tokenizer_config.to_string().into(),
        weights,
        tokenizer.into(),
    ]
}

#[test]
fn the_folder_that_is_edited_is_valid() {
    SCRATCH.with(|scratch| {
        for model in MODELS {
            for (name, file) in NAMES.iter().zip(valid(model)) {
                scratch.write(name, &file);
            }
            assert!(try_out(scratch.folder()), "{model}");
        }
    });
}
