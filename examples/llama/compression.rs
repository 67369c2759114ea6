//! From the command line to one [`CompressedAttention`] per layer.

use std::fs;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use candle_core::{Device, Tensor};
use candle_sfattention::{AttentionOptions, CompressedAttention, CompressionConfig, HeadStrategies, MergeStrategy};
use serde::Deserialize;

use crate::args::{CompressionArgs, Preset};

/// What the user asked for, before the model's shape is known.
pub struct Compression {
    pub config: CompressionConfig,
    /// How it was named: a strategy or a file.
    pub label: String,
    strategies: Strategies,
}

enum Strategies {
    Uniform(MergeStrategy),
    PerLayer(StrategyFile),
}

/// One strategy, and where wanted one threshold, per layer and query head.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StrategyFile {
    layers: Vec<Vec<MergeStrategy>>,
    thresholds: Option<Vec<Vec<f64>>>,
}

impl Compression {
    pub fn from_args(args: &CompressionArgs) -> Result<Self> {
        let config = args.config();
        config.check(true)?;
        let label = match (&args.strategy, args.dense, args.preset) {
            (_, true, _) => "off",
            (Some(name), ..) => name,
            (None, _, Preset::Pretrained) => "similarity",
            (None, _, Preset::Paper | Preset::Reference) => "difference",
        };
        let strategies = match label {
            "similarity" => Strategies::Uniform(MergeStrategy::Similarity),
            "difference" => Strategies::Uniform(MergeStrategy::Difference),
            "off" => Strategies::Uniform(MergeStrategy::Off),
            file => Strategies::PerLayer(read(file).with_context(|| format!("strategy {file}"))?),
        };
        Ok(Self {
            config,
            label: label.into(),
            strategies,
        })
    }

    /// The same with every head off.
    pub fn dense(self) -> Self {
        Self {
            label: "off".into(),
            strategies: Strategies::Uniform(MergeStrategy::Off),
            ..self
        }
    }

    /// One attention per layer of a model with that many layers and query heads.
    pub fn attention(&self, layers: usize, heads: usize) -> Result<Vec<CompressedAttention>> {
        let per_layer = match &self.strategies {
            Strategies::Uniform(strategy) => vec![HeadStrategies::uniform(*strategy); layers],
            Strategies::PerLayer(file) => file
                .strategies(layers, heads)
                .with_context(|| format!("strategy {}", self.label))?,
        };
        let attention = |strategies| {
            Ok(CompressedAttention::new(
                strategies,
                self.config.clone(),
                AttentionOptions::default(),
            )?)
        };
        per_layer.into_iter().map(attention).collect()
    }
}

fn read(file: &str) -> Result<StrategyFile> {
    const EXPECTED: &str = "expected similarity, difference, off or a strategy file (see --help)";
    ensure!(Path::new(file).is_file(), "{EXPECTED}, found no such file");
    let text = fs::read_to_string(file)?;
    serde_json::from_str(&text).context(EXPECTED)
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
