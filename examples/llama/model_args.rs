//! The flags for the model, its device, and its cache.

use std::path::PathBuf;

use candle_core::DType;
use candle_sfattention::{CacheOptions, Storage};
use clap::{Args, ValueEnum};

use crate::args::DEFAULT_MODEL;
use crate::load::LoadOptions;
use crate::place::Place;
use crate::ranks::{self, Ranks};
use crate::steps::StepFormat;

#[derive(Debug, Args)]
#[command(next_help_heading = "KV cache")]
pub struct CacheArgs {
    /// Tokens of the prompt to run at once. Fewer take less memory for activations; the result is the same. Default:
    /// 512 on the CPU, 32,768 on a GPU.
    #[arg(long, value_name = "N")]
    pub prefill_chunk: Option<usize>,
    /// What kept keys and values are stored in: f32, f16, bf16, or i8 or f8e4m3 with a scale for each.
    /// Default: the number type of the activations.
    #[arg(long, value_name = "TYPE")]
    pub kv_dtype: Option<Storage>,
}

impl CacheArgs {
    /// Refuses a chunk size of 0.
    pub fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.prefill_chunk != Some(0),
            "prefill-chunk: expected at least 1 token, got 0; leave it out for the default"
        );
        Ok(())
    }

    /// The options of the caches.
    pub fn options(&self) -> CacheOptions {
        CacheOptions {
            storage: self.kv_dtype,
            ..Default::default()
        }
    }
}

#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A .gguf file, a folder with config.json, tokenizer.json and safetensors, or a Hugging Face id OWNER/NAME.
    /// Default: the small model that comes with the example.
    #[arg(long, value_name = "PATH_OR_ID", default_value = DEFAULT_MODEL, hide_default_value = true)]
    pub model: String,
    /// Where to compute: cpu, or cuda or cuda:N in a build with --features cuda.
    #[arg(long, default_value_t = Place::Cpu, value_name = "DEVICE")]
    device: Place,
    /// Number type of weights and activations. Default: f32 on the CPU, where a GGUF file stays quantized and takes no
    /// other, and bf16 on a GPU, where it is dequantized.
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Turn a GGUF file's quantized weights into f32 while loading. Takes more memory, and is faster where candle has
    /// no fast kernel for the format: ten times for Q4_1 on x86. On a GPU they become --dtype, bf16 by default, in any
    /// case: candle's quantized product there has one kernel for a single row and another for many, which round
    /// otherwise (1.4e-2 against 5e-3 of error for Q4_0, the other way round for Q4_K), so that a decoded token would
    /// differ from the same token in a prompt.
    #[arg(long)]
    dequantize: bool,
    /// The form of the matrices for tokens that are decoded one at a time, on the CPU: own takes a GGUF file's blocks
    /// of 4 or 8 bits (Q4_0, Q4_1, Q4_K, Q8_0) against activations in f32 where --dequantize turns them into floats
    /// for prompts, and else the form of prompts; f32 takes the form of prompts; packed is own with 8 bits of all
    /// other weights. The others are candle's, which round activations to 8 bits: fast takes a file's own blocks where
    /// candle has a fast kernel for them, and else Q8_0; q4k is Q8_0 for matrices whose columns are no multiple of
    /// 256. Prompts keep their form.
    #[arg(long, value_enum, default_value_t = DecodeWeights::Own, value_name = "NAME")]
    decode_weights: DecodeWeights,
    /// Write the results to this file as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Ranks")]
pub struct RankArgs {
    /// Split the model by KV heads over N ranks, threads of this process on the CPU: each holds its heads' matrices,
    /// its part of the feed-forward matrices, and its heads' caches, and all compute together. Results are those of
    /// one rank, to rounding. N must divide the KV heads and the inner numbers of the feed-forward part. In a build
    /// with --features nccl also on GPUs of one machine, from --device on.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub tensor_parallel: usize,
}

