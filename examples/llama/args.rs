//! The command line.

use std::path::PathBuf;

use candle_core::DType;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::compression::CompressionArgs;
use crate::load::LoadOptions;

/// Runs a Llama checkpoint with compressed attention on the CPU.
///
/// Similar (or dissimilar) neighbouring tokens are merged per head, and their key/value columns disappear.
#[derive(Debug, Parser)]
#[command(name = "llama", version, after_long_help = STRATEGY_FILE)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Continue a prompt, or answer it with --chat.
    #[command(after_long_help = STRATEGY_FILE)]
    Generate(GenerateArgs),
    /// Measure perplexity on windows of a text.
    #[command(after_long_help = STRATEGY_FILE)]
    Eval(EvalArgs),
}

const STRATEGY_FILE: &str = r#"Strategy file:
  JSON with one list per layer, one entry per query head, and, where wanted, thresholds of the same shape:
    {"layers":     [["similarity", "off"], ["difference", "similarity"]],
     "thresholds": [[0.1, 0.0], [0.02, 0.15]]}
  Without "thresholds", heads use --similarity-threshold and --difference-threshold. The threshold of a head that is
  off is not read."#;

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// The text to continue, or with --chat the user's message.
    #[arg(long)]
    pub prompt: String,
    /// Put the prompt into the checkpoint's own chat template.
    #[arg(long)]
    pub chat: bool,
    /// 0 takes the likeliest token; higher is more random.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Sample from the likeliest tokens that together reach this probability, above 0 and at most 1.
    #[arg(long, allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Seed of the sampling.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Stop after this many tokens.
    #[arg(long, default_value_t = 100)]
    pub max_tokens: usize,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub compression: CompressionArgs,
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    /// The text file to score. No BOS token is added.
    #[arg(long)]
    pub text: PathBuf,
    /// Tokens per window; context - 1 of them are predicted.
    #[arg(long, default_value_t = 512)]
    pub context: usize,
    /// How many consecutive windows, which do not overlap, to score; all that fit when left out.
    #[arg(long)]
    pub windows: Option<usize>,
    /// Spread the windows evenly over the text instead of taking the first ones.
    #[arg(long)]
    pub spread: bool,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub compression: CompressionArgs,
}

#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A .gguf file, a folder with config.json, tokenizer.json and safetensors, or a Hugging Face id OWNER/NAME.
    #[arg(long, value_name = "PATH_OR_ID")]
    pub model: String,
    /// Number type of safetensors weights and activations. A GGUF file stays quantized and computes in f32.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// Turn a GGUF file's quantized weights into f32 while loading. Takes more memory, and is faster where candle has
    /// no fast kernel for the format: ten times for Q4_1 on x86.
    #[arg(long)]
    dequantize: bool,
    /// Write the results to this file as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    F32,
    Bf16,
    F16,
}

impl ModelArgs {
    /// How the weights are to be held.
    pub fn load_options(&self) -> LoadOptions {
        let dtype = match self.dtype {
            Dtype::F32 => DType::F32,
            Dtype::Bf16 => DType::BF16,
            Dtype::F16 => DType::F16,
        };
        LoadOptions {
            dtype,
            dequantize: self.dequantize,
        }
    }
}
