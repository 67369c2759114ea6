//! What only some of the llama example's models compute (caps, multipliers, LayerNorm, a rotation of a part of a head):
//! read from each file, applied by each command, or refused.

mod commands;

use crate::fixture::Fixture;
use crate::kinds::{Kind, FINAL_SOFTCAP, GRANITE, HEADS, HIDDEN, ROTATED, WIDE_HEAD};
use crate::load::{Checkpoint, LoadOptions};
use crate::model::{Activation, HiddenCounts, LayerOptions, Llama, LlamaConfig, NormKind, Sliding};
use crate::rope::Pairing;
use anyhow::{Context, Result};
use candle_core::quantized::gguf_file::Value as Meta;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_sfattention::{AttentionOptions, CompressedAttention, CompressionConfig, HeadStrategies, MergeStrategy};
use serde_json::{json, Value};

/// Tokens that a row of a sliding layer sees.
const WINDOW: usize = 16;
const TOKENS: [u32; 24] = [
    3, 77, 12, 200, 41, 41, 5, 130, 251, 8, 99, 64, 17, 180, 2, 90, 33, 33, 210, 71, 150, 28, 9, 119,
];

/// A folder with the kind's weights, and its config after `change`.
fn folder(name: &str, kind: Kind, change: impl FnOnce(&mut Value)) -> String {
    let folder = Fixture::get().folder.join(name);
    let mut config = kind.config(WINDOW);
    change(&mut config);
    kind.write_folder(&folder, &config, &kind.weights());
    folder.to_str().unwrap().into()
}

fn without(config: &mut Value, keys: &[&str]) {
    for key in keys {
        config.as_object_mut().unwrap().remove(*key);
    }
}

fn open(model: &str) -> Result<LlamaConfig> {
    Ok(Checkpoint::open(model, LoadOptions::default())?.config)
}

fn load(model: &str) -> Result<Llama> {
    let mut checkpoint = Checkpoint::open(model, LoadOptions::default())?;
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let off = CompressedAttention::new(off, CompressionConfig::pretrained(), AttentionOptions::default())?;
    let layers = checkpoint.config.layers;
    checkpoint.load(vec![off; layers])
}

/// Logits of all tokens.
fn logits(model: &Llama) -> Result<Vec<f32>> {
    let hidden = model.forward(&TOKENS, &mut HiddenCounts::default())?;
    Ok(model.logits(&hidden, 0, TOKENS.len())?.flatten_all()?.to_vec1()?)
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |most, each| if each <= most { most } else { each })
}

fn refused(model: &str, parts: &[&str]) {
    let error = match load(model) {
        Ok(_) => panic!("{model}: expected an error with {parts:?}"),
        Err(error) => format!("{error:#}"),
    };
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}

/// Keys that a file leaves out have transformers' defaults, and null is no default.
#[test]
fn keys_that_are_left_out_have_their_defaults() -> Result<()> {
    let layer = |kind: Kind, keys: &[&str]| -> Result<LayerOptions> {
        let folder = folder("defaults", kind, |config| without(config, keys));
        Ok(open(&folder)?.layer)
    };
    let gemma = LayerOptions {
        activation: Activation::GeluTanh,
        embedding_scale: Some((HIDDEN as f64).sqrt()),
        ..LayerOptions::default()
    };
    assert_eq!(layer(Kind::Gemma, &["hidden_activation"])?, gemma);
    let first = folder("defaults", Kind::Gemma, |config| {
        config["hidden_act"] = "gelu".into();
        config["hidden_activation"] = Value::Null;
    });
    assert_eq!(open(&first)?.layer, gemma);
    let keys = [
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "sliding_window",
        "hidden_activation",
    ];
    let gemma2 = LayerOptions {
        sandwich_norms: true,
        softmax_scale: Some(1.0 / 16.0),
        softcap: Some(50.0),
        final_softcap: Some(30.0),
        sliding: Some(Sliding {
            window: 4096,
            layers: vec![true, false, true],
            rope_theta: None,
        }),
        ..gemma
    };
    assert_eq!(layer(Kind::Gemma2, &keys)?, gemma2);
    let nulls = folder("nulls", Kind::Gemma2, |config| {
        for key in ["attn_logit_softcapping", "final_logit_softcapping", "sliding_window"] {
            config[key] = Value::Null;
        }
    });
    let nulls = open(&nulls)?.layer;
    assert_eq!((nulls.softcap, nulls.final_softcap, nulls.sliding), (None, None, None));
    let keys = [
        "embedding_multiplier",
        "residual_multiplier",
        "attention_multiplier",
        "logits_scaling",
    ];
    let granite = LayerOptions {
        softmax_scale: Some(1.0),
        ..LayerOptions::default()
    };
    assert_eq!(layer(Kind::Granite, &keys)?, granite);
    let helium = open(&folder("defaults", Kind::Helium, |config| {
        without(config, &["rope_theta"])
    }))?;
    assert_eq!(
        (helium.rope_pairing, helium.rope_theta),
        (Pairing::Interleaved, 100_000.0)
    );
    assert_eq!(helium.layer, LayerOptions::default());
    let stablelm = LayerOptions {
        norm: NormKind::Layer,
        output_without_bias: true,
        rotated: Some(HIDDEN / HEADS / 4),
        ..LayerOptions::default()
    };
    assert_eq!(layer(Kind::StableLm, &["partial_rotary_factor"])?, stablelm);
    Ok(())
}

