//! The llama example's report: questions made from seeds, scores beside dense, prunings, and given policies.

use std::collections::BTreeSet;
use std::fs;

use crate::binary::{assert_error, llama, number, text};
use crate::fixture::Fixture;
use crate::load::{Checkpoint, LoadOptions};
use crate::model::Llama;
use crate::prune::{attended, highest, Ranking};
use crate::score::Scores;
use crate::tasks::{Sample, TaskKind, TaskMaker};
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    AttentionOptions, CompressedAttention, CompressionConfig, HeadStrategies, MergeStrategy, Policy,
};
use clap::ValueEnum;
use serde_json::Value;

const SMALL: &str = "--window 8 --sinks 2";

/// The model that comes with the example.
fn shipped() -> Result<Checkpoint> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/llama/assets");
    Checkpoint::open(folder, LoadOptions::default())
}

fn dense(checkpoint: &mut Checkpoint) -> Result<Llama> {
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let attention = CompressedAttention::new(off, CompressionConfig::default(), AttentionOptions::default())?;
    checkpoint.load(vec![attention; checkpoint.config.layers])
}

/// The first token of the answer.
fn answer_at(sample: &Sample) -> usize {
    sample.tokens.len() - sample.answer
}

fn prose(checkpoint: &Checkpoint) -> Result<Vec<u32>> {
    checkpoint.encode(
        &"The old sailor looked at the grey sea, and said nothing. ".repeat(40),
        false,
    )
}

/// Samples 0 and 1 of a kind, of 220 tokens.
fn samples(checkpoint: &Checkpoint, kind: TaskKind, seed: u64) -> Result<[Sample; 2]> {
    let encode = |text: &str| checkpoint.encode(text, false);
    let prose = prose(checkpoint)?;
    let maker = TaskMaker {
        encode: &encode,
        start: &checkpoint.start()?,
        prose: &prose,
        length: 220,
        seed,
    };
    Ok([maker.sample(kind, 0)?, maker.sample(kind, 1)?])
}

/// Samples repeat themselves, differ from each other, have the asked length, and their answer stands in the context.
#[test]
fn tasks_are_made_from_seeds() -> Result<()> {
    let checkpoint = shipped()?;
    let decode = |tokens: &[u32]| -> Result<String> {
        let decoded = checkpoint.text.tokenizer.decode(tokens, false);
        decoded.map_err(|error| anyhow::anyhow!("{error}"))
    };
    for kind in TaskKind::value_variants() {
        let [first, second] = samples(&checkpoint, *kind, 1)?;
        ensure!(first == samples(&checkpoint, *kind, 1)?[0], "{kind:?} is another one");
        ensure!(
            first != second && first != samples(&checkpoint, *kind, 2)?[0],
            "{kind:?}"
        );
        for sample in [first, second] {
            ensure!(
                sample.tokens.len() == 220 && answer_at(&sample) > sample.context,
                "{kind:?}"
            );
            let context = decode(&sample.tokens[..sample.context])?;
            let answer = decode(&sample.tokens[answer_at(&sample)..])?;
            let parts: Vec<&str> = answer.split(',').map(str::trim).collect();
            let count = match kind {
                TaskKind::Needle | TaskKind::Multikey => 1,
                TaskKind::Multivalue | TaskKind::Variables => 4,
                TaskKind::Words => 3,
            };
            ensure!(parts.len() == count, "{kind:?}: {answer}");
            for part in &parts {
                ensure!(context.contains(part), "{kind:?}: {part} is not in {context}");
            }
            if *kind == TaskKind::Words {
                let times = |word: &&str| context.matches(&format!(" {word}")).count();
                let [a, b, c] = [0, 1, 2].map(|index| times(&parts[index]));
                ensure!(a > b && b > c && c > 1, "{answer}: {a}, {b}, {c} in {context}");
            }
        }
    }
    Ok(())
}

/// A length that leaves no room for a task is refused.
#[test]
fn a_task_needs_room() -> Result<()> {
    let checkpoint = shipped()?;
    let encode = |text: &str| checkpoint.encode(text, false);
    let prose = prose(&checkpoint)?;
    for kind in TaskKind::value_variants() {
        let maker = TaskMaker {
            encode: &encode,
            start: &checkpoint.start()?,
            prose: &prose,
            length: 20,
            seed: 1,
        };
        let error = maker.sample(*kind, 0).err().context("it has room")?;
        ensure!(error.to_string().contains("lengths: expected more than"), "{error}");
    }
    Ok(())
}

