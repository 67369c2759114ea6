//! The llama example's binary on a tiny random checkpoint: every format, command and error.

use std::fs;

use crate::binary::{assert_error, llama, number, report, text};
use crate::fixture::{Fixture, CONTEXT, HEADS, LAYERS};
use serde_json::{json, Value};

fn eval(name: &str, model: &str, more: &[&str]) -> Value {
    let fixture = Fixture::get();
    let (model, text) = (fixture.path(model), fixture.path("text.txt"));
    let args = [
        "eval",
        "--model",
        &model,
        "--text",
        &text,
        "--context",
        "64",
        "--windows",
        "4",
    ];
    report(name, &[&args, more].concat())
}

fn assert_close(a: f64, b: f64, relative: f64) {
    assert!(
        (a - b).abs() <= relative * b.abs(),
        "{a} and {b} differ by more than {relative}"
    );
}

#[test]
fn every_format_of_one_checkpoint_gives_one_perplexity() {
    let hf = number(&eval("formats_hf", "hf", &["--dense"]), "perplexity");
    assert!(hf.is_finite() && hf > 1.0);
    // Interleaved rotary pairs with permuted rows against halves.
    assert_close(
        number(&eval("formats_gguf", "f32.gguf", &["--dense"]), "perplexity"),
        hf,
        1e-4,
    );
    assert_close(
        number(&eval("formats_sharded", "sharded", &["--dense"]), "perplexity"),
        hf,
        1e-9,
    );
    assert_close(
        number(&eval("formats_q8", "q8.gguf", &["--dense"]), "perplexity"),
        hf,
        0.1,
    );
    assert_close(
        number(
            &eval("formats_q8_f32", "q8.gguf", &["--dense", "--dequantize"]),
            "perplexity",
        ),
        hf,
        0.1,
    );
    assert_close(
        number(
            &eval("formats_bf16", "hf", &["--dense", "--dtype", "bf16"]),
            "perplexity",
        ),
        hf,
        0.1,
    );
    assert_close(
        number(&eval("formats_f16", "hf", &["--dense", "--dtype", "f16"]), "perplexity"),
        hf,
        0.02,
    );
    let scaled = number(&eval("formats_llama3", "llama3", &["--dense"]), "perplexity");
    assert!((scaled - hf).abs() > 1e-3 * hf, "rope scaling changed nothing");
}

#[test]
fn eval_reports_what_it_promises() {
    let report = eval("report", "hf", &["--spread"]);
    for key in ["perplexity", "nll", "tokens", "hidden_ratio", "tokens_per_second"] {
        assert!(number(&report, key).is_finite(), "{key}");
    }
    assert_eq!(number(&report, "tokens"), 4.0 * 63.0);
    assert_close(number(&report, "nll").exp(), number(&report, "perplexity"), 1e-9);
    assert_eq!(report["hidden_ratio_per_layer"].as_array().unwrap().len(), LAYERS);
    assert_eq!(report["strategy"], "similarity");
    assert_eq!(report["config"]["fold"], "mean");
    assert!(report["model"].as_str().unwrap().ends_with("hf"));
}

#[test]
fn dense_hides_nothing_and_ignores_the_preset() {
    let dense = eval("dense", "hf", &["--dense"]);
    assert_eq!(number(&dense, "hidden_ratio"), 0.0);
    assert_eq!(dense["strategy"], "off");
    let off = eval("off", "hf", &["--strategy", "off", "--preset", "paper"]);
    assert_eq!(number(&off, "hidden_ratio"), 0.0);
    assert_close(number(&off, "perplexity"), number(&dense, "perplexity"), 1e-6);
}

#[test]
fn merging_hides_tokens_and_changes_the_perplexity() {
    let dense = number(&eval("merge_dense", "hf", &["--dense"]), "perplexity");
    for (name, model, flags) in [
        ("merge_paper", "hf", "--preset paper --difference-threshold 0.5"),
        (
            "merge_reference",
            "f32.gguf",
            "--preset reference --difference-threshold 0.5",
        ),
        ("merge_pretrained", "q8.gguf", "--similarity-threshold 0.9 --window 8"),
        ("merge_bf16", "hf", "--similarity-threshold 0.9 --window 8 --dtype bf16"),
    ] {
        let report = eval(name, model, &flags.split_whitespace().collect::<Vec<_>>());
        let ratio = number(&report, "hidden_ratio");
        assert!(ratio > 0.01 && ratio < 0.99, "{name}: {ratio}");
        let layers: Vec<f64> = serde_json::from_value(report["hidden_ratio_per_layer"].clone()).unwrap();
        assert_close(layers.iter().sum::<f64>() / LAYERS as f64, ratio, 1e-9);
        assert!((number(&report, "perplexity") - dense).abs() > 1e-4 * dense, "{name}");
    }
}

