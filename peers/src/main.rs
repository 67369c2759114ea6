//! candle-transformers' own quantized llama, measured as `llama bench` measures ours: the same tokens, the same row.

#[path = "../../examples/llama/error.rs"]
mod error;
#[allow(dead_code)]
#[path = "../../examples/llama/finite.rs"]
mod finite;
#[path = "../../examples/llama/bench/row.rs"]
mod row;
#[allow(dead_code)]
#[path = "../../examples/llama/stats.rs"]
mod stats;

include!("../../examples/llama/decoder.rs");

use std::env;
use std::fs::File;
use std::io::stdout;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::{ModelWeights, MAX_SEQ_LEN};
use clap::Parser;

use crate::load::{Checkpoint, LoadOptions};
use crate::row::{first_tokens, Run};
use crate::stats::{memory, Hidden, Stats};

/// Measures candle-transformers' own quantized llama on the CPU: speed and memory, as a row of `llama bench`.
///
/// A process has one peak of memory, so that each prompt takes a run of its own.
#[derive(Debug, Parser)]
#[command(name = "candle_llama")]
struct Args {
    /// A GGUF file.
    #[arg(long)]
    model: String,
    /// The text whose beginning is the prompt. No BOS token is added.
    #[arg(long, default_value = "data/moby-dick.txt")]
    text: PathBuf,
    /// Tokens of the prompt, which run at once: the model has no mask for a later chunk.
    #[arg(long, default_value_t = 2048)]
    prompt: usize,
    /// Tokens to decode one at a time after the prompt: those that follow in the text.
    #[arg(long, default_value_t = 32)]
    decode: usize,
}

fn main() -> ExitCode {
    // As in the llama example: without this variable candle counts the cores before every product.
    const THREADS: &str = "RAYON_NUM_THREADS";
    if env::var_os(THREADS).is_none() {
        env::set_var(THREADS, candle_core::utils::get_num_threads().to_string());
    }
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error::one_line(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    ensure!(
        args.prompt > 0 && args.decode > 0,
        "prompt and decode: expected at least 1 token, got 0; use --prompt 1 or --decode 1"
    );
    let tokens = tokens(args)?;
    let run = measure(&args.model, &tokens, args.prompt)?;
    let out = &mut stdout().lock();
    Run::print_header(out)?;
    run.print("candle", out)?;
    run.print_loaded(out)
}

/// The prompt and the tokens after it. The checkpoint is closed again: its memory must not count.
fn tokens(args: &Args) -> Result<Vec<u32>> {
    let options = LoadOptions {
        dequantize: false,
        ..Default::default()
    };
    let checkpoint = Checkpoint::open(&args.model, options)?;
    let (wanted, most) = (
        args.prompt + args.decode,
        checkpoint.config.context_length.min(MAX_SEQ_LEN),
    );
    ensure!(
        wanted <= most,
        "prompt and decode: expected at most {most} tokens together, which candle's quantized llama holds, got \
         {wanted}; lower --prompt"
    );
    first_tokens(&args.text, &checkpoint, wanted)
}

/// Runs the first `prompt` tokens at once, then one at a time.
fn measure(model: &str, tokens: &[u32], prompt: usize) -> Result<Run> {
    let mut file = File::open(model).with_context(|| format!("model {model}"))?;
    let content = Content::read(&mut file)
        .with_context(|| format!("model: expected a GGUF file for candle's quantized llama, got {model}"))?;
    let mut weights = ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
    let loaded_rss_bytes = memory("VmRSS");
    let mut forward = |tokens: &[u32], position: usize| -> Result<f64> {
        let start = Instant::now();
        let logits = weights.forward(&Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?, position)?;
        let seconds = start.elapsed().as_secs_f64();
        finite::check("candle's logits", &logits, position + tokens.len() - 1)?;
        Ok(seconds)
    };
    let prefill = forward(&tokens[..prompt], 0)?;
    let mut decode = 0.0;
    for position in prompt..tokens.len() {
        decode += forward(&tokens[position..position + 1], position)?;
    }
    let rest = tokens.len() - prompt;
    let stats = Stats {
        prompt_tokens: prompt,
        generated_tokens: rest,
        prefill_tokens_per_second: Some(prompt as f64 / prefill),
        decode_tokens_per_second: Some(rest as f64 / decode),
        draft: None,
        kv: None,
        hidden: Hidden {
            hidden_ratio: 0.0,
            hidden_ratio_per_layer: Vec::new(),
            hidden_ratio_of_whole_layers: None,
        },
        peak_rss_bytes: memory("VmHWM"),
    };
    Ok(Run {
        stats,
        decode_by_prompt_weights: None,
        loaded_rss_bytes,
        curve: Vec::new(),
    })
}
