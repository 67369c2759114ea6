//! The golden cases: inputs, settings and expected results, computed elsewhere in f64 and stored as f32.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use candle_core::{Device, Tensor};
use candle_sfattention::{
    AttentionOptions, CompressionConfig, Criterion, Fold, GroupRule, HeadStrategies, LossNormalizer, MergeRule,
};
use serde::Deserialize;

/// One case, on the CPU.
pub struct Case {
    pub name: String,
    pub config: CompressionConfig,
    pub options: AttentionOptions,
    /// Strategies with the case's own thresholds, one per batch row and head.
    pub strategies: HeadStrategies,
    tensors: HashMap<String, Tensor>,
}

/// A case's settings, as in the file's header.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    rule: MergeRule,
    group: GroupRule,
    criterion: Criterion,
    fold: Fold,
    sinks: usize,
    window: usize,
    max_merge_level: usize,
    causal: bool,
    /// 0 for the default.
    softmax_scale: f64,
    loss_factor: f64,
    loss_normalizer: LossNormalizer,
    similarity_threshold: f64,
    difference_threshold: f64,
}

impl Settings {
    fn config(&self) -> CompressionConfig {
        CompressionConfig {
            similarity_threshold: self.similarity_threshold,
            difference_threshold: self.difference_threshold,
            max_merge_level: self.max_merge_level,
            rule: self.rule,
            group_rule: self.group,
            criterion: self.criterion,
            fold: self.fold,
            sinks: self.sinks,
            window: self.window,
            loss_factor: self.loss_factor,
            loss_normalizer: self.loss_normalizer,
        }
    }

    fn options(&self) -> AttentionOptions {
        AttentionOptions {
            softmax_scale: (self.softmax_scale != 0.0).then_some(self.softmax_scale),
            causal: self.causal,
            ..AttentionOptions::default()
        }
    }
}

impl Case {
    /// A tensor that every case has.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.get(name)
            .with_context(|| format!("{}: no tensor {name}", self.name))
    }

    /// A tensor that may be absent: a case of one token has no `indicators` and no loss.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Which tensors the case has.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
}

/// Every case of every file.
pub fn all_cases() -> Result<Vec<Case>> {
    let mut all = cases("golden.safetensors")?;
    all.extend(cases("observed_mass.safetensors")?);
    Ok(all)
}

/// Every case of `tests/data/<file>`, ordered by name; the header lists the same cases.
pub fn cases(file: &str) -> Result<Vec<Case>> {
    // Read at run time: a packed binary runs on another machine than the one it was built on.
    let root = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_string());
    let path = Path::new(&root).join("tests/data").join(file);
    let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)?;
    let listed = header.metadata().as_ref().and_then(|m| m.get("cases"));
    let settings: HashMap<String, Settings> = serde_json::from_str(listed.context("no `cases` in the header")?)?;
    ensure!(!settings.is_empty(), "{file} lists no case");

    let mut tensors: HashMap<String, HashMap<String, Tensor>> = HashMap::new();
    for (key, tensor) in candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)? {
        let (case, name) = key.split_once('.').with_context(|| format!("tensor {key}"))?;
        tensors.entry(case.into()).or_default().insert(name.into(), tensor);
    }
    ensure!(
        tensors.len() == settings.len(),
        "{file}: tensors of {} cases, {} listed",
        tensors.len(),
        settings.len()
    );
    let mut cases = settings
        .into_iter()
        .map(|(name, settings)| {
            let tensors = tensors.remove(&name).with_context(|| format!("{name}: no tensors"))?;
            let tensor = |key: &str| tensors.get(key).with_context(|| format!("{name}: no tensor {key}"));
            Ok(Case {
                config: settings.config(),
                options: settings.options(),
                strategies: HeadStrategies::from_tensor(tensor("strategy")?)?.with_thresholds(tensor("threshold")?)?,
                tensors,
                name,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(cases)
}