/// Newer files name the rotated share beside the theta.
#[test]
fn the_rotated_share_may_stand_in_rope_parameters() -> Result<()> {
    let share = ROTATED as f64 / (HIDDEN / HEADS) as f64;
    let older = load(&folder("rope-old", Kind::StableLm, |_| ()))?;
    let newer = folder("rope-new", Kind::StableLm, |config| {
        without(config, &["partial_rotary_factor", "rope_theta"]);
        config["rope_parameters"] =
            json!({"rope_type": "default", "rope_theta": crate::kinds::THETA, "partial_rotary_factor": share});
    });
    assert_eq!(logits(&older)?, logits(&load(&newer)?)?);
    let whole = folder("rope-whole", Kind::StableLm, |config| {
        config["partial_rotary_factor"] = 1.into();
    });
    assert!(largest_difference(&logits(&older)?, &logits(&load(&whole)?)?) > 0.1);
    Ok(())
}

#[test]
fn settings_that_are_not_computed_are_refused_by_name() {
    for (kind, key, value) in [
        (Kind::Gemma, "hidden_activation", json!("gelu")),
        (Kind::Gemma, "hidden_act", json!("silu")),
        (Kind::Gemma, "final_logit_softcapping", json!(30.0)),
        (Kind::Gemma, "use_bidirectional_attention", json!(true)),
        (Kind::Gemma, "sliding_window", json!(64)),
        (Kind::Gemma2, "hidden_activation", json!("gelu")),
        (Kind::Gemma2, "hidden_act", json!("gelu")),
        (Kind::Gemma2, "use_bidirectional_attention", json!(true)),
        (Kind::Gemma2, "sliding_window_size", json!(WINDOW + 1)),
        (Kind::Gemma2, "layer_types", json!(["chunked", "chunked", "chunked"])),
        (Kind::Gemma2, "rope_local_base_freq", json!(500.0)),
        (Kind::Granite, "hidden_act", json!("gelu")),
        (Kind::Granite, "num_local_experts", json!(8)),
        (Kind::Granite, "partial_rotary_factor", json!(0.5)),
        (Kind::Helium, "attention_bias", json!(true)),
        (Kind::Helium, "hidden_act", json!("gelu")),
        (Kind::Helium, "embedding_multiplier", json!(2.0)),
        (Kind::StableLm, "qk_layernorm", json!(true)),
        (Kind::StableLm, "use_parallel_residual", json!(true)),
        (Kind::StableLm, "rms_norm_eps", json!(1e-5)),
        (Kind::StableLm, "partial_rotary_factor", json!(1.5)),
        (
            Kind::StableLm,
            "rope_parameters",
            json!({"partial_rotary_factor": 0.75}),
        ),
        (Kind::Llama, "layer_norm_eps", json!(1e-5)),
    ] {
        let model = folder("refused", kind, |config| config[key] = value.clone());
        let name = if key == "rope_parameters" {
            "partial_rotary_factor"
        } else {
            key
        };
        refused(&model, &["config.json", name]);
    }
    for (kind, key, part) in [
        (Kind::Gemma2, "attn_logit_softcapping", "softcap of attention"),
        (Kind::Gemma2, "final_logit_softcapping", "softcap of the logits"),
        (Kind::Granite, "residual_multiplier", "residual scale"),
        (Kind::Granite, "logits_scaling", "divisor of the logits"),
        (Kind::Granite, "attention_multiplier", "softmax scale"),
        (Kind::Granite, "embedding_multiplier", "embedding scale"),
        (
            Kind::StableLm,
            "partial_rotary_factor",
            "rotated numbers of a head: expected an even number from 2 to 16",
        ),
    ] {
        refused(
            &folder("refused", kind, |config| config[key] = 0.into()),
            &[part, "got 0"],
        );
    }
    let model = folder("refused", Kind::StableLm, |config| without(config, &["layer_norm_eps"]));
    refused(&model, &["layer_norm_eps: expected a number, got null"]);
    // A norm without its bias, and a bias that a norm does not add.
    let mut weights = Kind::StableLm.weights();
    let bias = "model.layers.1.input_layernorm.bias";
    let removed = weights.remove(bias).unwrap();
    let path = Fixture::get().folder.join("refused");
    Kind::StableLm.write_folder(&path, &Kind::StableLm.config(WINDOW), &weights);
    refused(
        path.to_str().unwrap(),
        &["expected model.layers.1.input_layernorm.bias of shape [64]"],
    );
    let mut weights = Kind::Gemma.weights();
    weights.insert(bias.into(), removed);
    Kind::Gemma.write_folder(&path, &Kind::Gemma.config(WINDOW), &weights);
    refused(path.to_str().unwrap(), &["tensors: expected", bias]);
}

