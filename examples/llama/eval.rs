//! `llama eval`: perplexity over windows of a text.

use std::fs;
use std::io::{stdout, Write};
use std::ops::Range;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use candle_core::{Device, Tensor, D};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::args::EvalArgs;
use crate::compression::Compression;
use crate::load::Checkpoint;
use crate::model::{HiddenCounts, Llama};
use crate::report::{check_path, write_json, RunReport};
use crate::stats::Hidden;

/// Rows of logits held at once: 64 rows of 50k f32 are 12 MiB, and three such buffers live together.
const LOGIT_ROWS: usize = 64;

#[derive(Serialize)]
struct EvalReport {
    perplexity: f64,
    /// Mean negative log likelihood per predicted token, in nats.
    nll: f64,
    /// Predicted tokens.
    tokens: usize,
    windows: usize,
    context: usize,
    seconds: f64,
    #[serde(flatten)]
    run: RunReport,
}

pub fn run(args: &EvalArgs) -> Result<()> {
    check_path("json", args.model.json.as_deref())?;
    let compression = Compression::from_args(&args.compression)?;
    let text = fs::read_to_string(&args.text).with_context(|| format!("text {}", args.text.display()))?;
    ensure!(
        !text.trim().is_empty(),
        "text {}: expected some text, got an empty file; give another with --text",
        args.text.display()
    );
    let mut checkpoint = Checkpoint::open(&args.model.model, args.model.load_options())?;
    let limit = checkpoint.config.context_length;
    ensure!(
        (2..=limit).contains(&args.context),
        "context: expected 2 to {limit}, the model's context length, got {}; change --context",
        args.context
    );
    let attention = compression.attention(checkpoint.config.layers, checkpoint.config.heads)?;
    let tokens = checkpoint.encode(&text, false)?;
    let windows = windows(tokens.len(), args)?;
    let model = checkpoint.load(attention)?;

    let start = Instant::now();
    let (nll, counts) = score(&model, &tokens, &windows)?;
    let seconds = start.elapsed().as_secs_f64();
    let predicted = windows.len() * (args.context - 1);
    let nll = nll / predicted as f64;
    let report = EvalReport {
        perplexity: nll.exp(),
        nll,
        tokens: predicted,
        windows: windows.len(),
        context: args.context,
        seconds,
        run: RunReport::new(
            &args.model,
            &compression,
            Hidden::of(&counts),
            predicted as f64 / seconds,
        ),
    };
    report.print()?;
    write_json("json", args.model.json.as_deref(), &report)
}

impl EvalReport {
    fn print(&self) -> Result<()> {
        let out = &mut stdout().lock();
        writeln!(out, "perplexity        {:.4}", self.perplexity)?;
        writeln!(out, "nll per token     {:.6}", self.nll)?;
        writeln!(
            out,
            "predicted tokens  {} ({} windows of {})",
            self.tokens, self.windows, self.context
        )?;
        self.run.print(out)
    }
}

/// The windows to score: multiples of the context, the first ones or evenly spread.
fn windows(tokens: usize, args: &EvalArgs) -> Result<Vec<Range<usize>>> {
    let available = tokens / args.context;
    ensure!(
        available > 0,
        "text: expected at least {} tokens, one window, got {tokens}; lower --context or give a longer text",
        args.context
    );
    let wanted = args.windows.unwrap_or(available);
    ensure!(
        (1..=available).contains(&wanted),
        "windows: expected 1 to {available}, as the text has {tokens} tokens and a window {}, got {wanted}; \
         lower --windows or --context, or give a longer text",
        args.context
    );
    let index = |i: usize| match args.spread {
        true => i * available / wanted,
        false => i,
    };
    Ok((0..wanted)
        .map(|i| index(i) * args.context..(index(i) + 1) * args.context)
        .collect())
}

/// The summed negative log likelihood of every token but the first of each window.
fn score(model: &Llama, tokens: &[u32], windows: &[Range<usize>]) -> Result<(f64, HiddenCounts)> {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} windows  {msg}  {eta} left")?;
    let bar = ProgressBar::new(windows.len() as u64).with_style(style);
    let (mut sum, mut predicted) = (0.0, 0);
    let mut counts = HiddenCounts::default();
    for window in windows {
        let window = &tokens[window.clone()];
        let hidden = model.forward(window, &mut counts)?;
        for first in (0..window.len() - 1).step_by(LOGIT_ROWS) {
            let rows = LOGIT_ROWS.min(window.len() - 1 - first);
            sum += nll(&model.logits(&hidden, first, rows)?, &window[first + 1..=first + rows])?;
        }
        predicted += window.len() - 1;
        bar.set_message(format!("perplexity {:.2}", (sum / predicted as f64).exp()));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok((sum, counts))
}

/// Σ log Σ exp(logits) - logits[target] over rows `(n, vocabulary)`; rows in f32, their sum in f64.
fn nll(logits: &Tensor, targets: &[u32]) -> Result<f64> {
    let targets = Tensor::new(targets, &Device::Cpu)?.unsqueeze(1)?;
    let picked = logits.gather(&targets, D::Minus1)?.squeeze(1)?;
    let losses = (logits.log_sum_exp(D::Minus1)? - picked)?;
    Ok(losses.to_vec1::<f32>()?.into_iter().map(f64::from).sum())
}
