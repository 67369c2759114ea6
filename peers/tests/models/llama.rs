//! The llama example's model as a module: its logits against candle-transformers' own models, and damaged files.

use std::fs;
use std::path::{Path, PathBuf};

use crate::again::again;
use crate::fixture::{Fixture, CONTEXT};
use crate::load::{Checkpoint, LoadOptions};
use crate::model::{HiddenCounts, Llama};
use candle_core::quantized::gguf_file::Content;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sfattention::{
    AttentionOptions, CacheOptions, CompressedAttention, CompressionConfig, HeadStrategies, MergeStrategy,
};
use candle_transformers::models::{llama, quantized_llama};

/// Damaged GGUF files never cause a panic: cuts anywhere in the file, and changed bytes anywhere in its header.
#[test]
fn damaged_gguf_files_never_panic() {
    let fixture = Fixture::get();
    let whole = fs::read(fixture.folder.join("q8.gguf")).unwrap();
    let path = fixture.path("damaged.gguf");
    let attempt = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        open(&path).and_then(|mut checkpoint| {
            let attention = attention_off(checkpoint.config.layers);
            checkpoint.load(attention)
        })
    };
    for cut in (0..whole.len()).step_by(whole.len() / 97) {
        assert!(attempt(&whole[..cut]).is_err(), "cut at {cut}");
    }
    for (position, value) in (4..whole.len())
        .step_by(13)
        .take(1500)
        .zip([0, 1, 0x7f, 0xff].into_iter().cycle())
    {
        let mut bytes = whole.clone();
        bytes[position] = value;
        let _ = attempt(&bytes);
    }
}

fn open(model: &str) -> anyhow::Result<Checkpoint> {
    open_as(model, false)
}

fn open_as(model: &str, dequantize: bool) -> anyhow::Result<Checkpoint> {
    let options = LoadOptions {
        dequantize,
        ..Default::default()
    };
    Checkpoint::open(model, options)
}

fn attention_off(layers: usize) -> Vec<CompressedAttention> {
    attention(layers, MergeStrategy::Off)
}

fn attention(layers: usize, strategy: MergeStrategy) -> Vec<CompressedAttention> {
    let (strategies, config) = (HeadStrategies::uniform(strategy), CompressionConfig::pretrained());
    vec![CompressedAttention::new(strategies, config, AttentionOptions::default()).unwrap(); layers]
}

/// Our model with every head off, and a text's tokens.
fn dense(model: &str, text: &str) -> (Llama, Vec<u32>) {
    let mut checkpoint = open(model).unwrap();
    let tokens = checkpoint.encode(text, false).unwrap();
    let attention = attention_off(checkpoint.config.layers);
    (checkpoint.load(attention).unwrap(), tokens)
}

fn last_logits(model: &Llama, tokens: &[u32]) -> Vec<f32> {
    let hidden = model.forward(tokens, &mut HiddenCounts::default()).unwrap();
    flat(model.logits(&hidden, tokens.len() - 1, 1).unwrap())
}

fn flat(logits: Tensor) -> Vec<f32> {
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

fn ids(tokens: &[u32]) -> Tensor {
    Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap()
}

fn assert_all_close(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len());
    for (id, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= 1e-3, "{what}, token {id}: {a} against {b}");
    }
}

fn candles_quantized_llama(model: &str) -> quantized_llama::ModelWeights {
    let mut file = fs::File::open(model).unwrap();
    let content = Content::read(&mut file).unwrap();
    quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap()
}

/// candle-transformers forgets its cache when a call starts at position 0, so each prefix is run from its beginning.
fn assert_same_as_quantized_llama(model: &str, text: &str, prefixes: &[usize]) {
    let mut theirs = candles_quantized_llama(model);
    let (ours, tokens) = dense(model, text);
    for &n in prefixes {
        let (ours, theirs) = (
            last_logits(&ours, &tokens[..n]),
            theirs.forward(&ids(&tokens[..n]), 0).unwrap(),
        );
        assert_all_close(&ours, &flat(theirs), &format!("{model}: prefix {n}"));
    }
}

#[test]
fn dense_logits_are_those_of_candles_quantized_llama() {
    let fixture = Fixture::get();
    let prose = fs::read_to_string(fixture.folder.join("text.txt")).unwrap();
    for model in ["f32.gguf", "q8.gguf"] {
        assert_same_as_quantized_llama(&fixture.path(model), &prose, &[1, 2, 33, CONTEXT]);
    }
}

#[test]
fn dense_logits_are_those_of_candles_llama_with_and_without_rope_scaling() {
    let fixture = Fixture::get();
    let prose = fs::read_to_string(fixture.folder.join("text.txt")).unwrap();
    for model in ["hf", "llama3"] {
        let folder = fixture.folder.join(model);
        let config: llama::LlamaConfig =
            serde_json::from_str(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
        let config = config.into_config(false);
        let bytes = fs::read(folder.join("model.safetensors")).unwrap();
        let weights = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu).unwrap();
        let theirs = llama::Llama::load(weights, &config).unwrap();
        let (ours, tokens) = dense(&fixture.path(model), &prose);
        for n in [1, 2, 33, CONTEXT] {
            let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
            let theirs = theirs.forward(&ids(&tokens[..n]), 0, &mut cache).unwrap();
            assert_all_close(
                &last_logits(&ours, &tokens[..n]),
                &flat(theirs),
                &format!("{model}: prefix {n}"),
            );
        }
    }
}

