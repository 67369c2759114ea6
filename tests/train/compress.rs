//! `train compress`: its loss against a divergence with a graph, its data, and its binary on a tiny model.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::OnceLock;

use crate::distill::{distill, nll, Predictions};
use crate::fixture::Fixture;
use candle_core::{Device, Tensor, Var, D};
use candle_nn::ops::log_softmax;
use rand::{rngs::StdRng, Rng, SeedableRng};
use serde_json::Value;

const CPU: &Device = &Device::Cpu;

fn random(seed: u64, dims: &[usize]) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..dims.iter().product())
        .map(|_| rng.random_range(-1f32..1.0))
        .collect();
    Tensor::from_vec(values, dims, CPU).unwrap()
}

fn assert_close(got: &Tensor, expected: &Tensor) {
    let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (got, expected) in numbers(got).into_iter().zip(numbers(expected)) {
        assert!(
            (got - expected).abs() <= 1e-6 + 1e-4 * expected.abs(),
            "{got} instead of {expected}"
        );
    }
}

/// A vocabulary so large that rows come in several pieces, the last one shorter.
#[test]
fn a_distilled_loss_has_the_gradients_of_the_divergence() {
    let (rows, hidden, vocabulary) = (7, 8, 1_300_000);
    let [hidden_var, head_var] = [
        Var::from_tensor(&random(1, &[rows, hidden])).unwrap(),
        Var::from_tensor(&random(2, &[vocabulary, hidden])).unwrap(),
    ];
    let (teacher_hidden, teacher_head) = (random(3, &[rows, hidden]), random(2, &[vocabulary, hidden]));
    let student = Predictions {
        hidden: &hidden_var,
        head: &head_var,
    };
    let teacher = Predictions {
        hidden: &teacher_hidden,
        head: &teacher_head,
    };
    let distilled = distill(student, teacher).unwrap();
    let logits = |hidden: &Tensor, head: &Tensor| hidden.matmul(&head.t().unwrap()).unwrap();
    let log_student = log_softmax(&logits(&hidden_var, &head_var), D::Minus1).unwrap();
    let log_teacher = log_softmax(&logits(&teacher_hidden, &teacher_head), D::Minus1).unwrap();
    let difference = (&log_teacher - log_student).unwrap();
    let whole = (log_teacher.exp().unwrap() * difference).unwrap().sum_all().unwrap();
    let whole = (whole / rows as f64).unwrap();
    assert_close(&distilled, &whole);
    assert!(whole.to_scalar::<f32>().unwrap() > 0.01);
    let (got, expected) = (distilled.backward().unwrap(), whole.backward().unwrap());
    for var in [&hidden_var, &head_var] {
        let gradient = |store: &candle_core::backprop::GradStore| store.get(var).unwrap().clone();
        assert_close(&gradient(&got), &gradient(&expected));
    }
    let targets = Tensor::from_vec((0..rows as u32).map(|row| row * 100_000).collect::<Vec<_>>(), rows, CPU).unwrap();
    let expected = log_softmax(&logits(&hidden_var, &head_var), D::Minus1).unwrap();
    let expected = expected.gather(&targets.unsqueeze(1).unwrap(), 1).unwrap();
    assert_close(
        &nll(student, &targets).unwrap(),
        &expected.squeeze(1).unwrap().neg().unwrap(),
    );
}

fn example(name: &str, args: &[&str]) -> Output {
    let mut command = Command::new(crate::example::path(name));
    command.args(args).env("RUST_BACKTRACE", "1").output().unwrap()
}

