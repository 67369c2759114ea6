//! The llama example's batches and decode weights, on tiny random checkpoints.

use std::fs;

use crate::binary::{assert_error, llama, number, report, text};
use crate::fixture::{Fixture, CONTEXT};
use serde_json::Value;

const PROMPTS: [&str; 4] = [
    "the whale there sea of ship 1851 Ahab sailed. them over and the sea there",
    "the",
    "ship of the whale over them",
    "1851 Ahab and the ship and the sea and the whale and them over the sea of the ship",
];

fn split(flags: &str) -> Vec<&str> {
    flags.split_whitespace().collect()
}

fn batch(name: &str, content: &str, flags: &str) -> Value {
    let fixture = Fixture::get();
    let (model, file) = (fixture.path("hf"), fixture.path(&format!("{name}.prompts.txt")));
    fs::write(&file, content).unwrap();
    let args = ["generate", "--model", &model, "--batch", &file, "--max-tokens", "30"];
    report(name, &[&args[..], &split(flags)].concat())
}

/// Prompts of other lengths together give each prompt's own text: with quantized decode weights a row's product does
/// not depend on other rows, and with floats these models' logits lie apart by more than rounding.
#[test]
fn a_batch_is_each_prompt_alone() {
    let fixture = Fixture::get();
    for (name, flags) in [
        ("dense", "--dense"),
        ("dense_fast", "--dense --decode-weights fast"),
        ("dense_q8", "--dense --decode-weights q8_0"),
        ("dense_packed", "--dense --decode-weights packed"),
        ("merging", "--similarity-threshold 0.9 --window 8"),
        ("sampled", "--dense --temperature 2 --seed 5"),
    ] {
        let together = batch(name, &PROMPTS.join("\n"), flags);
        let texts = together["texts"].as_array().unwrap();
        assert_eq!(texts.len(), PROMPTS.len());
        let mut kv_bytes = 0.0;
        for (index, (prompt, got)) in PROMPTS.iter().zip(texts).enumerate() {
            let model = fixture.path("hf");
            let args = ["generate", "--model", &model, "--prompt", prompt, "--max-tokens", "30"];
            let alone = report(&format!("{name}_{index}"), &[&args[..], &split(flags)].concat());
            assert_eq!(got["text"], alone["text"], "{flags}: {prompt}");
            assert_eq!(
                got["tokens"].as_array().unwrap().len() as f64,
                number(&alone, "tokens"),
                "{flags}: {prompt}"
            );
            assert_eq!(
                number(got, "kv_bytes"),
                number(&alone["stats"], "kv_bytes"),
                "{flags}: {prompt}"
            );
            kv_bytes += number(got, "kv_bytes");
        }
        assert_eq!(number(&together, "kv_bytes"), kv_bytes);
        assert!(number(&together, "decode_tokens_per_second") > 0.0);
    }
}

#[test]
fn a_file_with_blank_lines_has_a_prompt_a_paragraph() {
    let lines = batch("lines", "the sea\nof ship\n", "--dense");
    let prompts = |report: &Value| -> Vec<String> {
        let texts = report["texts"].as_array().unwrap().iter();
        texts.map(|text| text["prompt"].as_str().unwrap().into()).collect()
    };
    assert_eq!(prompts(&lines), ["the sea", "of ship"]);
    let paragraphs = batch("paragraphs", "\nthe sea\nof ship\n\n\nthe whale\n", "--dense");
    assert_eq!(prompts(&paragraphs), ["the sea\nof ship", "the whale"]);
}

#[test]
fn batches_that_cannot_run_are_refused() {
    let fixture = Fixture::get();
    let model = fixture.path("hf");
    let path = |name: &str, content: &str| {
        let path = fixture.path(name);
        fs::write(&path, content).unwrap();
        path
    };
    let generate = |file: &str, more: &[&str], parts: &[&str]| {
        assert_error(
            &[&["generate", "--model", &model, "--batch", file][..], more].concat(),
            parts,
        );
    };
    generate(&path("none.txt", "\n \n"), &[], &["batch", "at least one prompt"]);
    generate(&fixture.path("missing.txt"), &[], &["missing.txt"]);
    let long = "the sea ".repeat(CONTEXT);
    generate(
        &path("long.txt", &format!("the\n{long}")),
        &[],
        &["batch: prompt 2", "expected at most"],
    );
    generate(
        &path("one.txt", "the"),
        &["--preset", "reference"],
        &["rule: expected causal for --batch"],
    );
    let both = llama(&["generate", "--model", &model, "--batch", "x", "--prompt", "y"]);
    assert!(!both.status.success(), "{}", text(&both.stdout));
}

/// Scored step by step through the weights for prompts, a window is the whole one; through 8 bits it is near.
#[test]
fn perplexity_by_steps_is_that_of_windows() {
    let fixture = Fixture::get();
    let file = fixture.path("text.txt");
    for name in ["hf", "f32.gguf", "q8.gguf"] {
        let model = fixture.path(name);
        let nll = |run: &str, flags: &str| {
            let args = [
                "eval",
                "--model",
                &model,
                "--text",
                &file,
                "--context",
                "64",
                "--windows",
                "2",
                "--dense",
            ];
            number(
                &report(&format!("{name}_{run}"), &[&args[..], &split(flags)].concat()),
                "nll",
            )
        };
        let whole = nll("whole", "");
        for step in ["1", "4", "64"] {
            let steps = nll("steps", &format!("--step {step} --decode-weights f32"));
            // Products of quantized files round activations to 8 bits: a difference in the last bit before one becomes
            // a step of 1/127 after it.
            let most = if name == "q8.gguf" { 2e-3 } else { 2e-4 };
            assert!(
                (steps - whole).abs() <= most,
                "{name}: {steps} in steps of {step}, whole {whole}"
            );
        }
        // 8 bits a weight, or the file's own blocks, and activations as they are: a tenth of what Q8_0 may cost.
        let packed = nll("packed", "--step 1 --decode-weights packed");
        let exact = nll("exact", if name == "q8.gguf" { "--dequantize" } else { "" });
        let most = if name == "q8.gguf" { 1e-6 } else { 2e-3 };
        assert!(
            (packed / exact - 1.0).abs() <= most,
            "{name}: {packed} packed, {exact} in f32"
        );
        assert!(packed != exact, "{name}: {packed}");
        let quantized = nll("quantized", "--step 1 --decode-weights q8_0");
        assert!(
            (quantized / whole - 1.0).abs() < 0.02,
            "{name}: {quantized} against {whole}"
        );
        if name == "hf" {
            assert!(quantized != nll("steps", "--step 1 --decode-weights f32"));
            assert_eq!(quantized, nll("fast", "--step 1 --decode-weights fast"));
        }
    }
}