impl RankArgs {
    /// Runs `each` on every rank; returns the first one's result.
    ///
    /// # Errors
    /// Ranks that the device has no place for, or the error of a rank, which ends all of them.
    pub fn run<T: Send>(
        self,
        model: &ModelArgs,
        each: impl Fn(&Ranks) -> anyhow::Result<T> + Sync,
    ) -> anyhow::Result<T> {
        anyhow::ensure!(
            self.tensor_parallel > 0,
            "tensor-parallel: expected at least 1 rank, got 0; 1 runs the whole model"
        );
        match model.device {
            Place::Cpu => ranks::run(self.tensor_parallel, each),
            Place::Cuda(_) if self.tensor_parallel == 1 => ranks::run(1, each),
            #[cfg(feature = "nccl")]
            Place::Cuda(first) => crate::nccl::run(self.tensor_parallel, first, each),
            #[cfg(not(feature = "nccl"))]
            Place::Cuda(_) => anyhow::bail!(
                "tensor-parallel: expected 1 on {} in this build, got {}; build with --features nccl, or use \
                 --device cpu",
                model.device,
                self.tensor_parallel
            ),
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
}

impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => DType::F32,
            Dtype::Bf16 => DType::BF16,
            Dtype::F16 => DType::F16,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DecodeWeights {
    Own,
    Packed,
    F32,
    Fast,
    #[value(name = "q8_0")]
    Q8_0,
    Q4k,
}

impl ModelArgs {
    /// The form of the matrices for single tokens; that of prompts on a GPU.
    pub fn step_format(&self) -> StepFormat {
        if self.device != Place::Cpu {
            return StepFormat::Prompt;
        }
        match self.decode_weights {
            DecodeWeights::Own => StepFormat::Own,
            DecodeWeights::Packed => StepFormat::Packed,
            DecodeWeights::Fast => StepFormat::Fast,
            DecodeWeights::F32 => StepFormat::Prompt,
            DecodeWeights::Q8_0 => StepFormat::Q8_0,
            DecodeWeights::Q4k => StepFormat::Q4K,
        }
    }

    /// The format by its name on the command line.
    pub fn decode_weights(&self) -> &'static str {
        match self.step_format() {
            StepFormat::Prompt => "as prompts",
            StepFormat::Own => "own",
            StepFormat::Packed => "packed",
            StepFormat::Fast => "fast",
            StepFormat::Q8_0 => "q8_0",
            StepFormat::Q4K => "q4k",
        }
    }

    /// The device by its name.
    pub fn device(&self) -> String {
        self.device.to_string()
    }

    /// The number type of weights and activations.
    pub fn dtype(&self) -> DType {
        let default = match self.device {
            Place::Cpu => Dtype::F32,
            Place::Cuda(_) => Dtype::Bf16,
        };
        self.dtype.unwrap_or(default).into()
    }

    /// Whether to compute on the CPU.
    pub fn is_on_cpu(&self) -> bool {
        self.device == Place::Cpu
    }

    /// How the weights are to be held.
    ///
    /// # Errors
    /// A device that is not there.
    pub fn load_options(&self) -> anyhow::Result<LoadOptions> {
        self.load_options_of(&Ranks::default())
    }

    /// As [`Self::load_options`], on the device of one rank.
    pub fn load_options_of(&self, ranks: &Ranks) -> anyhow::Result<LoadOptions> {
        let quantized = matches!(self.decode_weights, DecodeWeights::Q8_0 | DecodeWeights::Q4k);
        anyhow::ensure!(
            self.device == Place::Cpu || !quantized,
            "decode-weights: expected fast or f32 on {}, where one form serves prompts and single tokens, got a \
             quantized one; leave --decode-weights out",
            self.device
        );
        let place = match self.device {
            Place::Cpu => Place::Cpu,
            Place::Cuda(first) => Place::Cuda(first + ranks.rank()),
        };
        Ok(LoadOptions {
            dtype: self.dtype(),
            dequantize: self.dequantize,
            device: place.open()?,
        })
    }
}
