//! The model that a run starts from: a checkpoint, read as in the llama example, or a new one.

use std::collections::BTreeMap;

use anyhow::{bail, ensure, Context, Result};
use candle_core::{Tensor, Var};
use serde_json::{json, Value};
use tokenizers::Tokenizer;

use crate::data::{vocabulary_size, END_OF_TEXT};
use crate::floats::all_weights;
use crate::load::text::{Edge, Start, Text};
use crate::load::{Checkpoint, LoadOptions};
use crate::model::LlamaConfig;
use crate::rope::{Llama3Scaling, Pairing, RopeScaling};

/// An export's settings about text, besides its tokenizer.
#[derive(Clone, Debug)]
pub struct Framing {
    /// Ids that end a text.
    pub ends: Vec<u32>,
    /// What the llama example puts before every sequence, and so training too.
    pub start: Start,
    /// Names and contents of further files, such as tokenizer_config.json.
    pub files: Vec<(String, Vec<u8>)>,
}

impl Framing {
    /// The framing of a tokenizer that was trained here.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let end = tokenizer.token_to_id(END_OF_TEXT).into_iter().collect();
        let text = Text::new(tokenizer.clone(), Edge::default(), Edge::default(), end, None)?;
        Ok(Self {
            start: text.start()?,
            ends: text.ends,
            files: Vec::new(),
        })
    }
}

/// A checkpoint with its weights in f32, by their Hugging Face names, with rotary pairs of halves.
pub struct Source {
    pub config: LlamaConfig,
    pub tokenizer: Tokenizer,
    pub framing: Framing,
    /// How the checkpoint itself pairs the numbers of a key.
    pub pairing: Pairing,
    weights: BTreeMap<String, Tensor>,
}

impl Source {
    /// `model`: a value of `llama --model`. The context becomes at least `context`, and the embedding gets a row for
    /// each of the tokenizer's ids.
    pub fn open(model: &str, context: usize) -> Result<Self> {
        let mut checkpoint = Checkpoint::open(model, LoadOptions::default())?;
        ensure!(
            checkpoint.config.layer.is_llama(),
            "{model}: expected layers of a Llama, got {:?}; train fine-tunes Llama, Mistral without a window and Qwen2",
            checkpoint.config.layer
        );
        let weights = checkpoint.read(all_weights)?;
        let mut config = checkpoint.config.clone();
        let start = checkpoint.text.start()?;
        let pairing = config.rope_pairing;
        config.rope_pairing = Pairing::Halves;
        config.rope_scaling = named(&config).with_context(|| model.to_string())?;
        config.context_length = config.context_length.max(context);
        let ids = vocabulary_size(&checkpoint.text.tokenizer).with_context(|| model.to_string())?;
        config.vocab_size = config.vocab_size.max(ids);
        Ok(Self {
            config,
            framing: Framing {
                ends: checkpoint.text.ends,
                start,
                files: checkpoint.companions,
            },
            tokenizer: checkpoint.text.tokenizer,
            pairing,
            weights,
        })
    }

    /// Sets a model's weights. Biases that the checkpoint lacks stay 0. Rows for ids that it lacks become the mean of
    /// the others, so that none of these ids is likelier than the average one.
    pub fn fill(&self, vars: &BTreeMap<String, Var>) -> Result<()> {
        for (name, var) in vars {
            let weight = match self.weights.get(name) {
                Some(weight) => weight.clone(),
                None if name.ends_with(".bias") => continue,
                None => bail!("{name}: expected this weight, found none; this is a defect of the example"),
            };
            let weight = match var.dim(0)?.saturating_sub(weight.dim(0)?) {
                0 => weight,
                missing => {
                    let row = weight.mean_keepdim(0)?;
                    Tensor::cat(&[&weight, &row.repeat((missing, 1))?], 0)?
                }
            };
            ensure!(
                weight.dims() == var.dims(),
                "{name}: expected shape {:?}, got {:?}; this is a defect of the example",
                var.dims(),
                weight.dims()
            );
            var.set(&weight.to_device(var.device())?)?;
        }
        Ok(())
    }
}

/// The scaling in config.json's terms. GGUF files store Llama 3's as a factor per frequency; all Llama 3 models made
/// these with the same three numbers.
fn named(config: &LlamaConfig) -> Result<RopeScaling> {
    let RopeScaling::Factors(factors) = &config.rope_scaling else {
        return Ok(config.rope_scaling.clone());
    };
    let most = factors.iter().copied().fold(1.0, f64::max);
    let llama3 = Llama3Scaling {
        factor: most,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192.0,
    };
    let half = factors.len() as f64;
    let same = factors.iter().enumerate().all(|(i, factor)| {
        let frequency = config.rope_theta.powf(-(i as f64) / half);
        (frequency / llama3.scaled(frequency) - factor).abs() <= 1e-4 * factor
    });
    ensure!(
        same,
        "rope_freqs.weight: expected Llama 3's factors, got others, which config.json has no name for; fine-tune the \
         Hugging Face folder of the model"
    );
    Ok(RopeScaling::Llama3(llama3))
}

/// config.json with the model's own numbers.
pub fn config_json(config: &LlamaConfig) -> Value {
    let mut json = json!({
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
    });
    for (key, on) in [("attention_bias", config.attention_bias), ("mlp_bias", config.mlp_bias)] {
        if on {
            json[key] = true.into();
        }
    }
    match &config.rope_scaling {
        RopeScaling::None | RopeScaling::Factors(_) => {}
        RopeScaling::Linear(factor) => json["rope_scaling"] = json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3(scaling) => {
            json["rope_scaling"] = json!({
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context as u64,
            });
        }
    }
    json
}
