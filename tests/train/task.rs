//! The train example's binary on a generated text, and the gradients of its model.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::model::LlamaConfig;
use crate::rope::{Pairing, RopeScaling};
use crate::trainable::Trainable;
use candle_core::{Device, Tensor};
use candle_sfattention::{AttentionOptions, CompressedAttention, CompressionConfig, HeadStrategies, MergeStrategy};
use serde_json::Value;

const SIZES: &str =
    "--hidden 32 --intermediate 48 --layers 2 --heads 4 --kv-heads 2 --vocab 320 --batch 4 --context 32 \
                     --eval-windows 4 --export-dtype f32";
/// Merges tokens in a model this small.
const COMPRESSION: &str = "--preset paper --strategy difference --difference-threshold 0.3";

fn example(name: &str) -> Command {
    let mut command = Command::new(crate::example::path(name));
    command.env("RUST_BACKTRACE", "1");
    command
}

/// An empty folder of this name, with `text.txt` in it.
fn folder(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join("train_example")
        .join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("text.txt"), text(12_000)).unwrap();
    folder
}

/// Sentences of few words, in an order that a small model can learn.
fn text(words: usize) -> String {
    let subjects = ["the whale", "the old captain", "a sailor", "the white sea"];
    let verbs = ["sees", "follows", "sinks", "remembers"];
    let mut state = 1u64;
    let mut next = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % n
    };
    (0..words / 5)
        .map(|_| format!("{} {} {}.\n", subjects[next(4)], verbs[next(4)], subjects[next(4)]))
        .collect()
}

fn train_command(folder: &Path, out: &str, flags: &str) -> Command {
    let mut command = example("train");
    command
        .arg("--text")
        .arg(folder.join("text.txt"))
        .arg("--out")
        .arg(folder.join(out))
        .args(SIZES.split_whitespace())
        .args(flags.split_whitespace());
    command
}

fn succeed(mut command: Command) -> Output {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    output
}

fn json(path: impl AsRef<Path>) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// A column of log.csv, empty fields left out.
fn column(out: &Path, name: &str) -> Vec<f64> {
    let log = fs::read_to_string(out.join("log.csv")).unwrap();
    let index = log.lines().next().unwrap().split(',').position(|title| title == name);
    let field = |line: &str| line.split(',').nth(index.unwrap()).unwrap().parse().ok();
    log.lines().skip(1).filter_map(field).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn every_weight_gets_a_gradient() {
    let tied = LlamaConfig {
        hidden_size: 32,
        intermediate_size: 48,
        vocab_size: 64,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Linear(2.0),
        rope_pairing: Pairing::Halves,
        context_length: 32,
        attention_bias: false,
        mlp_bias: false,
        tied: true,
        layer: Default::default(),
    };
    // The embedding and the last norm, and 9 weights a layer; the other model has a head and 7 biases a layer in
    // addition.
    let untied = LlamaConfig {
        attention_bias: true,
        mlp_bias: true,
        tied: false,
        ..tied.clone()
    };
    let ids = |first: u32| {
        let ids: Vec<u32> = (0..64).map(|i| (first + i * i * 7) % 64).collect();
        Tensor::from_vec(ids, (2, 32), &Device::Cpu).unwrap()
    };
    for (strategy, compression) in [
        (MergeStrategy::Off, CompressionConfig::default()),
        (MergeStrategy::Difference, CompressionConfig::default()),
        (MergeStrategy::Similarity, CompressionConfig::default()),
        (MergeStrategy::Similarity, CompressionConfig::pretrained()),
    ] {
        let strategies = HeadStrategies::uniform(strategy);
        let attention = CompressedAttention::new(strategies, compression, AttentionOptions::default()).unwrap();
        for (config, weights) in [(&tied, 2 + 2 * 9), (&untied, 3 + 2 * 16)] {
            let model = Trainable::new(config, vec![attention.clone(); 2], 7).unwrap();
            let losses = model.losses(&ids(1), &ids(2)).unwrap();
            let total = (&losses.cross_entropy + losses.compression.unwrap() * 0.1).unwrap();
            for loss in [losses.cross_entropy, total] {
                let gradients = loss.backward().unwrap();
                assert_eq!(model.vars().len(), weights);
                for (name, var) in model.vars() {
                    let gradient = gradients
                        .get(&var)
                        .unwrap_or_else(|| panic!("{strategy:?}: {name} has none"));
                    let size = gradient.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
                    assert!(size.is_finite() && size > 0.0, "{strategy:?}: {name}: {size}");
                }
            }
        }
    }
}

#[test]
fn training_learns_and_exports_what_the_llama_example_runs() {
    let folder = folder("learns");
    let flags =
        format!("{COMPRESSION} --lambda 0.01 --lambda-schedule linear:0:2 --steps 60 --eval-every 30 --lr 1e-2");
    let output = succeed(train_command(&folder, "out", &flags));
    assert!(String::from_utf8_lossy(&output.stdout).contains("hidden ratio"));
    let out = folder.join("out");
    let loss = column(&out, "cross_entropy");
    assert_eq!(loss.len(), 60);
    assert!(mean(&loss[50..]) < 0.6 * mean(&loss[..5]), "{loss:?}");
    let lambdas = column(&out, "lambda");
    assert!(lambdas[0] == 0.0 && (lambdas[59] - 0.02).abs() < 1e-12, "{lambdas:?}");
    assert_eq!(column(&out, "held_out_perplexity").len(), 3);
    for plot in ["loss", "perplexity", "hidden_ratio"] {
        let svg = fs::read_to_string(out.join(format!("{plot}.svg"))).unwrap();
        assert!(svg.contains("<polyline"), "{plot}");
    }
    let mut eval = example("llama");
    eval.args("eval --context 32 --windows 4 --spread".split_whitespace())
        .args(COMPRESSION.split_whitespace())
        .arg("--model")
        .arg(out.join("model"))
        .arg("--text")
        .arg(out.join("held_out.txt"))
        .arg("--json")
        .arg(folder.join("eval.json"));
    succeed(eval);
    let (eval, summary) = (json(folder.join("eval.json")), json(out.join("summary.json")));
    let ratio = eval["hidden_ratio"].as_f64().unwrap();
    assert!(ratio > 0.0);
    assert_eq!(eval["hidden_ratio"], summary["held_out"]["hidden_ratio"]);
    assert_eq!(eval["perplexity"], summary["held_out"]["perplexity"]);

    // Fine-tuning starts from the export.
    let flags = format!("{COMPRESSION} --steps 2 --finetune {}", out.join("model").display());
    succeed(train_command(&folder, "tuned", &flags));
    let tuned = column(&folder.join("tuned"), "held_out_perplexity");
    assert_eq!(tuned[0], summary["held_out"]["perplexity"].as_f64().unwrap());
}

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let folder = folder("killed");
    let flags = format!("{COMPRESSION} --lambda 0.01 --steps 60 --eval-every 7 --checkpoint-every 5");
    let (whole, killed) = (folder.join("whole"), folder.join("killed"));
    succeed(train_command(&folder, "whole", &flags));
    let mut child = train_command(&folder, "killed", &flags)
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while !killed.join("checkpoints/step-00000010").exists() {
        assert!(start.elapsed() < Duration::from_secs(60), "no checkpoint");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        !killed.join("summary.json").exists(),
        "the run ended before it was killed"
    );

    let error = "resume: expected the checkpoint's steps, 60, got 61";
    fails(
        train_command(
            &folder,
            "killed",
            &format!("{flags} --resume").replace("--steps 60", "--steps 61"),
        ),
        error,
    );
    let other = format!("{flags} --resume").replace("0.3", "0.2");
    fails(
        train_command(&folder, "killed", &other),
        "resume: expected the checkpoint's compression",
    );
    fails(train_command(&folder, "killed", &flags), "add --resume");

    succeed(train_command(&folder, "killed", &format!("{flags} --resume")));
    for file in [
        "model.safetensors",
        "optimizer.safetensors",
        "config.json",
        "tokenizer.json",
    ] {
        let path = format!("checkpoints/step-00000060/{file}");
        assert!(
            fs::read(whole.join(&path)).unwrap() == fs::read(killed.join(&path)).unwrap(),
            "{file}"
        );
    }
    for name in [
        "step",
        "train_loss",
        "compression_loss",
        "gradient_norm",
        "held_out_perplexity",
        "hidden_ratio",
    ] {
        assert_eq!(column(&whole, name), column(&killed, name), "{name}");
    }
    assert_eq!(column(&killed, "step").len(), 61);
}

