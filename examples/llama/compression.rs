//! The compression flags, shared with the train example, and one [`CompressedAttention`] per layer made from them.

use std::fs;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use candle_core::{Device, Tensor};
use candle_sfattention::{
    AttentionOptions, CompressedAttention, CompressionConfig, Criterion, Fold, GroupRule, HeadStrategies,
    LossNormalizer, MergeRule, MergeStrategy, Policy,
};
use clap::{Args, ValueEnum};
use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::Value;

use crate::model::LlamaConfig;
use crate::ranks::Ranks;

/// A named starting point for the method's parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Preset {
    /// The paper's values under the causal rule; for models trained with merging.
    Paper,
    /// The published Python reference, which is not causal: its perplexities are not comparable.
    Reference,
    /// Running means of similar keys; for stock checkpoints.
    Pretrained,
    /// Observed mass, which needs thresholds from `calibrate`; for stock checkpoints.
    Calibrated,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Compression")]
pub struct CompressionArgs {
    /// Start from these parameters; the flags below change single ones. Default: pretrained.
    #[arg(long, value_enum)]
    preset: Option<Preset>,
    /// similarity, difference or off for every head, or a JSON file: a policy that `calibrate` wrote, which brings its
    /// parameters with it, or one entry per head (see below). Default: similarity with the preset pretrained,
    /// difference with the others.
    #[arg(long, value_name = "NAME_OR_FILE")]
    strategy: Option<String>,
    /// Plain attention: every head off.
    #[arg(long, conflicts_with = "strategy")]
    pub dense: bool,
    /// A pair of a similarity head qualifies when 1 - cos is below this.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    similarity_threshold: Option<f64>,
    /// A pair of a difference head qualifies when |cos| is below this.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    difference_threshold: Option<f64>,
    /// The most tokens hidden in one run.
    #[arg(long, value_name = "N")]
    max_merge_level: Option<usize>,
    /// causal or reference.
    #[arg(long, value_parser = by_name::<MergeRule>, value_name = "NAME")]
    rule: Option<MergeRule>,
    /// per-query-head or unanimous.
    #[arg(long, value_parser = by_name::<GroupRule>, value_name = "NAME")]
    group_rule: Option<GroupRule>,
    /// query-key, key-key, observed-mass, or probe, which `calibrate` fits in a build with --features fit.
    #[arg(long, value_parser = criterion, value_name = "NAME")]
    criterion: Option<Criterion>,
    /// pair-sum, mean or drop.
    #[arg(long, value_parser = by_name::<Fold>, value_name = "NAME")]
    fold: Option<Fold>,
    /// The first tokens that are never hidden.
    #[arg(long, value_name = "N")]
    sinks: Option<usize>,
    /// The last tokens before a row that it attends as they are.
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Factor on the compression loss, which only training computes.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    loss_factor: Option<f64>,
    /// merged or pairs: the divisor of the compression loss, which only training computes.
    #[arg(long, value_parser = by_name::<LossNormalizer>, value_name = "NAME")]
    loss_normalizer: Option<LossNormalizer>,
}

impl CompressionArgs {
    /// The preset, [`Preset::Calibrated`] unless another is named, with the single flags on top.
    pub fn calibrated_config(&self) -> CompressionConfig {
        self.config(Preset::Calibrated)
    }

    /// The preset with the single flags on top.
    fn config(&self, default: Preset) -> CompressionConfig {
        let preset = match self.preset.unwrap_or(default) {
            Preset::Calibrated => CompressionConfig::calibrated(),
            Preset::Paper => CompressionConfig::default(),
            Preset::Reference => CompressionConfig::reference(),
            Preset::Pretrained => CompressionConfig::pretrained(),
        };
        CompressionConfig {
            similarity_threshold: self.similarity_threshold.unwrap_or(preset.similarity_threshold),
            difference_threshold: self.difference_threshold.unwrap_or(preset.difference_threshold),
            max_merge_level: self.max_merge_level.unwrap_or(preset.max_merge_level),
            rule: self.rule.unwrap_or(preset.rule),
            group_rule: self.group_rule.unwrap_or(preset.group_rule),
            criterion: self.criterion.unwrap_or(preset.criterion),
            fold: self.fold.unwrap_or(preset.fold),
            sinks: self.sinks.unwrap_or(preset.sinks),
            window: self.window.unwrap_or(preset.window),
            loss_factor: self.loss_factor.unwrap_or(preset.loss_factor),
            loss_normalizer: self.loss_normalizer.unwrap_or(preset.loss_normalizer),
        }
    }
}

