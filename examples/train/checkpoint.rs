//! Checkpoints, and the export for the llama example. Every folder appears whole, under its name, or not at all.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context, Result};
use candle_core::{safetensors, DType, Device, Var};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::evaluate::HeldOut;
use crate::files::replace;
use crate::model::LlamaConfig;
use crate::optimizer::AdamW;
use crate::source::{config_json, Framing, Source};
use crate::trainable::Trainable;

const PREFIX: &str = "step-";
const MOMENTS: &str = "optimizer.safetensors";

/// state.json: together with the weights and the moments, everything that the next step depends on. The place in the
/// data and the random numbers follow from the seed and the step.
#[derive(Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: usize,
    /// The time of these steps.
    pub seconds: f64,
    pub held_out: Option<HeldOut>,
    /// Settings that must be the same when the run resumes.
    pub settings: Value,
}

/// The parts of a model that are written to a folder.
pub struct Model<'a> {
    pub weights: BTreeMap<String, Var>,
    pub config: &'a LlamaConfig,
    pub tokenizer: &'a Tokenizer,
    pub framing: &'a Framing,
}

/// Writes OUT/checkpoints/step-N and keeps only that one and the previous one.
pub fn save(out: &Path, state: &State, model: &Model, optimizer: &AdamW) -> Result<()> {
    save_folder(out, state.step, |folder| {
        write_model(folder, model, DType::F32)?;
        write_moments(folder, optimizer)?;
        write_json(&folder.join("state.json"), state)
    })
}

/// Fills OUT/checkpoints/step-N and keeps only that one and the previous one.
pub fn save_folder(out: &Path, step: usize, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    replace_folder(&out.join("checkpoints").join(format!("{PREFIX}{step:08}")), fill)?;
    let mut all = list(out);
    all.truncate(all.len().saturating_sub(2));
    for old in all {
        fs::remove_dir_all(&old).with_context(|| format!("{}", old.display()))?;
    }
    Ok(())
}

pub fn write_moments(folder: &Path, optimizer: &AdamW) -> Result<()> {
    Ok(safetensors::save(&optimizer.state()?, folder.join(MOMENTS))?)
}

/// The newest checkpoint of a run.
pub fn latest(out: &Path) -> Option<PathBuf> {
    list(out).pop()
}

/// The checkpoint to resume from. A folder that has one is not overwritten.
pub fn find_checkpoint(out: &Path, resume: bool) -> Result<Option<PathBuf>> {
    let (latest, out) = (latest(out), out.display());
    match (resume, &latest) {
        (true, None) => bail!("resume: expected a checkpoint in {out}, found none; leave --resume out"),
        (false, Some(_)) => {
            bail!("out: expected a folder without checkpoints, got {out}; add --resume or change --out")
        }
        _ => Ok(latest),
    }
}

/// Refuses to resume under other settings than the checkpoint's.
pub fn check_settings(saved: &Value, settings: &Value) -> Result<()> {
    for (name, value) in settings.as_object().into_iter().flatten() {
        let saved = &saved[name];
        ensure!(
            saved == value,
            "resume: expected the checkpoint's {name}, {saved}, got {value}; give the flags of the first run"
        );
    }
    Ok(())
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

/// Sets the weights from `source`, read from `folder`, and the moments from the folder's other file.
pub fn restore(folder: &Path, source: &Source, state: &State, model: &Trainable, optimizer: &mut AdamW) -> Result<()> {
    source.fill(&model.vars())?;
    restore_moments(folder, state.step, optimizer)
}

/// The moments of [`write_moments`], after `step` steps.
pub fn restore_moments(folder: &Path, step: usize, optimizer: &mut AdamW) -> Result<()> {
    let moments = folder.join(MOMENTS);
    let restored = safetensors::load(&moments, &Device::Cpu)
        .map_err(anyhow::Error::from)
        .and_then(|moments| optimizer.restore(&moments, step));
    restored.with_context(|| format!("{}", moments.display()))
}

/// Writes OUT/model, which `llama --model` takes.
pub fn export(out: &Path, model: &Model, dtype: DType) -> Result<PathBuf> {
    let folder = out.join("model");
    replace_folder(&folder, |folder| write_model(folder, model, dtype))?;
    Ok(folder)
}

pub fn write_model(folder: &Path, model: &Model, dtype: DType) -> Result<()> {
    let mut weights = HashMap::new();
    for (name, var) in &model.weights {
        let weight = var.as_detached_tensor().to_device(&Device::Cpu)?;
        weights.insert(name.clone(), weight.to_dtype(dtype)?);
    }
    safetensors::save(&weights, folder.join("model.safetensors"))?;
    let mut json = config_json(model.config);
    json["architectures"] = serde_json::json!(["LlamaForCausalLM"]);
    json["torch_dtype"] = match dtype {
        DType::F16 => "float16",
        _ => "float32",
    }
    .into();
    match model.framing.ends[..] {
        [] => {}
        [id] => json["eos_token_id"] = id.into(),
        ref ids => json["eos_token_id"] = ids.into(),
    }
    write_json(&folder.join("config.json"), &json)?;
    for (name, content) in &model.framing.files {
        fs::write(folder.join(name), content).with_context(|| name.clone())?;
    }
    let path = folder.join("tokenizer.json");
    model
        .tokenizer
        .save(&path, false)
        .map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))
}

/// Fills a new folder beside `folder`, then puts it in its place. On failure the old folder stays, and nothing is left
/// beside it.
fn replace_folder(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let temporary = folder.with_extension("tmp");
    let written = write_folder(&temporary, fill).and_then(|()| put_in_place(&temporary, folder));
    if written.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    written.with_context(|| format!("{}", folder.display()))
}

fn write_folder(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder)?;
    fill(folder)?;
    for entry in fs::read_dir(folder)? {
        File::open(entry?.path())?.sync_all()?;
    }
    Ok(())
}

/// Renames the new folder to `folder`; only then removes the old one.
fn put_in_place(new: &Path, folder: &Path) -> Result<()> {
    let old = folder.with_extension("old");
    if !folder.exists() {
        return Ok(fs::rename(new, folder)?);
    }
    if old.exists() {
        fs::remove_dir_all(&old)?;
    }
    fs::rename(folder, &old)?;
    if let Err(error) = fs::rename(new, folder) {
        fs::rename(&old, folder)?;
        return Err(error.into());
    }
    Ok(fs::remove_dir_all(&old)?)
}

/// Replaces the file with the whole text, or fails and keeps the old file.
pub fn write_file(path: &Path, text: &str) -> Result<()> {
    replace(path, |file| fs::write(file, text)).with_context(|| format!("{}", path.display()))
}

pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    write_file(path, &(serde_json::to_string_pretty(value)? + "\n"))
}

pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{}", path.display()))
}
