//! Folders of safetensors and config.json.

use std::fs;
use std::path::PathBuf;

use candle_core::safetensors;
use serde_json::{json, Value};

use super::{assert_logits, assert_refused, random, with_biases, Tensors};
use crate::fixture::{self, Fixture, HEADS, HEAD_DIM, HIDDEN, INNER, KV_HEADS};
use crate::plain_llama::frequencies;

/// A folder with these tensors, and the fixture's config with these keys changed; null removes a key.
pub fn folder(name: &str, tensors: &Tensors, keys: Value) -> String {
    let folder = PathBuf::from(Fixture::get().path(name));
    fs::create_dir_all(&folder).unwrap();
    let mut config = fixture::config();
    for (key, value) in keys.as_object().unwrap() {
        match value {
            Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
            value => config[key] = value.clone(),
        }
    }
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fixture::tokenizer().save(folder.join("tokenizer.json"), false).unwrap();
    safetensors::save(tensors, folder.join("model.safetensors")).unwrap();
    folder.to_str().unwrap().into()
}

fn config(name: &str, keys: Value) -> String {
    folder(name, &fixture::weights(), keys)
}

#[test]
fn frequencies_are_scaled_as_config_json_says() {
    let weights = fixture::weights();
    let halved: Vec<f64> = frequencies().iter().map(|frequency| frequency / 2.0).collect();
    for (name, keys) in [
        ("new", json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0}})),
        ("old", json!({"rope_scaling": {"type": "linear", "factor": 2.0}})),
        (
            "both",
            json!({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}),
        ),
        (
            "parameters",
            json!({"rope_theta": null, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ),
        (
            "twice",
            json!({"rope_scaling": {"type": "linear", "factor": 2.0},
                   "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ),
    ] {
        assert_logits(&config(&format!("rope_{name}"), keys), &weights, halved.clone());
    }
    for (name, rope) in [
        ("default", json!({"rope_type": "default"})),
        (
            "neutral",
            json!({"type": "default", "factor": 1.0, "partial_rotary_factor": 1.0}),
        ),
    ] {
        let model = config(&format!("rope_{name}"), json!({"rope_scaling": rope}));
        assert_logits(&model, &weights, frequencies());
    }
}

#[test]
fn frequencies_that_are_not_understood_are_refused() {
    for (name, rope, part) in [
        (
            "contradiction",
            json!({"type": "linear", "rope_type": "default", "factor": 2.0}),
            "rope_type default and type linear",
        ),
        (
            "typeless",
            json!({"factor": 2.0}),
            "expected a rope_type that reads factor, got none",
        ),
        (
            "idle",
            json!({"rope_type": "default", "factor": 2.0}),
            "expected a rope_type that reads factor, got default",
        ),
        (
            "ramp",
            json!({"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}),
            "reads low_freq_factor",
        ),
        (
            "unknown",
            json!({"rope_type": "linear", "factor": 2.0, "mscale": 0.7}),
            "mscale",
        ),
        (
            "dynamic",
            json!({"rope_type": "dynamic", "factor": 2.0}),
            "got dynamic; not supported",
        ),
        (
            "zero",
            json!({"rope_type": "linear", "factor": 0.0}),
            "expected factor above 0, got 0",
        ),
        (
            "partial",
            json!({"rope_type": "default", "partial_rotary_factor": 0.5}),
            "partial_rotary_factor: expected 1, got 0.5",
        ),
        (
            "level",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 64}),
            "high_freq_factor above low_freq_factor",
        ),
    ] {
        let model = config(&format!("rope_{name}"), json!({"rope_scaling": rope}));
        assert_refused(&model, &["rope", part]);
    }
    let thetas = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}});
    assert_refused(&config("thetas", thetas), &["rope_parameters", "contradicts itself"]);
    for (key, value, part) in [
        ("rope_theta", json!(0), "rope theta: expected a number above 0, got 0"),
        (
            "rope_theta",
            json!(-1.0),
            "rope theta: expected a number above 0, got -1",
        ),
        (
            "rms_norm_eps",
            json!(-1e-5),
            "norm epsilon: expected a number of at least 0",
        ),
    ] {
        assert_refused(&config("numbers", json!({ key: value })), &[part]);
    }
}

