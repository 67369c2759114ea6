//! `llama report`: one model under every method, and under controls that keep the same number of entries.

mod held;
mod ledger;
mod mean;
mod method;
mod passkey;
mod plots;
mod policies;
mod prune;
mod run;
mod score;
mod summary;
mod tables;
pub mod tasks;
mod words;
mod workload;

use std::fs;

use anyhow::{ensure, Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::ReportArgs;
use crate::calibrate;
use crate::corpus;
use crate::load::Checkpoint;
use crate::report::{check_path, write_file};
use ledger::Ledger;
use method::{Method, Planner};
use passkey::QUESTION;
use policies::Named;
use run::Run;
use summary::Summary;
use workload::Workload;

pub fn run(args: &ReportArgs) -> Result<()> {
    check(args)?;
    check_path("write-tasks", args.write_tasks.as_deref())?;
    let text = corpus::read(&args.text)?;
    let options = args.model.load_options()?;
    let mut checkpoint = Checkpoint::open(&args.model.model, options.clone())?;
    let start = checkpoint.start()?;
    corpus::check_context(args.context, &checkpoint, &start)?;
    let asked = !args.tasks.is_empty();
    for length in args.passkey.iter().chain(args.lengths.iter().filter(|_| asked)) {
        corpus::check_context(*length, &checkpoint, &start)?;
    }
    let tokens = checkpoint.encode(&text, false)?;
    let work = Workload::new(&tokens, &checkpoint, args)?;
    if let Some(file) = &args.write_tasks {
        return write_file(file, &work.to_json(&args.model.model)?)
            .with_context(|| format!("write-tasks {}", file.display()));
    }
    fs::create_dir_all(&args.out).with_context(|| format!("out {}", args.out.display()))?;
    let model = checkpoint.load(calibrate::dense(checkpoint.config.layers)?)?;
    let policies = policies::all(&model, &checkpoint, &tokens, args)?;
    let named = |method: &Method| args.methods.iter().any(|name| name == method.family);
    let mut methods = Method::all(&policies);
    methods.retain(|method| match args.methods.is_empty() {
        true => args.peers || !method.prunes(),
        false => method.is_dense() || named(method) || args.peers && method.prunes(),
    });
    let given: Vec<String> = match args.policies.is_empty() {
        true => Vec::new(),
        false => policies.iter().map(Named::figures).collect(),
    };
    let begins = match start.count() {
        0 => String::new(),
        _ => format!(" {start:?}"),
    };
    let settings = format!(
        "{} {} {} {} {:?} {QUESTION:?} {} {:?} {given:?} {}{begins}",
        model.fingerprint()?,
        args.text.display(),
        args.context,
        args.windows,
        args.compression.calibrated_config(),
        args.model.device(),
        options.dtype,
        args.seed
    );
    let mut ledger = Ledger::open(&args.out.join("progress.jsonl"), &settings)?;

    let planners: Vec<(&Method, Planner)> = methods
        .iter()
        .map(|method| Ok((method, method.planner(&policies)?)))
        .collect::<Result<_>>()?;
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} runs  {msg}  {eta} left")?;
    let bar = ProgressBar::new((methods.len() * work.tasks.len()) as u64).with_style(style);
    for (name, task) in &work.tasks {
        let mut run = Run::new(&model, task);
        for (method, planner) in &planners {
            let key = format!("{} {name}", method.name());
            bar.set_message(key.clone());
            bar.tick();
            if task.takes(method) && ledger.get(&key).is_none() {
                ledger.add(&key, run.measure(planner)?)?;
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let summary = Summary::new(&args.model.model, &methods, &work.asked, &ledger)?;
    summary.write(&args.out)?;
    plots::draw(&args.out, &summary, &policies)?;
    print!("{}", tables::markdown(&summary));
    Ok(())
}

fn check(args: &ReportArgs) -> Result<()> {
    ensure!(
        !args.ratios.is_empty() && args.windows > 0 && args.keys > 0 && args.samples > 0,
        "ratios, windows, keys and samples: expected at least one of each, got {:?}, {}, {} and {}; see --help",
        args.ratios,
        args.windows,
        args.keys,
        args.samples
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