/// Dense hidden states, and those of a method that keeps `keep` tokens of each KV head.
fn hidden_states(model: &Llama, sample: &Sample, ranking: Ranking, keep: usize) -> Result<[Tensor; 2]> {
    let dense = model.forward(&sample.tokens, &mut Default::default())?;
    let pruned = model.forward_attended(&sample.tokens, |call| {
        let chosen = highest(&ranking.scores(call, sample.context)?, keep)?;
        for kept in chosen {
            let count = kept.iter().filter(|kept| **kept).count();
            ensure!(kept.len() == sample.context && count == keep, "{ranking:?}: {count}");
        }
        attended(call, sample.context, ranking, keep)
    })?;
    Ok([dense, pruned])
}

fn largest(difference: &Tensor) -> Result<f32> {
    Ok(difference.to_dtype(DType::F32)?.abs()?.max_all()?.to_scalar()?)
}

/// Dense beside itself is no distance away; its answers' likelihood is that of its logits.
#[test]
fn scores_of_dense_beside_itself() -> Result<()> {
    let mut checkpoint = shipped()?;
    let model = dense(&mut checkpoint)?;
    let [sample, _] = samples(&checkpoint, TaskKind::Multivalue, 3)?;
    let tokens = &sample.tokens;
    let states = model.forward(tokens, &mut Default::default())?;
    let scores = Scores::of(&model, tokens, 1, &states, &states)?;
    ensure!(
        scores.divergence == 0.0 && scores.agreed == tokens.len() - 1,
        "{scores:?}"
    );
    let answer = Scores::of(&model, tokens, answer_at(&sample), &states, &states)?;
    let mut nll = 0.0;
    for place in answer_at(&sample)..tokens.len() {
        let logits = model.logits(&states, place - 1, 1)?.squeeze(0)?.to_vec1::<f32>()?;
        let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        nll += sum.ln() - f64::from(logits[tokens[place] as usize]);
    }
    ensure!((answer.nll - nll).abs() < 1e-3, "{} and {nll}", answer.nll);
    Ok(())
}

/// Every ranking keeps as many tokens as asked in each KV head; with all kept it is dense, and with few kept it is not,
/// but for the context's rows.
#[test]
fn prunings_keep_what_they_are_asked_to() -> Result<()> {
    let mut checkpoint = shipped()?;
    let model = dense(&mut checkpoint)?;
    let [sample, _] = samples(&checkpoint, TaskKind::Needle, 5)?;
    for ranking in Ranking::ALL {
        let [exact, all] = hidden_states(&model, &sample, ranking, sample.context)?;
        let difference = largest(&(&exact - all)?)?;
        ensure!(
            difference <= 1e-5 * largest(&exact)?.max(1.0),
            "{ranking:?}: {difference}"
        );
        let [exact, few] = hidden_states(&model, &sample, ranking, 20)?;
        let rows = |xs: &Tensor, from: usize, n: usize| xs.narrow(1, from, n);
        let before = largest(&(rows(&exact, 0, sample.context)? - rows(&few, 0, sample.context)?)?)?;
        ensure!(before <= 1e-5 * largest(&exact)?.max(1.0), "{ranking:?}: {before}");
        let after = sample.tokens.len() - sample.context;
        let moved = largest(&(rows(&exact, sample.context, after)? - rows(&few, sample.context, after)?)?)?;
        ensure!(moved > 1e-3, "{ranking:?}: {moved}");
        let scores = Scores::of(&model, &sample.tokens, answer_at(&sample), &few, &exact)?;
        ensure!(scores.divergence > 0.0, "{ranking:?}: {scores:?}");
    }
    Ok(())
}

