//! The generated tokens that are printed, and those that end a text.

use candle_core::quantized::gguf_file::Value;
use serde_json::json;

use super::{byte_tokens, open, say, string};
use crate::binary::{assert_error, llama, text};
use crate::script::{says, strings, tokenizer_json, write_folder, write_gguf, Tokens, CONTROL, NORMAL, USER_DEFINED};

#[test]
fn user_defined_tokens_are_text_and_control_tokens_are_not() {
    let tokens = Tokens::bytes_and(&[
        ("<think>", USER_DEFINED),
        ("<|mark|>", CONTROL),
        ("</think>", USER_DEFINED),
        ("<|stop|>", CONTROL),
    ]);
    let sequence = ["a", "b", "<think>", "c", "<|mark|>", "</think>", "d", "<|stop|>"].map(|name| tokens.id(name));
    let weights = says(tokens.len(), &sequence);
    let gguf = write_gguf(
        "user_defined",
        &weights,
        &tokens,
        &[
            ("tokenizer.ggml.pre", string("smollm")),
            ("tokenizer.ggml.merges", strings::<&str>(&[])),
            ("tokenizer.ggml.eos_token_id", Value::U32(tokens.id("<|stop|>"))),
        ],
    );
    let config = json!({"eos_token": "<|stop|>"});
    let files = [
        ("tokenizer.json", tokenizer_json(&tokens, &[])),
        ("tokenizer_config.json", config),
    ];
    let folder = write_folder("user_defined", &weights, &files);
    for model in [&gguf, &folder] {
        assert_eq!(say(model, "a", &[]), "ab<think>c</think>d\n", "{model}");
        let ids = open(model).encode("x</think>y", false).unwrap();
        assert_eq!(ids, [tokens.id("x"), tokens.id("</think>"), tokens.id("y")]);
    }
}

#[test]
fn marks_that_end_turns_end_texts_though_eos_is_another() {
    for end in [
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "</s>",
        "<｜end▁of▁sentence｜>",
    ] {
        for kind in [CONTROL, USER_DEFINED] {
            let tokens = Tokens::bytes_and(&[("<eos>", CONTROL), (end, kind)]);
            let weights = says(tokens.len(), &["a", "b", end, "c"].map(|name| tokens.id(name)));
            let metadata = [
                ("tokenizer.ggml.pre", string("smollm")),
                ("tokenizer.ggml.merges", strings::<&str>(&[])),
                ("tokenizer.ggml.eos_token_id", Value::U32(tokens.id("<eos>"))),
            ];
            let gguf = write_gguf("ends", &weights, &tokens, &metadata);
            assert_eq!(say(&gguf, "a", &[]), "ab\n", "{end} of kind {kind}");
            let json = tokenizer_json(&tokens, &[]);
            let folder = write_folder("ends", &weights, &[("tokenizer.json", json)]);
            assert_eq!(say(&folder, "a", &[]), "ab\n", "{end} of kind {kind}");
        }
    }
}

#[test]
fn every_eos_of_generation_config_ends_a_text() {
    let tokens = Tokens::bytes_and(&[("<one>", CONTROL), ("<two>", CONTROL)]);
    let (one, two) = (tokens.id("<one>"), tokens.id("<two>"));
    for end in [one, two] {
        let weights = says(tokens.len(), &[tokens.id("a"), tokens.id("b"), end, tokens.id("c")]);
        for (eos, expected) in [(json!([one, two]), "ab\n"), (json!(end), "ab\n"), (json!(null), "abc")] {
            let files = [
                ("tokenizer.json", tokenizer_json(&tokens, &[])),
                ("generation_config.json", json!({"eos_token_id": eos})),
            ];
            let said = say(&write_folder("eos", &weights, &files), "a", &[]);
            assert!(said.starts_with(expected), "{eos}: {said}");
        }
    }
    let files = [
        ("tokenizer.json", tokenizer_json(&tokens, &[])),
        ("generation_config.json", json!({"eos_token_id": "</s>"})),
    ];
    let model = write_folder("eos", &says(tokens.len(), &[]), &files);
    assert_error(
        &["generate", "--model", &model, "--prompt", "a"],
        &[
            "generation_config.json: ",
            "eos_token_id: expected a token id or a list of them",
        ],
    );
}

/// A tokenizer.json whose BPE falls back to bytes.
fn byte_fallback_json(tokens: &Tokens) -> serde_json::Value {
    let mut json = tokenizer_json(tokens, &[]);
    json["added_tokens"] = json!([]);
    json["pre_tokenizer"] = json!(null);
    json["decoder"] = json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]});
    json["model"]["byte_fallback"] = json!(true);
    json
}

#[test]
fn broken_characters_are_replaced_and_end_nothing() {
    let mut fallback = Tokens::of(&[("a", NORMAL), ("x", NORMAL), ("y", NORMAL)]);
    fallback.add(
        &byte_tokens()
            .iter()
            .map(|(name, kind)| (name.as_str(), *kind))
            .collect::<Vec<_>>(),
    );
    let level = Tokens::bytes_and(&[]);
    // Byte-level BPE writes the bytes C3, A9, E2 and 82 as letters of its own.
    let written = |name: &str| match name {
        "C3" => "Ã".into(),
        "A9" => "©".into(),
        "E2" => "â".into(),
        "82" => "Ĥ".into(),
        other => String::from(other),
    };
    for (names, expected) in [
        (&["a", "x", "C3", "A9", "y"][..], "axéy"),
        (&["a", "C3", "A9", "E2", "x"], "aé\u{fffd}x"),
        (&["a", "A9", "x"], "a\u{fffd}x"),
        (&["a", "C3", "E2", "82", "x", "y"], "a\u{fffd}\u{fffd}xy"),
        // The text ends in the middle of a character.
        (&["a", "x", "E2", "82"], "ax\u{fffd}"),
    ] {
        let limit = (names.len() - 1).to_string();
        let limit = ["--max-tokens", limit.as_str()];
        let ids: Vec<u32> = names
            .iter()
            .map(|name| {
                if name.len() == 2 {
                    fallback.id(&format!("<0x{name}>"))
                } else {
                    fallback.id(name)
                }
            })
            .collect();
        let model = write_folder(
            "fallback",
            &says(fallback.len(), &ids),
            &[("tokenizer.json", byte_fallback_json(&fallback))],
        );
        assert_eq!(say_at_most(&model, limit), format!("{expected}\n"), "{names:?}");
        let ids: Vec<u32> = names.iter().map(|name| level.id(&written(name))).collect();
        let model = write_folder(
            "byte_level",
            &says(level.len(), &ids),
            &[("tokenizer.json", tokenizer_json(&level, &[]))],
        );
        assert_eq!(say_at_most(&model, limit), format!("{expected}\n"), "{names:?}");
    }
}

fn say_at_most(model: &str, limit: [&str; 2]) -> String {
    let args = ["generate", "--model", model, "--prompt", "a", "--dense"];
    let output = llama(&[&args[..], &limit].concat());
    assert!(output.status.success(), "{model}: {}", text(&output.stderr));
    text(&output.stdout)
}
