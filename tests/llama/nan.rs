//! The llama example on weights that produce NaN: every command ends in an error that names the token.

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Mutex, PoisonError};

use crate::binary::{assert_failed, llama, text};
use crate::script::{damage, says, strings, tokenizer_json, vocabulary, write_folder, write_gguf, Tokens};
use candle_core::quantized::gguf_file::Value;

/// A folder and a GGUF file of a model whose numbers are finite until it reads `token`. Tests run side by side: the
/// first caller writes the files.
fn sound_until(token: &'static str) -> [String; 2] {
    static MADE: Mutex<BTreeMap<&str, [String; 2]>> = Mutex::new(BTreeMap::new());
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    made.entry(token).or_insert_with(|| write_until(token)).clone()
}

fn write_until(token: &str) -> [String; 2] {
    let tokens = Tokens::bytes_and(&[]);
    let mut weights = says(tokens.len(), &["a", "b", "c"].map(|name| tokens.id(name)));
    let (_, hidden) = vocabulary(&weights);
    let row = tokens.id(token) as usize * hidden;
    damage(&mut weights, "model.embed_tokens.weight", row + 3, f32::NAN);
    let metadata = [
        ("tokenizer.ggml.pre", Value::String("gpt-2".into())),
        ("tokenizer.ggml.merges", strings::<&str>(&[])),
    ];
    let name = format!("nan_{token}");
    [
        write_folder(&name, &weights, &[("tokenizer.json", tokenizer_json(&tokens, &[]))]),
        write_gguf(&name, &weights, &tokens, &metadata),
    ]
}

/// A model with a number that is not finite in one of its last weights.
fn damaged(name: &str, weight: &str, value: f32) -> String {
    let tokens = Tokens::bytes_and(&[]);
    let mut weights = says(tokens.len(), &[]);
    damage(&mut weights, weight, 2, value);
    write_folder(name, &weights, &[("tokenizer.json", tokenizer_json(&tokens, &[]))])
}

fn write_text(name: &str, content: &str) -> String {
    let path = crate::script::folder("texts").join(name);
    fs::write(&path, content).unwrap();
    path.to_str().unwrap().into()
}

fn fails(args: &[&str], parts: &[&str]) {
    let output = llama(args);
    let parts = [&["expected finite numbers", "the weights are damaged"], parts].concat();
    assert_failed(args, &output, &parts);
}

#[test]
fn generation_says_at_which_token() {
    for model in sound_until("x") {
        let generate = |prompt: &str, more: &[&str]| {
            let args = ["generate", "--model", &model, "--prompt", prompt, "--dense"];
            [&args[..], more]
                .concat()
                .iter()
                .map(|arg| arg.to_string())
                .collect::<Vec<_>>()
        };
        for more in [
            &[][..],
            &["--temperature", "0.7", "--seed", "3"],
            &["--temperature", "1", "--top-p", "0.9"],
            &["--no-cache"],
        ] {
            let args = generate("abxc", more);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            fails(&args, &["hidden state: ", "got NaN at token position 2,"]);
        }
        let args = generate("abxcc", &["--prefill-chunk", "2"]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        fails(&args, &["got NaN at token position "]);
        let args = generate("a", &["--max-tokens", "2"]);
        let output = llama(&args.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "abc\n");
    }
    // NaN comes in the middle of the generated text: after a and b, c makes NaN.
    for model in sound_until("c") {
        fails(
            &["generate", "--model", &model, "--prompt", "a", "--dense"],
            &["got NaN at token position 2,"],
        );
    }
}

#[test]
fn norms_and_heads_are_seen_in_every_command() {
    let long = write_text("long.txt", &"the whale went down ".repeat(40));
    for (name, weight, value, parts) in [
        (
            "nan_norm",
            "model.norm.weight",
            f32::NAN,
            &["hidden state: ", "got NaN"][..],
        ),
        (
            "inf_norm",
            "model.norm.weight",
            f32::INFINITY,
            &["hidden state: ", "got "],
        ),
        ("nan_head", "lm_head.weight", f32::NAN, &["logits: ", "got NaN"]),
        ("inf_head", "lm_head.weight", f32::INFINITY, &["logits: ", "got "]),
    ] {
        let model = damaged(name, weight, value);
        let out = crate::script::folder(&format!("out_{name}"));
        let policy = out.join("policy.json");
        let (out, policy) = (out.to_str().unwrap(), policy.to_str().unwrap());
        let on = |command: &'static str, more: &[&str]| {
            let args = [command, "--model", &model, "--text", &long];
            fails(&[&args[..], more].concat(), &[parts, &["at token position"]].concat());
        };
        fails(&["generate", "--model", &model, "--prompt", "the", "--dense"], parts);
        on("eval", &["--context", "16", "--dense"]);
        on("eval", &["--context", "16", "--copy", "--windows", "2"]);
        on("bench", &["--prompts", "16", "--decode", "2"]);
        on(
            "calibrate",
            &[
                "--context",
                "64",
                "--windows",
                "2",
                "--repeats",
                "1",
                "--window",
                "8",
                "--out",
                policy,
            ],
        );
        assert!(!fs::exists(policy).unwrap());
        let small = [
            "--context",
            "64",
            "--windows",
            "2",
            "--calibration",
            "1",
            "--passkey",
            "110",
            "--window",
            "8",
        ];
        on("report", &[&small[..], &["--out", out]].concat());
        on("report", &[&small[..], &["--out", out, "--methods", "dense"]].concat());
    }
}

#[test]
fn eval_and_calibrate_say_in_which_window() {
    // Windows of 16 tokens, one token a letter. The model makes NaN at the sixth token of the third window, and of the
    // fourth, a window for calibration.
    let mut scored = "the whale went down ".repeat(20);
    let mut calibrated = scored.clone();
    scored.replace_range(37..38, "x");
    calibrated.replace_range(53..54, "x");
    let (scored, calibrated) = (
        write_text("scored.txt", &scored),
        write_text("calibrated.txt", &calibrated),
    );
    let policy = crate::script::folder("windows").join("policy.json");
    let policy = policy.to_str().unwrap();
    for model in sound_until("x") {
        let eval = [
            "eval",
            "--model",
            &model,
            "--text",
            &scored,
            "--context",
            "16",
            "--dense",
        ];
        fails(&eval, &["window 2: ", "got NaN at token position 5,"]);
        let fine = llama(&[&eval[..], &["--windows", "2"]].concat());
        assert!(fine.status.success(), "{}", text(&fine.stderr));
        let calibrate = [
            "calibrate",
            "--model",
            &model,
            "--text",
            &calibrated,
            "--context",
            "16",
            "--out",
            policy,
        ];
        let settings = ["--windows", "12", "--repeats", "0", "--window", "4", "--sinks", "1"];
        fails(
            &[&calibrate[..], &settings].concat(),
            &["window 1: ", "got NaN at token position 5,"],
        );
    }
}