#[test]
fn presets_and_flags_reach_the_configuration() {
    let reference = eval("preset_reference", "hf", &["--preset", "reference"]);
    assert_eq!(reference["strategy"], "difference");
    assert_eq!(reference["config"]["rule"], "reference");
    let flags = "--preset paper --strategy similarity --similarity-threshold 0.3 --difference-threshold 0.2 \
                 --max-merge-level 3 --rule causal --group-rule unanimous --criterion key-key --fold mean --sinks 2 \
                 --window 7 --loss-factor 0.5 --loss-normalizer pairs";
    let report = eval("flags", "hf", &flags.split_whitespace().collect::<Vec<_>>());
    let expected = json!({"similarity_threshold": 0.3, "difference_threshold": 0.2, "max_merge_level": 3,
        "rule": "causal", "group_rule": "unanimous", "criterion": "key_key", "fold": "mean", "sinks": 2, "window": 7,
        "loss_factor": 0.5, "loss_normalizer": "pairs"});
    assert_eq!(report["config"], expected);
}

#[test]
fn strategy_file_is_read() {
    let off = vec![vec!["off"; HEADS]; LAYERS];
    let file = write(
        "off.json",
        &json!({"layers": off, "thresholds": vec![vec![0.1; HEADS]; LAYERS]}),
    );
    let report = eval("strategy_file", "hf", &["--strategy", &file]);
    assert_eq!(number(&report, "hidden_ratio"), 0.0);
    assert_eq!(report["strategy"], file);
}

fn write(name: &str, value: &Value) -> String {
    let path = Fixture::get().path(name);
    fs::write(&path, value.to_string()).unwrap();
    path
}

#[test]
fn generation_is_deterministic() {
    let fixture = Fixture::get();
    let (gguf, hf) = (fixture.path("f32.gguf"), fixture.path("hf"));
    let generate = |name: &str, model: &str, more: &str| {
        let args = [
            "generate",
            "--model",
            model,
            "--prompt",
            "the whale",
            "--max-tokens",
            "12",
            "--dense",
        ];
        let report = report(
            name,
            &[&args[..], &more.split_whitespace().collect::<Vec<_>>()].concat(),
        );
        assert!(number(&report, "tokens") <= 12.0);
        assert_eq!(report["hidden_ratio_per_layer"].as_array().unwrap().len(), LAYERS);
        report["text"].as_str().unwrap().to_string()
    };
    let greedy = generate("greedy", &hf, "");
    assert_eq!(generate("greedy_again", &hf, ""), greedy);
    assert_eq!(generate("greedy_gguf", &gguf, ""), greedy);
    let sampled = generate("sampled", &hf, "--temperature 2 --top-p 0.95 --seed 3");
    assert_eq!(
        generate("sampled_again", &hf, "--temperature 2 --top-p 0.95 --seed 3"),
        sampled
    );
    assert_ne!(
        generate("sampled_other", &hf, "--temperature 2 --top-p 0.95 --seed 4"),
        sampled
    );
    assert_eq!(
        generate("chat_gguf", &gguf, "--chat"),
        generate("chat_hf", &hf, "--chat")
    );
}

#[test]
fn generation_stops_at_the_context() {
    let model = Fixture::get().path("hf");
    let prompt = "x".repeat(CONTEXT - 5);
    let output = llama(&[
        "generate",
        "--model",
        &model,
        "--prompt",
        &prompt,
        "--max-tokens",
        "50",
        "--dense",
    ]);
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(
        stderr.contains("generated tokens  5") && stderr.contains("note: stopped at the model's context"),
        "{stderr}"
    );
}

#[test]
fn bad_models_end_in_one_line() {
    let fixture = Fixture::get();
    let prose = fixture.path("text.txt");
    fs::create_dir_all(fixture.folder.join("hollow")).unwrap();
    for (model, parts) in [
        ("other.gguf", ["expected llama", "got gptneox"]),
        ("cut_data.gguf", ["expected at least", "truncated"]),
        ("cut_header.gguf", ["expected a whole GGUF file", "fetch it again"]),
        ("text.gguf", ["expected a whole GGUF file", "fetch it again"]),
        ("text.txt", ["expected a .gguf file", "got the file"]),
        ("missing.gguf", ["expected a .gguf file", "does not exist"]),
        (
            "hollow",
            ["expected a folder with config.json", "fetch the whole checkpoint"],
        ),
        ("other", ["expected llama", "got gpt_neox"]),
        (
            "three_layers",
            [
                "expected model.layers.2.input_layernorm.weight",
                "fetch the checkpoint again",
            ],
        ),
        ("yarn", ["expected default, linear or llama3", "got yarn"]),
    ] {
        let model = fixture.path(model);
        assert_error(
            &["eval", "--model", &model, "--text", &prose, "--context", "64"],
            &parts,
        );
        assert_error(&["generate", "--model", &model, "--prompt", "the"], &parts);
    }
    let hub = ["eval", "--model", "nobody/nothing-at-all", "--text", &prose];
    assert_error(
        &hub,
        &[
            "no file or folder here",
            "could not be fetched from the Hugging Face hub",
        ],
    );
    let gguf = fixture.path("f32.gguf");
    assert_error(
        &["eval", "--model", &gguf, "--text", &prose, "--dtype", "f16"],
        &["dtype: expected f32", "got f16"],
    );
}

