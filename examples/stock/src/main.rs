//! candle-transformers' own `llama::Llama` on compressed attention: text in, text, speed and bytes out.

#[path = "../../llama/error.rs"]
mod error;
#[path = "../../llama/floats.rs"]
mod floats;
#[allow(dead_code)]
#[path = "../../llama/sampling.rs"]
mod sampling;
#[allow(dead_code)]
#[path = "../../llama/stream.rs"]
mod stream;

include!("../../llama/decoder.rs");

use std::env;
use std::io::{stderr, stdout, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sfattention::session::{ModelCache, Session, SessionOptions};
use candle_sfattention::{CompressionConfig, HeadStrategies, MergeStrategy, Policy};
use clap::{Parser, ValueEnum};
use stock::models::llama::{Cache, Config, Llama};

use crate::load::{Checkpoint, LoadOptions};
use crate::model::LlamaConfig;
use crate::rope::RopeScaling;
use crate::sampling::Sampler;
use crate::stream::TextStream;

/// Continues a text with candle-transformers' own Llama, whose calls of flash attention are a session's.
#[derive(Debug, Parser)]
#[command(name = "stock")]
struct Args {
    /// A Llama: a GGUF file, a Hugging Face folder, or OWNER/NAME on the hub.
    #[arg(long, default_value = "data/SmolLM2-135M-Instruct.Q4_1.gguf")]
    model: String,
    /// The text to continue.
    #[arg(long, default_value = "Call me Ishmael.", conflicts_with = "text")]
    prompt: String,
    /// A file whose beginning is the prompt.
    #[arg(long)]
    text: Option<PathBuf>,
    /// The most tokens of the prompt that are read.
    #[arg(long, default_value_t = 1024)]
    tokens: usize,
    /// Tokens to generate.
    #[arg(long, default_value_t = 32)]
    max_tokens: usize,
    /// The attention of all layers.
    #[arg(long, value_enum, default_value_t = Attention::Pretrained)]
    attention: Attention,
    /// A policy that `llama calibrate` wrote, in the place of --attention.
    #[arg(long, conflicts_with = "attention")]
    policy: Option<PathBuf>,
    /// Whether the model's own cache is kept beside the session's.
    #[arg(long)]
    keep_own_cache: bool,
}

/// The attention of a run.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Attention {
    /// The model's own attention and cache, without flash attention.
    Plain,
    /// A session that hides nothing.
    Off,
    /// A session with `CompressionConfig::pretrained()`.
    Pretrained,
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
    let mut checkpoint = Checkpoint::open(&args.model, LoadOptions::default())?;
    let (prompt, tokens) = prompt(args, &checkpoint)?;
    let mut session = session(args, &checkpoint.config)?;
    let config = stock_config(&checkpoint.config, session.is_some())?;
    let weights = checkpoint.read(floats::all_weights)?;
    let vb = VarBuilder::from_tensors(weights.into_iter().collect(), DType::F32, &Device::Cpu);
    let model = Llama::load(vb, &config)?;
    let own = session.is_none() || args.keep_own_cache;
    let mut cache = Cache::new(own, DType::F32, &config, &Device::Cpu)?;
    let mut forward = |tokens: &[u32], position: usize| -> Result<(Tensor, f64)> {
        let tokens = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        let start = Instant::now();
        let logits = match &mut session {
            Some(session) => session.scope(|| model.forward(&tokens, position, &mut cache))?,
            None => model.forward(&tokens, position, &mut cache)?,
        };
        Ok((logits.squeeze(0)?, start.elapsed().as_secs_f64()))
    };

    let out = &mut stdout().lock();
    write!(out, "{prompt}")?;
    let mut sampler = Sampler::new(0.0, None, 0)?;
    let mut stream = TextStream::new(&checkpoint.text.tokenizer, &tokens)?;
    let (mut logits, prefill) = forward(&tokens, 0)?;
    let (mut decode, mut generated) = (0.0, 0);
    while generated < args.max_tokens {
        let next = sampler.sample(&logits)?;
        if checkpoint.text.ends.contains(&next) {
            break;
        }
        write!(out, "{}", stream.step(next)?)?;
        out.flush()?;
        let (row, seconds) = forward(&[next], tokens.len() + generated)?;
        (logits, generated, decode) = (row, generated + 1, decode + seconds);
    }
    writeln!(out)?;
    let err = &mut stderr().lock();
    writeln!(
        err,
        "{} tokens read, {:.1} tokens/s; {generated} generated, {:.1} ms a token",
        tokens.len(),
        tokens.len() as f64 / prefill,
        1e3 * decode / generated.max(1) as f64
    )?;
    let dense = 8 * config.num_hidden_layers * config.num_key_value_heads * checkpoint.config.head_dim;
    let own_bytes = if own { dense * (tokens.len() + generated) } else { 0 };
    writeln!(
        err,
        "keys and values: {} KiB in the model's own cache, {} KiB in the session's, {} KiB if nothing were hidden",
        own_bytes / 1024,
        session.as_ref().map_or(0, Session::bytes) / 1024,
        dense * (tokens.len() + generated) / 1024
    )?;
    Ok(())
}

