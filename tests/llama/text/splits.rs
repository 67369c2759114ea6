//! How text is cut before it becomes tokens.

use std::slice::from_ref;

use candle_core::quantized::gguf_file::Value;
use serde_json::json;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

use super::{open, split_by};
use crate::binary::assert_error;
use crate::load::pre_tokenizer::PreTokenizer;
use crate::script::{says, tokenizer_json, write_folder, Tokens, CONTROL, NORMAL};

#[test]
fn a_tokenizers_truncation_and_padding_are_not_the_models() {
    let tokens = Tokens::bytes_and(&[("<pad>", CONTROL)]);
    let mut json = tokenizer_json(&tokens, &[]);
    json["truncation"] = json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 256, "pad_type_id": 0, "pad_token": "<pad>"});
    let model = write_folder("truncated", &says(257, &[]), &[("tokenizer.json", json)]);
    let checkpoint = open(&model);
    for (text, special) in [("The whale went down", false), ("a", true)] {
        let ids: Vec<u32> = text
            .chars()
            .map(|c| tokens.id(&c.to_string().replace(' ', "Ġ")))
            .collect();
        assert_eq!(checkpoint.encode(text, special).unwrap(), ids, "{text}");
    }
}

/// Half of a surrogate pair is no character, wherever it stands; a reader that passes over a string does not find it.
#[test]
fn a_tokenizers_strings_are_read_where_nothing_needs_them() {
    let tokens = Tokens::bytes_and(&[]);
    let json = tokenizer_json(&tokens, &[]).to_string();
    let json = json.replacen('{', r#"{"note": "\ud800", "#, 1);
    let model = write_folder("half-a-pair", &says(256, &[]), &[("tokenizer.json", json.into())]);
    let args = ["generate", "--model", &model, "--prompt", "a"];
    assert_error(&args, &["tokenizer.json: expected a tokenizer, got: ", "line 1 column"]);
}

/// The pieces of a text.
fn pieces(pre: &str, text: &str) -> Vec<String> {
    let mut pieces = PreTokenizedString::from(text);
    let splits = PreTokenizer::named(pre, false).unwrap().splits;
    splits.pre_tokenize(&mut pieces).unwrap();
    let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
    splits
        .iter()
        .map(|(_, (first, end), _)| text[*first..*end].to_string())
        .collect()
}

#[test]
fn names_of_pre_tokenizers_split_as_their_models_do() {
    for (names, text, expected) in [
        (
            "llama-bpe llama3 llama-v3 falcon3 pixtral dbrx smaug-bpe lfm2",
            "We'LL pay 12345\n\n  now;\n",
            &["We", "'LL", " pay", " ", "123", "45", "\n\n", " ", " now", ";\n"][..],
        ),
        (
            "qwen2 deepseek-r1-qwen megrez stablelm2",
            "We'LL pay 123\n\n  now",
            &["We", "'LL", " pay", " ", "1", "2", "3", "\n\n", " ", " now"],
        ),
        (
            "tekken",
            "camelCase HTTPServer IT'S it's 12 a/\n",
            &[
                "camel",
                "Case",
                " HTTPServer",
                " IT",
                "'S",
                " it",
                "'s",
                " ",
                "1",
                "2",
                " a",
                "/\n",
            ],
        ),
        (
            "gpt-4o llama4",
            "camelCase it's 1234",
            &["camel", "Case", " it's", " ", "123", "4"],
        ),
        (
            "deepseek-llm",
            "You 123 好的ab!\n",
            &["You", " ", "1", "2", "3", " ", "好的", "ab", "!", "\n"],
        ),
        ("deepseek-coder", "x = y12;\n", &["x", " =", " y", "1", "2", ";", "\n"]),
        ("deepseek-v3", "12345好的 ab", &["123", "45", "好的", " ab"]),
        (
            "smollm starcoder refact",
            "we'll in 1851  x",
            &["we", "'ll", " in", " ", "1", "8", "5", "1", " ", " x"],
        ),
        (
            "gpt-2 olmo mpt",
            "We'LL in 1851  x",
            &["We", "'", "LL", " in", " 1851", " ", " x"],
        ),
        ("default", "a1234.b", &["a", "123", "4", ".", "b"]),
        ("falcon", "a 1234`", &["a", " ", "123", "4", "`"]),
        ("seed-coder", "a;\n12", &["a", ";", "\n", "1", "2"]),
        ("viking", "ab12, c", &["ab", "1", "2", ",", " c"]),
        ("poro-chat bloom", "ab12, c", &["ab12", ",", " c"]),
    ] {
        for name in names.split(' ') {
            assert_eq!(pieces(name, text), expected, "{name}");
        }
    }
}

#[test]
fn a_files_way_to_split_reaches_its_text() {
    let numbers = [("12", NORMAL), ("123", NORMAL), ("1234", NORMAL), ("<s>", CONTROL)];
    let tokens = Tokens::bytes_and(&numbers);
    let merges = ["1 2", "12 3", "123 4"];
    let bos = ("tokenizer.ggml.bos_token_id", Value::U32(tokens.id("<s>")));
    let names = |ids: &[u32]| -> Vec<&str> { ids.iter().map(|id| tokens.names[*id as usize].as_str()).collect() };
    for (pre, expected) in [
        ("falcon3", &["<s>", "123", "4"][..]),
        ("tekken", &["<s>", "1", "2", "3", "4"]),
        ("dbrx", &["123", "4"]),
        ("gpt-2", &["1234"]),
        ("deepseek-llm", &["1", "2", "3", "4"]),
    ] {
        let model = split_by(pre, &tokens, &merges, from_ref(&bos));
        assert_eq!(names(&open(&model).encode("1234", true).unwrap()), expected, "{pre}");
    }
    let model = split_by("no-such-pre", &tokens, &merges, &[]);
    let args = ["generate", "--model", &model, "--prompt", "a"];
    assert_error(
        &args,
        &[
            "tokenizer.ggml.pre: expected",
            "got no-such-pre",
            "use the Hugging Face folder",
        ],
    );

    // In these models only, a word that is a token needs no merges; and Qwen composes characters.
    let words = Tokens::bytes_and(&[("abc", NORMAL)]);
    let model = |pre| open(&split_by(pre, &words, &[], &[]));
    assert_eq!(model("llama-bpe").encode("abc", false).unwrap(), [words.id("abc")]);
    assert_eq!(model("smollm").encode("abc", false).unwrap().len(), 3);
    assert_eq!(model("qwen2").encode("e\u{301}", false).unwrap().len(), "é".len());
    assert_eq!(
        model("gpt-2").encode("e\u{301}", false).unwrap().len(),
        "e\u{301}".len()
    );
}
