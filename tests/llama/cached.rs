//! The llama example's KV cache and its bench, on a tiny random checkpoint.

use std::fs;

use crate::binary::{assert_error, llama, number, report, text};
use crate::fixture::{Fixture, CONTEXT, LAYERS};
use serde_json::Value;

/// Settings under which the tiny checkpoint merges.
const MERGING: &str = "--similarity-threshold 0.9 --window 8";
const PROMPT: &str = "the whale there sea of ship 1851 Ahab sailed. them over and the sea there";

fn split(flags: &str) -> Vec<&str> {
    flags.split_whitespace().collect()
}

/// Greedy text of at most 40 tokens, with `--stats`.
fn generate(name: &str, flags: &str) -> (String, Value) {
    let fixture = Fixture::get();
    let (model, stats) = (fixture.path("hf"), fixture.path(&format!("{name}.stats.json")));
    // Steps as prompts, so that recomputing is the same.
    let args = [
        "generate",
        "--model",
        &model,
        "--prompt",
        PROMPT,
        "--max-tokens",
        "40",
        "--decode-weights",
        "f32",
    ];
    let report = report(name, &[&args[..], &split(flags), &["--stats", &stats]].concat());
    let stats: Value = serde_json::from_str(&fs::read_to_string(stats).unwrap()).unwrap();
    assert_eq!(report["stats"], stats);
    (report["text"].as_str().unwrap().to_string(), stats)
}

#[test]
fn cached_text_is_the_recomputed_text_whatever_the_chunks() {
    for (name, flags) in [
        ("dense", "--dense"),
        ("merging", MERGING),
        ("queries", "--preset paper --difference-threshold 0.5"),
    ] {
        let (expected, stats) = generate(&format!("{name}_again"), &format!("{flags} --no-cache"));
        assert!(expected.len() > 20, "{expected}");
        assert!(stats["kv_bytes"].is_null(), "{stats}");
        for chunk in [1, 7, 16, 512] {
            let (text, stats) = generate(&format!("{name}_{chunk}"), &format!("{flags} --prefill-chunk {chunk}"));
            assert_eq!(text, expected, "{flags} in chunks of {chunk}");
            // The last token is written, but not read.
            let tokens = number(&stats, "prompt_tokens") + number(&stats, "generated_tokens");
            assert_eq!(number(&stats, "kv_tokens"), tokens - 1.0);
        }
    }
}

#[test]
fn stats_say_what_was_kept() {
    let (_, dense) = generate("stats_dense", "--dense");
    let (_, merging) = generate("stats_merging", MERGING);
    for key in [
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "kv_bytes",
        "kv_bytes_dense",
        "prompt_tokens",
        "generated_tokens",
    ] {
        assert!(number(&merging, key) > 0.0, "{key}");
    }
    if cfg!(target_os = "linux") {
        assert!(number(&merging, "peak_rss_bytes") > 1e6);
    }
    let entries = |stats: &Value| -> Vec<f64> { serde_json::from_value(stats["entries_per_layer"].clone()).unwrap() };
    let tokens = number(&dense, "kv_tokens");
    assert_eq!(entries(&dense), [tokens; LAYERS]);
    assert_eq!(number(&dense, "hidden_ratio"), 0.0);
    assert!(entries(&merging)
        .iter()
        .all(|kept| *kept < number(&merging, "kv_tokens")));
    let kept = entries(&merging).iter().sum::<f64>() / LAYERS as f64 / number(&merging, "kv_tokens");
    assert!((number(&merging, "hidden_ratio") - (1.0 - kept)).abs() < 1e-9);
    assert!(number(&merging, "kv_bytes") < number(&dense, "kv_bytes"));
}

#[test]
fn half_precision_halves_the_cache() {
    let (_, full) = generate("kv_full", "--dense");
    let dense_bytes = |stats: &Value| number(stats, "kv_bytes_dense") / number(stats, "kv_tokens");
    for dtype in ["f16", "bf16"] {
        let (_, half) = generate(&format!("kv_{dtype}"), &format!("--dense --kv-dtype {dtype}"));
        assert_eq!(dense_bytes(&half) * 2.0, dense_bytes(&full));
        assert!(number(&half, "kv_bytes") < 0.7 * number(&full, "kv_bytes"));
    }
    // Activations in f16, keys and values in f32.
    let (_, wide) = generate("kv_wide", "--dense --dtype f16 --kv-dtype f32");
    assert_eq!(dense_bytes(&wide), dense_bytes(&full));
}

