//! Checkpoints in the llama example: it gives the logits of a plain f64 Llama, or an error that names what it does not
//! read.

mod fp8;
mod gguf;
mod hf;

use std::collections::HashMap;

use crate::fixture::HIDDEN;
use crate::load::{Checkpoint, LoadOptions};
use crate::model::{HiddenCounts, Llama};
use crate::plain_llama::PlainLlama;
use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_sfattention::{AttentionOptions, CompressedAttention, CompressionConfig, HeadStrategies, MergeStrategy};

/// Every third byte token and a few others, so that positions and tokens vary.
const IDS: [u32; 24] = [
    3, 77, 12, 200, 41, 41, 5, 130, 251, 8, 99, 64, 17, 180, 2, 90, 33, 33, 210, 71, 150, 28, 9, 119,
];

type Tensors = HashMap<String, Tensor>;

/// The dense model of a checkpoint, in f32.
pub fn load_dense(model: &str) -> Result<Llama> {
    let mut checkpoint = Checkpoint::open(model, LoadOptions::default())?;
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let off = CompressedAttention::new(off, CompressionConfig::pretrained(), AttentionOptions::default())?;
    let layers = checkpoint.config.layers;
    checkpoint.load(vec![off; layers])
}

/// The checkpoint's logits are those of a plain Llama with these weights and frequencies.
fn assert_logits(model: &str, weights: &Tensors, frequencies: Vec<f64>) {
    let expected = PlainLlama::new(weights, frequencies).last_logits(&IDS, HIDDEN);
    let llama = load_dense(model).unwrap_or_else(|error| panic!("{model}: {error:#}"));
    let hidden = llama.forward(&IDS, &mut HiddenCounts::default()).unwrap();
    let logits: Vec<f32> = llama.last_logits(&hidden).unwrap().to_vec1().unwrap();
    assert_eq!(logits.len(), expected.len());
    for (id, (got, expected)) in logits.iter().zip(&expected).enumerate() {
        let difference = (f64::from(*got) - expected).abs();
        assert!(difference <= 2e-4, "{model}: token {id}: {got} instead of {expected}");
    }
}

/// Asserts one error that has every part.
fn assert_refused(model: &str, parts: &[&str]) -> String {
    let error = match load_dense(model) {
        Ok(_) => panic!("{model}: expected an error with {parts:?}, got a model"),
        Err(error) => format!("{error:#}"),
    };
    for part in parts {
        assert!(error.contains(part), "{model}: {part:?} is not in {error}");
    }
    error
}

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The weights, and a bias for each of these matrices.
fn with_biases(paths: &[&str]) -> Tensors {
    let mut weights = crate::fixture::weights();
    for (seed, path) in paths.iter().enumerate() {
        let rows = weights[&format!("{path}.weight")].dim(0).unwrap();
        weights.insert(format!("{path}.bias"), random(&[rows], seed as u64 + 3));
    }
    weights
}

#[test]
fn ids_beyond_the_vocabulary_are_refused() {
    let model = crate::fixture::Fixture::get().path("hf");
    let llama = load_dense(&model).unwrap();
    let size = crate::fixture::tokens().len() as u32;
    for id in [size, 1 << 20, u32::MAX] {
        let error = llama
            .forward(&[1, id], &mut HiddenCounts::default())
            .unwrap_err()
            .to_string();
        let expected = format!("expected one below {size}, the size of the model's vocabulary, got {id}");
        assert!(error.contains(&expected), "{error}");
        let mut caches = llama.caches(&Default::default()).unwrap();
        assert!(llama.forward_cached(&[id], &mut caches).is_err());
    }
    assert!(llama.forward(&[size - 1], &mut HiddenCounts::default()).is_ok());
}