/// A GGUF file of the kind, with keys changed (None removes one) and more tensors.
fn gguf(kind: Kind, changes: &[(&str, Option<Meta>)], more: &[(&str, Tensor)]) -> String {
    let path = Fixture::get().folder.join("changed.gguf");
    let mut metadata = kind.gguf_metadata(WINDOW);
    for (key, value) in changes {
        let key = format!("{}.{key}", kind.architecture().unwrap());
        metadata.retain(|(name, _)| *name != key);
        metadata.extend(value.clone().map(|value| (key, value)));
    }
    let mut tensors = kind.gguf_tensors(&kind.weights(), GgmlDType::F32);
    for (name, tensor) in more {
        tensors.push((name.to_string(), QTensor::quantize(tensor, GgmlDType::F32).unwrap()));
    }
    crate::fixture::save_gguf(&path, &metadata, &tensors);
    path.to_str().unwrap().into()
}

/// As llama.cpp reads them.
#[test]
fn gguf_keys_of_each_kind_are_read_or_refused() -> Result<()> {
    let keys = [
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "attention.sliding_window",
    ];
    let gemma2 = open(&gguf(Kind::Gemma2, &keys.map(|key| (key, None)), &[]))?.layer;
    assert_eq!((gemma2.softcap, gemma2.final_softcap), (Some(50.0), Some(30.0)));
    let sliding = gemma2.sliding.context("layers that slide")?;
    assert_eq!((sliding.window, sliding.rope_theta), (4096, None));
    assert_eq!(sliding.layers, [true, false, true]);
    let of = |pattern: u32| [("attention.sliding_window_pattern", Some(Meta::U32(pattern)))];
    let sliding = open(&gguf(Kind::Gemma2, &of(3), &[]))?.layer.sliding;
    assert_eq!(sliding.context("layers that slide")?.layers, [true, true, false]);

    let granite = open(&gguf(Kind::Granite, &[], &[]))?.layer;
    let [embedding, residual, attention, logits] = GRANITE.map(Some);
    assert_eq!((granite.embedding_scale, granite.residual_scale), (embedding, residual));
    assert_eq!((granite.softmax_scale, granite.logit_divisor), (attention, logits));
    let keys = ["embedding_scale", "residual_scale", "attention.scale"];
    let granite = open(&gguf(Kind::Granite, &keys.map(|key| (key, Some(Meta::F32(0.0)))), &[]))?.layer;
    assert_eq!(
        (granite.embedding_scale, granite.residual_scale, granite.softmax_scale),
        (None, None, None)
    );
    refused(
        &gguf(Kind::Granite, &[("logit_scale", None)], &[]),
        &["granite.logit_scale: expected"],
    );
    let still = [("rope.scaling.finetuned", Some(Meta::Bool(false)))];
    refused(
        &gguf(Kind::Granite, &still, &[]),
        &["granite.rope.scaling.finetuned: expected true"],
    );

    let stablelm = open(&gguf(Kind::StableLm, &[], &[]))?.layer;
    assert_eq!((stablelm.rotated, stablelm.norm), (Some(ROTATED), NormKind::Layer));
    let norm = Tensor::ones((HEADS, HIDDEN / HEADS), candle_core::DType::F32, &Device::Cpu)?;
    let model = gguf(Kind::StableLm, &[], &[("blk.0.attn_q_norm.weight", norm)]);
    refused(&model, &["tensors: expected", "blk.0.attn_q_norm.weight"]);
    let odd = [("rope.dimension_count", Some(Meta::U32(3)))];
    refused(
        &gguf(Kind::StableLm, &odd, &[]),
        &["rotated numbers of a head", "got 3"],
    );
    refused(
        &gguf(Kind::Gemma, &odd, &[]),
        &["gemma.rope.dimension_count: expected the head dimension 32"],
    );
    refused(
        &gguf(Kind::Gemma, &[("attn_logit_softcapping", Some(Meta::F32(50.0)))], &[]),
        &[
            "metadata: expected keys of a plain gemma",
            "gemma.attn_logit_softcapping",
        ],
    );
    Ok(())
}

