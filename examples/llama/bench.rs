//! `llama bench`: speed, cache and memory by prompt length, dense and compressed.

#[path = "bench/child.rs"]
mod child;
#[path = "bench/row.rs"]
mod row;
#[path = "bench/serving.rs"]
pub mod serving;

use std::io::{stderr, stdout, Write};
use std::path::Path;

use anyhow::{ensure, Context, Result};
use candle_sfattention::CompressionConfig;
use child::Children;
use row::{first_tokens, Run};
use serde::Serialize;

use crate::args::{BenchArgs, Child, Contender};
use crate::compression::Compression;
use crate::load::Checkpoint;
use crate::model_args::CacheArgs;
use crate::plot;
use crate::ranks::Ranks;
use crate::report::{check_path, write_json};
use crate::session::Session;
use crate::stats::{memory, mib};
use crate::weights::Pass;

#[derive(Serialize)]
struct BenchReport {
    model: String,
    text: String,
    config: CompressionConfig,
    decode: usize,
    decode_weights: &'static str,
    rows: Vec<Row>,
}

/// One configuration, measured in a process of its own.
#[derive(Serialize)]
struct Row {
    /// `off` for dense attention, else the strategy.
    strategy: String,
    #[serde(flatten)]
    run: Run,
}

pub fn run(args: &BenchArgs) -> Result<()> {
    check_path("json", args.model.json.as_deref())?;
    if let Some(shape) = args.serving.shape()? {
        return serving::run(args, shape);
    }
    check_path("svg", args.svg.as_deref())?;
    ensure!(
        args.kv_dtype.len() <= 1,
        "kv-dtype: expected one type without --shape, got {}; run bench once for each",
        args.kv_dtype.len()
    );
    let cache = args.cache(args.kv_dtype.first().copied())?;
    let compression = Compression::from_args(&args.compression)?;
    ensure!(
        compression.config.rule.is_causal(),
        "rule: expected causal for bench, which measures the KV cache, got reference, whose rows see the future; \
         use --rule causal"
    );
    if let Some(child) = args.child {
        let measure = |ranks: &Ranks| {
            let compression = Compression::from_args(&args.compression)?;
            measure(args, &cache, compression, child, ranks)
        };
        serde_json::to_writer(stdout().lock(), &args.ranks.run(&args.model, measure)?)?;
        return Ok(());
    }
    let configurations = configurations(args)?;
    let rows = measure_all(&configurations, &compression.label)?;
    let report = BenchReport {
        model: args.model.model.clone(),
        text: args.text.display().to_string(),
        config: compression.config,
        decode: args.decode,
        decode_weights: args.model.decode_weights(),
        rows,
    };
    report.print()?;
    write_json("json", args.model.json.as_deref(), &report)?;
    match &args.svg {
        Some(file) => report.draw(file).with_context(|| format!("svg {}", file.display())),
        None => Ok(()),
    }
}

/// The configurations to measure: prompts that leave room to decode, each dense and, if the settings merge anything,
/// compressed.
fn configurations(args: &BenchArgs) -> Result<Vec<Child>> {
    ensure!(
        !args.prompts.contains(&0) && args.decode > 0,
        "prompts and decode: expected at least 1 token, got 0; leave that prompt out, or use --decode 1"
    );
    let checkpoint = Checkpoint::open(&args.model.model, args.model.load_options()?)?;
    let context = checkpoint.config.context_length;
    ensure!(
        args.decode < context,
        "decode: expected fewer tokens than the model's context of {context}, got {}; lower --decode",
        args.decode
    );
    let longest = context - args.decode;
    let wanted = args.prompts.iter().max().map_or(0, |prompt| longest.min(*prompt));
    first_tokens(&args.text, &checkpoint, wanted + args.decode)?;
    let mut prompts: Vec<usize> = Vec::new();
    for &prompt in &args.prompts {
        if prompt > longest {
            writeln!(
                stderr(),
                "note: a prompt of {prompt} tokens and {} more exceed the model's context of {context}: {longest} are \
                 used",
                args.decode
            )?;
        }
        if !prompts.contains(&prompt.min(longest)) {
            prompts.push(prompt.min(longest));
        }
    }
    let mut all = Vec::new();
    for prompt in prompts {
        let mut add = |attention| all.push(Child { prompt, attention });
        add(Contender::Dense);
        if !args.compression.dense {
            add(Contender::Compressed);
        }
    }
    Ok(all)
}