/// The rankings against their definitions, written out for one head of one layer.
#[test]
fn rankings_are_those_of_their_papers() -> Result<()> {
    let mut checkpoint = shipped()?;
    let model = dense(&mut checkpoint)?;
    let [sample, _] = samples(&checkpoint, TaskKind::Needle, 7)?;
    let context = sample.context;
    model.forward_attended(&sample.tokens, |call| {
        let [q, k, v] = call.qkv;
        let (group, dim) = (q.dim(1)? / k.dim(1)?, q.dim(3)?);
        let scale = 1.0 / (dim as f64).sqrt();
        let rows = |xs: &Tensor, head: usize| -> Result<Vec<Vec<f64>>> {
            Ok(xs.get(0)?.get(head)?.to_dtype(DType::F64)?.to_vec2()?)
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let softmax = |logits: &[f64]| -> Vec<f64> {
            let sum: f64 = logits.iter().map(|x| x.exp()).sum();
            logits.iter().map(|x| x.exp() / sum).collect()
        };
        let (keys, values) = (rows(k, 0)?, rows(v, 0)?);
        let mut snap = vec![0.0; context - 32];
        let mut expected = vec![0.0; context - 4];
        for head in 0..group {
            let queries = rows(q, head)?;
            let mut mean = vec![0.0; context - 32];
            for row in context - 32..context {
                let logits: Vec<f64> = keys[..=row].iter().map(|key| scale * dot(&queries[row], key)).collect();
                let weights = softmax(&logits);
                mean.iter_mut()
                    .zip(weights)
                    .for_each(|(sum, weight)| *sum += weight / 32.0);
            }
            for (t, score) in snap.iter_mut().enumerate() {
                let near = t.saturating_sub(3)..(t + 4).min(context - 32);
                *score += mean[near].iter().sum::<f64>() / 7.0 / group as f64;
            }
            // exp of a Gaussian's linear form, by the queries turned by the average rotation.
            let plain = call.unrotated_query.narrow(2, 4, context - 4)?.to_dtype(DType::F32)?;
            let turned = rows(&call.rope.average(context, 512, context - 4)?.apply(&plain)?, head)?;
            let count = turned.len() as f64;
            let logits = keys[4..context].iter().map(|key| {
                let products: Vec<f64> = turned.iter().map(|query| scale * dot(query, key)).collect();
                let mean = products.iter().sum::<f64>() / count;
                mean + products.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count / 2.0
            });
            let weights = softmax(&logits.collect::<Vec<_>>());
            for (t, score) in expected.iter_mut().enumerate() {
                *score += weights[t] / group as f64 * dot(&values[4 + t], &values[4 + t]).sqrt();
            }
        }
        for (ranking, first, wanted) in [
            (Ranking::SnapKv, 0, snap),
            (Ranking::Expected, 4, expected),
            (
                Ranking::KNorm,
                0,
                keys.iter().map(|key| -dot(key, key).sqrt()).collect(),
            ),
        ] {
            let scores = ranking
                .scores(call, context)?
                .get(0)?
                .to_dtype(DType::F64)?
                .to_vec1::<f64>()?;
            for (t, want) in wanted.iter().enumerate().take(context - first) {
                let got = scores[first + t];
                ensure!(
                    (got - want).abs() <= 1e-4 * want.abs() + 1e-9,
                    "{ranking:?}, layer {}, token {t}: {got}, not {want}",
                    call.layer
                );
            }
            let forced = scores.iter().filter(|score| score.is_infinite()).count();
            let wanted = match ranking {
                Ranking::SnapKv => 32,
                Ranking::Expected => 4,
                Ranking::KNorm => 0,
            };
            ensure!(forced == wanted, "{ranking:?}: {forced}");
        }
        attended(call, context, Ranking::KNorm, context)
    })?;
    Ok(())
}

/// The average of rotations, in both pairings of coordinates, is the mean of the rotated vectors.
#[test]
fn rotations_are_averaged() -> Result<()> {
    for name in ["hf", "f32.gguf"] {
        let checkpoint = Checkpoint::open(&Fixture::get().path(name), LoadOptions::default())?;
        let rope = crate::rope::Rope::new(&checkpoint.config, DType::F32, &Device::Cpu)?;
        let xs = Tensor::arange(0f32, 16., &Device::Cpu)?.reshape((1, 1, 1, 16))?;
        let each = rope
            .at(5, 9)?
            .apply(&xs.broadcast_as((1, 1, 9, 16))?)?
            .mean_keepdim(2)?;
        let average = rope.average(5, 9, 1)?.apply(&xs)?;
        ensure!(largest(&(each - average)?)? < 1e-5, "{name}");
    }
    Ok(())
}

fn run(args: &[&str]) -> String {
    let output = llama(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn split(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// `report` on the shipped model, into a folder of its own.
fn report(name: &str, more: &str) -> (String, String) {
    let fixture = Fixture::get();
    let (file, out) = (fixture.path("text.txt"), fixture.path(name));
    let line = format!("report --text {file} --out {out} {more}");
    let said = run(&split(&line));
    (said, out)
}

/// Policies from files, questions, and prunings: every number has its samples and its error.
#[test]
fn a_report_reads_policies_and_asks() -> Result<()> {
    let fixture = Fixture::get();
    let (file, half) = (fixture.path("text.txt"), fixture.path("given.json"));
    run(&split(&format!(
        "calibrate --text {file} --context 64 --windows 2 --repeats 1 --out {half} {SMALL}"
    )));
    // The same decisions under another name.
    let mut parts = Policy::from_json(&fs::read_to_string(&half)?)?.parts().clone();
    parts.calibration.target = 0.6;
    let other = fixture.path("other.json");
    fs::write(&other, Policy::new(parts)?.to_json()?)?;
    let _ = fs::remove_dir_all(fixture.path("asked"));
    let more = format!(
        "--context 64 --windows 2 --passkey 120 --depths 0.5 --tasks needle,words --lengths 200 --samples 2 --peers \
         --policies {half} {other}"
    );
    let (said, out) = report("asked", &more);
    let summary: Value = serde_json::from_str(&fs::read_to_string(format!("{out}/report.json"))?)?;
    let rows = summary["rows"].as_array().context("rows")?;
    let names: Vec<&str> = rows.iter().filter_map(|row| row["method"].as_str()).collect();
    let both = |family: &str| [format!("{family}-0.5"), format!("{family}-0.6")];
    let families = ["observed", "random", "streaming", "snapkv", "knorm", "expected"]
        .map(both)
        .concat();
    let wanted: Vec<&str> = ["dense", "paper", "pretrained"]
        .into_iter()
        .chain(families.iter().map(String::as_str))
        .collect();
    ensure!(names == wanted, "{names:?}");
    for row in rows {
        let (name, peer) = (&row["method"], row["prose"].is_null());
        ensure!(
            peer == ["snapkv", "knorm", "expected"].contains(&row["family"].as_str().context("family")?),
            "{row}"
        );
        if !peer {
            ensure!(
                row["prose"]["divergence"]["samples"] == 2 && number(row, "perplexity") > 1.0,
                "{row}"
            );
            ensure!(
                number(row, "nll_over_dense") == number(&row["prose"]["nats_over_dense"], "mean"),
                "{row}"
            );
        }
        let tasks = row["tasks"].as_array().context("tasks")?;
        let kinds: BTreeSet<&str> = tasks.iter().filter_map(|asked| asked["task"].as_str()).collect();
        ensure!(
            kinds == BTreeSet::from(["needle", "passkey", "words"]),
            "{name}: {kinds:?}"
        );
        for asked in tasks {
            let samples = if asked["task"] == "passkey" { 1 } else { 2 };
            for key in [
                "nats",
                "nats_over_dense",
                "divergence",
                "agreement",
                "found",
                "found_over_dense",
            ] {
                ensure!(asked[key]["samples"] == samples, "{name}: {key} of {asked}");
                ensure!(number(&asked[key], "standard_error") >= 0.0, "{name}: {key} of {asked}");
            }
            let divergence = number(&asked["divergence"], "mean");
            ensure!((divergence == 0.0) == (name == "dense"), "{name}: {asked}");
            ensure!(name != "dense" || number(&asked["agreement"], "mean") == 1.0, "{asked}");
            let kept = number(asked, "kv_bytes_of_dense");
            ensure!(
                (name == "dense") == (kept == 1.0) || name == "paper" && kept <= 1.0,
                "{name}: {asked}"
            );
        }
    }
    // Prunings drop as many tokens as streaming does.
    let hidden = |method: &str| {
        let row = rows.iter().find(|row| row["method"] == method);
        row.map(|row| number(&row["tasks"][1], "hidden_ratio")).context("a row")
    };
    let streaming = hidden("streaming-0.5")?;
    for peer in ["snapkv-0.5", "knorm-0.5", "expected-0.5"] {
        let peer = hidden(peer)?;
        ensure!(peer > 0.0 && (peer - streaming).abs() < 1e-9, "{peer}, {streaming}");
    }
    ensure!(
        said.contains("| needle 200 | snapkv-0.5 | 2 |") && said.contains(" ± "),
        "{said}"
    );
    let picture = fs::read_to_string(format!("{out}/nats-needle-200.svg"))?;
    for method in ["dense", "observed", "snapkv"] {
        ensure!(picture.contains(method), "{method} is missing in the picture");
    }
    // What was measured is not measured again.
    let ledger = fs::read_to_string(format!("{out}/progress.jsonl"))?;
    report("asked", &more);
    ensure!(
        fs::read_to_string(format!("{out}/progress.jsonl"))?.trim() == ledger.trim(),
        "measured twice"
    );
    let line = format!("report --text {file} --out {out} {more} {half}");
    assert_error(&split(&line), &["policies", "got a second observed-0.5"]);
    Ok(())
}

/// Questions as a file for other programs.
#[test]
fn questions_are_written() -> Result<()> {
    let fixture = Fixture::get();
    let file = fixture.path("questions.json");
    let more = format!(
        "--context 64 --windows 1 --passkey 120 --depths 0.5 --tasks variables --lengths 220 --samples 3 \
                        --write-tasks {file}"
    );
    report("unused", &more);
    let written: Value = serde_json::from_str(&fs::read_to_string(&file)?)?;
    let questions = written["questions"].as_array().context("questions")?;
    ensure!(questions.len() == 4, "{}", questions.len());
    ensure!(!fs::exists(fixture.path("unused"))?, "a report was begun");
    let last = &questions[3];
    ensure!(
        last["name"] == "variables 220 2" && last["tokens"].as_array().map(Vec::len) == Some(220),
        "{last}"
    );
    ensure!(number(last, "context") + number(last, "answer") < 220.0, "{last}");
    Ok(())
}
