//! Hugging Face checkpoints: config.json, tokenizer.json and safetensors, from a folder or through the hub.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::Value;

use super::fp8::Quantization;
use super::hf_config;
use super::hf_tensors::Tensors;
use super::hf_text_part;
use super::hf_tokenizer::{text, TextFiles};
use super::hub::Hub;
use super::Checkpoint;
use crate::model::LlamaConfig;
use crate::weights::{Linear, Part, Weights};

/// The files of one checkpoint on this machine.
pub struct Files {
    config: PathBuf,
    text: TextFiles,
    companions: Vec<(String, Vec<u8>)>,
    weights: Vec<PathBuf>,
}

/// The source of [`Files`], by their names in the checkpoint.
pub(super) trait Origin {
    fn required(&self, name: &str) -> Result<PathBuf>;
    /// None if the checkpoint has no such file; an error if that cannot be told.
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
        Ok(Self {
            config: origin.required("config.json")?,
            text: TextFiles::collect(origin)?,
            companions: companions(origin)?,
            weights: weights(origin)?,
        })
    }
}

/// The single weights file if it exists, even beside a stale index; otherwise the shards of the index.
fn weights(origin: &dyn Origin) -> Result<Vec<PathBuf>> {
    const SINGLE: &str = "model.safetensors";
    const INDEX: &str = "model.safetensors.index.json";
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    if let Some(single) = origin.optional(SINGLE)? {
        return Ok(vec![single]);
    }
    let Some(path) = origin.optional(INDEX)? else {
        return Ok(vec![origin.required(SINGLE)?]);
    };
    let shards: BTreeSet<String> = read_json::<Index>(&path)?.weight_map.into_values().collect();
    ensure!(
        !shards.is_empty(),
        "{}: expected at least one shard, got none; fetch it again",
        path.display()
    );
    for shard in &shards {
        let mut parts = Path::new(shard).components();
        ensure!(
            matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)),
            "{}: expected names of files beside it, got {shard}; fetch it again",
            path.display()
        );
    }
    shards.iter().map(|shard| origin.required(shard)).collect()
}

/// Files about the framing of texts.
fn companions(origin: &dyn Origin) -> Result<Vec<(String, Vec<u8>)>> {
    const NAMES: [&str; 4] = [
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
    ];
    let mut companions = Vec::new();
    for name in NAMES {
        if let Some(path) = origin.optional(name)? {
            let content = fs::read(&path).with_context(|| format!("{}", path.display()))?;
            companions.push((name.to_string(), content));
        }
    }
    Ok(companions)
}

pub fn open(files: &Files, dtype: DType, device: &Device) -> Result<Checkpoint> {
    let raw: Value = read_json(&files.config)?;
    let settings = Settings::read(&raw).with_context(|| format!("{}", files.config.display()))?;
    let config = settings.config;
    let mut tensors = Tensors::open(&files.weights, settings.quantization)?;
    if settings.is_part {
        tensors.take_text_part();
    }
    Ok(Checkpoint {
        text: text(&files.text)?,
        companions: files.companions.clone(),
        weights: Box::new(HfWeights {
            tensors,
            config: config.clone(),
            norm_offset: settings.norm_offset,
            dtype,
            device: device.clone(),
        }),
        config,
    })
}

/// The contents of config.json.
struct Settings {
    config: LlamaConfig,
    quantization: Option<Quantization>,
    /// Added to the weights of norms.
    norm_offset: f64,
    /// Whether the model is the text part of another one.
    is_part: bool,
}

impl Settings {
    fn read(raw: &Value) -> Result<Self> {
        let part = hf_text_part::config(raw)?;
        let raw = part.as_ref().unwrap_or(raw);
        Ok(Self {
            config: hf_config::read(raw)?,
            quantization: hf_config::quantization(raw)?,
            norm_offset: hf_config::kind(raw)?.norm_offset(),
            is_part: part.is_some(),
        })
    }
}

/// The shape that a config.json names, for weights that come from elsewhere as floats.
pub fn shape(raw: &Value) -> Result<LlamaConfig> {
    let settings = Settings::read(raw)?;
    ensure!(
        settings.quantization.is_none(),
        "quantization_config: expected none for weights that are made as floats, got one; remove the key"
    );
    settings.config.check()?;
    Ok(settings.config)
}

struct HfWeights {
    tensors: Tensors,
    config: LlamaConfig,
    /// Added to the weights of norms.
    norm_offset: f64,
    dtype: DType,
    device: Device,
}

impl HfWeights {
    fn get(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.tensors.read(name, shape)?.to_dtype(self.dtype)?;
        Ok(tensor.to_device(&self.device)?)
    }
}

impl Weights for HfWeights {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn device(&self) -> Device {
        self.device.clone()
    }

    fn len(&self) -> usize {
        self.tensors.len()
    }

    fn shape(&self, path: &str) -> Option<Vec<usize>> {
        self.tensors.shape(&format!("{path}.weight"))
    }

    fn table(&mut self, path: &str, rows: usize, columns: usize) -> Result<Linear> {
        let weight = self.get(&format!("{path}.weight"), &[rows, columns])?;
        Ok(Linear::Float(candle_nn::Linear::new(weight, None)))
    }

    fn linear(&mut self, path: &str, rows: usize, columns: usize) -> Result<Linear> {
        let weight = self.get(&format!("{path}.weight"), &[rows, columns])?;
        let bias = match self.config.has_bias(path) {
            true => Some(self.get(&format!("{path}.bias"), &[rows])?),
            false => None,
        };
        Ok(Linear::Float(candle_nn::Linear::new(weight, bias)))
    }

    /// Reads only the part, but for a matrix of FP8 with scales.
    fn part(&mut self, path: &str, whole: [usize; 2], part: &Part) -> Result<Linear> {
        let weight = self.tensors.read_part(&format!("{path}.weight"), &whole, part)?;
        let weight = weight.to_dtype(self.dtype)?.to_device(&self.device)?;
        let bias = match self.config.has_bias(path) {
            true => Some(self.get(&format!("{path}.bias"), &whole[..1])?),
            false => None,
        };
        Ok(Linear::Float(candle_nn::Linear::new(weight, part.bias(bias)?)))
    }

    fn vector(&mut self, path: &str, len: usize) -> Result<Tensor> {
        if self.norm_offset == 0.0 {
            return self.get(&format!("{path}.weight"), &[len]);
        }
        let stored = self.tensors.read(&format!("{path}.weight"), &[len])?;
        let whole = (stored.to_dtype(DType::F32)? + self.norm_offset)?;
        Ok(whole.to_dtype(self.dtype)?.to_device(&self.device)?)
    }

    fn bias(&mut self, path: &str, len: usize) -> Result<Tensor> {
        self.get(&format!("{path}.bias"), &[len])
    }

    fn check_all_read(&mut self) -> Result<()> {
        if self.config.tied {
            self.tensors.pass_copy("lm_head.weight", "model.embed_tokens.weight")?;
        }
        self.tensors.check_all_read()
    }
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{}", path.display()))
}