/// A criterion by its name. Scores come from a probe here.
fn criterion(name: &str) -> Result<Criterion, String> {
    match name {
        "probe" => Ok(Criterion::Given),
        "given" => Err("expected query-key, key-key, observed-mass or probe, got given".into()),
        name => by_name(name),
    }
}

/// Reads an enum by the name serde gives it, with `-` for `_`.
fn by_name<T: DeserializeOwned>(name: &str) -> Result<T, String> {
    serde_json::from_value(Value::String(name.replace('-', "_"))).map_err(|error| error.to_string())
}

/// The user's settings, before the model's shape is known.
pub struct Compression {
    pub config: CompressionConfig,
    /// The name on the command line: a strategy or a file.
    pub label: String,
    strategies: Strategies,
}

enum Strategies {
    Uniform(MergeStrategy),
    PerLayer(StrategyFile),
    Policy(Box<Policy>),
}

/// The contents of a strategy file.
enum File {
    Heads(StrategyFile),
    Policy(Box<Policy>),
}

/// One strategy, and optionally one threshold, per layer and query head.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StrategyFile {
    layers: Vec<Vec<MergeStrategy>>,
    thresholds: Option<Vec<Vec<f64>>>,
}

impl Compression {
    pub fn from_args(args: &CompressionArgs) -> Result<Self> {
        let config = args.config(Preset::Pretrained);
        config.check(true)?;
        let preset = args.preset.unwrap_or(Preset::Pretrained);
        let label = match (&args.strategy, args.dense, preset) {
            (_, true, _) => "off",
            (Some(name), ..) => name,
            (None, _, Preset::Pretrained) => "similarity",
            (None, _, Preset::Paper | Preset::Reference | Preset::Calibrated) => "difference",
        };
        let strategies = match label {
            "similarity" => Strategies::Uniform(MergeStrategy::Similarity),
            "difference" => Strategies::Uniform(MergeStrategy::Difference),
            "off" => Strategies::Uniform(MergeStrategy::Off),
            file => match read(file).with_context(|| format!("strategy {file}"))? {
                File::Heads(heads) => Strategies::PerLayer(heads),
                File::Policy(policy) => {
                    let base = args.config(Preset::Pretrained);
                    ensure!(
                        args.preset.is_none() && base == CompressionConfig::pretrained(),
                        "strategy {file}: expected no preset and no parameters beside a policy, whose thresholds are \
                         for its own, got some; leave them out or calibrate with them"
                    );
                    return Ok(Self::of_policy(*policy, label));
                }
            },
        };
        Ok(Self {
            config,
            label: label.into(),
            strategies,
        })
    }

    /// A policy with its own parameters; `label`: its name.
    pub fn of_policy(policy: Policy, label: &str) -> Self {
        Self {
            config: policy.parts().config.clone(),
            label: label.into(),
            strategies: Strategies::Policy(Box::new(policy)),
        }
    }

    /// The same with every head off.
    pub fn dense(self) -> Self {
        Self {
            label: "off".into(),
            strategies: Strategies::Uniform(MergeStrategy::Off),
            ..self
        }
    }

    /// Prints a note if a policy was made for other weights of the same shape.
    pub fn check_weights(&self, fingerprint: &str, ranks: &Ranks) {
        if let Strategies::Policy(policy) = &self.strategies {
            let expected = &policy.parts().fingerprint;
            if expected != fingerprint && ranks.is_first() {
                eprintln!(
                    "note: strategy {}: the policy is for the weights {expected}, these are {fingerprint}; calibrate \
                     them",
                    self.label
                );
            }
        }
    }

