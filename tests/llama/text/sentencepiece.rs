//! SentencePiece vocabularies in GGUF files.

use candle_core::quantized::gguf_file::Value;

use super::{byte_tokens, open, say, string};
use crate::binary::assert_error;
use crate::script::{says, write_gguf, Tokens, CONTROL, NORMAL, UNKNOWN};
use crate::stream::TextStream;

/// A SentencePiece vocabulary with few enough merges to follow by hand: `bc` first, then `ab`, `▁a`, `abc`, `▁ab`.
fn pieces_of_sentencepiece() -> (Tokens, Value) {
    let mut tokens = Tokens::of(&[("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]);
    tokens.add(
        &byte_tokens()
            .iter()
            .map(|(name, kind)| (name.as_str(), *kind))
            .collect::<Vec<_>>(),
    );
    let mut scores = vec![0f32; tokens.len()];
    for (piece, score) in [
        ("abc", -3.0),
        ("▁ab", -4.0),
        ("bc", 0.0),
        ("ab", -1.0),
        ("▁a", -2.0),
        ("▁", -5.0),
        ("a", -6.0),
        ("b", -7.0),
        ("c", -8.0),
    ] {
        tokens.add(&[(piece, NORMAL)]);
        scores.push(score);
    }
    (tokens, Value::Array(scores.into_iter().map(Value::F32).collect()))
}

#[test]
fn sentencepiece_files_merge_by_score() {
    let (tokens, scores) = pieces_of_sentencepiece();
    let metadata = [
        ("tokenizer.ggml.model", string("llama")),
        ("tokenizer.ggml.scores", scores),
    ];
    let model = |name, more: &[(&str, Value)]| {
        write_gguf(name, &says(tokens.len(), &[]), &tokens, &[&metadata[..], more].concat())
    };
    let spaced = open(&model("spm", &[]));
    let plain = open(&model(
        "spm_plain",
        &[
            ("tokenizer.ggml.add_space_prefix", Value::Bool(false)),
            ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
        ],
    ));
    for (checkpoint, text, expected) in [
        (&spaced, "abc", &["<s>", "▁a", "bc"][..]),
        (&spaced, "ab", &["<s>", "▁ab"]),
        (&spaced, "a  b", &["<s>", "▁a", "▁", "▁", "b"]),
        (&spaced, "é", &["<s>", "▁", "<0xC3>", "<0xA9>"]),
        (&spaced, "a</s>b", &["<s>", "▁a", "</s>", "▁", "b"]),
        (&spaced, "<s>ab", &["<s>", "▁ab"]),
        (&plain, "abc", &["abc"]),
        (&plain, "abab", &["ab", "ab"]),
        (&plain, " ab\n", &["▁ab", "<0x0A>"]),
    ] {
        let ids = checkpoint.encode(text, true).unwrap();
        let names: Vec<&str> = ids.iter().map(|id| tokens.names[*id as usize].as_str()).collect();
        assert_eq!(names, expected, "{text}");
    }
    // Encoding and decoding give the same text.
    for text in ["abc", " a b", "é\nab"] {
        let ids = spaced.encode(text, true).unwrap();
        assert_eq!(spaced.text.tokenizer.decode(&ids, true).unwrap(), text);
    }
    let args = |model| ["generate", "--model", model, "--prompt", "a"];
    let short = [("tokenizer.ggml.scores", Value::Array(vec![Value::F32(0.0)]))];
    let both = [("tokenizer.ggml.model", string("llama"))];
    let model = write_gguf(
        "spm_short",
        &says(tokens.len(), &[]),
        &tokens,
        &[&both[..], &short].concat(),
    );
    assert_error(
        &args(&model),
        &["tokenizer.ggml.scores: expected one for each of the 268 tokens, got 1"],
    );
    let model = write_gguf("spm_none", &says(tokens.len(), &[]), &tokens, &both);
    assert_error(
        &args(&model),
        &["tokenizer.ggml.scores: expected the scores", "found none"],
    );
}

#[test]
fn sentencepiece_text_goes_on_with_its_space_and_answers_without() {
    let (tokens, scores) = pieces_of_sentencepiece();
    let sequence = ["bc", "▁ab", "<0xC3>", "<0xA9>", "▁a", "c", "</s>"].map(|name| tokens.id(name));
    let metadata = [
        ("tokenizer.ggml.model", string("llama")),
        ("tokenizer.ggml.scores", scores),
        ("tokenizer.chat_template", string("{{ messages[0].content }}")),
    ];
    let model = write_gguf("spm_says", &says(tokens.len(), &sequence), &tokens, &metadata);
    assert_eq!(say(&model, "abc", &[]), "abc abé ac\n");
    assert_eq!(say(&model, "abc", &["--chat"]), "abé ac\n");
}

#[test]
fn streams_say_what_whole_texts_do() {
    let (tokens, scores) = pieces_of_sentencepiece();
    let metadata = [
        ("tokenizer.ggml.model", string("llama")),
        ("tokenizer.ggml.scores", scores),
    ];
    let checkpoint = open(&write_gguf("spm_stream", &says(tokens.len(), &[]), &tokens, &metadata));
    let tokenizer = &checkpoint.text.tokenizer;
    for text in ["abc", "a b  c", "  é ab\n\nc", "€", "a\u{1F600}b é"] {
        let ids = checkpoint.encode(text, true).unwrap();
        for first in 0..ids.len() {
            // A cut between any two characters: the stream continues the text before it.
            let before = tokenizer.decode(&ids[..first], true).unwrap();
            if before.contains('\u{fffd}') || !text.starts_with(&before) {
                continue;
            }
            let mut stream = TextStream::new(tokenizer, &ids[..first]).unwrap();
            let mut said = before;
            for id in &ids[first..] {
                said += &stream.step(*id).unwrap();
            }
            said += &stream.finish().unwrap();
            assert_eq!(said, text, "from {first} of {ids:?}");
        }
    }
}