/// query_pre_attn_scalar s scales logits by s^-1/2: as a query that is larger by (head_dim / s)^1/2.
#[test]
fn gemma_2s_scale_is_that_of_its_queries() -> Result<()> {
    let kind = Kind::Gemma2;
    let scaled = folder("scaled", kind, |config| {
        config["query_pre_attn_scalar"] = (WIDE_HEAD / 4).into()
    });
    let mut larger = kind.weights();
    for (name, tensor) in &mut larger {
        if name.contains("q_proj") {
            *tensor = (&*tensor * 2.0)?;
        }
    }
    let path = Fixture::get().folder.join("larger");
    kind.write_folder(&path, &kind.config(WINDOW), &larger);
    let expected = logits(&load(path.to_str().context("a path")?)?)?;
    let difference = largest_difference(&logits(&load(&scaled)?)?, &expected);
    assert!(difference <= 1e-4, "{difference}");
    let plain = logits(&load(&folder("plain", kind, |_| ()))?)?;
    assert!(largest_difference(&plain, &expected) > 0.1);
    Ok(())
}

/// Capped logits are c tanh(z / c) of the logits of the model without a cap, by each way to logits.
#[test]
fn gemma_2_caps_the_logits_of_every_path() -> Result<()> {
    let capped = load(&folder("capped", Kind::Gemma2, |_| ()))?;
    let without = load(&folder("uncapped", Kind::Gemma2, |config| {
        config["final_logit_softcapping"] = Value::Null;
    }))?;
    let mut caches = capped.caches(&Default::default())?;
    let mut stepped = Vec::new();
    for part in [&TOKENS[..10], &TOKENS[10..11], &TOKENS[11..]] {
        let hidden = capped.forward_cached(part, &mut caches)?;
        let logits = capped.logits_in_place(&hidden, 0, part.len())?;
        stepped.extend(logits.flatten_all()?.to_vec1::<f32>()?);
    }
    let plain = logits(&without)?;
    let cap = FINAL_SOFTCAP as f32;
    let expected: Vec<f32> = plain.iter().map(|z| cap * (z / cap).tanh()).collect();
    let bent = largest_difference(&plain, &expected);
    assert!(bent > 1.0, "the cap bends logits by {bent} only");
    for got in [logits(&capped)?, stepped] {
        let difference = largest_difference(&got, &expected);
        assert!(difference <= 1e-4, "{difference}");
    }
    Ok(())
}

/// The layers that slide keep their window, the others all tokens.
#[test]
fn gemma_2s_layers_slide_in_turn() -> Result<()> {
    let model = load(&folder("turns", Kind::Gemma2, |_| ()))?;
    assert_eq!(model.windows(), [Some(WINDOW), None, Some(WINDOW)]);
    let mut caches = model.caches(&Default::default())?;
    model.forward_cached(&TOKENS, &mut caches)?;
    let kept: Vec<usize> = caches.iter().map(|cache| cache.lens().concat()[0]).collect();
    assert_eq!(kept, [WINDOW - 1, TOKENS.len(), WINDOW - 1]);
    Ok(())
}
