//! A model without a file: its shape by name or from a config.json, its weights drawn from a seed.

use std::fs;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::CompressedAttention;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{json, Value};

use crate::load::{self, Formed, LoadOptions};
use crate::model::{Llama, LlamaConfig};
use crate::ranks::Ranks;
use crate::stats::{gib, memory_available};
use crate::weights::{Linear, Weights};

/// The shapes that have a name.
const NAMES: [&str; 5] = [
    "llama-3.1-8b",
    "llama-3.2-1b",
    "qwen2.5-32b",
    "smollm2-1.7b",
    "smollm2-135m",
];

/// The config.json of a shape that has a name.
fn named(name: &str) -> Option<Value> {
    let llama3 = |factor: f64| {
        json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192})
    };
    // Layers, hidden, inner, heads, KV heads, vocabulary, context.
    let (sizes, theta, scaling, tied) = match name {
        "llama-3.1-8b" => (
            [32, 4096, 14336, 32, 8, 128_256, 131_072],
            500_000.0,
            llama3(8.0),
            false,
        ),
        "llama-3.2-1b" => ([16, 2048, 8192, 32, 8, 128_256, 131_072], 500_000.0, llama3(32.0), true),
        "qwen2.5-32b" => (
            [64, 5120, 27648, 40, 8, 152_064, 32768],
            1_000_000.0,
            Value::Null,
            false,
        ),
        "smollm2-1.7b" => ([24, 2048, 8192, 32, 32, 49_152, 8192], 130_000.0, Value::Null, true),
        "smollm2-135m" => ([30, 576, 1536, 9, 3, 49_152, 8192], 100_000.0, Value::Null, true),
        _ => return None,
    };
    let kind = if name.starts_with("qwen2.5") { "qwen2" } else { "llama" };
    let [layers, hidden, inner, heads, kv_heads, vocabulary, context] = sizes;
    Some(json!({
        "model_type": kind, "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": theta, "rope_scaling": scaling,
        "tie_word_embeddings": tied
    }))
}

/// The shape of a model.
pub struct Shape {
    pub name: String,
    pub config: LlamaConfig,
}

impl Shape {
    /// `name` is one of the names, or a config.json.
    pub fn open(name: &str) -> Result<Self> {
        let read = || -> Result<Value> {
            if let Some(json) = named(name) {
                return Ok(json);
            }
            ensure!(
                Path::new(name).is_file(),
                "expected {} or a config.json, found no such file; give one of these",
                NAMES.join(", ")
            );
            let text = fs::read_to_string(name)?;
            serde_json::from_str(&text).context("expected a config.json; give the one of a model of the Llama family")
        };
        let config = read()
            .and_then(|json| load::shape(&json))
            .with_context(|| format!("shape {name}"))?;
        Ok(Self {
            name: name.into(),
            config,
        })
    }

    /// The numbers of its matrices.
    pub fn parameters(&self) -> u128 {
        let config = &self.config;
        let [hidden, inner, vocabulary, layers] = [
            config.hidden_size,
            config.intermediate_size,
            config.vocab_size,
            config.layers,
        ]
        .map(|size| size as u128);
        let heads = (2 * config.heads as u128 + 2 * config.kv_heads as u128) * config.head_dim as u128;
        let tables = if config.tied { 1 } else { 2 };
        hidden * (tables * vocabulary + layers * (heads + 3 * inner))
    }

    /// Refuses weights that the CPU's memory has no place for: a process that takes too much is killed without a word.
    pub fn check_memory(&self, dtype: DType) -> Result<()> {
        let bytes = self.parameters() * dtype.size_in_bytes() as u128;
        if let Some(free) = memory_available() {
            ensure!(
                bytes <= u128::from(free),
                "shape {}: expected weights of at most {:.1} GiB, the memory that is free, got {:.1} GiB in {}; give \
                 a smaller shape, or --dtype bf16",
                self.name,
                gib(free as f64),
                gib(bytes as f64),
                dtype.as_str()
            );
        }
        Ok(())
    }

