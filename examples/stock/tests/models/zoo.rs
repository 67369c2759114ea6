//! Every model, tiny and with random weights, behind one trait.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_sfattention::ModelShape;
use rand::{rngs::StdRng, Rng, SeedableRng};
use serde_json::json;
use stock::models::{gemma, gemma2, gemma3, granite, helium, llama, mistral, qwen3, qwen3_flash, stable_lm};

pub const LAYERS: usize = 2;
pub const HEADS: usize = 4;
pub const HEAD_DIM: usize = 16;
/// Of the smallest model.
pub const VOCABULARY: usize = 50;
pub const NAMES: [&str; 9] = [
    "llama",
    "mistral",
    "granite",
    "helium",
    "stable_lm",
    "gemma",
    "gemma2",
    "gemma3",
    "qwen3",
];

/// The model's own cache during a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OwnCache {
    Kept,
    /// Cleared before each call, or off.
    Cleared,
}

/// A model of candle-transformers.
pub trait Model {
    /// Logits of each row's last token, for tokens `(rows, n)` that begin at `position`.
    fn step(&mut self, tokens: &Tensor, position: usize) -> candle_core::Result<Tensor>;
    /// Empties the model's own cache, where there is one.
    fn clear(&mut self);
}

macro_rules! model {
    ($name:ty) => {
        impl Model for $name {
            fn step(&mut self, tokens: &Tensor, position: usize) -> candle_core::Result<Tensor> {
                self.forward(tokens, position)
            }

            fn clear(&mut self) {
                self.clear_kv_cache()
            }
        }
    };
}

model!(mistral::Model);
model!(helium::Model);
model!(gemma::Model);
model!(gemma2::Model);
model!(gemma3::Model);
model!(qwen3::ModelForCausalLM);
model!(qwen3_flash::ModelForCausalLM);

impl Model for stable_lm::Model {
    fn step(&mut self, tokens: &Tensor, position: usize) -> candle_core::Result<Tensor> {
        self.forward(tokens, position)
    }

    /// It has no such function: its config switches the cache off.
    fn clear(&mut self) {}
}

impl Model for (llama::Llama, llama::Cache) {
    fn step(&mut self, tokens: &Tensor, position: usize) -> candle_core::Result<Tensor> {
        self.0.forward(tokens, position, &mut self.1)
    }

    /// The cache itself is off.
    fn clear(&mut self) {}
}

impl Model for (granite::Granite, granite::Cache) {
    fn step(&mut self, tokens: &Tensor, position: usize) -> candle_core::Result<Tensor> {
        self.0.forward(tokens, position, &mut self.1)
    }

    fn clear(&mut self) {}
}

/// One model's weights, from which models with other settings are made.
pub struct Zoo {
    pub name: &'static str,
    weights: VarMap,
}

impl Zoo {
    pub fn new(name: &'static str) -> Self {
        let zoo = Self {
            name,
            weights: VarMap::new(),
        };
        // A first model asks for the weights.
        zoo.model(false, OwnCache::Kept).expect("a model");
        draw(&zoo.weights).expect("weights");
        zoo
    }

    pub fn kv_heads(&self) -> usize {
        match self.name {
            // Its tensors of queries, keys and values are of one size.
            "helium" => HEADS,
            // With more, candle-transformers 0.11.1 refuses a prompt: its cache takes contiguous values only.
            "gemma3" => 1,
            _ => 2,
        }
    }

    pub fn shape(&self) -> ModelShape {
        ModelShape {
            layers: LAYERS,
            heads: HEADS,
            kv_heads: self.kv_heads(),
            head_dim: HEAD_DIM,
        }
    }

    /// The model with its own attention, or with `flash_attn`.
    pub fn model(&self, flash: bool, own: OwnCache) -> Result<Box<dyn Model>> {
        self.model_with(flash, own, json!({}))
    }