#[test]
fn the_reference_rule_runs_without_a_cache_and_says_so() {
    let model = Fixture::get().path("hf");
    let args = [
        "generate",
        "--model",
        &model,
        "--prompt",
        "the",
        "--preset",
        "reference",
    ];
    let output = llama(&[&args[..], &["--max-tokens", "3"]].concat());
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("note: the rule reference keeps no cache"), "{stderr}");
    assert!(!stderr.contains("KV cache "), "{stderr}");
    assert_error(
        &[&args[..], &["--kv-dtype", "f16"]].concat(),
        &["kv-dtype: expected a rule that can keep a cache", "use --rule causal"],
    );
}

#[test]
fn bad_cache_settings_end_in_one_line() {
    let fixture = Fixture::get();
    let (model, prose) = (fixture.path("hf"), fixture.path("text.txt"));
    let generate = ["generate", "--model", &model, "--prompt", "the"];
    let bench = ["bench", "--model", &model, "--text", &prose];
    for (command, more, parts) in [
        (
            &generate,
            "--prefill-chunk 0",
            ["prefill-chunk: expected at least 1", "got 0"],
        ),
        (
            &generate,
            "--stats no/such/x.json",
            ["stats: expected a file in an", "create the folder"],
        ),
        (
            &bench,
            "--prefill-chunk 0",
            ["prefill-chunk: expected at least 1", "got 0"],
        ),
        (
            &bench,
            "--svg no/such/x.svg",
            ["svg: expected a file in an", "create the folder"],
        ),
        (
            &bench,
            "--prompts 0",
            ["prompts and decode: expected at least 1", "got 0"],
        ),
        (
            &bench,
            "--decode 0",
            ["prompts and decode: expected at least 1", "got 0"],
        ),
        (
            &bench,
            "--decode 128",
            ["decode: expected fewer tokens than", "128, got 128"],
        ),
        (
            &bench,
            "--preset reference",
            ["rule: expected causal for bench", "use --rule causal"],
        ),
    ] {
        assert_error(&[&command[..], &split(more)].concat(), &parts);
    }
    let short = fixture.path("short.txt");
    assert_error(
        &["bench", "--model", &model, "--text", &short, "--prompts", "64"],
        &["text: expected at least 96 tokens", "got 5"],
    );
    let missing = fixture.path("missing.txt");
    assert_error(
        &["bench", "--model", &model, "--text", &missing],
        &["missing.txt: give one with --text"],
    );
    let both = [&generate[..], &["--no-cache", "--kv-dtype", "f16"]].concat();
    assert_eq!(llama(&both).status.code(), Some(2));
}

#[test]
fn bench_measures_dense_and_compressed() {
    let fixture = Fixture::get();
    let [model, prose, svg] = ["hf", "text.txt", "bench.svg"].map(|name| fixture.path(name));
    let more = "--prompts 32,64,500 --decode 8 --prefill-chunk 10";
    let args = ["bench", "--model", &model, "--text", &prose, "--svg", &svg];
    let report = report("bench", &[&args[..], &split(more), &split(MERGING)].concat());
    let rows = report["rows"].as_array().unwrap();
    let longest = CONTEXT - 8;
    for (row, (prompt, strategy)) in rows.iter().zip(
        [32, 64, longest]
            .into_iter()
            .flat_map(|prompt| [(prompt, "off"), (prompt, "similarity")]),
    ) {
        assert_eq!(
            (&row["strategy"], number(row, "prompt_tokens")),
            (&strategy.into(), prompt as f64)
        );
        assert_eq!(number(row, "kv_tokens"), prompt as f64 + 8.0);
        assert_eq!(row["curve"].as_array().unwrap().len(), 1 + prompt.div_ceil(10));
        assert_eq!(number(row, "hidden_ratio") > 0.0, strategy != "off");
        assert!(number(row, "decode_tokens_per_second") > 0.0);
    }
    assert_eq!(rows.len(), 6);
    let picture = fs::read_to_string(svg).unwrap();
    for part in [
        "<svg",
        "KV cache of hf reading text",
        "dense: ",
        "compressed: ",
        "</svg>",
    ] {
        assert!(picture.contains(part), "{part}");
    }
}

#[test]
fn bench_prints_a_table_and_how_a_long_prompt_is_cut() {
    let fixture = Fixture::get();
    let (model, prose) = (fixture.path("hf"), fixture.path("text.txt"));
    let more = "--prompts 120,128 --decode 16 --dense";
    let output = llama(&[&["bench", "--model", &model, "--text", &prose][..], &split(more)].concat());
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{stderr}");
    assert!(
        stderr.contains("note: a prompt of 128 tokens and 16 more exceed the model's context of 128: 112 are used"),
        "{stderr}"
    );
    // Both prompts were cut to the same length, and --dense leaves nothing to compare with.
    let rows: Vec<_> = stdout.lines().filter(|line| line.contains("   112  dense ")).collect();
    assert_eq!(rows.len(), 1, "{stdout}");
    assert!(!stdout.contains("compressed"), "{stdout}");
}
