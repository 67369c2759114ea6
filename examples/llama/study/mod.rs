//! `llama report`: one model under every method, and under controls that keep the same number of entries.

mod held;
mod ledger;
mod mean;
mod method;
mod passkey;
mod plots;
mod policies;
mod run;
mod score;
mod summary;
mod tables;

use std::fs;

use anyhow::{ensure, Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::ReportArgs;
use crate::calibrate;
use crate::corpus::{self, Window};
use crate::load::Checkpoint;
use crate::windows::{self, Purpose};
use ledger::Ledger;
use method::{Method, Planner};
use passkey::{Passkey, QUESTION};
use policies::Named;
use run::{Run, Task};
use summary::Summary;

pub fn run(args: &ReportArgs) -> Result<()> {
    check(args)?;
    let text = corpus::read(&args.text)?;
    let options = args.model.load_options()?;
    let mut checkpoint = Checkpoint::open(&args.model.model, options.clone())?;
    corpus::check_context(args.context, &checkpoint)?;
    for length in &args.passkey {
        corpus::check_context(*length, &checkpoint)?;
    }
    let tokens = checkpoint.encode(&text, false)?;
    let tasks = tasks(&tokens, &checkpoint, args)?;
    fs::create_dir_all(&args.out).with_context(|| format!("out {}", args.out.display()))?;
    let model = checkpoint.load(calibrate::dense(checkpoint.config.layers)?)?;
    let policies = policies::all(&model, &checkpoint, &tokens, args)?;
    let mut methods = Method::all(&policies);
    if !args.methods.is_empty() {
        methods.retain(|method| method.is_dense() || args.methods.iter().any(|name| name == method.family));
    }
    let given: Vec<String> = match args.policies.is_empty() {
        true => Vec::new(),
        false => policies.iter().map(Named::figures).collect(),
    };
    let settings = format!(
        "{} {} {} {} {:?} {QUESTION:?} {} {:?} {given:?}",
        model.fingerprint()?,
        args.text.display(),
        args.context,
        args.windows,
        args.compression.calibrated_config(),
        args.model.device(),
        options.dtype
    );
    let mut ledger = Ledger::open(&args.out.join("progress.jsonl"), &settings)?;

    let planners: Vec<(String, Planner)> = methods
        .iter()
        .map(|method| Ok((method.name(), method.planner(&policies)?)))
        .collect::<Result<_>>()?;
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} runs  {msg}  {eta} left")?;
    let bar = ProgressBar::new((methods.len() * tasks.len()) as u64).with_style(style);
    for (name, task) in &tasks {
        let mut run = Run::new(&model, task);
        for (method, planner) in &planners {
            bar.set_message(format!("{method} {name}"));
            bar.tick();
            let key = format!("{method} {name}");
            if ledger.get(&key).is_none() {
                ledger.add(&key, run.measure(planner)?)?;
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let asked: Vec<(String, usize)> = args.passkey.iter().map(|length| ("passkey".into(), *length)).collect();
    let summary = Summary::new(&args.model.model, &methods, &asked, &ledger)?;
    summary.write(&args.out)?;
    plots::draw(&args.out, &summary, &policies)?;
    print!("{}", tables::markdown(&summary));
    Ok(())
}

fn check(args: &ReportArgs) -> Result<()> {
    ensure!(
        !args.ratios.is_empty() && args.windows > 0 && args.keys > 0,
        "ratios, windows and keys: expected at least one of each, got {:?}, {} and {}; see --help",
        args.ratios,
        args.windows,
        args.keys
    );
    for name in &args.methods {
        ensure!(
            Method::FAMILIES.contains(&name.as_str()),
            "methods: expected some of {}, got {name}; see --help",
            Method::FAMILIES.join(", ")
        );
    }
    Ok(())
}

/// Every text window, each also as a copy test, and pass keys at every length and depth.
fn tasks(tokens: &[u32], checkpoint: &Checkpoint, args: &ReportArgs) -> Result<Vec<(String, Task)>> {
    let windows = windows::spread(tokens, args.context, args.windows, Purpose::Score)?;
    let mut tasks = Vec::new();
    for (index, window) in windows.iter().enumerate() {
        tasks.push((format!("prose {index}"), Task::Text(Window::prose(window))));
        tasks.push((format!("copy {index}"), Task::Text(Window::copy(window))));
    }
    for length in &args.passkey {
        for (index, depth) in args.depths.iter().enumerate() {
            for key in 0..args.keys {
                let number = index + key * args.depths.len();
                let passkey = Passkey::new(checkpoint, tokens, *length, *depth, number)?;
                let again = if key == 0 { String::new() } else { format!(" {key}") };
                tasks.push((format!("passkey {length} {depth}{again}"), Task::Passkey(passkey)));
            }
        }
    }
    Ok(tasks)
}
