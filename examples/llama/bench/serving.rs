//! `llama bench --shape`: how a model without a file serves, dense and with shares of its tokens hidden.
//!
//! Every context and attention runs in a process of its own, with the same random weights. One prompt is run. The rows
//! of a batch are copies of its caches in memory of their own, and each decodes random tokens.

#[path = "serving/args.rs"]
pub mod args;
#[path = "serving/measure.rs"]
mod measure;
#[path = "serving/rows.rs"]
mod rows;
#[path = "serving/search.rs"]
mod search;
#[path = "serving/table.rs"]
mod table;

use std::fs;
use std::io::stdout;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context, Result};
use candle_sfattention::{CompressionConfig, Storage};
use serde::Serialize;

use self::args::{once_each, BatchSize, Part, Setting};
use self::measure::{Batch, Calibration, Measurement, Run};
use super::child::Children;
use crate::args::BenchArgs;
use crate::random::Shape;
use crate::ranks::Ranks;
use crate::report::write_json;
use crate::stats::gib;

/// Tokens of a window that a policy is calibrated on, where the context has as many.
const CALIBRATION_TOKENS: usize = 2048;

#[derive(Serialize)]
struct Report {
    shape: String,
    parameters: u64,
    device: String,
    dtype: &'static str,
    /// Over which the model is split.
    ranks: usize,
    weights_seed: u64,
    /// Steps that are timed, and those before them.
    decode: usize,
    warm_up: usize,
    /// On the CPU, the memory for the caches of the largest batch.
    cache_gib: Option<f64>,
    /// Of the policies.
    config: CompressionConfig,
    calibrations: Vec<Calibration>,
    rows: Vec<Row>,
}

/// One batch of one attention at one context.
#[derive(Serialize)]
struct Row {
    context: usize,
    /// `dense`, or the share.
    attention: String,
    /// The share to hide, of the tokens that have left the window.
    wanted: Option<f64>,
    kv_dtype: String,
    /// Why nothing was measured.
    not_on_this_device: Option<String>,
    #[serde(flatten)]
    measured: Option<Measured>,
}

#[derive(Serialize)]
struct Measured {
    prefill_tokens_per_second: f64,
    hidden: f64,
    hidden_of_all: f64,
    /// The prompt's own row.
    prompt_kv_bytes: usize,
    prompt_kv_bytes_allocated: usize,
    prompt_kv_bytes_dense: usize,
    #[serde(flatten)]
    batch: Batch,
    /// Decoded tokens per second over those of dense attention, at the same context, batch and dtype.
    decode_of_dense: Option<f64>,
}

pub fn run(args: &BenchArgs, shape: Shape) -> Result<()> {
    args.serving.check(&shape, args.model.is_on_cpu())?;
    ensure!(
        args.decode > 0,
        "decode: expected at least 1 token, got 0; 32 is the default"
    );
    args.cache(None)?;
    let ranks = args.ranks.tensor_parallel;
    ensure!(
        ranks == 1 || !args.serving.batch.contains(&BatchSize::Largest),
        "batch: expected numbers of rows beside --tensor-parallel {ranks}, got max, for which each rank may find \
         another answer; give them with --batch"
    );
    shape.config.shard(ranks)?;
    match &args.serving.part {
        Some(Part::Calibrate { tokens, folder }) => {
            let all = measure::calibrated(args, &shape, *tokens, folder)?;
            Ok(serde_json::to_writer(stdout().lock(), &all)?)
        }
        Some(Part::Measure(setting)) => {
            let measure = |ranks: &Ranks| measure::measured(args, &shape, setting, ranks);
            let measured = args.ranks.run(&args.model, measure)?;
            Ok(serde_json::to_writer(stdout().lock(), &measured)?)
        }
        None => {
            let report = measured(args, shape)?;
            report.print()?;
            write_json("json", args.model.json.as_deref(), &report)
        }
    }
}

