//! The flags of a bench of serving, and the parts of it that processes of their own run.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{ensure, Result};
use candle_sfattention::Storage;
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::random::Shape;

#[derive(Debug, Args)]
#[command(next_help_heading = "Serving, without a model file")]
pub struct ServingArgs {
    /// Measure how a model of this shape serves: llama-3.1-8b, llama-3.2-1b, qwen2.5-32b, smollm2-1.7b, smollm2-135m,
    /// or the config.json of a model of the Llama family. Every context runs dense and with each of --shares hidden,
    /// and decodes batches of rows that hold memory of their own. Together with --random-weights.
    #[arg(long, value_name = "NAME_OR_FILE",
          conflicts_with_all = ["model", "text", "prompts", "svg", "child", "dequantize", "strategy", "dense"])]
    shape: Option<String>,
    /// Draw the weights of --shape from a seed, on the device, in --dtype. Policies are calibrated on random tokens.
    #[arg(long)]
    random_weights: bool,
    /// The seed of weights and tokens.
    #[arg(long, default_value_t = 1, value_name = "N", requires = "shape")]
    pub weights_seed: u64,
    /// Rows to decode together; max is as many as fit.
    #[arg(long, value_delimiter = ',', value_name = "N,N..", requires = "shape",
          default_values_t = [BatchSize::Rows(1), BatchSize::Rows(8), BatchSize::Largest])]
    pub batch: Vec<BatchSize>,
    /// Tokens of each row before the first decoded one.
    #[arg(long, value_delimiter = ',', value_name = "N,N..", requires = "shape", default_values_t = [2048, 8192])]
    pub context: Vec<usize>,
    /// Shares of tokens to hide, of those that have left the window.
    #[arg(long, value_delimiter = ',', value_name = "X,X..", requires = "shape", default_values_t = [0.5, 0.75])]
    pub shares: Vec<f64>,
    /// On the CPU, the memory for the KV caches of the largest batch; 4 when left out. A GPU's own memory is the bound.
    #[arg(long, value_name = "GIB", requires = "shape", allow_negative_numbers = true)]
    pub memory: Option<f64>,
    /// How this program runs itself: each part in a process of its own.
    #[arg(long, hide = true, value_name = "JSON", requires = "shape")]
    pub part: Option<Part>,
}

/// How many rows decode together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchSize {
    Rows(usize),
    /// As many as fit.
    Largest,
}

impl fmt::Display for BatchSize {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Rows(rows) => write!(f, "{rows}"),
            Self::Largest => write!(f, "max"),
        }
    }
}

impl FromStr for BatchSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "max" => Ok(Self::Largest),
            rows => match rows.parse() {
                Ok(rows) => Ok(Self::Rows(rows)),
                Err(error) => Err(format!("expected a number of rows or max: {error}")),
            },
        }
    }
}

/// A part of the bench.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Part {
    /// Calibrates a policy for each share on windows of `tokens` tokens, and writes them into a folder.
    Calibrate { tokens: usize, folder: PathBuf },
    /// Measures one attention at one context.
    Measure(Setting),
}

/// One attention at one context.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setting {
    pub context: usize,
    /// The share to hide, and its policy; None is dense.
    pub hidden: Option<(f64, PathBuf)>,
    /// None: the number type of the weights.
    pub storage: Option<Storage>,
}

impl Setting {
    /// The attention's name in tables.
    pub fn attention(&self) -> String {
        match &self.hidden {
            None => "dense".into(),
            Some((share, _)) => format!("{share} hidden"),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Calibrate { tokens, .. } => write!(f, "calibration on {tokens} tokens"),
            Self::Measure(setting) => {
                write!(f, "context {}, {}", setting.context, setting.attention())?;
                setting.storage.map_or(Ok(()), |storage| write!(f, ", {storage}"))
            }
        }
    }
}

impl FromStr for Part {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        serde_json::from_str(text)
    }
}

impl ServingArgs {
    /// The shape of the model; None where the bench reads a checkpoint.
    ///
    /// # Errors
    /// A shape without random weights or the other way round, or one that is not known.
    pub fn shape(&self) -> Result<Option<Shape>> {
        match (&self.shape, self.random_weights) {
            (None, false) => Ok(None),
            (Some(name), true) => Shape::open(name).map(Some),
            (Some(name), false) => anyhow::bail!(
                "shape: expected --random-weights beside it, since a shape has no weights, got --shape {name} alone; \
                 add --random-weights, or give a checkpoint with --model"
            ),
            (None, true) => anyhow::bail!(
                "random-weights: expected --shape beside it, got --random-weights alone; add --shape llama-3.1-8b, \
                 another name or a config.json"
            ),
        }
    }

    /// Refuses numbers that have no meaning for a model of this shape.
    pub fn check(&self, shape: &Shape, on_cpu: bool) -> Result<()> {
        ensure!(
            !self.batch.contains(&BatchSize::Rows(0)),
            "batch: expected at least 1 row, got 0; give numbers of rows, or max"
        );
        let most = shape.config.context_length;
        for context in &self.context {
            ensure!(
                (1..=most).contains(context),
                "context: expected 1 to {most} tokens, the context of {}, got {context}; change --context",
                shape.name
            );
        }
        for share in &self.shares {
            ensure!(
                *share > 0.0 && *share < 1.0,
                "shares: expected numbers between 0 and 1, got {share}; 0.5 hides half of the tokens"
            );
        }
        if let Some(memory) = self.memory {
            ensure!(
                on_cpu,
                "memory: expected it on the CPU only, got --memory {memory} on a GPU, whose own memory is the bound; \
                 leave it out"
            );
            ensure!(
                memory.is_finite() && memory > 0.0,
                "memory: expected a number of GiB above 0, got {memory}; 4 is the default"
            );
        }
        Ok(())
    }

    /// The batches, each once.
    pub fn batches(&self) -> impl Iterator<Item = BatchSize> + '_ {
        once_each(&self.batch)
    }

    /// The memory for the caches of the largest batch on the CPU, in bytes.
    pub fn cache_memory(&self) -> f64 {
        self.memory.unwrap_or(4.0) * f64::from(1 << 30)
    }
}

/// The items in their order, without those that came before.
pub fn once_each<T: Copy + PartialEq>(items: &[T]) -> impl Iterator<Item = T> + '_ {
    let first = |(index, item): (usize, &T)| (!items[..index].contains(item)).then_some(*item);
    items.iter().enumerate().filter_map(first)
}