fn succeed(name: &str, args: &[&str]) -> String {
    let output = example(name, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// A text to train on, and one to score.
fn texts() -> [String; 2] {
    static PATHS: OnceLock<[String; 2]> = OnceLock::new();
    let write = || {
        let words = fs::read_to_string(Fixture::get().path("text.txt")).unwrap();
        let backwards: Vec<&str> = words.split(' ').rev().collect();
        [
            ("train.txt", words.repeat(2)),
            ("held_out.txt", backwards.join(" ").repeat(2)),
        ]
        .map(|(name, text)| {
            fs::write(Fixture::get().folder.join(name), text).unwrap();
            Fixture::get().path(name)
        })
    };
    PATHS.get_or_init(write).clone()
}

/// An empty folder's path.
fn out(name: &str) -> String {
    let path = Fixture::get().path(name);
    let _ = fs::remove_dir_all(&path);
    path
}

const SIZES: &str = "--target 0.5 --steps 8 --batch 2 --context 64 --window 6 --sinks 2 --samples 4 --lr 1e-3 \
                     --held-out-windows 4x64 --export-dtype f32";

/// Flags of `more` take the place of the same ones above; a policy brings window and sinks.
fn compress(out: &str, more: &[&str]) -> Output {
    let ([text, held_out], model) = (texts(), Fixture::get().path("hf"));
    let files = [
        "--model",
        &model,
        "--text",
        &text,
        "--held-out",
        &held_out,
        "--out",
        out,
    ];
    let all: Vec<&str> = files.into_iter().chain(SIZES.split_whitespace()).collect();
    let replaced = |flag: &str| {
        let by_policy = more.contains(&"--policy") && ["--window", "--sinks"].contains(&flag);
        by_policy || more.contains(&flag)
    };
    let kept = all.chunks(2).filter(|flag| !replaced(flag[0])).flatten();
    let args = ["compress"].iter().chain(kept).chain(more).copied();
    example("train", &args.collect::<Vec<_>>())
}

fn succeeded(output: &Output) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
}

/// Exit code 1 and one line on stderr that starts with `error: ` and has every part.
fn refused(output: &Output, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.starts_with("error: ") && stderr.trim_end().lines().count() == 1,
        "{stderr}"
    );
    parts
        .iter()
        .for_each(|part| assert!(stderr.contains(part), "{part:?} is not in {stderr}"));
}

fn json(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The rows of log.csv: phase, divergence, hidden share.
fn rows(out: &str) -> Vec<(String, f64, f64)> {
    let log = fs::read_to_string(format!("{out}/log.csv")).unwrap();
    let row = |(index, line): (usize, &str)| {
        let fields: Vec<&str> = line.split(',').collect();
        assert_eq!(fields[0], (index + 1).to_string(), "{log}");
        (
            fields[1].to_string(),
            fields[2].parse().unwrap(),
            fields[3].parse().unwrap(),
        )
    };
    log.lines().skip(1).enumerate().map(row).collect()
}

/// The first run of the tests below: 6 steps that fade, 2 that hide.
fn first() -> &'static str {
    static OUT: OnceLock<String> = OnceLock::new();
    OUT.get_or_init(|| {
        let out = out("first");
        succeeded(&compress(&out, &[]));
        out
    })
}

/// The llama example runs the export under its policy, which hides the target of text that was not trained on.
#[test]
fn an_export_runs_under_its_policy() {
    let out = first();
    let phases: Vec<String> = rows(out).into_iter().map(|row| row.0).collect();
    assert_eq!(phases, [vec!["fades"; 6], vec!["hides"; 2]].concat());
    for (phase, divergence, hidden) in rows(out) {
        assert!(divergence > 0.0 && divergence < 5.0, "{phase}: {divergence}");
        assert!((0.2..0.8).contains(&hidden), "{phase}: {hidden}");
    }
    let summary = json(format!("{out}/summary.json"));
    let after = &summary["after"][0];
    assert!(
        (after["hidden_share"].as_f64().unwrap() - 0.5).abs() < 0.15,
        "{summary}"
    );
    let prose = |score: &Value, key: &str| score["prose"][key].as_f64().unwrap();
    assert_eq!(prose(&summary["before"][0], "dense"), prose(after, "dense"));
    let [_, held_out] = texts();
    let file = format!("{out}/eval.json");
    let (model, policy) = (format!("{out}/model"), format!("{out}/policy.json"));
    let args = format!(
        "eval --model {model} --text {held_out} --context 64 --windows 4 --spread --strategy {policy} --json {file}"
    );
    succeed("llama", &args.split(' ').collect::<Vec<_>>());
    let nats = json(&file)["perplexity"].as_f64().unwrap().ln();
    let expected = prose(after, "dense") + prose(after, "over_dense");
    assert!((nats - expected).abs() < 2e-3, "{nats} instead of {expected}");
    for plot in ["divergence.svg", "hidden_share.svg"] {
        assert!(fs::read_to_string(format!("{out}/{plot}")).unwrap().contains("<svg"));
    }
}