    /// One attention per layer of a model, for the heads of one rank; `model` is the whole one. One strategy for all
    /// heads leaves layers that slide alone: their caches are short, and hold the tokens of their window exactly. A
    /// file may name strategies for them.
    pub fn attention(&self, model: &LlamaConfig, ranks: &Ranks) -> Result<Vec<CompressedAttention>> {
        let shape = &model.shape();
        let (rank, world) = (ranks.rank(), ranks.world());
        let own = model.shard(world)?.shape();
        let global = (0..shape.layers).any(|layer| model.layer.window(layer).is_none());
        let hides = match &self.strategies {
            Strategies::Uniform(strategy) => !strategy.is_off(),
            Strategies::PerLayer(_) | Strategies::Policy(_) => false,
        };
        if hides && !global && ranks.is_first() {
            eprintln!(
                "note: every layer of this model slides, and {} hides nothing in such layers; a strategy file may name \
                 strategies for them",
                self.label
            );
        }
        let uniform = |strategy, layer| match model.layer.window(layer) {
            Some(_) => HeadStrategies::uniform(MergeStrategy::Off),
            None => HeadStrategies::uniform(strategy),
        };
        let per_layer = match &self.strategies {
            Strategies::Uniform(strategy) => (0..shape.layers).map(|layer| uniform(*strategy, layer)).collect(),
            Strategies::PerLayer(file) => {
                let whole = file
                    .strategies(shape.layers, shape.heads)
                    .with_context(|| format!("strategy {}", self.label))?;
                let cut = whole.iter().map(|layer| layer.shard(rank, world, shape.kv_heads));
                cut.collect::<candle_core::Result<_>>()?
            }
            Strategies::Policy(policy) => {
                let check = policy.head_strategies(shape);
                check.with_context(|| format!("strategy {}", self.label))?;
                policy.shard(rank, world)?.head_strategies(&own)?
            }
        };
        let probe = match &self.strategies {
            Strategies::Policy(policy) => policy.parts().probe.as_ref(),
            Strategies::Uniform(_) | Strategies::PerLayer(_) => None,
        };
        let probe = probe.map(|probe| probe.shard(rank, world)).transpose()?;
        let attention = |(layer, strategies)| {
            let attention = CompressedAttention::new(strategies, self.config.clone(), AttentionOptions::default())?;
            Ok(match &probe {
                Some(probe) => attention.with_probe(probe, layer)?,
                None => attention,
            })
        };
        per_layer.into_iter().enumerate().map(attention).collect()
    }
}

fn read(file: &str) -> Result<File> {
    const EXPECTED: &str = "expected similarity, difference, off or a policy or strategy file (see --help)";
    ensure!(Path::new(file).is_file(), "{EXPECTED}, found no such file");
    let text = fs::read_to_string(file)?;
    let json: Value = serde_json::from_str(&text).context(EXPECTED)?;
    if json.get("format").is_some() {
        return Ok(File::Policy(Box::new(Policy::from_json(&text)?)));
    }
    Ok(File::Heads(serde_json::from_value(json).context(EXPECTED)?))
}

impl StrategyFile {
    fn strategies(&self, layers: usize, heads: usize) -> Result<Vec<HeadStrategies>> {
        check_shape("layers", &self.layers, layers, heads)?;
        let uniform = self.layers.iter().map(|layer| HeadStrategies::per_head(layer.clone()));
        let Some(thresholds) = &self.thresholds else {
            return Ok(uniform.collect());
        };
        check_shape("thresholds", thresholds, layers, heads)?;
        let own = |(strategies, row): (HeadStrategies, &Vec<f64>)| {
            Ok(strategies.with_thresholds(&Tensor::new(row.as_slice(), &Device::Cpu)?)?)
        };
        uniform.zip(thresholds).map(own).collect()
    }
}

fn check_shape<T>(name: &str, rows: &[Vec<T>], layers: usize, heads: usize) -> Result<()> {
    ensure!(
        rows.len() == layers,
        "{name}: expected {layers} lists, got {}; write one per layer of the model",
        rows.len()
    );
    match rows.iter().position(|row| row.len() != heads) {
        None => Ok(()),
        Some(layer) => anyhow::bail!(
            "{name}: expected {heads} entries for layer {layer}, got {}; write one per query head",
            rows[layer].len()
        ),
    }
}