#[test]
fn an_experiment_keeps_finished_runs() {
    let folder = folder("experiment");
    let run = |only: &str| {
        let mut command = example("train");
        command
            .arg("experiment")
            .arg("--text")
            .arg(folder.join("text.txt"))
            .arg("--out")
            .arg(folder.join("out"))
            .args(SIZES.split_whitespace())
            .args(["--steps", "3", "--only", only]);
        let output = succeed(command);
        (
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    assert!(run("dense").1.contains("dense"));
    let (table, stderr) = run("loss / pairs");
    assert!(
        !stderr.contains("dense") && stderr.contains("drop, window 32, loss / pairs"),
        "{stderr}"
    );
    assert_eq!(table.lines().count(), 2 + 5, "{table}");
    assert_eq!(json(folder.join("out/experiment.json")).as_array().unwrap().len(), 5);
    assert_eq!(run("dense").1, "");
}

/// Exit code 1 and one line on stderr that starts with `error: ` and has the part.
fn fails(mut command: Command, part: &str) {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{command:?}: {stderr}");
    assert!(
        stderr.starts_with("error: ") && stderr.trim_end().lines().count() == 1 && stderr.contains(part),
        "{command:?}: {part:?} is not in {stderr}"
    );
}

#[test]
fn bad_input_ends_in_one_line() {
    let folder = folder("bad");
    let bad = |flags: &str, part: &str| fails(train_command(&folder, "out", flags), part);
    bad("--resume", "resume: expected a checkpoint in");
    bad("--steps 0", "steps: expected at least 1, got 0");
    bad("--lr NaN", "lr: expected a number above 0");
    bad("--lambda inf", "lambda: expected a number");
    bad("--max-merge-level 0", "max_merge_level: expected at least 1");
    bad("--strategy similar", "expected similarity, difference, off or");
    bad(
        "--finetune nowhere",
        "finetune: model: expected a .gguf file, a folder or a model id",
    );
    bad("--tokenizer nowhere.json", "nowhere.json: expected a tokenizer");
    fs::write(folder.join("text.txt"), "the sea\n").unwrap();
    bad("", "text: expected more than 32 tokens, got");
    fs::write(folder.join("text.txt"), " \n").unwrap();
    bad("", "expected some text, got an empty file");
    fs::remove_file(folder.join("text.txt")).unwrap();
    bad("", "text.txt: No such file");
    assert!(!folder.join("out").exists());
}
