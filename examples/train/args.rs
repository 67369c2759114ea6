//! The command line.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{ensure, Context, Result};
use candle_core::DType;
use clap::{Args, Parser, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::compress::CompressArgs;
use crate::compression::CompressionArgs;
use crate::model::LlamaConfig;
use crate::rope::{Pairing, RopeScaling};

/// `train ...`, `train experiment ...` or `train compress ...`.
pub enum Command {
    Run(RunArgs),
    Experiment(ExperimentArgs),
    Compress(CompressArgs),
}

impl Command {
    /// Reads the process's arguments, or ends it with a message.
    pub fn parse() -> Self {
        let words: Vec<_> = std::env::args_os().collect();
        match words.get(1).and_then(|word| word.to_str()) {
            Some("experiment") => Self::Experiment(ExperimentArgs::parse_from(&words[1..])),
            Some("compress") => Self::Compress(CompressArgs::parse_from(&words[1..])),
            _ => Self::Run(RunArgs::parse_from(&words)),
        }
    }
}

const OTHERS: &str = "`train experiment --help` is about training the same model with a list of compressions, `train \
                      compress --help` about teaching a checkpoint to do without most of its keys.";

/// Trains a small Llama with compressed attention on a text file, on the CPU.
///
/// Writes checkpoints, log.csv, plots, and the model as a Hugging Face folder that the llama example runs.
#[derive(Debug, Parser)]
#[command(name = "train", version, after_help = OTHERS)]
pub struct RunArgs {
    /// The text to train on. Its last 5% are held out.
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Folder for everything that is written.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Continue from the last checkpoint in --out, as if it had never stopped.
    #[arg(long)]
    pub resume: bool,
    /// Start from this model: an export, a checkpoint, or whatever `llama --model` reads: a .gguf file, a folder of
    /// Hugging Face files, or an id OWNER/NAME. Weights become f32. Sizes, tokenizer, ends of texts and chat template
    /// are its; the embedding grows where the tokenizer has ids beyond it.
    #[arg(long, value_name = "PATH_OR_ID")]
    pub finetune: Option<String>,
    /// Use this tokenizer.json instead of training one.
    #[arg(long, value_name = "FILE", conflicts_with = "finetune")]
    pub tokenizer: Option<PathBuf>,
    /// Weight of the compression loss, summed over layers.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub lambda: f64,
    /// How the weight changes: constant, or linear:START:END factors on it from the first to the last step.
    #[arg(long, default_value = "constant", value_name = "SCHEDULE")]
    pub lambda_schedule: Schedule,
    #[command(flatten)]
    pub training: TrainingArgs,
    #[command(flatten)]
    pub compression: CompressionArgs,
}

/// The settings that all runs of an experiment share.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Training")]
pub struct TrainingArgs {
    /// Optimizer steps.
    #[arg(long, default_value_t = 1000)]
    pub steps: usize,
    /// Sequences per step.
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
    /// Tokens per sequence.
    #[arg(long, default_value_t = 256)]
    pub context: usize,
    /// Highest learning rate: reached after the warmup, then a cosine down to a tenth.
    #[arg(long, default_value_t = 2e-3)]
    pub lr: f64,
    /// Steps of linear warmup; a twentieth of all when left out.
    #[arg(long)]
    pub warmup: Option<usize>,
    #[arg(long, default_value_t = 0.1)]
    pub weight_decay: f64,
    /// Gradients whose norm is larger are scaled down to it.
    #[arg(long, default_value_t = 1.0)]
    pub clip: f64,
    /// Seed of the weights and of the order of the data.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Measure the held-out text whenever this many steps have passed, and at the first and last.
    #[arg(long, default_value_t = 100)]
    pub eval_every: usize,
    /// Held-out windows of --context tokens, those of `llama eval --spread`; all that fit when left out.
    #[arg(long)]
    pub eval_windows: Option<usize>,
    #[arg(long, default_value_t = 100)]
    pub checkpoint_every: usize,
    /// Number type of the exported weights.
    #[arg(long, value_enum, default_value_t = ExportDtype::F16)]
    pub export_dtype: ExportDtype,
    /// Tokens of the tokenizer.
    #[arg(long, default_value_t = 2048)]
    pub vocab: usize,
    #[arg(long, default_value_t = 192)]
    pub hidden: usize,
    /// Width of the feed-forward layers.
    #[arg(long, default_value_t = 512)]
    pub intermediate: usize,
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    /// Query heads.
    #[arg(long, default_value_t = 6)]
    pub heads: usize,
    #[arg(long, default_value_t = 2)]
    pub kv_heads: usize,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ExportDtype {
    F32,
    F16,
}

impl From<ExportDtype> for DType {
    fn from(dtype: ExportDtype) -> Self {
        match dtype {
            ExportDtype::F32 => DType::F32,
            ExportDtype::F16 => DType::F16,
        }
    }
}

/// Trains the same model with a list of compressions at equal steps, and compares them in a table.
#[derive(Debug, Parser)]
#[command(name = "train experiment", version)]
pub struct ExperimentArgs {
    /// The text to train on. Its last 5% are held out.
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Folder for the runs and the table. Started again, finished runs are kept and a stopped one resumes.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Weight of the compression loss in the runs that have it.
    #[arg(long, default_value_t = 0.1)]
    pub lambda: f64,
    /// Only the runs whose name contains this.
    #[arg(long, value_name = "PART")]
    pub only: Option<String>,
    #[command(flatten)]
    pub training: TrainingArgs,
}

impl TrainingArgs {
    pub fn check(&self) -> Result<()> {
        for (name, value, least) in [
            ("steps", self.steps, 1),
            ("batch", self.batch, 1),
            ("context", self.context, 2),
            ("eval-every", self.eval_every, 1),
            ("checkpoint-every", self.checkpoint_every, 1),
            ("vocab", self.vocab, 300),
            ("hidden", self.hidden, 1),
            ("intermediate", self.intermediate, 1),
            ("layers", self.layers, 1),
            ("heads", self.heads, 1),
            ("kv-heads", self.kv_heads, 1),
        ] {
            ensure!(
                value >= least,
                "{name}: expected at least {least}, got {value}; change --{name}"
            );
        }
        for (name, value) in [("lr", self.lr), ("clip", self.clip)] {
            ensure!(
                value.is_finite() && value > 0.0,
                "{name}: expected a number above 0, got {value}; change --{name}"
            );
        }
        ensure!(
            self.heads.is_multiple_of(self.kv_heads) && self.hidden.is_multiple_of(2 * self.heads),
            "heads: expected a multiple of the {} KV heads that divides half of --hidden {}, got {}",
            self.kv_heads,
            self.hidden,
            self.heads
        );
        Ok(())
    }

    pub fn model(&self, vocab_size: usize) -> LlamaConfig {
        LlamaConfig {
            hidden_size: self.hidden,
            intermediate_size: self.intermediate,
            vocab_size,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.hidden / self.heads,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            rope_pairing: Pairing::Halves,
            context_length: self.context,
            attention_bias: false,
            mlp_bias: false,
            tied: true,
            layer: Default::default(),
        }
    }

    /// Warmup, then a cosine from `lr` to a tenth of it; `step` counts from 0.
    pub fn learning_rate(&self, step: usize) -> f64 {
        self.lr * warmup_then_cosine(step, self.steps, self.warmup)
    }
}

/// A factor on learning rates: linear up to 1 in `warmup` steps, a twentieth of all if None, then a cosine down to a
/// tenth; `step` counts from 0.
pub fn warmup_then_cosine(step: usize, steps: usize, warmup: Option<usize>) -> f64 {
    let warmup = warmup.unwrap_or(steps / 20);
    if step < warmup {
        return (step + 1) as f64 / warmup as f64;
    }
    let done = (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
    0.55 + 0.45 * (std::f64::consts::PI * done).cos()
}

/// Factor on λ, from `start` at the first step to `end` at the last.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    start: f64,
    end: f64,
}

impl Schedule {
    pub fn factor(&self, step: usize, steps: usize) -> f64 {
        self.start + (self.end - self.start) * step as f64 / (steps - 1).max(1) as f64
    }
}

impl FromStr for Schedule {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "constant" {
            return Ok(Self { start: 1.0, end: 1.0 });
        }
        let parse = || {
            let (start, end) = text.strip_prefix("linear:")?.split_once(':')?;
            let number = |text: &str| text.parse().ok().filter(|x: &f64| x.is_finite());
            Some(Self {
                start: number(start)?,
                end: number(end)?,
            })
        };
        parse().with_context(|| format!("expected constant or linear:START:END, got {text}"))
    }
}