#[test]
fn keys_that_change_what_is_computed_are_refused_by_name() {
    for (key, value) in [
        ("sliding_window", json!(64)),
        ("partial_rotary_factor", json!(0.5)),
        ("layer_types", json!(["sliding_attention", "full_attention"])),
        ("logit_scale", json!(0.5)),
        ("residual_multiplier", json!(0.22)),
        ("attn_logit_softcapping", json!(50.0)),
        ("rope_interleaved", json!(true)),
        ("use_qk_norm", json!(true)),
        ("is_causal", json!(false)),
        ("pruned_heads", json!({"1": [0]})),
        ("num_local_experts", json!(8)),
        ("never_heard_of", json!("anything")),
    ] {
        let model = config("key", json!({ key: value }));
        assert_refused(&model, &["config.json: expected settings of a plain Llama", key]);
    }
    let harmless = json!({
        "_name_or_path": "x", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "pretraining_tp": 2,
        "bos_token_id": 1, "attention_dropout": 0.1, "rope_interleaved": false, "is_llama_config": true,
        "layer_types": ["full_attention", "full_attention"], "sliding_window": null, "partial_rotary_factor": 1.0,
        "num_experts": 0, "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "hidden_act": "swish",
        "is_causal": true, "rope_scaling": null, "attention_bias": false
    });
    assert_logits(&config("harmless", harmless), &fixture::weights(), frequencies());
    // `folder` removes a key that is null, so these nulls are written here.
    let path = PathBuf::from(config("nulls", json!({}))).join("config.json");
    let mut nulls = fixture::config();
    for key in [
        "rope_scaling",
        "head_dim",
        "sliding_window",
        "attention_bias",
        "quantization_config",
    ] {
        nulls[key] = Value::Null;
    }
    fs::write(&path, nulls.to_string()).unwrap();
    assert_logits(
        path.parent().unwrap().to_str().unwrap(),
        &fixture::weights(),
        frequencies(),
    );
}

#[test]
fn tensors_that_nothing_reads_are_refused_by_name() {
    for (name, shape) in [
        ("model.layers.0.self_attn.q_norm.weight", HEAD_DIM),
        ("model.layers.1.self_attn.sinks", HEADS),
        ("model.layers.1.post_feedforward_layernorm.weight", HIDDEN),
        ("model.layers.1.self_attn.v_proj.bias", KV_HEADS * HEAD_DIM),
        ("model.layers.0.mlp.gate_proj.bias", INNER),
        ("model.layers.2.input_layernorm.weight", HIDDEN),
        ("lm_head.bias", fixture::tokens().len()),
        ("model.norm.bias", HIDDEN),
        ("model.layers.0.self_attn.q_proj.weight_scale", 1),
        ("model.layers.0.self_attn.k_scale", 1),
        ("score.weight", 2),
    ] {
        let mut weights = fixture::weights();
        weights.insert(name.into(), random(&[shape], 1));
        assert_refused(&folder("unread", &weights, json!({})), &["tensors: expected", name]);
    }
    let fewer = config("fewer_layers", json!({"num_hidden_layers": 1}));
    let error = assert_refused(&fewer, &["model.layers.1.input_layernorm.weight", "and 5 more"]);
    assert!(!error.contains("model.layers.0."), "{error}");
    let mut buffers = fixture::weights();
    for layer in 0..2 {
        let name = format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq");
        buffers.insert(name, random(&[HEAD_DIM / 2], 1));
    }
    assert_logits(
        &folder("buffers", &buffers, json!({})),
        &fixture::weights(),
        frequencies(),
    );
}

#[test]
fn a_head_beside_tied_embeddings_must_be_theirs() {
    let mut weights = fixture::weights();
    let tied = json!({"tie_word_embeddings": true});
    let head = ["lm_head.weight", "tie_word_embeddings"];
    assert_refused(&folder("tied_other", &weights, tied.clone()), &head);
    let embedding = weights["model.embed_tokens.weight"].clone();
    weights.insert("lm_head.weight".into(), embedding);
    assert_logits(&folder("tied_same", &weights, tied.clone()), &weights, frequencies());
    weights.remove("lm_head.weight");
    assert_logits(&folder("tied_alone", &weights, tied), &weights, frequencies());
    assert_refused(
        &folder("untied", &weights, json!({})),
        &["expected lm_head.weight", "found none"],
    );
}

