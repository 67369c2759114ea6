//! The llama example's text: tokenizers, chat templates, what ends a text, and tokens printed as they come.

#[allow(dead_code)]
#[path = "llama_example/binary.rs"]
mod binary;
#[allow(dead_code)]
#[path = "llama_example/fixture.rs"]
mod fixture;
#[allow(dead_code)]
#[path = "llama_example/script.rs"]
mod script;

#[path = "../examples/llama/chat.rs"]
mod chat;
#[allow(dead_code)]
#[path = "../examples/llama/load/mod.rs"]
mod load;
#[allow(dead_code)]
#[path = "../examples/llama/model.rs"]
mod model;
#[allow(dead_code)]
#[path = "../examples/llama/rope.rs"]
mod rope;
#[path = "../examples/llama/stream.rs"]
mod stream;
#[allow(dead_code)]
#[path = "../examples/llama/weights.rs"]
mod weights;

use binary::{assert_error, llama, text};
use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device};
use chat::ChatTemplate;
use load::pre_tokenizer::PreTokenizer;
use load::{Checkpoint, LoadOptions};
use script::{
    says, strings, tokenizer_json, write_folder, write_gguf, Tokens, BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED,
};
use serde_json::json;
use stream::TextStream;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

fn open(model: &str) -> Checkpoint {
    let options = LoadOptions {
        dtype: DType::F32,
        dequantize: false,
        device: Device::Cpu,
    };
    Checkpoint::open(model, options).unwrap()
}

fn string(text: &str) -> Value {
    Value::String(text.into())
}

/// What greedy generation prints after a prompt, and how many tokens it takes at most.
fn say(model: &str, prompt: &str, more: &[&str]) -> String {
    let args = ["generate", "--model", model, "--prompt", prompt, "--dense"];
    let output = llama(&[&args[..], &["--max-tokens", "20"], more].concat());
    assert!(output.status.success(), "{model}: {}", text(&output.stderr));
    text(&output.stdout)
}

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

/// A GGUF file of bytes and these tokens, with a way to split text.
fn split_by(pre: &str, tokens: &Tokens, merges: &[&str], more: &[(&str, Value)]) -> String {
    let metadata = [
        ("tokenizer.ggml.pre", string(pre)),
        ("tokenizer.ggml.merges", strings(merges)),
    ];
    write_gguf(pre, &says(tokens.len(), &[]), tokens, &[&metadata[..], more].concat())
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
        let model = split_by(pre, &tokens, &merges, &[bos.clone()]);
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

    // A word that is a token needs no merges, in these models only; and Qwen composes characters.
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
}

