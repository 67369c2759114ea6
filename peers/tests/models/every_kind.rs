//! The llama example's decoder on tiny models of every kind that it reads: its logits are those of candle-transformers'
//! own models, for a whole prompt and token by token, with nothing hidden.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::again::again;
use crate::kinds::{Kind, CONTEXT, KINDS};
use crate::load::{Checkpoint, LoadOptions};
use crate::model::{Activation, HiddenCounts, Llama};
use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sfattention::{AttentionOptions, CompressedAttention, CompressionConfig, HeadStrategies, MergeStrategy};
use candle_transformers::models::{
    gemma, gemma2, gemma3, granite, helium, llama, mistral, quantized_gemma3, quantized_llama, quantized_qwen2,
    quantized_qwen3, qwen2, qwen3, stable_lm,
};

/// A window that no prompt here outgrows.
const LONG: usize = CONTEXT;

/// Logits of the last of some tokens at a position.
type Forward = Box<dyn FnMut(&[u32], usize) -> Tensor>;

fn folder(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(env!("CARGO_CRATE_NAME"))
        .join(name);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn open(path: &Path) -> anyhow::Result<Checkpoint> {
    Checkpoint::open(path.to_str().unwrap(), LoadOptions::default())
}

fn load(checkpoint: &mut Checkpoint) -> Llama {
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let off = CompressedAttention::new(off, CompressionConfig::pretrained(), AttentionOptions::default()).unwrap();
    let layers = checkpoint.config.layers;
    checkpoint.load(vec![off; layers]).unwrap()
}

fn prompt(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * i * 31 + i * 7 + 3) % 250).collect()
}

fn ids(tokens: &[u32]) -> Tensor {
    Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap()
}

