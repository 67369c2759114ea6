//! `llama eval`: perplexity over windows of a text.

use std::io::Write;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use candle_core::Tensor;
use candle_sfattention::{CacheOptions, Storage};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::args::EvalArgs;
use crate::compression::Compression;
use crate::corpus::{self, Window};
use crate::load::Checkpoint;
use crate::model::{HiddenCounts, Llama};
use crate::ranks::Ranks;
use crate::report::{check_path, write_json, RunReport};
use crate::stats::{Hidden, KvUse};
use crate::steps::StepFormat;
use crate::weights::Pass;
use crate::windows::{self, Purpose};

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
    args.ranks.run(&args.model, |ranks| run_on(args, ranks))
}

fn run_on(args: &EvalArgs, ranks: &Ranks) -> Result<()> {
    let compression = Compression::from_args(&args.compression)?;
    let text = corpus::read(&args.text)?;
    let mut checkpoint = Checkpoint::open(&args.model.model, args.model.load_options_of(ranks)?)?;
    let start = checkpoint.start()?;
    corpus::check_context(args.context, &checkpoint, &start)?;
    let attention = compression.attention(&checkpoint.config, ranks)?;
    let tokens = checkpoint.encode(&text, false)?;
    let windows: Vec<Window> = windows(&tokens, args)?
        .into_iter()
        .map(|window| match args.copy {
            true => Window::copy(window, &start),
            false => Window::prose(window, &start),
        })
        .collect();
    ensure!(
        args.step != Some(0),
        "step: expected at least 1 token, got 0; 1 scores as generate decodes"
    );
    let format = match args.step {
        Some(_) => args.model.step_format(),
        None => StepFormat::Prompt,
    };
    let model = checkpoint.load_formed(attention, &|linear| format.with_step(linear), ranks)?;
    compression.check_weights(&model.fingerprint()?, ranks);

    let begun = Instant::now();
    let (nll, hidden) = score(&model, &windows, (args.step, args.kv_dtype))?;
    let seconds = begun.elapsed().as_secs_f64();
    if !ranks.is_first() {
        return Ok(());
    }
    let predicted: usize = windows.iter().map(Window::predicted).sum();
    let nll = nll / predicted as f64;
    let report = EvalReport {
        perplexity: nll.exp(),
        nll,
        tokens: predicted,
        windows: windows.len(),
        context: args.context,
        seconds,
        run: RunReport::new(&args.model, &compression, hidden, predicted as f64 / seconds),
    };
    report.print(&mut ranks.stdout())?;
    write_json("json", args.model.json.as_deref(), &report)
}

impl EvalReport {
    fn print(&self, out: &mut dyn Write) -> Result<()> {
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

/// The windows to score: the first ones, or evenly spread.
fn windows<'t>(tokens: &'t [u32], args: &EvalArgs) -> Result<Vec<&'t [u32]>> {
    let available = tokens.len() / args.context;
    ensure!(
        available > 0,
        "text: expected at least {} tokens, one window, got {}; lower --context or give a longer text",
        args.context,
        tokens.len()
    );
    if args.spread {
        let wanted = args.windows.unwrap_or(available / 2);
        return windows::spread(tokens, args.context, wanted, Purpose::Score);
    }
    let wanted = args.windows.unwrap_or(available);
    ensure!(
        (1..=available).contains(&wanted),
        "windows: expected 1 to {available}, as the text has {} tokens and a window {}, got {wanted}; \
         lower --windows or --context, or give a longer text",
        tokens.len(),
        args.context
    );
    Ok(tokens.chunks_exact(args.context).take(wanted).collect())
}

/// The summed negative log likelihood of the tokens that count in each window, whole or `step` tokens at a time, and
/// the tokens hidden; with steps, those of the last window.
fn score(
    model: &Llama,
    windows: &[Window],
    (step, storage): (Option<usize>, Option<Storage>),
) -> Result<(f64, Hidden)> {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} windows  {msg}  {eta} left")?;
    let bar = match model.ranks().is_first() {
        true => ProgressBar::new(windows.len() as u64).with_style(style),
        false => ProgressBar::hidden(),
    };
    let (mut sum, mut predicted) = (0.0, 0);
    let mut counts = HiddenCounts::default();
    let mut kept = None;
    for (index, window) in windows.iter().enumerate() {
        let nll = match step {
            None => {
                let hidden = model.forward(&window.tokens, &mut counts)?;
                window.nll(model, &hidden)
            }
            Some(step) => {
                let mut caches = model.caches(&CacheOptions {
                    storage,
                    ..Default::default()
                })?;
                let rows = window.tokens.chunks(step);
                let rows = rows.map(|tokens| model.forward_as(tokens, &mut caches, Pass::Step));
                let hidden = Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 1)?;
                kept = Some(KvUse::of(&caches, model)?.hidden());
                window.nll_as(model, &hidden, Pass::Step)
            }
        };
        sum += nll.with_context(|| format!("window {index}"))?;
        predicted += window.predicted();
        bar.set_message(format!("perplexity {:.2}", (sum / predicted as f64).exp()));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let hidden = match kept {
        Some(hidden) => hidden,
        None => Hidden::of(&counts, model)?,
    };
    Ok((sum, hidden))
}
