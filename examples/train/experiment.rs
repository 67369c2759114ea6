//! The same training with a list of compressions.

use std::fs;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use clap::Parser;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::{ExperimentArgs, RunArgs};
use crate::checkpoint::{latest, read_json, write_file, write_json};
use crate::data::{train_tokenizer, Text};
use crate::plot::{plot_runs, plot_tradeoff};
use crate::record;
use crate::trainer::{train, Summary};

/// Name and flags of every run; LAMBDA stands for `--lambda`.
const RUNS: [(&str, &str); 13] = [
    ("dense", "--dense"),
    ("pair-sum difference", "--preset paper --strategy difference"),
    (
        "pair-sum difference, loss / merged",
        "--preset paper --strategy difference --lambda LAMBDA --loss-normalizer merged",
    ),
    (
        "pair-sum difference, loss / pairs",
        "--preset paper --strategy difference --lambda LAMBDA --loss-normalizer pairs",
    ),
    ("pair-sum similarity", "--preset paper --strategy similarity"),
    (
        "pair-sum similarity, loss / merged",
        "--preset paper --strategy similarity --lambda LAMBDA --loss-normalizer merged",
    ),
    (
        "pair-sum similarity, loss / pairs",
        "--preset paper --strategy similarity --lambda LAMBDA --loss-normalizer pairs",
    ),
    ("mean, window 32", "--preset pretrained"),
    (
        "mean, window 32, loss / merged",
        "--preset pretrained --lambda LAMBDA --loss-normalizer merged",
    ),
    (
        "mean, window 32, loss / pairs",
        "--preset pretrained --lambda LAMBDA --loss-normalizer pairs",
    ),
    ("drop, window 32", "--preset pretrained --fold drop"),
    (
        "drop, window 32, loss / merged",
        "--preset pretrained --fold drop --lambda LAMBDA --loss-normalizer merged",
    ),
    (
        "drop, window 32, loss / pairs",
        "--preset pretrained --fold drop --lambda LAMBDA --loss-normalizer pairs",
    ),
];

/// result.json of one run.
#[derive(Serialize, Deserialize)]
struct Finished {
    name: String,
    flags: String,
    /// The run's settings: a finished run is kept only under the same ones.
    settings: Value,
    summary: Summary,
}

pub fn run(args: &ExperimentArgs) -> Result<()> {
    args.training.check()?;
    let text = Text::read(&args.text)?;
    fs::create_dir_all(&args.out).with_context(|| format!("out {}", args.out.display()))?;
    let tokenizer = args.out.join("tokenizer.json");
    if !tokenizer.exists() {
        let trained = train_tokenizer(&text.training, args.training.vocab)?;
        let json = trained
            .to_string(false)
            .map_err(|error| anyhow::anyhow!("tokenizer: {error}"))?;
        write_file(&tokenizer, &json)?;
    }
    let settings = serde_json::json!({"training": format!("{:?}", args.training), "text": text.hash});
    let only = args.only.as_deref().unwrap_or_default();
    ensure!(
        RUNS.iter().any(|(name, _)| name.contains(only)),
        "only: expected a part of a run's name such as dense, got {only}"
    );
    let mut finished = Vec::new();
    for (name, flags) in RUNS {
        let flags = flags.replace("LAMBDA", &args.lambda.to_string());
        let folder = args
            .out
            .join("runs")
            .join(name.replace(", ", "_").replace(" / ", "-").replace(' ', "-"));
        match read_json::<Finished>(&folder.join("result.json")) {
            Ok(done) if done.settings == settings && done.flags == flags => {
                finished.push((folder, done));
            }
            Ok(_) => anyhow::bail!(
                "out: expected runs with these flags, got {} with others; change --out",
                folder.display()
            ),
            Err(_) if !name.contains(only) => continue,
            Err(_) => {
                eprintln!("{name}: {flags}");
                let summary = train(&run_args(args, &flags, &folder, &tokenizer)?)?;
                let done = Finished {
                    name: name.into(),
                    flags,
                    settings: settings.clone(),
                    summary,
                };
                write_json(&folder.join("result.json"), &done)?;
                finished.push((folder, done));
            }
        }
        let runs: Vec<&Finished> = finished.iter().map(|(_, done)| done).collect();
        write_json(&args.out.join("experiment.json"), &runs)?;
        write_file(&args.out.join("experiment.md"), &table(&runs))?;
    }
    let mut rows = Vec::new();
    for (folder, done) in &finished {
        rows.push((done.name.clone(), record::read(folder)?));
    }
    plot_runs(&args.out, &rows)?;
    let points = finished.iter().map(|(_, done)| {
        let held_out = &done.summary.held_out;
        (done.name.clone(), held_out.hidden_ratio, held_out.perplexity)
    });
    plot_tradeoff(&args.out, &points.collect::<Vec<_>>())?;
    print!("{}", fs::read_to_string(args.out.join("experiment.md"))?);
    Ok(())
}

/// One run's arguments: its flags, parsed as on the command line, and the shared settings.
fn run_args(args: &ExperimentArgs, flags: &str, folder: &Path, tokenizer: &Path) -> Result<RunArgs> {
    let words = ["train", "--text", "-", "--out", "-"]
        .into_iter()
        .chain(flags.split_whitespace());
    let run = RunArgs::try_parse_from(words)?;
    Ok(RunArgs {
        text: args.text.clone(),
        out: folder.into(),
        resume: latest(folder).is_some(),
        tokenizer: Some(tokenizer.into()),
        training: args.training.clone(),
        ..run
    })
}

fn table(runs: &[&Finished]) -> String {
    let mut table = String::from(
        "| run | held-out perplexity | hidden ratio | cross entropy | compression loss | steps | minutes | flags |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for run in runs {
        let Summary {
            steps,
            seconds,
            cross_entropy,
            compression_loss,
            held_out,
            diverged_at,
            ..
        } = &run.summary;
        let steps = diverged_at.map_or(steps.to_string(), |step| format!("diverged at {step}"));
        table += &format!(
            "| {} | {:.2} | {:.4} | {cross_entropy:.4} | {compression_loss:.4} | {steps} | {:.1} | `{}` |\n",
            run.name,
            held_out.perplexity,
            held_out.hidden_ratio,
            seconds / 60.0,
            run.flags
        );
    }
    table
}