fn flat(logits: &Tensor) -> Vec<f32> {
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(ours: &Tensor, theirs: &Tensor, what: &str) {
    let (ours, theirs) = (flat(ours), flat(theirs));
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let scale = theirs.iter().fold(0.0, |most: f32, logit| most.max(logit.abs()));
    assert!(scale > 1.0, "{what}: logits near 0 show nothing: {scale}");
    for (id, (a, b)) in ours.iter().zip(&theirs).enumerate() {
        assert!((a - b).abs() <= 2e-4 * scale, "{what}, token {id}: {a} against {b}");
    }
}

/// Ours and theirs on whole prompts, then both token by token.
fn assert_same(ours: &Llama, theirs: &mut dyn FnMut() -> Forward, what: &str) {
    let tokens = prompt(61);
    for n in [1, 2, 33, tokens.len()] {
        let hidden = ours.forward(&tokens[..n], &mut HiddenCounts::default()).unwrap();
        let theirs = theirs()(&tokens[..n], 0);
        assert_close(
            &ours.last_logits(&hidden).unwrap(),
            &theirs,
            &format!("{what}: {n} tokens"),
        );
    }
    let mut caches = ours.caches(&Default::default()).unwrap();
    let mut theirs = theirs();
    for (position, token) in tokens.iter().enumerate() {
        let hidden = ours.forward_cached(&[*token], &mut caches).unwrap();
        let theirs = theirs(&[*token], position);
        assert_close(
            &ours.last_logits(&hidden).unwrap(),
            &theirs,
            &format!("{what}: token {position} alone"),
        );
    }
}

/// candle-transformers' model with these settings and weights.
fn candles(kind: Kind, config: &serde_json::Value, weights: &HashMap<String, Tensor>) -> Forward {
    let vb = VarBuilder::from_tensors(kind.folded(weights), DType::F32, &Device::Cpu);
    let config = config.clone();
    fn parsed<T: serde::de::DeserializeOwned>(config: serde_json::Value) -> T {
        serde_json::from_value(config).unwrap()
    }
    match kind {
        Kind::Llama => {
            let config = parsed::<llama::LlamaConfig>(config).into_config(false);
            let model = llama::Llama::load(vb, &config).unwrap();
            let mut cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
            Box::new(move |tokens, position| model.forward(&ids(tokens), position, &mut cache).unwrap())
        }
        Kind::Mistral => {
            let mut model = mistral::Model::new(&parsed(config), vb).unwrap();
            Box::new(move |tokens, position| model.forward(&ids(tokens), position).unwrap())
        }
        Kind::Qwen2 => {
            let mut model = qwen2::ModelForCausalLM::new(&parsed(config), vb).unwrap();
            Box::new(move |tokens, position| model.forward(&ids(tokens), position).unwrap())
        }
        Kind::Qwen3 => {
            let mut model = qwen3::ModelForCausalLM::new(&parsed(config), vb).unwrap();
            Box::new(move |tokens, position| model.forward(&ids(tokens), position).unwrap())
        }
        Kind::Gemma => {
            let mut model = gemma::Model::new(false, &parsed(config), vb).unwrap();
            Box::new(move |tokens, position| model.forward(&ids(tokens), position).unwrap())
        }
        Kind::Gemma2 => {
            let mut model = gemma2::Model::new(false, &parsed(config), vb).unwrap();
            Box::new(move |tokens, position| model.forward(&ids(tokens), position).unwrap())
        }
        Kind::Gemma3 => {
            let mut model = gemma3::Model::new(false, &parsed(config), vb).unwrap();
            Box::new(move |tokens, position| model.forward(&ids(tokens), position).unwrap())
        }
        Kind::Granite => {
            let config = parsed::<granite::GraniteConfig>(config).into_config(false);
            let model = granite::Granite::load(vb, &config).unwrap();
            let mut cache = granite::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
            Box::new(move |tokens, position| model.forward(&ids(tokens), position, &mut cache).unwrap())
        }
        Kind::Helium => {
            let mut model = helium::Model::new(&parsed(config), vb).unwrap();
            Box::new(move |tokens, position| model.forward(&ids(tokens), position).unwrap())
        }
        Kind::StableLm => {
            let mut model = stable_lm::Model::new(&parsed(config), vb).unwrap();
            Box::new(move |tokens, position| model.forward(&ids(tokens), position).unwrap())
        }
    }
}

/// The kinds that candle-transformers 0.11.1 has a quantized model for.
const QUANTIZED: [Kind; 5] = [Kind::Llama, Kind::Mistral, Kind::Qwen2, Kind::Qwen3, Kind::Gemma3];

/// candle-transformers' quantized model of a GGUF file.
fn candles_quantized(kind: Kind, path: &Path) -> Forward {
    let mut file = fs::File::open(path).unwrap();
    let content = Content::read(&mut file).unwrap();
    match kind {
        Kind::Llama | Kind::Mistral => {
            let mut model = quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
            Box::new(move |tokens, position| model.forward(&ids(tokens), position).unwrap())
        }
        Kind::Qwen2 => {
            let mut model = quantized_qwen2::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
            Box::new(move |tokens, position| model.forward(&ids(tokens), position).unwrap())
        }
        Kind::Qwen3 => {
            let mut model = quantized_qwen3::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
            Box::new(move |tokens, position| model.forward(&ids(tokens), position).unwrap())
        }
        Kind::Gemma3 => {
            let mut model = quantized_gemma3::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
            Box::new(move |tokens, position| model.forward(&ids(tokens), position).unwrap())
        }
        Kind::Gemma | Kind::Gemma2 | Kind::Granite | Kind::Helium | Kind::StableLm => {
            panic!("{kind:?}: no quantized model")
        }
    }
}

#[test]
fn every_kind_from_a_folder_is_candles_model() {
    for kind in KINDS {
        let (config, weights) = (kind.config(LONG), kind.weights());
        let path = folder(kind.model_type());
        kind.write_folder(&path, &config, &weights);
        let ours = load(&mut open(&path).unwrap());
        let mut theirs = || candles(kind, &config, &weights);
        assert_same(&ours, &mut theirs, &format!("{kind:?}"));
    }
}

#[test]
fn a_gguf_file_is_candles_quantized_model() {
    for kind in QUANTIZED {
        let path = folder("gguf").join(format!("{}.gguf", kind.model_type()));
        kind.write_gguf(&path, LONG, &kind.weights(), GgmlDType::F32);
        let mut checkpoint = open(&path).unwrap();
        if kind == Kind::Gemma3 {
            // candle-transformers 0.11.1 puts SiLU in the place of Gemma's GELU.
            assert_eq!(checkpoint.config.layer.activation, Activation::GeluTanh);
            checkpoint.config.layer.activation = Activation::Silu;
        }
        let ours = load(&mut checkpoint);
        let mut theirs = || candles_quantized(kind, &path);
        assert_same(&ours, &mut theirs, &format!("{kind:?}"));
    }
}

/// Prompts that outgrow the window. candle-transformers 0.11.1 sees one token more than its window in a whole prompt,
/// and its window, as Gemma 3 does, in its rotating cache. Its Mistral and its Gemma 2 never forget a token that comes
/// alone.
#[test]
fn sliding_layers_see_their_window() {
    const WINDOW: usize = 8;
    let tokens = prompt(61);
    for kind in [Kind::Mistral, Kind::Gemma2, Kind::Gemma3] {
        let weights = kind.weights();
        let config = |window: usize| {
            let mut config = kind.config(window);
            if kind == Kind::Gemma2 {
                // All of candle-transformers' layers slide.
                config["layer_types"] = vec!["sliding_attention"; crate::kinds::LAYERS].into();
            }
            config
        };
        let ours = |window: usize| {
            let path = folder("sliding");
            kind.write_folder(&path, &config(window), &weights);
            load(&mut open(&path).unwrap())
        };
        let logits = |model: &Llama, n: usize| {
            let hidden = model.forward(&tokens[..n], &mut HiddenCounts::default()).unwrap();
            model.last_logits(&hidden).unwrap()
        };
        let (exact, wider) = (ours(WINDOW), ours(WINDOW + 1));
        for n in [WINDOW, WINDOW + 1, WINDOW + 2, 33, tokens.len()] {
            let theirs = candles(kind, &config(WINDOW), &weights)(&tokens[..n], 0);
            assert_close(&logits(&wider, n), &theirs, &format!("{kind:?}: whole prompt of {n}"));
        }
        let off_by_one = flat(&(logits(&wider, 61) - logits(&exact, 61)).unwrap());
        assert!(off_by_one.iter().any(|difference| difference.abs() > 0.1), "{kind:?}");
        let mut theirs = candles(kind, &config(WINDOW), &weights);
        let mut caches = exact.caches(&Default::default()).unwrap();
        for (position, token) in tokens.iter().enumerate() {
            let hidden = exact.forward_cached(&[*token], &mut caches).unwrap();
            let alone = exact.last_logits(&hidden).unwrap();
            let what = format!("{kind:?}: token {position} alone");
            assert_close(&alone, &logits(&exact, position + 1), &what);
            if kind == Kind::Gemma3 {
                assert_close(&alone, &theirs(&[*token], position), &format!("{what}, candle's"));
            }
        }
        for (layer, (cache, window)) in caches.iter().zip(exact.windows()).enumerate() {
            let kept = cache.lens().concat();
            let expected = window.unwrap_or(tokens.len());
            assert!(
                kept.iter().all(|entries| *entries <= expected),
                "{kind:?}, layer {layer}: {kept:?}"
            );
            assert_eq!(
                window.is_some(),
                kind != Kind::Gemma3 || layer != crate::kinds::PATTERN - 1
            );
        }
        // Chunks of other sizes than the window.
        let mut caches = exact.caches(&Default::default()).unwrap();
        let mut last = None;
        for chunk in tokens.chunks(13) {
            last = Some(exact.forward_cached(chunk, &mut caches).unwrap());
        }
        let chunked = exact.last_logits(&last.unwrap()).unwrap();
        assert_close(&chunked, &logits(&exact, 61), &format!("{kind:?}: chunks"));
    }
}

/// Gemma 3 270M, which `examples/llama/fetch.sh gemma3` fetches, on a prompt beyond its window, in float products. Two
/// settings are candle-transformers' own: SiLU in place of GELU, and a window of one token more. With those of the
/// model the text is likelier.
#[test]
fn gemma_270m_is_candles_quantized_gemma3_beyond_its_window() {
    // candle-transformers reads this variable once per thread: the test runs itself again with it.
    const DEQUANTIZE: &str = "CANDLE_DEQUANTIZE_ALL";
    const TOKENS: usize = 560;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/gemma-3-270m-q4_k_m.gguf");
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/moby-dick.txt");
    if !path.exists() || !text.exists() {
        eprintln!("skipped: {} or the text beside it does not exist", path.display());
        return;
    }
    if std::env::var_os(DEQUANTIZE).is_none() {
        assert!(again(
            DEQUANTIZE,
            "1",
            module_path!(),
            &["gemma_270m_is_candles_quantized_gemma3_beyond_its_window"]
        )
        .unwrap());
        return;
    }
    let text: String = fs::read_to_string(text).unwrap().chars().take(6000).collect();
    let mut checkpoint = open(&path).unwrap();
    let tokens = checkpoint.encode(&text, true).unwrap()[..TOKENS].to_vec();
    let sliding = checkpoint.config.layer.sliding.clone().unwrap();
    assert_eq!(sliding.window, 512);
    assert_eq!(sliding.layers.iter().filter(|slides| **slides).count(), 15);
    let nll = |model: &Llama| {
        let hidden = model.forward(&tokens[..65], &mut HiddenCounts::default()).unwrap();
        let logits = model.logits(&hidden, 0, 64).unwrap();
        let targets = Tensor::new(&tokens[1..65], &Device::Cpu).unwrap();
        let nll = candle_nn::loss::cross_entropy(&logits, &targets).unwrap();
        nll.to_scalar::<f32>().unwrap()
    };
    let own = nll(&load(&mut checkpoint));

    let mut as_candle = open(&path).unwrap();
    as_candle.config.layer.activation = Activation::Silu;
    as_candle.config.layer.sliding.as_mut().unwrap().window += 1;
    let ours = load(&mut as_candle);
    let hidden = ours.forward(&tokens, &mut HiddenCounts::default()).unwrap();
    let expected = candles_quantized(Kind::Gemma3, &path)(&tokens, 0);
    assert_close(&ours.last_logits(&hidden).unwrap(), &expected, "Gemma 3 270M");
    let silu = nll(&ours);
    assert!(own + 0.1 < silu, "nll {own} with GELU, {silu} with SiLU");
}

/// A folder and a GGUF file of the same weights are one model: q and k permuted or not, norms less 1 or whole.
#[test]
fn a_gguf_file_is_the_model_of_the_folder() {
    for kind in KINDS.into_iter().filter(|kind| kind.architecture().is_some()) {
        let weights = kind.weights();
        let paths = [folder("same"), folder("same").join("same.gguf")];
        // GGUF files name no pattern: 6 is llama.cpp's, which 3 layers never reach.
        let mut config = kind.config(LONG);
        if kind == Kind::Gemma3 {
            config["sliding_window_pattern"] = 6.into();
            config["rope_local_base_freq"] = 10_000.0.into();
        }
        kind.write_folder(&paths[0], &config, &weights);
        kind.write_gguf(&paths[1], LONG, &weights, GgmlDType::F32);
        let tokens = prompt(40);
        let [folder, gguf] = paths.map(|path| {
            let model = load(&mut open(&path).unwrap());
            let hidden = model.forward(&tokens, &mut HiddenCounts::default()).unwrap();
            model.last_logits(&hidden).unwrap()
        });
        assert_close(&gguf, &folder, &format!("{kind:?}"));
    }
}

/// query_pre_attn_scalar s scales logits by s^-1/2: as a query norm that is larger by (head_dim / s)^1/2.
#[test]
fn gemmas_scale_is_that_of_its_query_norms() {
    let kind = Kind::Gemma3;
    let logits = |name: &str, config: &serde_json::Value, weights: &HashMap<String, Tensor>| {
        let path = folder(name);
        kind.write_folder(&path, config, weights);
        let model = load(&mut open(&path).unwrap());
        let hidden = model.forward(&prompt(40), &mut HiddenCounts::default()).unwrap();
        model.last_logits(&hidden).unwrap()
    };
    let mut config = kind.config(LONG);
    let mut larger = kind.weights();
    for (name, tensor) in &mut larger {
        if name.contains("q_norm") {
            // (1 + w)·2 is 1 + (2w + 1).
            *tensor = ((&*tensor * 2.0).unwrap() + 1.0).unwrap();
        }
    }
    let expected = logits("larger", &config, &larger);
    config["query_pre_attn_scalar"] = (crate::kinds::WIDE_HEAD / 4).into();
    assert_close(&logits("scaled", &config, &kind.weights()), &expected, "scaled");
}

/// Newer files name a theta for each type of layers.
#[test]
fn gemmas_newer_rope_parameters_are_the_older_ones() {
    let kind = Kind::Gemma3;
    let mut config = kind.config(LONG);
    let old = folder("old-rope");
    kind.write_folder(&old, &config, &kind.weights());
    let keys = config.as_object_mut().unwrap();
    keys.remove("rope_theta");
    keys.remove("rope_local_base_freq");
    keys.remove("sliding_window_pattern");
    config["layer_types"] = serde_json::json!(["sliding_attention", "sliding_attention", "full_attention"]);
    config["rope_parameters"] = serde_json::json!({
        "full_attention": {"rope_type": "default", "rope_theta": crate::kinds::THETA},
        "sliding_attention": {"rope_type": "default", "rope_theta": crate::kinds::LOCAL_THETA}
    });
    let new = folder("new-rope");
    kind.write_folder(&new, &config, &kind.weights());
    let [old, new] = [old, new].map(|path| open(&path).unwrap().config);
    assert_eq!(old.layer, new.layer);
    assert_eq!(old.rope_theta, new.rope_theta);
    assert!(old.layer.sliding.is_some());
}

/// Settings that a kind does not have, or that this decoder does not compute, are errors that name them.
#[test]
fn other_settings_are_refused_by_name() {
    for (kind, key, value) in [
        (Kind::Llama, "query_pre_attn_scalar", serde_json::json!(64)),
        (Kind::Llama, "sliding_window", serde_json::json!(64)),
        (Kind::Mistral, "attention_bias", serde_json::json!(true)),
        (Kind::Qwen2, "mlp_bias", serde_json::json!(true)),
        (Kind::Qwen3, "query_pre_attn_scalar", serde_json::json!(64)),
        (Kind::Gemma3, "final_logit_softcapping", serde_json::json!(30.0)),
        (Kind::Gemma3, "attn_logit_softcapping", serde_json::json!(50.0)),
        (Kind::Gemma3, "use_bidirectional_attention", serde_json::json!(true)),
        (Kind::Gemma3, "hidden_activation", serde_json::json!("gelu")),
        (Kind::Gemma3, "layer_types", serde_json::json!(["full_attention"])),
        (
            Kind::Gemma3,
            "layer_types",
            serde_json::json!(["chunked", "chunked", "chunked"]),
        ),
        (
            Kind::Gemma3,
            "num_hidden_layers",
            serde_json::json!(1_000_000_000_000_u64),
        ),
    ] {
        let path = folder("refused");
        let mut config = kind.config(LONG);
        config[key] = value;
        kind.write_folder(&path, &config, &kind.weights());
        let error = format!("{:#}", open(&path).err().unwrap_or_else(|| panic!("{kind:?}: {key}")));
        assert!(error.contains(key), "{kind:?}: {key} is not in {error}");
    }
}