#[test]
fn biases_are_those_that_config_json_names() {
    let attention = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|part| format!("self_attn.{part}"));
    let mlp = ["gate_proj", "up_proj", "down_proj"].map(|part| format!("mlp.{part}"));
    let paths = |parts: &[String]| -> Vec<String> {
        let of_layer = |layer| parts.iter().map(move |part| format!("model.layers.{layer}.{part}"));
        (0..2).flat_map(of_layer).collect()
    };
    for (key, parts) in [("attention_bias", &attention[..]), ("mlp_bias", &mlp[..])] {
        let paths = paths(parts);
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let mut weights = with_biases(&paths);
        assert_logits(&folder(key, &weights, json!({ key: true })), &weights, frequencies());
        assert_refused(&folder(key, &weights, json!({})), &["tensors: expected", ".bias"]);
        let missing = format!("{}.bias", paths[5]);
        weights.remove(&missing);
        let expected = format!("expected {missing} of shape");
        assert_refused(&folder(key, &weights, json!({ key: true })), &[&expected, "found none"]);
    }
}

#[test]
fn one_file_is_read_whatever_a_stale_index_says() {
    let model = config("stale", json!({}));
    let index = PathBuf::from(&model).join("model.safetensors.index.json");
    let map = json!({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}});
    fs::write(&index, map.to_string()).unwrap();
    assert_logits(&model, &fixture::weights(), frequencies());
    fs::write(&index, "no JSON").unwrap();
    assert_logits(&model, &fixture::weights(), frequencies());
    fs::remove_file(index.with_file_name("model.safetensors")).unwrap();
    fs::write(
        &index,
        json!({"weight_map": {"lm_head.weight": "../hf/model.safetensors"}}).to_string(),
    )
    .unwrap();
    assert_refused(
        &model,
        &["expected names of files beside it, got ../hf/model.safetensors"],
    );
    let twice = Fixture::get().path("twice");
    fs::create_dir_all(&twice).unwrap();
    for file in ["config.json", "tokenizer.json"] {
        fs::copy(format!("{model}/{file}"), format!("{twice}/{file}")).unwrap();
    }
    for shard in ["a.safetensors", "b.safetensors"] {
        safetensors::save(&fixture::weights(), PathBuf::from(&twice).join(shard)).unwrap();
    }
    let map = json!({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}});
    fs::write(format!("{twice}/model.safetensors.index.json"), map.to_string()).unwrap();
    assert_refused(&twice, &["expected each tensor in one file, got lm_head.weight in two"]);
}

#[test]
fn sizes_beyond_what_the_file_holds_are_refused_before_they_cost_memory() {
    let most = 1u64 << 24;
    for (key, value, part) in [
        (
            "num_hidden_layers",
            json!(4000),
            "number of layers: expected at most 21",
        ),
        ("num_hidden_layers", json!(u64::MAX), "number of layers: expected 1 to"),
        ("num_attention_heads", json!(most), "q_proj.weight: expected shape"),
        ("num_key_value_heads", json!(0), "number of KV heads: expected 1 to"),
        ("head_dim", json!(most), "q_proj.weight: expected shape"),
        ("head_dim", json!(u64::MAX), "head dimension: expected 1 to"),
        ("vocab_size", json!(most), "embed_tokens.weight: expected shape"),
        ("hidden_size", json!(most), "expected shape"),
        ("intermediate_size", json!(most), "gate_proj.weight: expected shape"),
        (
            "max_position_embeddings",
            json!(1u64 << 40),
            "context length: expected 1 to",
        ),
    ] {
        // The head dimension comes from the file, independent of the other sizes.
        let mut keys = json!({"head_dim": HEAD_DIM});
        keys[key] = value;
        assert_refused(&config("sizes", keys), &[part]);
    }
}
