//! The llama example's calibration, policies and report on a tiny random checkpoint.

use std::fs;
use std::sync::OnceLock;

use crate::binary::{assert_error, llama, number, report, text};
use crate::fixture::{Fixture, KV_HEADS, LAYERS};
use serde_json::Value;

const SMALL: &str = "--window 8 --sinks 2";

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

fn run(args: &[&str]) -> String {
    let output = llama(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// A command on the fixture's model and text.
fn on<'a>(command: &'a str, model: &'a str, file: &'a str) -> Vec<&'a str> {
    vec![command, "--model", model, "--text", file]
}

/// A policy that hides half, made once.
pub fn policy() -> &'static str {
    static POLICY: OnceLock<String> = OnceLock::new();
    POLICY.get_or_init(|| {
        let fixture = Fixture::get();
        let (model, file, out) = (
            fixture.path("hf"),
            fixture.path("text.txt"),
            fixture.path("policy.json"),
        );
        let more = format!("--context 64 --windows 3 --repeats 2 --out {out} {SMALL}");
        let said = run(&[on("calibrate", &model, &file), words(&more)].concat());
        assert!(said.contains("hidden") && said.lines().count() == 1 + LAYERS, "{said}");
        out
    })
}

fn read(file: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

#[test]
fn a_policy_says_where_it_came_from() {
    let policy = read(policy());
    let parts = &policy["policy"];
    assert_eq!(parts["model"]["layers"], LAYERS);
    assert_eq!(parts["config"]["criterion"], "observed_mass");
    assert_eq!(parts["config"]["window"], 8);
    assert_eq!(parts["calibration"]["windows"], 5);
    let hidden = number(&parts["calibration"], "hidden_ratio");
    assert!((0.5..0.62).contains(&hidden), "{hidden}");
    assert_eq!(parts["layers"][0]["thresholds"].as_array().unwrap().len(), KV_HEADS);
}

/// Calibration gives the same policy every time, and several targets give several files.
#[test]
fn calibration_repeats_itself() {
    let fixture = Fixture::get();
    let (model, file) = (fixture.path("hf"), fixture.path("text.txt"));
    let out = fixture.path("again-{}.json");
    let more = format!("--context 64 --windows 3 --repeats 2 --target 0.25,0.5 --out {out} {SMALL}");
    run(&[on("calibrate", &model, &file), words(&more)].concat());
    assert_eq!(read(&fixture.path("again-0.5.json")), read(policy()));
    let quarter = number(
        &read(&fixture.path("again-0.25.json"))["policy"]["calibration"],
        "hidden_ratio",
    );
    assert!((0.25..0.4).contains(&quarter), "{quarter}");
}

/// eval, generate and bench accept a policy and hide about the share it names; other storage of the same weights is the
/// same model.
#[test]
fn every_command_takes_a_policy() {
    let fixture = Fixture::get();
    let file = fixture.path("text.txt");
    for name in ["hf", "q8.gguf"] {
        let model = fixture.path(name);
        let more = format!("--context 120 --windows 4 --strategy {}", policy());
        let eval = report(
            &format!("policy_{name}"),
            &[on("eval", &model, &file), words(&more)].concat(),
        );
        let hidden = number(&eval, "hidden_ratio");
        assert!((0.3..0.7).contains(&hidden), "{name}: {hidden}");
        assert_eq!(eval["config"]["criterion"], "observed_mass");
        let output = llama(&[on("eval", &model, &file), words(&more)].concat());
        assert!(!text(&output.stderr).contains("note:"), "{}", text(&output.stderr));
    }
    let model = fixture.path("hf");
    let more = format!("--prompt whale --max-tokens 60 --strategy {}", policy());
    let generated = report(
        "policy_generate",
        &[&["generate", "--model", &model], &words(&more)[..]].concat(),
    );
    assert!(number(&generated, "tokens") > 0.0);
    let more = format!("--prompts 100 --decode 4 --strategy {}", policy());
    let bench = report("policy_bench", &[on("bench", &model, &file), words(&more)].concat());
    assert!(number(&bench["rows"][1], "hidden_ratio") > 0.2);
}

/// A report under a probe decides as the model itself does.
#[cfg(feature = "fit")]
#[test]
fn a_report_scores_a_probe() {
    let fixture = Fixture::get();
    let (model, file, out) = (
        fixture.path("hf"),
        fixture.path("text.txt"),
        fixture.path("probe-report"),
    );
    let _ = fs::remove_dir_all(&out);
    let windows = "--context 64 --windows 2";
    let more = format!(
        "--out {out} {windows} --calibration 2 --ratios 0.5 --methods calibrated,random --passkey 110 --depths 0.5 \
         --criterion probe {SMALL}"
    );
    run(&[on("report", &model, &file), words(&more)].concat());
    let summary = read(&format!("{out}/report.json"));
    let [dense, calibrated, random] = [0, 1, 2].map(|row| &summary["rows"][row]);
    let more = format!("{windows} --spread --strategy {out}/policy-0.5.json");
    let eval = report("probe_spread", &[on("eval", &model, &file), words(&more)].concat());
    let perplexity = number(calibrated, "perplexity");
    assert!(
        (perplexity - number(&eval, "perplexity")).abs() < 1e-6 * perplexity,
        "{calibrated}, {eval}"
    );
    assert_ne!(perplexity, number(dense, "perplexity"));
    let [kept, control] = [calibrated, random].map(|row| number(row, "kv_bytes_of_dense"));
    assert!(kept < 0.8 && (kept - control).abs() < 0.06, "{kept}, {control}");
}

/// A probe is fitted, kept in the policy, and read by every command; without the feature the command says how to get
/// it.
#[test]
fn a_probe_makes_a_policy() {
    let fixture = Fixture::get();
    let (model, file, out) = (fixture.path("hf"), fixture.path("text.txt"), fixture.path("probe.json"));
    let more = format!("--context 64 --windows 3 --repeats 2 --criterion probe --out {out} {SMALL}");
    let args = [on("calibrate", &model, &file), words(&more)].concat();
    if cfg!(not(feature = "fit")) {
        return assert_error(
            &args,
            &["criterion probe: expected a build that fits probes", "--features fit"],
        );
    }
    let said = run(&args);
    assert!(said.contains("of the variance of ln(harm)"), "{said}");
    let parts = &read(&out)["policy"];
    assert_eq!(parts["config"]["criterion"], "given");
    assert_eq!(parts["probe"].as_array().unwrap().len(), LAYERS);
    assert_eq!(parts["probe"][1]["weights"].as_array().unwrap().len(), KV_HEADS);
    let hidden = number(&parts["calibration"], "hidden_ratio");
    assert!((0.5..0.62).contains(&hidden), "{hidden}");

    let more = format!("--context 120 --windows 4 --strategy {out}");
    let eval = report("probe_eval", &[on("eval", &model, &file), words(&more)].concat());
    let hidden = number(&eval, "hidden_ratio");
    assert!((0.3..0.7).contains(&hidden), "{hidden}");
    let more = format!("--prompts 100 --decode 4 --strategy {out}");
    let bench = report("probe_bench", &[on("bench", &model, &file), words(&more)].concat());
    assert!(number(&bench["rows"][1], "hidden_ratio") > 0.2);
    let given = llama(&[on("eval", &model, &file), words("--criterion given")].concat());
    let error = text(&given.stderr);
    assert!(
        !given.status.success() && error.contains("observed-mass or probe, got given"),
        "{error}"
    );
}

#[test]
fn a_policy_for_another_model_is_refused() {
    let fixture = Fixture::get();
    let (model, file) = (fixture.path("three_layers"), fixture.path("text.txt"));
    let more = format!("--context 64 --strategy {}", policy());
    assert_error(
        &[on("eval", &model, &file), words(&more)].concat(),
        &[
            "policy: expected a model of",
            "layers: 3",
            "got a policy for",
            "calibrate this model",
        ],
    );
    // The parameters come from the policy.
    let model = fixture.path("hf");
    for flags in ["--window 16", "--preset paper"] {
        let more = format!("--context 64 --strategy {} {flags}", policy());
        assert_error(
            &[on("eval", &model, &file), words(&more)].concat(),
            &[
                "expected no preset and no parameters beside a policy",
                "calibrate with them",
            ],
        );
    }
    assert_error(
        &[on("eval", &model, &file), words("--context 64 --preset calibrated")].concat(),
        &["thresholds: expected one per head", "calibrate them"],
    );
    assert_error(
        &[on("calibrate", &model, &file), words("--target 0.5,0.6 --out x.json")].concat(),
        &["out: expected {} in the name"],
    );
    let short = fixture.path("short.txt");
    assert_error(
        &[on("calibrate", &model, &short), words("--context 64 --out x.json")].concat(),
        &["windows: expected", "give a longer text"],
    );
}

/// Only the second half of a repeated passage is scored.
#[test]
fn eval_scores_copying() {
    let fixture = Fixture::get();
    let (model, file) = (fixture.path("hf"), fixture.path("text.txt"));
    let more = words("--context 64 --windows 2 --dense --copy");
    let copy = report("copy", &[on("eval", &model, &file), more].concat());
    assert_eq!(number(&copy, "tokens"), 64.0);
}

/// All methods and controls, twice: the second run measures nothing and writes the same files.
#[test]
fn a_report_is_whole_and_goes_on() {
    let fixture = Fixture::get();
    let (model, file, out) = (fixture.path("hf"), fixture.path("text.txt"), fixture.path("report"));
    let _ = fs::remove_dir_all(&out);
    let more =
        format!("--out {out} --context 64 --windows 2 --calibration 2 --ratios 0.5 --passkey 110 --depths 0.5 {SMALL}");
    let args = [on("report", &model, &file), words(&more)].concat();
    let said = run(&args);
    let ledger = fs::read_to_string(format!("{out}/progress.jsonl")).unwrap();
    let summary = read(&format!("{out}/report.json"));
    let rows = summary["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["method"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "dense",
            "paper",
            "pretrained",
            "calibrated-0.5",
            "random-0.5",
            "streaming-0.5"
        ]
    );
    for row in rows {
        assert!(number(row, "perplexity") > 1.0 && number(row, "copy") > 1.0, "{row}");
        assert_eq!(row["passkey"][0]["tries"], 1);
        assert!(number(&row["passkey"][0], "nll") > 0.0, "{row}");
    }
    assert_eq!(number(&rows[0], "nll_over_dense"), 0.0);
    // The controls keep as much.
    let kept: Vec<f64> = rows[3..].iter().map(|row| number(row, "kv_bytes_of_dense")).collect();
    assert!(
        (kept[0] - kept[1]).abs() < 0.06 && (kept[0] - kept[2]).abs() < 0.06,
        "{kept:?}"
    );
    for name in [
        "report.md",
        "perplexity.svg",
        "copy.svg",
        "heads-0.5.svg",
        "policy-0.5.json",
    ] {
        assert!(fs::metadata(format!("{out}/{name}")).unwrap().len() > 100, "{name}");
    }
    // Cut off in the middle of a line.
    fs::write(format!("{out}/progress.jsonl"), &ledger[..ledger.len() * 2 / 3]).unwrap();
    run(&args);
    let strip = |text: &str| {
        text.lines()
            .map(|line| line.rsplit_once(" | ").map_or(line, |parts| parts.1).to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(strip(&run(&args)), strip(&said));
    let again = read(&format!("{out}/report.json"));
    for (row, before) in again["rows"].as_array().unwrap().iter().zip(rows) {
        assert_eq!(row["perplexity"], before["perplexity"]);
        assert_eq!(row["copy"], before["copy"]);
    }
    let other = more.replace("--windows 2", "--windows 3");
    assert_error(
        &[on("report", &model, &file), words(&other)].concat(),
        &["expected a report of the same settings", "choose another --out"],
    );
}
