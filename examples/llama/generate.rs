//! `llama generate`: continues a prompt, or answers it.

use std::io::{stderr, stdout, Write};
use std::time::Instant;

use anyhow::{anyhow, ensure, Context, Result};
use candle_transformers::generation::LogitsProcessor;
use serde::Serialize;

use crate::args::GenerateArgs;
use crate::compression::Compression;
use crate::load::Checkpoint;
use crate::model::{HiddenCounts, Llama};
use crate::report::{check_json_path, write_json, RunReport};

#[derive(Serialize)]
struct GenerateReport {
    text: String,
    prompt_tokens: usize,
    /// Generated tokens.
    tokens: usize,
    seconds: f64,
    #[serde(flatten)]
    run: RunReport,
}

pub fn run(args: &GenerateArgs) -> Result<()> {
    check_json_path(args.model.json.as_deref())?;
    let mut sampler = sampler(args)?;
    let compression = Compression::from_args(&args.compression)?;
    let mut checkpoint = Checkpoint::open(&args.model.model, args.model.load_options())?;
    let prompt = encode_prompt(&checkpoint, args)?;
    let attention = compression.attention(checkpoint.config.layers, checkpoint.config.heads)?;
    let model = checkpoint.load(attention)?;

    let start = Instant::now();
    let generated = generate(&model, &checkpoint, &prompt, args.max_tokens, &mut sampler)?;
    let seconds = start.elapsed().as_secs_f64();
    let speed = generated.tokens as f64 / seconds;
    let report = GenerateReport {
        text: generated.text,
        prompt_tokens: prompt.len(),
        tokens: generated.tokens,
        seconds,
        run: RunReport::new(&args.model, &compression, &generated.counts, speed),
    };
    let out = &mut stderr().lock();
    writeln!(
        out,
        "\nprompt tokens     {}\ngenerated tokens  {}",
        report.prompt_tokens, report.tokens
    )?;
    report.run.print(out)?;
    write_json(args.model.json.as_deref(), &report)
}

fn sampler(args: &GenerateArgs) -> Result<LogitsProcessor> {
    ensure!(
        args.temperature.is_finite() && args.temperature >= 0.0,
        "temperature: expected a number of at least 0, got {}; 0 takes the likeliest token",
        args.temperature
    );
    if let Some(p) = args.top_p {
        ensure!(
            p > 0.0 && p <= 1.0,
            "top-p: expected a probability above 0 and at most 1, got {p}; 1 samples from all"
        );
    }
    Ok(LogitsProcessor::new(args.seed, Some(args.temperature), args.top_p))
}

/// The prompt's tokens, which must leave room for at least one more in the model's context.
fn encode_prompt(checkpoint: &Checkpoint, args: &GenerateArgs) -> Result<Vec<u32>> {
    let tokens = match args.chat {
        true => {
            let template = checkpoint.chat_template.as_ref();
            let template =
                template.context("chat: expected a checkpoint with a chat template, found none; leave --chat out")?;
            checkpoint.encode(&template.render(&args.prompt)?, false)?
        }
        false => checkpoint.encode(&args.prompt, true)?,
    };
    let limit = checkpoint.config.context_length;
    ensure!(
        !tokens.is_empty(),
        "prompt: expected some text, got none; give one with --prompt"
    );
    ensure!(
        tokens.len() < limit,
        "prompt: expected at most {} tokens, which leaves room in the model's context of {limit}, got {}; shorten it",
        limit - 1,
        tokens.len()
    );
    Ok(tokens)
}

struct Generated {
    text: String,
    tokens: usize,
    counts: HiddenCounts,
}

/// Generates up to `max_tokens`, printing text as it comes.
///
/// Every step runs the whole sequence again. The counts are those of the last step, the longest sequence.
fn generate(
    model: &Llama,
    checkpoint: &Checkpoint,
    prompt: &[u32],
    max_tokens: usize,
    sampler: &mut LogitsProcessor,
) -> Result<Generated> {
    let out = &mut stdout().lock();
    let mut decoder = checkpoint.tokenizer.decode_stream(true);
    let mut tokens = prompt.to_vec();
    let mut generated = Generated {
        text: String::new(),
        tokens: 0,
        counts: HiddenCounts::default(),
    };
    while generated.tokens < max_tokens {
        if tokens.len() >= checkpoint.config.context_length {
            writeln!(
                stderr(),
                "\nnote: stopped at the model's context of {} tokens",
                tokens.len()
            )?;
            break;
        }
        generated.counts = HiddenCounts::default();
        let hidden = model.forward(&tokens, 0, &mut generated.counts)?;
        let logits = model.logits(&hidden, tokens.len() - 1, 1)?.squeeze(0)?;
        let token = sampler.sample(&logits).context("sampling: the logits are not usable")?;
        if checkpoint.end_tokens.contains(&token) {
            break;
        }
        tokens.push(token);
        generated.tokens += 1;
        if let Some(piece) = decoder.step(token).map_err(|error| anyhow!("tokenizer: {error}"))? {
            write!(out, "{piece}")?;
            out.flush()?;
            generated.text.push_str(&piece);
        }
    }
    writeln!(out)?;
    Ok(generated)
}
