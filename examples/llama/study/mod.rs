//! `llama report`: one model under every method, and under controls that keep the same number of entries.

mod held;
mod ledger;
mod method;
mod passkey;
mod plots;
mod policies;
mod summary;

use std::fs;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::ReportArgs;
use crate::calibrate;
use crate::corpus::{self, Window};
use crate::load::Checkpoint;
use crate::model::{HiddenCounts, Llama};
use crate::windows::{self, Purpose};
use held::Kept;
use ledger::{Ledger, Record};
use method::Method;
use passkey::{Passkey, QUESTION};
use policies::Named;

/// A task for a method.
enum Task {
    Text(Window),
    Passkey(Passkey),
}

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

    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} runs  {msg}  {eta} left")?;
    let bar = ProgressBar::new((methods.len() * tasks.len()) as u64).with_style(style);
    for method in &methods {
        for (name, task) in &tasks {
            bar.set_message(format!("{} {name}", method.name()));
            bar.tick();
            let key = format!("{} {name}", method.name());
            if ledger.get(&key).is_none() {
                ledger.add(&key, measure(&model, method, &policies, task)?)?;
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let summary = summary::Summary::new(&args.model.model, &methods, &ledger)?;
    summary.write(&args.out)?;
    plots::draw(&args.out, &summary, &policies)?;
    print!("{}", summary.markdown());
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

/// Runs one task under one method.
fn measure(model: &Llama, method: &Method, policies: &[Named], task: &Task) -> Result<Record> {
    let tokens = match task {
        Task::Text(window) => &window.tokens,
        Task::Passkey(passkey) => &passkey.tokens,
    };
    let planner = method.planner(policies)?;
    let mut kept = Kept::default();
    let start = Instant::now();
    let hidden = model.forward_planned(tokens, &mut HiddenCounts::default(), |call| {
        let (plan, per_query_head) = planner.plan(call)?;
        kept.add(call, &plan, per_query_head)?;
        Ok(plan)
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let (score, predicted, found) = match task {
        Task::Text(window) => (window.nll(model, &hidden)?, window.predicted(), None),
        Task::Passkey(passkey) => {
            let (score, found) = passkey.score(model, &hidden)?;
            (score, passkey.predicted(), Some(found))
        }
    };
    Ok(Record {
        score,
        predicted,
        found,
        tokens: tokens.len(),
        kept,
        seconds,
    })
}
