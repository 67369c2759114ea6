//! Checkpoints, and the export for the llama example. Every folder appears whole, under its name, or not at all.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use candle_core::{safetensors, DType, Device, Tensor};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::data::{load_tokenizer, END_OF_TEXT};
use crate::evaluate::HeldOut;
use crate::optimizer::AdamW;
use crate::trainable::{ModelConfig, Trainable};

const PREFIX: &str = "step-";

/// state.json: with the weights and the moments, all that the next step depends on. The place in the data and the
/// random numbers follow from the seed and the step.
#[derive(Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: usize,
    /// Time they took.
    pub seconds: f64,
    pub held_out: Option<HeldOut>,
    /// What must be the same when the run goes on.
    pub settings: Value,
}

/// Writes OUT/checkpoints/step-N and removes all but it and the one before.
pub fn save(
    out: &Path,
    state: &State,
    model: &Trainable,
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    optimizer: &AdamW,
) -> Result<()> {
    let folder = out.join("checkpoints").join(format!("{PREFIX}{:08}", state.step));
    replace_folder(&folder, |folder| {
        write_model(folder, model, config, tokenizer, DType::F32)?;
        safetensors::save(&optimizer.state()?, folder.join("optimizer.safetensors"))?;
        write_json(&folder.join("state.json"), state)
    })?;
    let mut all = list(out);
    all.truncate(all.len().saturating_sub(2));
    for old in all {
        fs::remove_dir_all(&old).with_context(|| format!("{}", old.display()))?;
    }
    Ok(())
}

/// The newest checkpoint of a run.
pub fn latest(out: &Path) -> Option<PathBuf> {
    list(out).pop()
}

/// Checkpoints of a run, oldest first.
fn list(out: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(out.join("checkpoints")) else {
        return Vec::new();
    };
    let is_checkpoint = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.strip_prefix(PREFIX)
            .is_some_and(|step| step.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let mut all: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(is_checkpoint)
        .collect();
    all.sort();
    all
}

pub fn restore(folder: &Path, state: &State, model: &Trainable, optimizer: &mut AdamW) -> Result<()> {
    load_weights(folder, model)?;
    let moments = folder.join("optimizer.safetensors");
    let restored = safetensors::load(&moments, &Device::Cpu)
        .map_err(anyhow::Error::from)
        .and_then(|moments| optimizer.restore(&moments, state.step));
    restored.with_context(|| format!("{}", moments.display()))
}

/// Writes OUT/model, which `llama --model` takes.
pub fn export(
    out: &Path,
    model: &Trainable,
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    dtype: DType,
) -> Result<PathBuf> {
    let folder = out.join("model");
    replace_folder(&folder, |folder| write_model(folder, model, config, tokenizer, dtype))?;
    Ok(folder)
}

fn write_model(
    folder: &Path,
    model: &Trainable,
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    dtype: DType,
) -> Result<()> {
    let mut weights = HashMap::new();
    for (name, var) in model.vars() {
        weights.insert(name, var.as_detached_tensor().to_dtype(dtype)?);
    }
    safetensors::save(&weights, folder.join("model.safetensors"))?;
    let mut json = serde_json::to_value(config)?;
    json["architectures"] = serde_json::json!(["LlamaForCausalLM"]);
    json["torch_dtype"] = match dtype {
        DType::F16 => "float16",
        _ => "float32",
    }
    .into();
    if let Some(id) = tokenizer.token_to_id(END_OF_TEXT) {
        json["eos_token_id"] = id.into();
    }
    write_json(&folder.join("config.json"), &json)?;
    let path = folder.join("tokenizer.json");
    tokenizer
        .save(&path, false)
        .map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))
}

/// A model to start from: its sizes, which take at least `context` tokens, and its tokenizer.
pub fn open(folder: &Path, context: usize) -> Result<(ModelConfig, Tokenizer)> {
    let path = folder.join("config.json");
    let json: Value = read_json(&path)?;
    let mut config: ModelConfig =
        serde_json::from_value(json.clone()).with_context(|| format!("{}", path.display()))?;
    ensure!(
        config.model_type == "llama" && config.hidden_act == "silu" && config.tie_word_embeddings,
        "{}: expected a llama with silu and tied embeddings, got {} with {} and tie_word_embeddings {}",
        path.display(),
        config.model_type,
        config.hidden_act,
        config.tie_word_embeddings
    );
    ensure!(
        json["rope_scaling"].is_null() && json["attention_bias"] != true && json["mlp_bias"] != true,
        "{}: expected a model without rope scaling and biases; not supported",
        path.display()
    );
    config.max_position_embeddings = config.max_position_embeddings.max(context);
    Ok((config, load_tokenizer(&folder.join("tokenizer.json"))?))
}

/// Sets every weight from FOLDER/model.safetensors.
pub fn load_weights(folder: &Path, model: &Trainable) -> Result<()> {
    let path = folder.join("model.safetensors");
    let load = || -> Result<()> {
        let weights = safetensors::load(&path, &Device::Cpu)?;
        for (name, var) in model.vars() {
            let weight: &Tensor = weights
                .get(&name)
                .with_context(|| format!("expected {name}, found none; give the whole checkpoint"))?;
            ensure!(
                weight.dims() == var.dims(),
                "{name}: expected shape {:?}, got {:?}; config.json does not fit",
                var.dims(),
                weight.dims()
            );
            var.set(&weight.to_dtype(DType::F32)?)?;
        }
        Ok(())
    };
    load().with_context(|| format!("{}", path.display()))
}

/// Fills a folder beside `folder`, then puts it in its place.
fn replace_folder(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let temporary = folder.with_extension("tmp");
    let write = || -> Result<()> {
        if temporary.exists() {
            fs::remove_dir_all(&temporary)?;
        }
        fs::create_dir_all(&temporary)?;
        fill(&temporary)?;
        for entry in fs::read_dir(&temporary)? {
            File::open(entry?.path())?.sync_all()?;
        }
        if folder.exists() {
            fs::remove_dir_all(folder)?;
        }
        Ok(fs::rename(&temporary, folder)?)
    };
    write().with_context(|| format!("{}", folder.display()))
}

/// Writes a file beside `path`, then renames it.
pub fn write_file(path: &Path, text: &str) -> Result<()> {
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, text)
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("{}", path.display()))
}

pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    write_file(path, &(serde_json::to_string_pretty(value)? + "\n"))
}

pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{}", path.display()))
}