const ISHMAEL: &str =
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my \
                       purse, and nothing particular to interest me on shore, I thought I would sail about a little \
                       and see the watery part of the world. It is a way I have of driving off the spleen.";

/// The checkpoint that examples/llama/fetch.sh fetches, or the one SFATTENTION_GGUF names.
fn real_checkpoint() -> Option<String> {
    let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/SmolLM2-135M-Instruct.Q4_1.gguf");
    let model = std::env::var_os("SFATTENTION_GGUF").map_or(fetched, PathBuf::from);
    if !model.exists() {
        eprintln!(
            "skipped: {} does not exist; examples/llama/fetch.sh fetches it",
            model.display()
        );
        return None;
    }
    Some(model.to_str().unwrap().into())
}

/// With float products. Quantized products round activations to 8 bits first, so that a difference in the last bit
/// before one can become a step of 1/127 after it: see the next test.
#[test]
fn dense_logits_of_a_real_checkpoint() {
    // candle-transformers reads this variable once per thread, and has no other switch: the test runs itself again with
    // it.
    const DEQUANTIZE: &str = "CANDLE_DEQUANTIZE_ALL";
    let Some(model) = real_checkpoint() else { return };
    if std::env::var_os(DEQUANTIZE).is_some() {
        return assert_same_as_quantized_llama(&model, ISHMAEL, &[1, 17, 60]);
    }
    assert!(again(DEQUANTIZE, "1", module_path!(), &["dense_logits_of_a_real_checkpoint"]).unwrap());
}

/// With quantized products: activations are rounded to 8 bits, so that a difference in the last bit before one can
/// become a step of 1/127 after it, and two ways to compute one model differ by as much as either differs from the
/// model in floats. That model is the judge: we may differ from it by twice what candle-transformers does.
#[test]
fn quantized_logits_of_a_real_checkpoint_are_as_near_to_floats_as_candles() {
    const TOKENS: usize = 60;
    let Some(model) = real_checkpoint() else { return };
    let mut checkpoint = open_as(&model, true).unwrap();
    let tokens = checkpoint.encode(ISHMAEL, false).unwrap()[..TOKENS].to_vec();
    let attention = attention_off(checkpoint.config.layers);
    let exact = checkpoint.load(attention).unwrap();
    let (ours, _) = dense(&model, ISHMAEL);
    let mut theirs = candles_quantized_llama(&model);
    let (mut own, mut candles) = (Vec::new(), Vec::new());
    for n in [1, 17, TOKENS] {
        let exact = last_logits(&exact, &tokens[..n]);
        let distance = |other: &[f32]| -> f64 {
            let squares = exact.iter().zip(other).map(|(a, b)| f64::from(a - b).powi(2));
            (squares.sum::<f64>() / exact.len() as f64).sqrt()
        };
        own.push(distance(&last_logits(&ours, &tokens[..n])));
        candles.push(distance(&flat(theirs.forward(&ids(&tokens[..n]), 0).unwrap())));
    }
    eprintln!("root mean square distance from floats: ours {own:?}, candle's {candles:?}");
    for (own, candles) in own.iter().zip(&candles) {
        assert!(own <= &(2.0 * candles), "ours {own}, candle's {candles}");
    }
}

/// Greedy text through the cache equals greedy text that recomputes everything at every step. Under a causal rule a row
/// sees only its past, so one run over the prompt and the generated text has at each position the logits that a run up
/// to there would end with. If the likeliest token of each is the generated one, recomputing generates the same text.
///
/// With float products: quantized ones round activations to 8 bits, see above, so that a difference in the last bit
/// between a chunk's product and a single row's can change a token.
#[test]
fn cached_greedy_text_of_a_real_checkpoint_is_the_recomputed_text() {
    const TOKENS: usize = 200;
    let Some(path) = real_checkpoint() else { return };
    for strategy in [MergeStrategy::Off, MergeStrategy::Similarity] {
        let mut checkpoint = open_as(&path, true).unwrap();
        let mut tokens = checkpoint.encode(ISHMAEL, false).unwrap();
        let prompt = tokens.len();
        let attention = attention(checkpoint.config.layers, strategy);
        let model = checkpoint.load(attention).unwrap();
        let mut caches = model.caches(&CacheOptions::default()).unwrap();
        let mut next = 0;
        for chunk in tokens.chunks(37) {
            next = likeliest(
                &model,
                &model.forward_cached(chunk, &mut caches).unwrap(),
                chunk.len() - 1,
            );
        }
        while tokens.len() < prompt + TOKENS {
            tokens.push(next);
            next = likeliest(&model, &model.forward_cached(&[next], &mut caches).unwrap(), 0);
        }
        let whole = model.forward(&tokens, &mut HiddenCounts::default()).unwrap();
        for (index, token) in tokens[prompt..].iter().enumerate() {
            let again = likeliest(&model, &whole, prompt + index - 1);
            assert_eq!(again, *token, "{strategy:?}, token {index}");
        }
        let kept: usize = caches.iter().flat_map(|cache| cache.lens().concat()).sum();
        let lists = caches.len() * checkpoint.config.kv_heads;
        eprintln!("{strategy:?}: {} of {} entries kept", kept / lists, tokens.len());
        assert_eq!(kept == lists * tokens.len(), strategy == MergeStrategy::Off);
    }
}

fn likeliest(model: &Llama, hidden: &Tensor, row: usize) -> u32 {
    let logits = model.logits(hidden, row, 1).unwrap().squeeze(0).unwrap();
    logits.argmax(0).unwrap().to_scalar().unwrap()
}