/// The prompt's text and tokens.
fn prompt(args: &Args, checkpoint: &Checkpoint) -> Result<(String, Vec<u32>)> {
    let text = match &args.text {
        Some(path) => std::fs::read_to_string(path).with_context(|| format!("text {}", path.display()))?,
        None => args.prompt.clone(),
    };
    let mut tokens = checkpoint.encode(&text, true)?;
    tokens.truncate(args.tokens);
    let most = checkpoint.config.context_length.saturating_sub(args.max_tokens);
    ensure!(
        (1..=most).contains(&tokens.len()),
        "prompt: expected 1 to {most} tokens, which leaves room in the model's context, got {}; change --tokens",
        tokens.len()
    );
    let shown = match args.text {
        Some(_) => String::new(),
        None => text,
    };
    Ok((shown, tokens))
}

fn session(args: &Args, config: &LlamaConfig) -> Result<Option<Session>> {
    let options = SessionOptions {
        model_cache: match args.keep_own_cache {
            true => ModelCache::Kept,
            false => ModelCache::Cleared,
        },
        ..Default::default()
    };
    if let Some(path) = &args.policy {
        let text = std::fs::read_to_string(path).with_context(|| format!("policy {}", path.display()))?;
        let policy = Policy::from_json(&text)?;
        ensure!(
            policy.parts().model == config.shape(),
            "policy: expected one for {:?}, got one for {:?}; calibrate this model",
            config.shape(),
            policy.parts().model
        );
        return Ok(Some(Session::new(&policy, options)?));
    }
    let strategy = match args.attention {
        Attention::Plain => return Ok(None),
        Attention::Off => MergeStrategy::Off,
        Attention::Pretrained => MergeStrategy::Similarity,
    };
    let strategies = HeadStrategies::uniform(strategy);
    let session = Session::uniform(config.shape(), &strategies, &CompressionConfig::pretrained(), options)?;
    Ok(Some(session))
}

/// The config in candle-transformers' terms.
fn stock_config(config: &LlamaConfig, flash: bool) -> Result<Config> {
    let plain = config.layer.is_llama()
        && config.head_dim * config.heads == config.hidden_size
        && !(config.attention_bias || config.mlp_bias)
        && matches!(config.rope_scaling, RopeScaling::None);
    ensure!(
        plain,
        "model: expected a Llama without biases and without rope scaling, whose heads fill the hidden size, got \
         {config:?}; the llama example runs others"
    );
    Ok(Config {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        num_hidden_layers: config.layers,
        num_attention_heads: config.heads,
        num_key_value_heads: config.kv_heads,
        use_flash_attn: flash,
        rms_norm_eps: config.norm_eps,
        rope_theta: config.rope_theta as f32,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: config.context_length,
        tie_word_embeddings: config.tied,
    })
}
