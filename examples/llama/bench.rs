//! `llama bench`: speed, cache and memory by prompt length, dense and compressed.

use std::env;
use std::fs;
use std::io::{stderr, stdout, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{bail, ensure, Context, Result};
use candle_sfattention::CompressionConfig;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use crate::args::{BenchArgs, Child, Contender};
use crate::compression::Compression;
use crate::load::Checkpoint;
use crate::peer;
use crate::plot;
use crate::report::{check_path, write_json};
use crate::session::Session;
use crate::stats::{memory, mib, KvUse, Stats};

/// The name of candle-transformers' rows.
const CANDLE: &str = "candle";

/// Bytes of text that surely hold a token: the text beyond them need not be tokenized.
const BYTES_PER_TOKEN: usize = 16;

#[derive(Serialize)]
struct BenchReport {
    model: String,
    text: String,
    config: CompressionConfig,
    decode: usize,
    rows: Vec<Row>,
}

/// One configuration, measured in a process of its own.
#[derive(Serialize)]
struct Row {
    /// `off` for dense attention, `candle` for candle-transformers' own model, else the strategy.
    strategy: String,
    #[serde(flatten)]
    run: Run,
}

/// The output of a child process.
#[derive(Serialize, Deserialize)]
struct Run {
    #[serde(flatten)]
    stats: Stats,
    /// Memory held after loading the weights, before the first run.
    loaded_rss_bytes: Option<u64>,
    /// Tokens and cache bytes after each chunk of the prompt.
    curve: Vec<(usize, usize)>,
}

pub fn run(args: &BenchArgs) -> Result<()> {
    check_path("json", args.model.json.as_deref())?;
    check_path("svg", args.svg.as_deref())?;
    args.cache.check()?;
    let compression = Compression::from_args(&args.compression)?;
    ensure!(
        compression.config.rule.is_causal(),
        "rule: expected causal for bench, which measures the KV cache, got reference, whose rows see the future; \
         use --rule causal"
    );
    if let Some(child) = args.child {
        serde_json::to_writer(stdout().lock(), &measure(args, compression, child)?)?;
        return Ok(());
    }
    let configurations = configurations(args)?;
    let rows = measure_all(&configurations, &compression.label)?;
    let report = BenchReport {
        model: args.model.model.clone(),
        text: args.text.display().to_string(),
        config: compression.config,
        decode: args.decode,
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
    tokens(args, &checkpoint, wanted + args.decode)?;
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
        if args.peer && prompt + args.decode <= peer::CONTEXT {
            add(Contender::Candle);
        } else if args.peer {
            writeln!(
                stderr(),
                "note: candle's quantized llama holds {} tokens: not run with a prompt of {prompt}",
                peer::CONTEXT
            )?;
        }
    }
    Ok(all)
}

/// The first `count` tokens of the text.
fn tokens(args: &BenchArgs, checkpoint: &Checkpoint, count: usize) -> Result<Vec<u32>> {
    let whole = fs::read_to_string(&args.text)
        .with_context(|| format!("text {}: give one with --text", args.text.display()))?;
    let mut end = whole.len().min(count * BYTES_PER_TOKEN);
    while !whole.is_char_boundary(end) {
        end += 1;
    }
    let mut tokens = checkpoint.encode(&whole[..end], false)?;
    if tokens.len() < count && end < whole.len() {
        tokens = checkpoint.encode(&whole, false)?;
    }
    ensure!(
        tokens.len() >= count,
        "text: expected at least {count} tokens, the longest prompt and those to decode, got {}; give a longer text or \
         lower --prompts",
        tokens.len()
    );
    tokens.truncate(count);
    Ok(tokens)
}

/// Runs one configuration in this process.
fn measure(args: &BenchArgs, compression: Compression, child: Child) -> Result<Run> {
    let mut checkpoint = Checkpoint::open(&args.model.model, args.model.load_options()?)?;
    let tokens = tokens(args, &checkpoint, child.prompt + args.decode)?;
    let compression = match child.attention {
        Contender::Dense => compression.dense(),
        Contender::Compressed => compression,
        Contender::Candle => {
            drop(checkpoint);
            let (loaded_rss_bytes, stats) = peer::measure(&args.model.model, &tokens, child.prompt)?;
            return Ok(Run {
                stats,
                loaded_rss_bytes,
                curve: Vec::new(),
            });
        }
    };
    let attention = compression.attention(&checkpoint.config.shape())?;
    let model = checkpoint.load(attention)?;
    compression.check_weights(&model.fingerprint()?);
    let loaded_rss_bytes = memory("VmRSS");
    let (prompt, rest) = tokens.split_at(child.prompt);
    let new_session = || Session::cached(&model, &args.cache.options(), args.cache.prefill_chunk);
    if !model.device().is_cpu() {
        // Kernels load on first use.
        let mut warm_up = new_session()?;
        warm_up.prefill(prompt, |_| ())?;
        warm_up.step(rest[0])?;
    }
    let mut session = new_session()?;
    let mut curve = vec![(0, 0)];
    session.prefill(prompt, |kv| curve.push((kv.kv_tokens, kv.kv_bytes)))?;
    for token in rest {
        session.step(*token)?;
    }
    Ok(Run {
        stats: session.stats(rest.len()),
        loaded_rss_bytes,
        curve,
    })
}

/// Runs each configuration in a process of its own, with this process's arguments.
fn measure_all(configurations: &[Child], label: &str) -> Result<Vec<Row>> {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} runs  {msg}  {elapsed}")?;
    let bar = ProgressBar::new(configurations.len() as u64).with_style(style);
    let mut rows = Vec::new();
    for child in configurations {
        bar.set_message(child.to_string());
        bar.tick();
        let program = env::current_exe().context("bench: this program cannot find itself")?;
        let mut command = Command::new(program);
        command
            .args(env::args_os().skip(1))
            .arg("--child")
            .arg(child.to_string());
        let output = command.stdin(Stdio::null()).output()?;
        if !output.status.success() {
            bar.finish_and_clear();
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.trim().trim_start_matches("error: ");
            bail!(
                "{child}: {}",
                if said.is_empty() {
                    "the process was killed"
                } else {
                    said
                }
            )
        }
        let run = serde_json::from_slice(&output.stdout).with_context(|| format!("{child}: its report"))?;
        let strategy = match child.attention {
            Contender::Dense => "off",
            Contender::Compressed => label,
            Contender::Candle => CANDLE,
        };
        let strategy = strategy.into();
        rows.push(Row { strategy, run });
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// A row's name in tables and plots.
fn shown(strategy: &str) -> &str {
    match strategy {
        "off" => "dense",
        CANDLE => CANDLE,
        _ => "compressed",
    }
}

impl BenchReport {
    fn print(&self) -> Result<()> {
        let out = &mut stdout().lock();
        writeln!(
            out,
            "prompt  attention   prefill tok/s  decode tok/s  KV MiB  of dense  hidden  peak RSS MiB"
        )?;
        for Row { strategy, run } in &self.rows {
            let stats = &run.stats;
            let number = |number: Option<f64>| number.map_or("-".into(), |number| format!("{number:.1}"));
            let ratio = |number: Option<f64>| number.map_or("-".into(), |number| format!("{number:.3}"));
            let kv = stats.kv.as_ref();
            writeln!(
                out,
                "{:>6}  {:<10}  {:>13}  {:>12}  {:>6}  {:>8}  {:>6}  {:>12}",
                stats.prompt_tokens,
                shown(strategy),
                number(stats.prefill_tokens_per_second),
                number(stats.decode_tokens_per_second),
                number(kv.map(|kv| mib(kv.kv_bytes as u64))),
                ratio(kv.map(KvUse::ratio)),
                ratio(kv.map(|_| stats.hidden.hidden_ratio)),
                stats
                    .peak_rss_bytes
                    .map_or("-".into(), |bytes| format!("{:.0}", mib(bytes))),
            )?;
        }
        if let Some(bytes) = self.rows.first().and_then(|row| row.run.loaded_rss_bytes) {
            writeln!(out, "Weights loaded, nothing run: {:.0} MiB.", mib(bytes))?;
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
        let rows = self
            .rows
            .iter()
            .filter(|row| tokens(row) == longest && row.strategy != CANDLE);
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
