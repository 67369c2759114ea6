//! BOS and EOS, tokens without weights, and damaged vocabularies.

use candle_core::quantized::gguf_file::Value;
use serde_json::json;

use super::{open, split_by, string};
use crate::binary::{assert_error, llama, text};
use crate::script::{says, strings, tokenizer_json, write_folder, write_gguf, Tokens, CONTROL};

#[test]
fn bos_is_added_where_the_checkpoint_says_and_never_twice() {
    let tokens = Tokens::bytes_and(&[("<s>", CONTROL), ("</s>", CONTROL)]);
    let weights = says(tokens.len(), &[]);
    let (bos, eos, a) = (tokens.id("<s>"), tokens.id("</s>"), tokens.id("a"));
    let mut adds = tokenizer_json(&tokens, &[]);
    adds["post_processor"] = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}}});
    let none = tokenizer_json(&tokens, &[]);
    for (json, config, text, expected) in [
        (&none, json!({}), "a", &[a][..]),
        (&none, json!({"add_bos_token": true}), "a", &[bos, a]),
        (
            &none,
            json!({"add_bos_token": true, "add_eos_token": true}),
            "a",
            &[bos, a, eos],
        ),
        (&none, json!({"add_bos_token": true}), "<s>a", &[bos, a]),
        (&none, json!({"add_bos_token": false}), "<s>a", &[bos, a]),
        (&adds, json!({}), "a", &[bos, a]),
        (&adds, json!({"add_bos_token": true}), "a", &[bos, a]),
        (&adds, json!({"add_bos_token": null}), "<s>a", &[bos, a]),
        (&adds, json!({"add_bos_token": false}), "a", &[a]),
    ] {
        let mut file = config.clone();
        file["bos_token"] = json!("<s>");
        file["eos_token"] = json!("</s>");
        let files = [("tokenizer.json", json.clone()), ("tokenizer_config.json", file)];
        let checkpoint = open(&write_folder("bos", &weights, &files));
        assert_eq!(checkpoint.encode(text, true).unwrap(), expected, "{config} {text}");
        assert_eq!(checkpoint.encode("a", false).unwrap(), [a], "{config}");
    }
    let id = |key, id| (key, Value::U32(id));
    let (bos_id, eos_id) = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id");
    let (add_bos, add_eos) = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token");
    for (pre, more, expected) in [
        ("smollm", vec![], &[a][..]),
        ("smollm", vec![(add_bos, Value::Bool(true))], &[bos, a]),
        ("smollm", vec![(add_eos, Value::Bool(true))], &[a, eos]),
        ("llama-bpe", vec![], &[bos, a]),
        ("llama-bpe", vec![(add_bos, Value::Bool(false))], &[a]),
    ] {
        let more = [&[id(bos_id, bos), id(eos_id, eos)], &more[..]].concat();
        let checkpoint = open(&split_by(pre, &tokens, &[], &more));
        assert_eq!(checkpoint.encode("a", true).unwrap(), expected, "{pre} {more:?}");
    }
    let files = [
        ("tokenizer.json", none),
        ("tokenizer_config.json", json!({"add_bos_token": true})),
    ];
    let model = write_folder("no_bos", &weights, &files);
    let args = ["generate", "--model", &model, "--prompt", "a"];
    assert_error(
        &args,
        &[
            "tokenizer_config.json: ",
            "expected a bos token, as add_bos_token is true, found none",
        ],
    );
}

/// If a template writes BOS, the tokenizer adds no second one.
#[test]
fn a_templates_own_bos_is_the_only_one() {
    let tokens = Tokens::bytes_and(&[("<s>", CONTROL)]);
    let weights = says(tokens.len(), &[tokens.id("a"), tokens.id("b"), tokens.id("c")]);
    let config = json!({"add_bos_token": true, "bos_token": "<s>",
        "chat_template": "{{ bos_token }}{{ messages[0].content }}"});
    let files = [
        ("tokenizer.json", tokenizer_json(&tokens, &[])),
        ("tokenizer_config.json", config),
    ];
    let model = write_folder("template_bos", &weights, &files);
    let args = [
        "generate",
        "--model",
        &model,
        "--prompt",
        "a",
        "--dense",
        "--max-tokens",
        "2",
        "--chat",
    ];
    let output = llama(&args);
    assert_eq!(text(&output.stdout), "bc\n");
    assert!(
        text(&output.stderr).contains("prompt tokens     2\n"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn tokens_that_the_weights_do_not_have_are_an_error() {
    let tokens = Tokens::bytes_and(&[("<added>", CONTROL)]);
    let files = [("tokenizer.json", tokenizer_json(&tokens, &[]))];
    let model = write_folder("few_rows", &says(256, &[]), &files);
    let args = ["generate", "--model", &model, "--prompt", "a<added>"];
    assert_error(
        &args,
        &[
            "tokenizer: expected ids below 256",
            "got 256 for \"<added>\"",
            "another checkpoint",
        ],
    );
    assert!(
        llama(&["generate", "--model", &model, "--prompt", "a", "--max-tokens", "2"])
            .status
            .success()
    );
}

#[test]
fn damaged_vocabularies_end_in_one_line() {
    let tokens = Tokens::bytes_and(&[("<s>", CONTROL)]);
    let weights = says(tokens.len(), &[]);
    let pre = ("tokenizer.ggml.pre", string("gpt-2"));
    let merges = ("tokenizer.ggml.merges", strings::<&str>(&[]));
    let twice = [&tokens.names[..256], &["a".to_string()]].concat();
    for (metadata, parts) in [
        (
            vec![pre.clone(), merges.clone(), ("tokenizer.ggml.tokens", strings(&twice))],
            &["expected every token once", "\"a\""][..],
        ),
        (
            vec![pre.clone(), ("tokenizer.ggml.merges", strings(&["a"]))],
            &["tokenizer.ggml.merges: expected two tokens", "got \"a\""],
        ),
        (
            vec![pre.clone(), ("tokenizer.ggml.merges", strings(&["a qq"]))],
            &["tokenizer.ggml.merges: expected merges of known tokens"],
        ),
        (vec![pre.clone()], &["tokenizer.ggml.merges: expected this metadata"]),
        (
            vec![
                pre.clone(),
                merges.clone(),
                ("tokenizer.ggml.eos_token_id", Value::U32(257)),
            ],
            &["tokenizer.ggml.eos_token_id: expected the id of one of the 257 tokens, got 257"],
        ),
        (
            vec![
                pre.clone(),
                merges.clone(),
                ("tokenizer.ggml.token_type", Value::Array(vec![Value::I32(1)])),
            ],
            &["tokenizer.ggml.token_type: expected one for each of the 257 tokens, got 1"],
        ),
        (
            vec![
                pre.clone(),
                merges.clone(),
                ("tokenizer.ggml.add_bos_token", Value::U32(1)),
            ],
            &["tokenizer.ggml.add_bos_token: expected true or false"],
        ),
        (
            vec![pre, merges, ("tokenizer.ggml.model", string("t5"))],
            &["tokenizer.ggml.model: expected gpt2", "got t5"],
        ),
    ] {
        let model = write_gguf("damaged", &weights, &tokens, &metadata);
        assert_error(&["generate", "--model", &model, "--prompt", "a"], parts);
    }
}