    /// As [`Self::model`], with other entries of the config.
    pub fn model_with(&self, flash: bool, own: OwnCache, changes: serde_json::Value) -> Result<Box<dyn Model>> {
        let mut config = json!({
            "vocab_size": VOCABULARY, "hidden_size": HEADS * HEAD_DIM, "intermediate_size": 96,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": self.kv_heads(),
            "head_dim": HEAD_DIM, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0, "hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": false, "mlp_bias": false, "bos_token_id": 1, "eos_token_id": 2,
            "tie_word_embeddings": false, "partial_rotary_factor": 0.5, "use_cache": own == OwnCache::Kept,
            "query_pre_attn_scalar": HEAD_DIM, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 2,
            "max_window_layers": 0, "use_sliding_window": false,
        });
        if self.name.starts_with("gemma") {
            config["hidden_act"] = json!(null);
        }
        if self.name == "gemma3" {
            config["sliding_window"] = json!(256);
        }
        for (name, value) in changes.as_object().into_iter().flatten() {
            config[name] = value.clone();
        }
        config["use_flash_attn"] = json!(flash);
        let vb = VarBuilder::from_varmap(&self.weights, DType::F32, &Device::Cpu);
        load(self.name, config, flash, own, vb)
    }
}

/// Draws matrices and biases anew: the same ones in every run, unlike those of a `VarMap`. Vectors of norms stay.
fn draw(weights: &VarMap) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(11);
    let vars = weights.data().lock().expect("weights");
    let mut names: Vec<&String> = vars.keys().collect();
    names.sort();
    for name in names {
        let var = &vars[name];
        let spread = match var.dims() {
            [_, columns] if !name.contains("embed") => (3.0 / *columns as f32).sqrt(),
            [_, _] => 1.7,
            _ if name.ends_with("bias") => 0.2,
            _ => continue,
        };
        let values: Vec<f32> = (0..var.elem_count())
            .map(|_| rng.random_range(-spread..spread))
            .collect();
        var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu)?)?;
    }
    Ok(())
}

/// The model of this name with these settings and weights, with its own attention or with `flash_attn`.
pub fn load(
    name: &str,
    config: serde_json::Value,
    flash: bool,
    own: OwnCache,
    vb: VarBuilder,
) -> Result<Box<dyn Model>> {
    let kept = own == OwnCache::Kept;
    Ok(match name {
        "llama" => {
            let config = serde_json::from_value::<llama::LlamaConfig>(config)?.into_config(flash);
            let cache = llama::Cache::new(kept, DType::F32, &config, &Device::Cpu)?;
            Box::new((llama::Llama::load(vb, &config)?, cache))
        }
        "granite" => {
            let config = serde_json::from_value::<granite::GraniteConfig>(config)?.into_config(flash);
            let cache = granite::Cache::new(kept, DType::F32, &config, &Device::Cpu)?;
            Box::new((granite::Granite::load(vb, &config)?, cache))
        }
        "mistral" => Box::new(mistral::Model::new(&serde_json::from_value(config)?, vb)?),
        "helium" => Box::new(helium::Model::new(&serde_json::from_value(config)?, vb)?),
        "stable_lm" => Box::new(stable_lm::Model::new(&serde_json::from_value(config)?, vb)?),
        "gemma" => Box::new(gemma::Model::new(flash, &serde_json::from_value(config)?, vb)?),
        "gemma2" => Box::new(gemma2::Model::new(flash, &serde_json::from_value(config)?, vb)?),
        "gemma3" => Box::new(gemma3::Model::new(flash, &serde_json::from_value(config)?, vb)?),
        "qwen3" if flash => Box::new(qwen3_flash::ModelForCausalLM::new(
            &serde_json::from_value(config)?,
            vb,
        )?),
        "qwen3" => Box::new(qwen3::ModelForCausalLM::new(&serde_json::from_value(config)?, vb)?),
        other => anyhow::bail!("no model {other}"),
    })
}