#[test]
fn bad_texts_and_settings_end_in_one_line() {
    let fixture = Fixture::get();
    let model = fixture.path("hf");
    let eval = |text: &str, more: &[&str], parts: &[&str]| {
        let text = fixture.path(text);
        assert_error(
            &[&["eval", "--model", &model, "--text", &text][..], more].concat(),
            parts,
        );
    };
    eval("empty.txt", &[], &["expected some text", "empty file"]);
    eval("missing.txt", &[], &["missing.txt", "No such file"]);
    eval(
        "short.txt",
        &["--context", "64"],
        &["text: expected at least 64 tokens", "got 5"],
    );
    eval(
        "text.txt",
        &["--context", "64", "--windows", "1000"],
        &["windows: expected 1 to", "got 1000"],
    );
    eval(
        "text.txt",
        &["--context", "64", "--windows", "0"],
        &["windows: expected 1 to", "got 0"],
    );
    eval(
        "text.txt",
        &["--context", "129"],
        &["context: expected 2 to 128", "got 129"],
    );
    eval(
        "text.txt",
        &["--context", "1"],
        &["context: expected 2 to 128", "got 1"],
    );
    eval(
        "text.txt",
        &["--json", "no/such/folder/x.json"],
        &["json: expected a file in an existing folder"],
    );
    eval(
        "text.txt",
        &["--max-merge-level", "0"],
        &["max_merge_level: expected at least 1, got 0"],
    );
    eval(
        "text.txt",
        &["--rule", "reference"],
        &["MergeRule::Reference: expected", "got"],
    );
}

#[test]
fn bad_prompts_and_samplings_end_in_one_line() {
    let model = Fixture::get().path("hf");
    let generate = |prompt: &str, more: &[&str], parts: &[&str]| {
        assert_error(
            &[&["generate", "--model", &model, "--prompt", prompt][..], more].concat(),
            parts,
        );
    };
    generate(
        &"x".repeat(CONTEXT),
        &[],
        &["prompt: expected at most 127 tokens", "got 128"],
    );
    generate("", &[], &["prompt: expected some text"]);
    generate("the", &["--temperature", "-1"], &["temperature: expected", "got -1"]);
    generate("the", &["--temperature", "NaN"], &["temperature: expected", "got NaN"]);
    generate("the", &["--top-p", "0"], &["top-p: expected", "got 0"]);
    generate("the", &["--top-p", "1.5"], &["top-p: expected", "got 1.5"]);
}

#[test]
fn bad_strategies_end_in_one_line() {
    let fixture = Fixture::get();
    let (model, prose) = (fixture.path("hf"), fixture.path("text.txt"));
    let strategy = |name: &str, value: Value, parts: &[&str]| {
        let file = write(name, &value);
        let context = ["--context", "64", "--strategy", &file];
        assert_error(
            &[&["eval", "--model", &model, "--text", &prose][..], &context].concat(),
            parts,
        );
    };
    let layers = vec![vec!["similarity"; HEADS]; LAYERS];
    strategy(
        "one_layer.json",
        json!({"layers": layers[..1]}),
        &["layers: expected 2 lists, got 1"],
    );
    strategy(
        "heads.json",
        json!({"layers": [vec!["off"; HEADS], vec!["off"]]}),
        &["expected 4 entries for layer 1, got 1"],
    );
    strategy(
        "thresholds.json",
        json!({"layers": layers, "thresholds": [[0.1]]}),
        &["thresholds: expected 2 lists, got 1"],
    );
    strategy(
        "name.json",
        json!({"layers": [["similar"]]}),
        &["expected similarity, difference, off", "`similar`"],
    );
    strategy("key.json", json!({"heads": []}), &["unknown field `heads`"]);
    let args = ["eval", "--model", &model, "--text", &prose, "--strategy", "similar"];
    assert_error(
        &args,
        &[
            "strategy similar: expected similarity, difference, off or",
            "found no such file",
        ],
    );
}

#[test]
fn wrong_usage_ends_in_claps_code() {
    for args in [
        vec!["--fold", "sum"],
        vec!["eval"],
        vec!["generate", "--model", "x", "--prompt", "y", "--fold", "sum"],
    ] {
        assert_eq!(llama(&args).status.code(), Some(2), "{args:?}");
    }
    assert_eq!(llama(&["eval", "--help"]).status.code(), Some(0));
}