/// Runs one configuration in this process.
fn measure(args: &BenchArgs, cache: &CacheArgs, compression: Compression, child: Child, ranks: &Ranks) -> Result<Run> {
    let mut checkpoint = Checkpoint::open(&args.model.model, args.model.load_options_of(ranks)?)?;
    let tokens = first_tokens(&args.text, &checkpoint, child.prompt + args.decode)?;
    let compression = match child.attention {
        Contender::Dense => compression.dense(),
        Contender::Compressed => compression,
    };
    let attention = compression.attention(&checkpoint.config, ranks)?;
    let format = args.model.step_format();
    let model = checkpoint.load_formed(attention, &|linear| format.with_step(linear), ranks)?;
    compression.check_weights(&model.fingerprint()?, ranks);
    // All of them have loaded.
    ranks.gather(Vec::new())?;
    let loaded_rss_bytes = memory("VmRSS");
    let (prompt, rest) = tokens.split_at(child.prompt);
    let new_session = || Session::cached(&model, &cache.options(), cache.prefill_chunk);
    if !model.device().is_cpu() {
        // Kernels load on first use.
        let mut warm_up = new_session()?;
        warm_up.prefill(prompt)?;
        warm_up.step(rest[0])?;
    }
    let mut session = new_session()?;
    let mut curve = vec![(0, 0)];
    session.prefill_watched(prompt, Some(&mut |kv| curve.push((kv.kv_tokens, kv.kv_bytes))))?;
    for token in rest {
        session.step(*token)?;
    }
    let stats = session.stats(rest.len())?;
    // The same tokens once more, after the peak of memory was read.
    let mut again = session.fork();
    for token in rest {
        again.step_as(*token, Pass::Prompt)?;
    }
    Ok(Run {
        stats,
        decode_by_prompt_weights: again.stats(rest.len())?.decode_tokens_per_second,
        loaded_rss_bytes,
        curve,
    })
}

/// Runs each configuration in a process of its own, with this process's arguments.
fn measure_all(configurations: &[Child], label: &str) -> Result<Vec<Row>> {
    let mut children = Children::new(configurations.len())?;
    let mut rows = Vec::new();
    for child in configurations {
        let run = children.run(&child.to_string(), &["--child", &child.to_string()])?;
        let strategy = match child.attention {
            Contender::Dense => "off",
            Contender::Compressed => label,
        };
        let strategy = strategy.into();
        rows.push(Row { strategy, run });
    }
    Ok(rows)
}

/// A row's name in tables and plots.
fn shown(strategy: &str) -> &str {
    match strategy {
        "off" => "dense",
        _ => "compressed",
    }
}

impl BenchReport {
    fn print(&self) -> Result<()> {
        let out = &mut stdout().lock();
        Run::print_header(out)?;
        for Row { strategy, run } in &self.rows {
            run.print(shown(strategy), out)?;
        }
        writeln!(
            out,
            "Decode: by the decode weights, {}; then by the weights that prompts go through.",
            self.decode_weights
        )?;
        if let Some(first) = self.rows.first() {
            first.run.print_loaded(out)?;
        }
        Ok(())
    }

    /// The curves of the longest prompt.
    fn draw(&self, file: &Path) -> Result<()> {
        let tokens = |row: &Row| row.run.stats.prompt_tokens;
        let longest = self.rows.iter().map(tokens).max().unwrap_or(0);
        let curve = |row: &Row| {
            let end = row.run.curve.last().map_or(0, |end| end.1);
            plot::Curve {
                label: format!("{}: {:.0} MiB", shown(&row.strategy), mib(end as u64)),
                points: row.run.curve.clone(),
            }
        };
        let rows = self.rows.iter().filter(|row| tokens(row) == longest);
        let curves: Vec<_> = rows.map(curve).collect();
        let name = |path: &str| {
            Path::new(path)
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned()
        };
        let title = format!("KV cache of {} reading {}", name(&self.model), name(&self.text));
        plot::draw(file, &title, &curves)
    }
}