/// Runs every part in a process of its own.
fn measured(args: &BenchArgs, shape: Shape) -> Result<Report> {
    if args.model.is_on_cpu() {
        shape.check_memory(args.model.dtype())?;
    }
    let config = args.compression.calibrated_config();
    config.check(true)?;
    let contexts: Vec<usize> = once_each(&args.serving.context).collect();
    let never_hidden = config.window + config.sinks;
    if let Some(short) = contexts.iter().find(|context| **context < never_hidden + 2) {
        bail!(
            "context: expected at least {} tokens, since {never_hidden} of the window and the sinks are never hidden, \
             got {short}; change --context, --window or --sinks",
            never_hidden + 2
        )
    }
    let storages: Vec<Option<Storage>> = match args.kv_dtype.is_empty() {
        true => vec![None],
        false => once_each(&args.kv_dtype).map(Some).collect(),
    };
    let calibrated: Vec<usize> = contexts.iter().map(|context| calibration_tokens(*context)).collect();
    let calibrated: Vec<usize> = once_each(&calibrated).collect();
    let folder = tempfile::tempdir().context("policies: a folder for them")?;
    let settings: Vec<Setting> = contexts
        .iter()
        .flat_map(|context| settings(args, *context, &storages, folder.path()))
        .collect();
    let mut children = Children::new(calibrated.len() + settings.len())?;
    let run = |part: Part| -> Result<(String, String)> { Ok((part.to_string(), serde_json::to_string(&part)?)) };
    let mut calibrations: Vec<Calibration> = Vec::new();
    for tokens in calibrated {
        let folder = policies(folder.path(), tokens);
        fs::create_dir(&folder)?;
        let (name, part) = run(Part::Calibrate { tokens, folder })?;
        calibrations.extend(children.run::<Vec<Calibration>>(&name, &["--part", &part])?);
    }
    let mut rows = Vec::new();
    for setting in settings {
        let (name, part) = run(Part::Measure(setting.clone()))?;
        let measurement = children.run(&name, &["--part", &part])?;
        add(&mut rows, &setting, args, measurement);
    }
    drop(children);
    compare(&mut rows);
    Ok(Report {
        parameters: u64::try_from(shape.parameters()).unwrap_or(u64::MAX),
        shape: shape.name,
        device: args.model.device(),
        dtype: args.model.dtype().as_str(),
        ranks: args.ranks.tensor_parallel,
        weights_seed: args.serving.weights_seed,
        decode: args.decode,
        warm_up: rows::WARM_UP,
        cache_gib: args.model.is_on_cpu().then(|| gib(args.serving.cache_memory())),
        config,
        calibrations,
        rows,
    })
}

fn calibration_tokens(context: usize) -> usize {
    context.min(CALIBRATION_TOKENS)
}

/// The folder of the policies that are calibrated on this number of tokens.
fn policies(folder: &Path, tokens: usize) -> PathBuf {
    folder.join(tokens.to_string())
}

/// Every storage and attention at one context.
fn settings(args: &BenchArgs, context: usize, storages: &[Option<Storage>], folder: &Path) -> Vec<Setting> {
    let folder = policies(folder, calibration_tokens(context));
    let hidden = once_each(&args.serving.shares).map(|share| Some((share, measure::policy_file(&folder, share))));
    let attentions: Vec<_> = [None].into_iter().chain(hidden).collect();
    let setting = |storage: &Option<Storage>| {
        let storage = *storage;
        attentions.clone().into_iter().map(move |hidden| Setting {
            context,
            hidden,
            storage,
        })
    };
    storages.iter().flat_map(setting).collect()
}

/// Adds the rows of a setting.
fn add(rows: &mut Vec<Row>, setting: &Setting, args: &BenchArgs, measurement: Measurement) {
    let row = |not_on_this_device, measured| Row {
        context: setting.context,
        attention: setting.attention(),
        wanted: setting.hidden.as_ref().map(|(share, _)| *share),
        kv_dtype: match setting.storage {
            Some(storage) => storage.to_string(),
            None => args.model.dtype().as_str().into(),
        },
        not_on_this_device,
        measured,
    };
    match measurement {
        Measurement::NotOnThisDevice(refusal) => rows.push(row(Some(refusal), None)),
        Measurement::Ran(run) => {
            let Run { batches, .. } = *run;
            rows.extend(batches.into_iter().map(|batch| {
                row(
                    None,
                    Some(Measured {
                        prefill_tokens_per_second: run.prefill_tokens_per_second,
                        hidden: run.hidden,
                        hidden_of_all: run.hidden_of_all,
                        prompt_kv_bytes: run.kv_bytes,
                        prompt_kv_bytes_allocated: run.kv_bytes_allocated,
                        prompt_kv_bytes_dense: run.kv_bytes_dense,
                        batch,
                        decode_of_dense: None,
                    }),
                )
            }));
        }
    }
}

/// Sets each row's speed beside the dense one's.
fn compare(rows: &mut [Row]) {
    let speed = |row: &Row| Some(row.measured.as_ref()?.batch.decoded.as_ref()?.tokens_per_second);
    let same = |a: &Row, b: &Row| {
        let batch = |row: &Row| row.measured.as_ref().map(|measured| measured.batch.batch.clone());
        (a.context, &a.kv_dtype, batch(a)) == (b.context, &b.kv_dtype, batch(b))
    };
    let of_dense: Vec<Option<f64>> = rows
        .iter()
        .map(|row| {
            let dense = rows.iter().find(|dense| dense.wanted.is_none() && same(dense, row))?;
            Some(speed(row)? / speed(dense)?)
        })
        .collect();
    for (row, ratio) in rows.iter_mut().zip(of_dense) {
        if let Some(measured) = &mut row.measured {
            measured.decode_of_dense = ratio;
        }
    }
}