/// Bytes as tokens, as vocabularies of SentencePiece have them.
fn byte_tokens() -> Vec<(String, i32)> {
    (0..=255).map(|byte| (format!("<0x{byte:02X}>"), BYTE)).collect()
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
    // Byte-level BPE has its own letters for the bytes C3, A9, E2 and 82.
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
        // The end comes in the middle of a character.
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

/// A SentencePiece vocabulary whose merges are few enough to follow by hand: `bc` first, then `ab`, `▁a`, `abc`, `▁ab`.
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
    // A text comes back as it went in.
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
            // Cut anywhere between characters: what came before is continued.
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

fn render(template: &str, prompt: &str) -> Result<String, String> {
    let mut template = ChatTemplate::new(template.into());
    template.name_token("bos_token", "<s>");
    template.name_token("unk_token", "<unk>");
    template.name_tokens("additional_special_tokens", vec!["<a>".into(), "<b>".into()]);
    template.render(prompt).map_err(|error| format!("{error:#}"))
}

#[test]
fn templates_have_what_pythons_have() {
    let year = jiff::Zoned::now().strftime("%d %b %Y").to_string();
    for (template, prompt, expected) in [
        ("{% if tools is none and documents is none %}none{% endif %}", "", "none"),
        ("{% if tools %}T{% endif %}{{ bos_token }}{{ unk_token }}{{ eos_token }}", "", "<s><unk>"),
        ("{% if pad_token is defined %}pad{% else %}no{% endif %}", "", "no"),
        ("{{ additional_special_tokens[1] }}", "", "<b>"),
        ("{{ messages[0].content.split('x')[-1] }}", "1x2x3", "3"),
        ("{{ messages[0]['content'].split('x', 1)[1] }}", "1x2x3", "2x3"),
        ("{{ messages[0].content.rsplit('x', 1)[0] }}", "1x2x3", "1x2"),
        ("{{ messages[0].content.startswith('h') }}{{ messages[-1].content.endswith('h') }}", "hi", "TrueFalse"),
        ("{{ messages[0].content.lstrip() }}|{{ messages[0].content.rstrip('!') }}", " hi!", "hi!| hi"),
        ("{{ messages[0].content.upper().replace('H', 'J').lower().title() }}", "hi", "Ji"),
        ("{{ messages[0].content.removeprefix('<').removesuffix('>') }}", "<a>", "a"),
        ("{{ messages[0].content.partition(':')[2] }}", "a:b", "b"),
        ("{{ messages[0].content.zfill(4) }}|{{ messages[0].content.center(5, '*') }}", "42", "0042|**42*"),
        ("{{ 'a-b'.find('-') }}{{ 'ab'.index('b') }}", "", "11"),
        ("{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}", "hi", "role=user;content=hi;"),
        ("{{ messages[0].get('tool_calls') is none }}", "", "True"),
        ("{{ messages | tojson }}", "\"é\" <b>", r#"[{"role": "user", "content": "\"é\" <b>"}]"#),
        ("{{ messages[0].content | tojson(ensure_ascii=True) }}", "é😀", r#""\u00e9\ud83d\ude00""#),
        ("{{ {'b': [], 'a': 1.5} | tojson(indent=2) }}", "", "{\n  \"b\": [],\n  \"a\": 1.5\n}"),
        ("{{ {'b': 1, 'a': [true, none]} | tojson(separators=(',', ':'), sort_keys=true) }}", "", r#"{"a":[true,null],"b":1}"#),
        ("{{ strftime_now('%d %b %Y') }}", "", &year),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "", "02"),
        ("a {%- generation %} {{ messages[0].content }} {% endgeneration -%} b", "hi", "a hi b"),
        ("{% generation %}x{% endgeneration %}{# {% generation %} #}{{ '{% generation %}' }}", "", "x{% generation %}"),
        ("{% raw %}{% generation %}{% endraw %}", "", "{% generation %}"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "", "1"),
        ("  {% if true %}\na\n  {% endif %}\nb\n", "", "a\nb"),
        ("{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}", "", "<|assistant|>\n"),
    ] {
        assert_eq!(render(template, prompt).as_deref(), Ok(expected), "{template}");
    }
    for (template, parts) in [
        (
            "{{ raise_exception('roles must alternate') }}",
            &["could not be rendered", "roles must alternate"][..],
        ),
        ("{% if %}", &["chat template: expected Jinja"]),
        ("{{ messages[0].content.no_such_method() }}", &["no_such_method"]),
        ("{{ strftime_now('%!') }}", &["strftime_now: expected a format"]),
        ("{{ nothing | tojson }}", &["tojson: expected a value, got undefined"]),
    ] {
        let error = render(template, "hi").unwrap_err();
        assert!(parts.iter().all(|part| error.contains(part)), "{template}: {error}");
    }
}

#[test]
fn templates_of_files_know_their_tokens() {
    let specials = ["<s>", "</s>", "<unk>", "<pad>", "<sep>", "<cls>", "<mask>", "<more>"];
    let tokens = Tokens::bytes_and(&specials.map(|name| (name, CONTROL)));
    let weights = says(tokens.len(), &[]);
    let template =
        "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token }}{{ cls_token }}{{ mask_token }}";
    let config = json!({"chat_template": format!("{template}{{{{ additional_special_tokens[0] }}}}{{{{ image_token }}}}"),
        "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "sep_token": "<sep>", "cls_token": {"content": "<cls>"}, "mask_token": "<mask>",
        "additional_special_tokens": ["<more>"], "extra_special_tokens": {"image_token": "<more>"}});
    let files = [
        ("tokenizer.json", tokenizer_json(&tokens, &[])),
        ("tokenizer_config.json", config),
    ];
    let folder = open(&write_folder("specials", &weights, &files));
    let said = |checkpoint: &Checkpoint| checkpoint.text.chat_template.as_ref().unwrap().render("x").unwrap();
    assert_eq!(said(&folder), format!("{}<more>", specials.concat()));
    let id = |name| Value::U32(tokens.id(name));
    let metadata = [
        ("tokenizer.ggml.pre", string("gpt-2")),
        ("tokenizer.ggml.merges", strings::<&str>(&[])),
        ("tokenizer.chat_template", string(template)),
        ("tokenizer.ggml.bos_token_id", id("<s>")),
        ("tokenizer.ggml.eos_token_id", id("</s>")),
        ("tokenizer.ggml.unknown_token_id", id("<unk>")),
        ("tokenizer.ggml.padding_token_id", id("<pad>")),
        ("tokenizer.ggml.seperator_token_id", id("<sep>")),
        ("tokenizer.ggml.cls_token_id", id("<cls>")),
        ("tokenizer.ggml.mask_token_id", id("<mask>")),
    ];
    let gguf = open(&write_gguf("specials", &weights, &tokens, &metadata));
    assert_eq!(said(&gguf), specials[..7].concat());
}

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

/// A template that writes BOS gets no second one from the tokenizer.
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