/// From a checkpoint while tokens fade, and from one while they are hidden, a run ends with the same bytes.
#[test]
fn a_resumed_run_is_the_same_run() {
    let whole = first();
    for (name, step) in [("while_fading", "4"), ("while_hiding", "7")] {
        let out = out(name);
        succeeded(&compress(&out, &["--checkpoint-every", step]));
        fs::remove_dir_all(format!("{out}/checkpoints/step-00000008")).unwrap();
        assert!(Path::new(&format!("{out}/checkpoints/step-0000000{step}")).is_dir());
        let files = [
            "policy.json",
            "model/model.safetensors",
            "checkpoints/step-00000008/gates.safetensors",
        ];
        files[..2]
            .iter()
            .for_each(|file| fs::remove_file(format!("{out}/{file}")).unwrap());
        succeeded(&compress(&out, &["--resume"]));
        for file in files {
            let read = |folder: &str| fs::read(format!("{folder}/{file}")).unwrap();
            assert!(read(&out) == read(whole), "{name}: {file} differs");
        }
        assert_eq!(rows(&out), rows(whole), "{name}");
    }
}

/// A run starts from a policy of `llama calibrate`, and keeps its window. In a GGUF file the numbers of a key stand in
/// another order than in the training, and so do those of its policy's probe.
#[test]
fn a_run_starts_from_a_policy() {
    let [text, _] = texts();
    let before = ["hf", "f32.gguf"].map(|name| {
        let (out, model) = (out(&format!("from_{name}")), Fixture::get().path(name));
        let policy = Fixture::get().path(&format!("probe_{name}.json"));
        let args = format!(
            "calibrate --model {model} --dequantize --text {text} --criterion probe --window 5 --context 48 \
             --windows 2 --repeats 1 --target 0.4 --out {policy}"
        );
        succeed("llama", &args.split_whitespace().collect::<Vec<_>>());
        succeeded(&compress(
            &out,
            &["--model", &model, "--policy", &policy, "--steps", "2"],
        ));
        let [start, end] = [policy, format!("{out}/policy.json")].map(|path| json(path)["policy"].clone());
        assert_eq!(start["config"], end["config"]);
        assert_eq!(end["config"]["window"], 5);
        assert!(start["probe"] != end["probe"]);
        let before = json(format!("{out}/summary.json"))["before"][0].clone();
        assert!((before["hidden_share"].as_f64().unwrap() - 0.4).abs() < 0.2, "{before}");
        before
    });
    for key in ["over_dense", "dense"] {
        let [folder, file] = before.each_ref().map(|before| before["prose"][key].as_f64().unwrap());
        assert!((folder - file).abs() < 1e-4, "{before:?}");
    }
}

#[test]
fn settings_without_a_meaning_are_refused() {
    let [text, held_out] = texts();
    let out = out("refused");
    refused(
        &compress(&out, &["--target", "1"]),
        &["target: expected a share between 0 and 1, got 1"],
    );
    refused(
        &compress(&out, &["--hard", "2"]),
        &["hard: expected a share from 0 to 1, got 2"],
    );
    refused(
        &compress(&out, &["--gate-lr", "0"]),
        &["gate-lr: expected a number above 0, got 0"],
    );
    refused(
        &compress(&out, &["--held-out", &text]),
        &["held-out: expected a text that is not trained on"],
    );
    refused(&compress(&out, &["--policy", &held_out]), &["policy", "expected"]);
    refused(&compress(&out, &["--resume"]), &["resume: expected a checkpoint in"]);
    refused(&compress(first(), &[]), &["out: expected a folder without checkpoints"]);
    let other = ["--resume", "--target", "0.75"];
    refused(
        &compress(first(), &other),
        &["resume: expected the checkpoint's target, 0.5, got 0.75"],
    );
}
