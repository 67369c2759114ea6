//! Chat templates.

use candle_core::quantized::gguf_file::Value;
use serde_json::json;

use super::{open, string};
use crate::chat::ChatTemplate;
use crate::load::Checkpoint;
use crate::script::{says, strings, tokenizer_json, write_folder, write_gguf, Tokens, CONTROL};

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
        (
            "{% if tools is none and documents is none %}none{% endif %}",
            "",
            "none",
        ),
        (
            "{% if tools %}T{% endif %}{{ bos_token }}{{ unk_token }}{{ eos_token }}",
            "",
            "<s><unk>",
        ),
        ("{% if pad_token is defined %}pad{% else %}no{% endif %}", "", "no"),
        ("{{ additional_special_tokens[1] }}", "", "<b>"),
        ("{{ messages[0].content.split('x')[-1] }}", "1x2x3", "3"),
        ("{{ messages[0]['content'].split('x', 1)[1] }}", "1x2x3", "2x3"),
        ("{{ messages[0].content.rsplit('x', 1)[0] }}", "1x2x3", "1x2"),
        (
            "{{ messages[0].content.startswith('h') }}{{ messages[-1].content.endswith('h') }}",
            "hi",
            "TrueFalse",
        ),
        (
            "{{ messages[0].content.lstrip() }}|{{ messages[0].content.rstrip('!') }}",
            " hi!",
            "hi!| hi",
        ),
        (
            "{{ messages[0].content.upper().replace('H', 'J').lower().title() }}",
            "hi",
            "Ji",
        ),
        (
            "{{ messages[0].content.removeprefix('<').removesuffix('>') }}",
            "<a>",
            "a",
        ),
        ("{{ messages[0].content.partition(':')[2] }}", "a:b", "b"),
        (
            "{{ messages[0].content.zfill(4) }}|{{ messages[0].content.center(5, '*') }}",
            "42",
            "0042|**42*",
        ),
        ("{{ 'a-b'.find('-') }}{{ 'ab'.index('b') }}", "", "11"),
        (
            "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
            "hi",
            "role=user;content=hi;",
        ),
        ("{{ messages[0].get('tool_calls') is none }}", "", "True"),
        (
            r#"{{ messages }}{{ [1.0, true, none, "it's", '"\''] }}"#,
            "a\tb",
            r#"[{'role': 'user', 'content': 'a\tb'}][1.0, True, None, "it's", '"\'']"#,
        ),
        (
            "{{ messages | tojson }}",
            "\"é\" <b>",
            r#"[{"role": "user", "content": "\"é\" <b>"}]"#,
        ),
        (
            "{{ messages[0].content | tojson(ensure_ascii=True) }}",
            "é😀",
            r#""\u00e9\ud83d\ude00""#,
        ),
        (
            "{{ {'b': [], 'a': 1.5} | tojson(indent=2) }}",
            "",
            "{\n  \"b\": [],\n  \"a\": 1.5\n}",
        ),
        (
            "{{ {'b': 1, 'a': [true, none]} | tojson(separators=(',', ':'), sort_keys=true) }}",
            "",
            r#"{"a":[true,null],"b":1}"#,
        ),
        ("{{ strftime_now('%d %b %Y') }}", "", &year),
        (
            "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "",
            "012",
        ),
        (
            "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "",
            "02",
        ),
        (
            "a {%- generation %} {{ messages[0].content }} {% endgeneration -%} b",
            "hi",
            "a hi b",
        ),
        (
            "{% generation %}x{% endgeneration %}{# {% generation %} #}{{ '{% generation %}' }}",
            "",
            "x{% generation %}",
        ),
        ("{% raw %}{% generation %}{% endraw %}", "", "{% generation %}"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 1 %}{% endfor %}{{ ns.n }}",
            "",
            "1",
        ),
        ("  {% if true %}\na\n  {% endif %}\nb\n", "", "a\nb"),
        (
            "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
            "",
            "<|assistant|>\n",
        ),
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
        (
            "{{ 'a'.ljust(9999999999) }}",
            &["ljust: expected a width of at most 4096, got 9999999999"],
        ),
        (
            "{{ [1] | tojson(indent=9999999999) }}",
            &["tojson: expected a width of at most 4096"],
        ),
        ("{{ 'a' * 99999999999 }}", &["could not be rendered"]),
        ("{{ range(99999999999) | list }}", &["could not be rendered"]),
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
    let more = "{{ additional_special_tokens[0] }}{{ image_token }}";
    let config = json!({"chat_template": format!("{template}{more}"),
        "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<pad>", "sep_token": "<sep>", "cls_token": {"content": "<cls>"}, "mask_token": "<mask>",
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
