//! The command line of `train compress`.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{ensure, Result};
use candle_core::DType;
use candle_sfattention::{CompressionConfig, Criterion};
use clap::Parser;

use crate::args::{warmup_then_cosine, ExportDtype};
use crate::place::Place;

/// Teaches a checkpoint to do without most of its keys: a gate per layer and KV head is trained together with the
/// weights, toward the outputs of the checkpoint itself.
///
/// The gate starts as a probe that is fitted to the checkpoint. It fades tokens first, with noise, and hides them in
/// the last steps. Writes checkpoints, log.csv, plots, the model as a Hugging Face folder, and its policy: `llama
/// --model OUT/model --strategy OUT/policy.json`.
#[derive(Debug, Parser)]
#[command(name = "train compress", version)]
pub struct CompressArgs {
    /// The checkpoint: whatever `llama --model` reads, of a Llama's shape. Weights become f32.
    #[arg(long, value_name = "PATH_OR_ID")]
    pub model: String,
    /// Texts to train on.
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub text: Vec<PathBuf>,
    /// Folder for everything that is written.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The share of tokens to hide, of those that have left the window.
    #[arg(long, value_name = "SHARE")]
    pub target: f64,
    /// Start from this policy of a probe, which `llama calibrate --criterion probe` wrote, instead of fitting one. Its
    /// window and sinks hold.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["window", "sinks"])]
    pub policy: Option<PathBuf>,
    /// Continue from the last checkpoint in --out, as if it had never stopped.
    #[arg(long)]
    pub resume: bool,
    /// Optimizer steps.
    #[arg(long, default_value_t = 300)]
    pub steps: usize,
    /// The share of the steps that hide tokens, after those that fade them.
    #[arg(long, default_value_t = 0.25, value_name = "SHARE")]
    pub hard: f64,
    /// Sequences per step.
    #[arg(long, default_value_t = 16)]
    pub batch: usize,
    /// Tokens per sequence.
    #[arg(long, default_value_t = 1024)]
    pub context: usize,
    /// The last tokens before a row that it attends in any case.
    #[arg(long, default_value_t = 32)]
    pub window: usize,
    /// The first tokens that are never hidden.
    #[arg(long, default_value_t = 4)]
    pub sinks: usize,
    /// Highest learning rate of the weights: reached after the warmup, then a cosine down to a tenth.
    #[arg(long, default_value_t = 1e-4)]
    pub lr: f64,
    /// The same of the gates, while tokens fade.
    #[arg(long, default_value_t = 3e-3)]
    pub gate_lr: f64,
    /// Steps of linear warmup; a twentieth of all when left out.
    #[arg(long)]
    pub warmup: Option<usize>,
    /// Gradients whose norm is larger are scaled down to it.
    #[arg(long, default_value_t = 1.0)]
    pub clip: f64,
    /// Seed of the order of the data, of invented facts, and of the gates' noise.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Windows of the texts, half of them passages twice, that the probe is fitted to and the shares are measured on.
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub samples: usize,
    /// A text that is only scored, before and after.
    #[arg(long, value_name = "FILE")]
    pub held_out: Option<PathBuf>,
    /// Windows of the held-out text as COUNTxTOKENS, spread as in `llama eval --spread`.
    #[arg(long, num_args = 1.., default_values = ["64x512"], value_name = "NxN")]
    pub held_out_windows: Vec<Windows>,
    /// Where to compute: cpu, or cuda or cuda:N in a build with --features cuda.
    #[arg(long, default_value_t = Place::Cpu, value_name = "DEVICE")]
    pub device: Place,
    /// Print the time of each part of a step, which then waits for the device after each.
    #[arg(long)]
    pub profile: bool,
    #[arg(long, default_value_t = 100)]
    pub checkpoint_every: usize,
    /// Number type of the exported weights.
    #[arg(long, value_enum, default_value_t = ExportDtype::F16)]
    pub export_dtype: ExportDtype,
}

/// COUNTxTOKENS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    pub count: usize,
    pub tokens: usize,
}

impl FromStr for Windows {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (count, tokens) = text.split_once('x')?;
            let (count, tokens) = (count.parse().ok()?, tokens.parse().ok()?);
            (count > 0 && tokens > 1).then_some(Self { count, tokens })
        };
        parse().ok_or_else(|| "expected COUNTxTOKENS with at least 1 window of 2 tokens, as 64x512".into())
    }
}

impl CompressArgs {
    pub fn check(&self) -> Result<()> {
        for (name, value, least) in [
            ("steps", self.steps, 1),
            ("batch", self.batch, 1),
            ("context", self.context, 2),
            ("samples", self.samples, 2),
            ("checkpoint-every", self.checkpoint_every, 1),
        ] {
            ensure!(
                value >= least,
                "{name}: expected at least {least}, got {value}; change --{name}"
            );
        }
        for (name, value) in [("lr", self.lr), ("gate-lr", self.gate_lr), ("clip", self.clip)] {
            ensure!(
                value.is_finite() && value > 0.0,
                "{name}: expected a number above 0, got {value}; change --{name}"
            );
        }
        ensure!(
            self.target > 0.0 && self.target < 1.0,
            "target: expected a share between 0 and 1, got {}; 0.5 hides half of the tokens that have left the window",
            self.target
        );
        ensure!(
            (0.0..=1.0).contains(&self.hard),
            "hard: expected a share from 0 to 1, got {}; 0.25 is the default",
            self.hard
        );
        Ok(())
    }

    /// The decisions that are trained.
    pub fn compression(&self) -> CompressionConfig {
        CompressionConfig {
            criterion: Criterion::Given,
            window: self.window,
            sinks: self.sinks,
            ..CompressionConfig::calibrated()
        }
    }

    /// The first step, from 0, that hides tokens.
    pub fn first_hard(&self) -> usize {
        self.steps - (self.steps as f64 * self.hard).round() as usize
    }

    /// The factor on both learning rates at a step from 0.
    pub fn rate(&self, step: usize) -> f64 {
        warmup_then_cosine(step, self.steps, self.warmup)
    }

    /// Products on a GPU run in bf16.
    pub fn products(&self) -> DType {
        match self.device {
            Place::Cpu => DType::F32,
            Place::Cuda(_) => DType::BF16,
        }
    }
}