    /// Draws the weights, each matrix as `form` gives it; `attention` holds one entry per layer. Every rank draws whole
    /// matrices, one at a time, and keeps its part, so that all ranks have the weights of one.
    pub fn load(
        &self,
        options: &LoadOptions,
        seed: u64,
        attention: Vec<CompressedAttention>,
        form: &dyn Fn(Linear) -> Result<Linear>,
        ranks: &Ranks,
    ) -> Result<Llama> {
        let mut inner = RandomWeights::new(&self.config, options, seed)?;
        let inner = &mut inner;
        Llama::load(&mut Formed { inner, form }, &self.config, attention, ranks)
    }
}

/// Weights drawn one tensor at a time, on the device: no copy of the model is anywhere else. Equal seeds draw equal
/// weights on one kind of device.
struct RandomWeights {
    config: LlamaConfig,
    dtype: DType,
    device: Device,
    /// On the CPU, where candle's own generator takes no seed.
    random: StdRng,
}

impl RandomWeights {
    fn new(config: &LlamaConfig, options: &LoadOptions, seed: u64) -> Result<Self> {
        if !options.device.is_cpu() {
            options.device.set_seed(seed)?;
        }
        Ok(Self {
            config: config.clone(),
            dtype: options.dtype,
            device: options.device.clone(),
            random: StdRng::seed_from_u64(seed),
        })
    }

    /// Numbers of this mean and standard deviation, uniform.
    fn draw(&mut self, shape: &[usize], mean: f32, deviation: f32) -> Result<Tensor> {
        let half = deviation * 3f32.sqrt();
        let (low, high) = (mean - half, mean + half);
        let tensor = match self.device.is_cpu() {
            true => {
                let count = shape.iter().product();
                let values: Vec<f32> = (0..count).map(|_| self.random.random_range(low..high)).collect();
                Tensor::from_vec(values, shape, &self.device)?
            }
            false => Tensor::rand(low, high, shape, &self.device)?,
        };
        Ok(tensor.to_dtype(self.dtype)?)
    }

    /// A matrix whose products with numbers of mean square 1 have a mean square of about 1.
    fn matrix(&mut self, rows: usize, columns: usize) -> Result<Tensor> {
        self.draw(&[rows, columns], 0.0, 1.0 / (columns as f32).sqrt())
    }
}

impl Weights for RandomWeights {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn device(&self) -> Device {
        self.device.clone()
    }

    /// Every tensor that is asked for is there.
    fn len(&self) -> usize {
        usize::MAX
    }

    fn shape(&self, _path: &str) -> Option<Vec<usize>> {
        None
    }

    fn table(&mut self, _path: &str, rows: usize, columns: usize) -> Result<Linear> {
        let weight = self.matrix(rows, columns)?;
        Ok(Linear::Float(candle_nn::Linear::new(weight, None)))
    }

    fn linear(&mut self, path: &str, rows: usize, columns: usize) -> Result<Linear> {
        let weight = self.matrix(rows, columns)?;
        let bias = match self.config.has_bias(path) {
            true => Some(self.bias(path, rows)?),
            false => None,
        };
        Ok(Linear::Float(candle_nn::Linear::new(weight, bias)))
    }

    fn vector(&mut self, _path: &str, len: usize) -> Result<Tensor> {
        self.draw(&[len], 1.0, 0.1)
    }

    fn bias(&mut self, _path: &str, len: usize) -> Result<Tensor> {
        self.draw(&[len], 0.0, 0.02)
    }

    fn check_all_read(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Token ids drawn from a seed.
pub struct RandomTokens {
    random: StdRng,
    vocab_size: u32,
}

impl RandomTokens {
    pub fn new(config: &LlamaConfig, seed: u64) -> Self {
        Self {
            random: StdRng::seed_from_u64(seed),
            // A config's sizes fit u32.
            vocab_size: config.vocab_size as u32,
        }
    }

    pub fn draw(&mut self, count: usize) -> Vec<u32> {
        (0..count)
            .map(|_| self.random.random_range(0..self.vocab_size))
            .collect()
    }
}
