//! Hugging Face checkpoints: config.json, tokenizer.json and safetensors, from a folder or through the hub.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::de::DeserializeOwned;
use serde::Deserialize;

use super::hf_tokenizer::{text, TextFiles};
use super::hub::Hub;
use super::Checkpoint;
use crate::model::LlamaConfig;
use crate::rope::{Llama3Scaling, Pairing, RopeScaling};
use crate::weights::{Linear, Weights};

/// The files of one checkpoint on this machine.
pub struct Files {
    config: PathBuf,
    text: TextFiles,
    weights: Vec<PathBuf>,
}

/// Where [`Files`] are taken from, by their name in the checkpoint.
pub(super) trait Origin {
    fn required(&self, name: &str) -> Result<PathBuf>;
    /// None where the checkpoint has no such file; an error where that cannot be told.
    fn optional(&self, name: &str) -> Result<Option<PathBuf>>;
}

struct Folder<'a>(&'a Path);

impl Origin for Folder<'_> {
    fn required(&self, name: &str) -> Result<PathBuf> {
        self.optional(name)?.with_context(|| {
            format!(
                "{}: expected a folder with {name} in it, found no such file; fetch the whole checkpoint",
                self.0.display()
            )
        })
    }

    fn optional(&self, name: &str) -> Result<Option<PathBuf>> {
        let path = self.0.join(name);
        Ok(path.is_file().then_some(path))
    }
}

impl Files {
    pub fn in_folder(folder: &Path) -> Result<Self> {
        Self::collect(&Folder(folder))
    }

    pub fn from_hub(id: &str) -> Result<Self> {
        Self::collect(&Hub::new(id)?)
    }

    fn collect(origin: &dyn Origin) -> Result<Self> {
        const INDEX: &str = "model.safetensors.index.json";
        #[derive(Deserialize)]
        struct Index {
            weight_map: HashMap<String, String>,
        }
        let config = origin.required("config.json")?;
        let text = TextFiles::collect(origin)?;
        let weights = match origin.optional(INDEX)? {
            Some(path) => {
                let shards: BTreeSet<String> = read_json::<Index>(&path)?.weight_map.into_values().collect();
                ensure!(
                    !shards.is_empty(),
                    "{}: expected at least one shard, got none; fetch it again",
                    path.display()
                );
                shards
                    .iter()
                    .map(|shard| origin.required(shard))
                    .collect::<Result<_>>()?
            }
            None => vec![origin.required("model.safetensors")?],
        };
        Ok(Self { config, text, weights })
    }
}

pub fn open(files: &Files, dtype: DType, device: &Device) -> Result<Checkpoint> {
    let raw: RawConfig = read_json(&files.config)?;
    // SAFETY: the maps are only read, and live no longer than this process; a checkpoint that another process
    // rewrites meanwhile is outside what mapping a file can promise.
    let tensors = unsafe { VarBuilder::from_mmaped_safetensors(&files.weights, dtype, device) };
    let tensors = tensors.with_context(|| {
        format!(
            "{}: expected whole safetensors files, got a damaged or truncated one; fetch it again",
            files.weights[0].display()
        )
    })?;
    Ok(Checkpoint {
        config: raw
            .into_config()
            .with_context(|| format!("{}", files.config.display()))?,
        text: text(&files.text)?,
        weights: Box::new(HfWeights {
            name: files.weights[0].display().to_string(),
            tensors,
        }),
    })
}

struct HfWeights {
    /// Where they come from, for messages.
    name: String,
    tensors: VarBuilder<'static>,
}

impl HfWeights {
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.tensors.get(shape, name);
        tensor.with_context(|| {
            format!(
                "{}: expected {name} of shape {shape:?}; fetch the checkpoint again",
                self.name
            )
        })
    }
}

impl Weights for HfWeights {
    fn dtype(&self) -> DType {
        self.tensors.dtype()
    }

    fn device(&self) -> Device {
        self.tensors.device().clone()
    }

    fn linear(&mut self, path: &str, rows: usize, columns: usize, bias: bool) -> Result<Linear> {
        let weight = self.get(&format!("{path}.weight"), &[rows, columns])?;
        let bias = match bias {
            true => Some(self.get(&format!("{path}.bias"), &[rows])?),
            false => None,
        };
        Ok(Linear::Float(candle_nn::Linear::new(weight, bias)))
    }

    fn vector(&mut self, path: &str, len: usize) -> Result<Tensor> {
        self.get(&format!("{path}.weight"), &[len])
    }
}

/// config.json, as far as it is read.
#[derive(Deserialize)]
struct RawConfig {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    vocab_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f64,
    max_position_embeddings: usize,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    /// Where newer files keep theta and scaling.
    rope_parameters: Option<RawRope>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default = "silu")]
    hidden_act: String,
}

fn silu() -> String {
    "silu".into()
}

#[derive(Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

impl RawRope {
    fn scaling(&self) -> Result<RopeScaling> {
        let number = |name: &str, value: Option<f64>| -> Result<f64> {
            let value = value.with_context(|| format!("rope scaling: expected {name}, found none"))?;
            ensure!(
                value.is_finite() && value > 0.0,
                "rope scaling: expected {name} above 0, got {value}"
            );
            Ok(value)
        };
        match self.rope_type.as_deref() {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear(number("factor", self.factor)?)),
            Some("llama3") => Ok(RopeScaling::Llama3(Llama3Scaling {
                factor: number("factor", self.factor)?,
                low_freq_factor: number("low_freq_factor", self.low_freq_factor)?,
                high_freq_factor: number("high_freq_factor", self.high_freq_factor)?,
                original_context: number(
                    "original_max_position_embeddings",
                    self.original_max_position_embeddings,
                )?,
            })),
            Some(other) => bail!("rope scaling: expected default, linear or llama3, got {other}; not supported"),
        }
    }
}

impl RawConfig {
    fn into_config(self) -> Result<LlamaConfig> {
        ensure!(
            self.model_type == "llama",
            "model_type: expected llama, got {}; this example runs Llama checkpoints only",
            self.model_type
        );
        ensure!(
            self.hidden_act == "silu",
            "hidden_act: expected silu, got {}; not supported",
            self.hidden_act
        );
        ensure!(
            self.num_attention_heads > 0,
            "num_attention_heads: expected at least 1, got 0"
        );
        let head_dim = self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads);
        let rope = self.rope_scaling.as_ref().or(self.rope_parameters.as_ref());
        let theta = self
            .rope_theta
            .or(self.rope_parameters.as_ref().and_then(|rope| rope.rope_theta));
        Ok(LlamaConfig {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            vocab_size: self.vocab_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim,
            rms_norm_eps: self.rms_norm_eps,
            rope_theta: theta.unwrap_or(10_000.0),
            rope_scaling: rope.map_or(Ok(RopeScaling::None), RawRope::scaling)?,
            rope_pairing: Pairing::Halves,
            context_length: self.max_position_embeddings,
            attention_bias: self.attention_bias,
            mlp_bias: self.mlp_bias,
            tied: self.tie_word_embeddings,
        })
    }
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{}", path.display()))
}
