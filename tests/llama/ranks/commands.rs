//! `--tensor-parallel` of the llama example's commands: 3 ranks print what one prints.

use std::fs;

use candle_core::{Device, Tensor};
use candle_sfattention::{Criterion, KeyProbe, MergeStrategy, Policy};
use rand::{rngs::StdRng, Rng, SeedableRng};
use serde_json::{json, Value};

use super::{model, HEADS, HEAD_DIM, KV_HEADS, LAYERS};
use crate::binary::{assert_error, llama, number, report, text};
use crate::fixture::Fixture;

const MERGING: &str = "--similarity-threshold 0.7 --window 8";

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// The reports of a command on one rank and on three.
fn both(name: &str, command: &[&str], more: &str) -> [Value; 2] {
    ["1", "3"].map(|world| {
        let ranks = ["--tensor-parallel", world];
        report(
            &format!("ranks_{name}_{world}"),
            &[command, &words(more), &ranks].concat(),
        )
    })
}

fn assert_close(a: &Value, b: &Value, key: &str, relative: f64) {
    let (a, b) = (number(a, key), number(b, key));
    assert!((a - b).abs() <= relative * b.abs(), "{key}: {a} for {b}");
}

/// A policy that hides half, calibrated on one rank.
fn policy(model: &str) -> String {
    let fixture = Fixture::get();
    let (file, out) = (fixture.path("text.txt"), fixture.path("ranks-policy.json"));
    let more = format!("--context 64 --windows 3 --repeats 2 --out {out} --window 8 --sinks 2");
    let output = llama(&[&["calibrate", "--model", model, "--text", &file][..], &words(&more)].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    out
}

/// The same strategies with a probe in their place: about half of its scores lie below each threshold.
fn probe_policy(policy: &str) -> String {
    let path = Fixture::get().path("ranks-probe.json");
    let mut parts = Policy::from_json(&fs::read_to_string(policy).unwrap())
        .unwrap()
        .parts()
        .clone();
    let mut rng = StdRng::seed_from_u64(5);
    let mut random = |shape: &[usize]| {
        let values = (0..shape.iter().product()).map(|_| rng.random_range(-1f32..1.0));
        Tensor::from_vec(values.collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
    };
    let weights = random(&[LAYERS, KV_HEADS, HEAD_DIM]);
    parts.probe = Some(KeyProbe::new(&weights, &random(&[LAYERS, KV_HEADS])).unwrap());
    parts.config.criterion = Criterion::Given;
    for layer in &mut parts.layers {
        layer.strategies = vec![MergeStrategy::Similarity, MergeStrategy::Off, MergeStrategy::Similarity];
        layer.thresholds = vec![0.1, 0.0, -0.2];
    }
    fs::write(&path, Policy::new(parts).unwrap().to_json().unwrap()).unwrap();
    path
}

fn strategy_file() -> String {
    let path = Fixture::get().path("ranks-strategies.json");
    let layers = vec![["similarity", "similarity", "off", "off", "difference", "difference"]; LAYERS];
    let thresholds = vec![[0.8, 0.7, 0.0, 0.0, 0.4, 0.3]; LAYERS];
    assert_eq!(layers[0].len(), HEADS);
    fs::write(&path, json!({"layers": layers, "thresholds": thresholds}).to_string()).unwrap();
    path
}

#[test]
fn eval_of_three_ranks_is_that_of_one() {
    let (model, file) = (model("three"), Fixture::get().path("text.txt"));
    let (policy, strategies) = (policy(&model), strategy_file());
    let probe = probe_policy(&policy);
    let eval = [
        "eval",
        "--model",
        &model,
        "--text",
        &file,
        "--context",
        "64",
        "--windows",
        "3",
    ];
    for (name, flags) in [
        ("dense", "--dense".to_string()),
        ("merging", MERGING.into()),
        ("paper", "--preset paper --difference-threshold 0.4".into()),
        ("policy", format!("--strategy {policy}")),
        ("probe", format!("--strategy {probe}")),
        ("file", format!("--strategy {strategies} --window 8")),
        ("steps", format!("{MERGING} --step 9")),
        ("packed", "--dense --step 9 --decode-weights packed".into()),
    ] {
        let [one, three] = both(&format!("eval_{name}"), &eval, &flags);
        assert_close(&three, &one, "perplexity", 1e-5);
        for key in ["hidden_ratio", "hidden_ratio_per_layer", "tokens"] {
            assert_eq!(three[key], one[key], "{name}");
        }
        assert_eq!(
            number(&one, "hidden_ratio") > 0.02,
            !flags.contains("--dense"),
            "{name}"
        );
    }
}

#[test]
fn text_of_three_ranks_is_that_of_one() {
    let fixture = Fixture::get();
    let generate = |model: &str, name: &str, flags: &str| {
        let model = super::model(model);
        let prompt = "the whale there sea of ship 1851 Ahab sailed. them over and the sea there";
        let args = ["generate", "--model", &model, "--prompt", prompt, "--max-tokens", "30"];
        both(name, &args, flags)
    };
    for (model, name, flags) in [
        ("three", "greedy", MERGING),
        (
            "biased",
            "sampled",
            "--similarity-threshold 0.7 --window 8 --temperature 1.5 --seed 4",
        ),
        ("f32.gguf", "chunks", "--dense --prefill-chunk 5"),
        ("q8.gguf", "dequantized", "--dense --dequantize"),
        ("three", "drafts", "--dense --draft 3"),
        ("three", "recomputed", "--dense --no-cache"),
    ] {
        let [one, three] = generate(model, &format!("text_{name}"), flags);
        assert_eq!(three["text"], one["text"], "{name}");
        for key in [
            "kv_bytes",
            "kv_bytes_dense",
            "kv_tokens",
            "entries_per_layer",
            "hidden_ratio_per_layer",
            "draft",
        ] {
            assert_eq!(three["stats"][key], one["stats"][key], "{name} {key}");
        }
    }
    let (model, prompts) = (model("three"), fixture.path("ranks.prompts.txt"));
    fs::write(&prompts, "the whale there sea of ship\nthe\n1851 Ahab and the ship").unwrap();
    let batch = ["generate", "--model", &model, "--batch", &prompts, "--max-tokens", "20"];
    let [one, three] = both("batch", &batch, MERGING);
    for key in ["texts", "kv_bytes", "kv_bytes_dense"] {
        assert_eq!(three[key], one[key], "{key}");
    }
}

/// Only the first rank prints.
#[test]
fn ranks_print_once() {
    let model = model("three");
    let args = [
        "generate",
        "--model",
        &model,
        "--prompt",
        "the whale",
        "--max-tokens",
        "8",
        "--dense",
    ];
    let [one, three] = ["1", "3"].map(|world| {
        let output = llama(&[&args[..], &["--tensor-parallel", world]].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        (text(&output.stdout), text(&output.stderr).lines().count())
    });
    assert_eq!(one, three);
}

#[test]
fn bench_of_three_ranks_holds_as_many_bytes() {
    let (model, file) = (model("three"), Fixture::get().path("text.txt"));
    let bench = ["bench", "--model", &model, "--text", &file];
    let [one, three] = both("bench", &bench, &format!("--prompts 40,90 --decode 6 {MERGING}"));
    let rows = |report: &Value| report["rows"].as_array().unwrap().clone();
    assert_eq!(rows(&one).len(), 4);
    for (one, three) in rows(&one).iter().zip(rows(&three)) {
        for key in [
            "prompt_tokens",
            "kv_tokens",
            "kv_bytes",
            "kv_bytes_dense",
            "curve",
            "hidden_ratio",
        ] {
            assert_eq!(three[key], one[key], "{key}");
        }
    }
}

/// Random weights are those of one rank, whatever the ranks.
#[test]
fn serving_on_three_ranks_holds_as_many_bytes() {
    let shape = Fixture::get().path("ranks-shape.json");
    fs::copy(format!("{}/config.json", model("biased")), &shape).unwrap();
    let bench = ["bench", "--shape", &shape, "--random-weights", "--decode", "2"];
    let [one, three] = both(
        "serving",
        &bench,
        "--context 90 --batch 2,1 --shares 0.5 --kv-dtype f32,i8,f64",
    );
    assert_eq!((number(&one, "ranks"), number(&three, "ranks")), (1.0, 3.0));
    assert_eq!(three["calibrations"], one["calibrations"]);
    let rows = |report: &Value| report["rows"].as_array().unwrap().clone();
    assert_eq!(rows(&one).len(), 4 + 4 + 2);
    for (one, three) in rows(&one).iter().zip(rows(&three)) {
        for key in [
            "attention",
            "batch",
            "hidden",
            "hidden_of_all",
            "prompt_kv_bytes",
            "prompt_kv_bytes_dense",
            "not_on_this_device",
        ] {
            assert_eq!(three[key], one[key], "{key}");
        }
        assert_eq!(three["decoded"]["kv_bytes"], one["decoded"]["kv_bytes"]);
        // An f32 model has no f64 entries.
        assert_eq!(one["hidden"].is_null(), one["kv_dtype"] == "f64");
        if one["kv_dtype"] != "f64" {
            assert_eq!(number(one, "hidden") > 0.2, one["wanted"].is_number());
        }
    }
}

#[test]
fn ranks_that_do_not_fit_end_in_one_line() {
    let fixture = Fixture::get();
    let (model, file) = (model("three"), fixture.path("text.txt"));
    let generate = ["generate", "--model", &model, "--prompt", "the"];
    let eval = ["eval", "--model", &model, "--text", &file, "--windows", "2"];
    for (command, flags, parts) in [
        (
            &generate[..],
            "--tensor-parallel 2",
            [
                "tensor-parallel: expected a divisor of the model's 3 KV heads, got 2 ranks",
                "take another",
            ],
        ),
        (
            &eval[..],
            "--tensor-parallel 6 --context 64",
            [
                "tensor-parallel: expected a divisor of the model's 3 KV heads, got 6 ranks",
                "take another",
            ],
        ),
        (
            &eval[..],
            "--tensor-parallel 0",
            ["tensor-parallel: expected at least 1 rank, got 0", "1 runs"],
        ),
        (
            &["bench", "--shape", "smollm2-135m", "--random-weights"][..],
            "--tensor-parallel 3",
            [
                "batch: expected numbers of rows beside --tensor-parallel 3, got max",
                "give them with --batch",
            ],
        ),
        (
            &["bench", "--shape", "qwen2.5-32b", "--random-weights"][..],
            "--tensor-parallel 3 --batch 1",
            [
                "tensor-parallel: expected a divisor of the model's 8 KV heads, got 3 ranks",
                "take another",
            ],
        ),
        (
            &eval[..],
            "--tensor-parallel 3 --context 1000",
            ["context: expected 2 to 128", "got 1000"],
        ),
    ] {
        assert_error(&[command, &words(flags)].concat(), &parts);
    }
    // The other commands run on one rank.
    assert_eq!(llama(&["calibrate", "--tensor-parallel", "3"]).status.code(), Some(2));
}
