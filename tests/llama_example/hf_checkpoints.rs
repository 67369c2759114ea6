//! Folders of safetensors and config.json.

use std::fs;
use std::path::PathBuf;

use candle_core::{safetensors, DType, Device, Tensor};
use serde_json::{json, Value};

use crate::fixture::{self, Fixture, HEADS, HEAD_DIM, HIDDEN, INNER, KV_HEADS};
use crate::plain_llama::frequencies;
use crate::{assert_logits, assert_refused, random, with_biases, Tensors};

/// A folder with these tensors, and the fixture's config with these keys on top; null takes a key out.
fn folder(name: &str, tensors: &Tensors, keys: Value) -> String {
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
            "rms norm epsilon: expected a number of at least 0",
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
    // `folder` takes null for a key's absence: these nulls are written.
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

/// FP8 values, their scales of shape `shape` for blocks of `block`, and what they mean.
fn quantize(weight: &Tensor, block: [usize; 2]) -> (Tensor, Tensor, Tensor) {
    let (rows, columns) = weight.dims2().unwrap();
    let values = weight.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let across = columns.div_ceil(block[1]);
    let scales: Vec<f32> = (0..rows.div_ceil(block[0]) * across)
        .map(|i| 0.004 + 0.001 * (i % 7) as f32)
        .collect();
    let scale = |at: usize| scales[at / columns / block[0] * across + at % columns / block[1]];
    let small: Vec<f32> = values.iter().enumerate().map(|(at, value)| value / scale(at)).collect();
    let tensor = |values: Vec<f32>| Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap();
    let small = tensor(small).to_dtype(DType::F8E4M3).unwrap();
    let rounded = small
        .to_dtype(DType::F32)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1::<f32>()
        .unwrap();
    let meant = rounded
        .iter()
        .enumerate()
        .map(|(at, value)| value * scale(at))
        .collect();
    let scales = Tensor::from_vec(scales, (rows.div_ceil(block[0]), across), &Device::Cpu).unwrap();
    (small, scales, tensor(meant))
}

/// Every matrix of the layers in FP8, with scales per `block` under `suffix`: what is stored, and what is meant.
fn in_fp8(suffix: &str, block: [usize; 2], reshape: impl Fn(Tensor) -> Tensor) -> (Tensors, Tensors) {
    let (mut stored, mut meant) = (fixture::weights(), fixture::weights());
    for (name, weight) in fixture::weights() {
        if name.contains("layers") && weight.rank() == 2 {
            let block = [
                block[0].min(weight.dim(0).unwrap()),
                block[1].min(weight.dim(1).unwrap()),
            ];
            let (small, scales, value) = quantize(&weight, block);
            stored.insert(name.clone(), small);
            stored.insert(format!("{name}{suffix}"), reshape(scales));
            meant.insert(name, value);
        }
    }
    (stored, meant)
}

#[test]
fn fp8_weights_are_scaled_by_matrix_row_and_block() {
    const WHOLE: usize = usize::MAX;
    let compressed = |weights: Value| {
        json!({"quant_method": "compressed-tensors", "format": "float-quantized",
               "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]})
    };
    let float = |strategy: &str| json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": strategy});
    let squares = json!({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]});
    let groups = json!({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 16});
    let inverse = json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 16]});
    let one = |scales: Tensor| scales.flatten_all().unwrap();
    let scalar = |scales: Tensor| scales.flatten_all().unwrap().squeeze(0).unwrap();
    let same = |scales: Tensor| scales;
    let cases: [(&str, [usize; 2], &dyn Fn(Tensor) -> Tensor, Value); 8] = [
        (
            "_scale",
            [WHOLE, WHOLE],
            &one,
            json!({"quant_method": "compressed-tensors", "format": "float-quantized"}),
        ),
        ("_scale", [WHOLE, WHOLE], &scalar, compressed(float("tensor"))),
        ("_scale", [1, WHOLE], &same, compressed(float("channel"))),
        (
            "_scale",
            [1, WHOLE],
            &one,
            json!({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
        ),
        ("_scale", [16, 32], &same, compressed(squares)),
        ("_scale", [1, 16], &same, compressed(groups)),
        ("_scale_inv", [32, 16], &same, inverse),
        (
            "_scale_inv",
            [WHOLE, WHOLE],
            &scalar,
            json!({"quant_method": "fp8", "weight_block_size": null}),
        ),
    ];
    for (suffix, block, reshape, quantization) in cases {
        let (mut stored, meant) = in_fp8(suffix, block, reshape);
        // How activations and cached keys would be rounded is not read.
        stored.insert("model.layers.0.mlp.up_proj.input_scale".into(), random(&[1], 2));
        stored.insert("model.layers.1.self_attn.k_scale".into(), random(&[1], 2));
        let model = folder("fp8", &stored, json!({"quantization_config": quantization}));
        assert_logits(&model, &meant, frequencies());
    }
    // Without a word about quantization: a scale is a scale, and values without one are what they are.
    let (stored, meant) = in_fp8("_scale", [WHOLE, WHOLE], one);
    assert_logits(&folder("fp8", &stored, json!({})), &meant, frequencies());
    let mut plain = fixture::weights();
    let name = "model.layers.1.mlp.up_proj.weight";
    plain.insert(name.into(), plain[name].to_dtype(DType::F8E4M3).unwrap());
    let model = folder("fp8", &plain, json!({}));
    plain.insert(name.into(), plain[name].to_dtype(DType::F32).unwrap());
    assert_logits(&model, &plain, frequencies());
}

#[test]
fn quantized_weights_that_are_not_understood_are_refused() {
    let (stored, _) = in_fp8("_scale", [usize::MAX, usize::MAX], |scales| scales);
    let fp8 = json!({"quant_method": "compressed-tensors", "format": "float-quantized"});
    let name = "model.layers.0.self_attn.q_proj.weight";
    let refused = |change: &dyn Fn(&mut Tensors), quantization: &Value, parts: &[&str]| {
        let mut stored = stored.clone();
        change(&mut stored);
        let keys = json!({"quantization_config": quantization});
        assert_refused(&folder("fp8_refused", &stored, keys), parts);
    };
    let scale = format!("{name}_scale");
    let remove = |stored: &mut Tensors| drop(stored.remove(&scale));
    refused(&remove, &fp8, &[name, "expected", "_scale", "found neither"]);
    let twice = |stored: &mut Tensors| drop(stored.insert(format!("{scale}_inv"), random(&[1], 1)));
    refused(&twice, &fp8, &[name, "expected one scale"]);
    let odd = |stored: &mut Tensors| drop(stored.insert(scale.clone(), random(&[3, 5], 1)));
    refused(&odd, &fp8, &[name, "got shape [3, 5]; not supported"]);
    let point = |stored: &mut Tensors| drop(stored.insert(format!("{name}_zero_point"), random(&[1], 1)));
    refused(&point, &fp8, &["tensors: expected", "weight_zero_point"]);
    let nothing = |_: &mut Tensors| ();
    for (quantization, part) in [
        (json!({"quant_method": "gptq", "bits": 4}), "got gptq; not supported"),
        (
            json!({"quant_method": "bitsandbytes", "load_in_8bit": true}),
            "got bitsandbytes",
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
            "of format pack-quantized",
        ),
        (json!({"bits": 8}), "got no quant_method"),
        (
            json!({"quant_method": "fp8", "fmt": "e5m2"}),
            "expected fmt e4m3, got e5m2",
        ),
        (
            json!({"quant_method": "fp8", "weight_block_size": [128, 0]}),
            "expected a block of rows and columns",
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "naive-quantized",
                   "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}}),
            "expected symmetric float weights of 8 bits in group_0",
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "float-quantized", "transform_config": {"r1": {}}}),
            "expected no transform_config",
        ),
    ] {
        refused(&nothing, &quantization, &["quantization_config: expected", part]);
    }
    let mut whole = fixture::weights();
    whole.insert(name.into(), whole[name].to_dtype(DType::U8).unwrap());
    assert_refused(
        &folder("bytes", &whole, json!({})),
        &[name, "got U8, which is not supported"],
    );
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
        // The head dimension is the file's, whatever the other sizes.
        let mut keys = json!({"head_dim": HEAD_DIM});
        keys[key] = value;
        assert_refused(&config("sizes", keys), &[part]);
    }
}
