//! The llama example on tiny random models with layers that slide: calibration, report, batches, and the text part of a
//! checkpoint for images.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::binary::{assert_error, llama, number, report, text};
use crate::fixture::Fixture;
use crate::kinds::{Kind, HIDDEN, LAYERS, WIDE_HEAD};
use serde_json::{json, Value};

/// Tokens that a row of a sliding layer sees.
const WINDOW: usize = 16;
const CONTEXT: usize = 64;
const SMALL: &str = "--window 8 --sinks 2";

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

fn run(args: &[&str]) -> String {
    let output = llama(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn folder(kind: Kind) -> String {
    let name = format!("sliding-{}", kind.model_type());
    let folder = Fixture::get().folder.join(name);
    kind.write_folder(&folder, &kind.config(WINDOW), &kind.weights());
    folder.to_str().unwrap().into()
}

/// A Gemma 3 of two layers that slide and one that sees all tokens.
pub fn gemma() -> &'static str {
    static FOLDER: OnceLock<String> = OnceLock::new();
    FOLDER.get_or_init(|| folder(Kind::Gemma3))
}

fn on<'a>(command: &'a str, model: &'a str, file: &'a str) -> Vec<&'a str> {
    vec![command, "--model", model, "--text", file]
}

pub fn calibrated() -> &'static (String, String) {
    static POLICY: OnceLock<(String, String)> = OnceLock::new();
    POLICY.get_or_init(|| {
        let fixture = Fixture::get();
        let (file, out) = (fixture.path("text.txt"), fixture.path("sliding-policy.json"));
        let more = format!("--context {CONTEXT} --windows 3 --repeats 2 --out {out} {SMALL}");
        let said = run(&[on("calibrate", gemma(), &file), words(&more)].concat());
        (out, said)
    })
}

/// Calibration chooses thresholds for the layers that see all tokens, and says which layers slide.
#[test]
fn calibration_leaves_sliding_layers_off() {
    let (file, said) = calibrated();
    let lines: Vec<&str> = said.lines().skip(1).collect();
    assert_eq!(lines.len(), LAYERS, "{said}");
    for (layer, line) in lines.iter().enumerate() {
        assert_eq!(
            line.contains("slides: it keeps the last 16 tokens"),
            layer < 2,
            "{line}"
        );
    }
    let policy: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let parts = &policy["policy"];
    let hidden = number(&parts["calibration"], "hidden_ratio");
    assert!((0.5..0.7).contains(&hidden), "{hidden}");
    for (layer, part) in parts["layers"].as_array().unwrap().iter().enumerate() {
        let off = part["strategies"]
            .as_array()
            .unwrap()
            .iter()
            .all(|strategy| strategy == "off");
        assert_eq!(off, layer < 2, "layer {layer}: {part}");
    }
    let mistral = folder(Kind::Mistral);
    let text = Fixture::get().path("text.txt");
    assert_error(
        &[on("calibrate", &mistral, &text), words("--context 64 --out x.json")].concat(),
        &["expected a model with layers that see all tokens", "layers all slide"],
    );
}

/// The report counts layers that slide apart, and its counts are those of caches.
#[test]
fn a_report_counts_sliding_layers_apart() {
    let fixture = Fixture::get();
    let (file, out) = (fixture.path("text.txt"), fixture.path("sliding-report"));
    let _ = fs::remove_dir_all(&out);
    let more = format!(
        "--out {out} --context {CONTEXT} --windows 2 --calibration 2 --ratios 0.5 --passkey 110 --depths 0.5 --methods \
         dense,pretrained,calibrated {SMALL}"
    );
    let said = run(&[on("report", gemma(), &file), words(&more)].concat());
    let summary: Value = serde_json::from_str(&fs::read_to_string(format!("{out}/report.json")).unwrap()).unwrap();
    let rows = summary["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    // Keys and values in f32, of the one KV head.
    let entry = (2 * WIDE_HEAD * size_of::<f32>()) as f64;
    for row in rows {
        let (whole, sliding) = (&row["apart"]["whole"], &row["apart"]["sliding"]);
        // The next row sees its own token beside them.
        assert_eq!(number(sliding, "entries_a_list"), (WINDOW - 1) as f64, "{row}");
        assert_eq!(number(sliding, "kv_bytes"), 2.0 * (WINDOW - 1) as f64 * entry, "{row}");
        assert_eq!(number(sliding, "hidden_ratio"), 0.0, "{row}");
        assert_eq!(number(sliding, "kv_bytes_of_dense"), 1.0, "{row}");
        let kept = number(whole, "entries_a_list");
        assert!((number(whole, "kv_bytes") - kept * entry).abs() < 1e-6, "{row}");
        assert!(
            (number(whole, "hidden_ratio") - (1.0 - kept / CONTEXT as f64)).abs() < 1e-9,
            "{row}"
        );
        assert!(
            (number(whole, "kv_bytes_of_dense") - kept / CONTEXT as f64).abs() < 1e-9,
            "{row}"
        );
        assert_eq!(
            number(row, "kv_bytes"),
            number(whole, "kv_bytes") + number(sliding, "kv_bytes")
        );
    }
    assert_eq!(number(&rows[0]["apart"]["whole"], "entries_a_list"), CONTEXT as f64);
    let calibrated = number(&rows[2]["apart"]["whole"], "entries_a_list");
    assert!((0.3..0.7).contains(&(calibrated / CONTEXT as f64)), "{calibrated}");
    let line = said
        .lines()
        .find(|line| line.starts_with("| calibrated-0.5 | ") && line.contains("| 15 |"));
    assert!(
        said.contains("Layers that see all tokens, then layers that slide") && line.is_some(),
        "{said}"
    );
    // Caches of as many tokens.
    let more = format!("--prompts {} --decode 4 --dense", CONTEXT - 4);
    let bench = report("sliding_bench", &[on("bench", gemma(), &file), words(&more)].concat());
    let entries = &bench["rows"][0]["entries_per_layer"];
    assert_eq!(*entries, json!([15.0, 15.0, 64.0]));
}

/// eval and generate name the hidden share of the layers that can hide; the share of all is their mean with zeros.
#[test]
fn the_hidden_share_of_whole_layers_is_named() {
    let file = Fixture::get().path("text.txt");
    let more = format!("--context 120 --windows 2 --strategy {}", calibrated().0);
    for (name, step) in [("whole", ""), ("step", " --step 7")] {
        let more = more.clone() + step;
        let eval = report(
            &format!("share_{name}"),
            &[on("eval", gemma(), &file), words(&more)].concat(),
        );
        let whole = number(&eval, "hidden_ratio_of_whole_layers");
        assert!((0.3..0.7).contains(&whole), "{name}: {whole}");
        assert!(
            (number(&eval, "hidden_ratio") - whole / LAYERS as f64).abs() < 1e-9,
            "{eval}"
        );
        let per_layer = eval["hidden_ratio_per_layer"].as_array().unwrap();
        assert_eq!(per_layer[2].as_f64().unwrap(), whole);
    }
    let model = Fixture::get().path("hf");
    let eval = report(
        "share_none",
        &[on("eval", &model, &file), words("--context 64 --windows 1")].concat(),
    );
    assert!(eval["hidden_ratio_of_whole_layers"].is_null());
}

/// Prompts of other lengths together, beyond the window, give each prompt's own text.
#[test]
fn a_batch_over_sliding_layers_is_each_prompt_alone() {
    let prompts = [
        "the whale there sea of ship 1851 Ahab sailed. them over and the sea there",
        "the",
        "of ship",
    ];
    let file = Fixture::get().path("sliding.prompts.txt");
    fs::write(&file, prompts.join("\n")).unwrap();
    let policy = format!("--strategy {}", calibrated().0);
    for (name, flags) in [
        ("dense", "--dense"),
        ("packed", "--dense --decode-weights packed"),
        ("policy", &policy),
    ] {
        let common = [
            &["generate", "--model", gemma(), "--max-tokens", "40"][..],
            &words(flags),
        ]
        .concat();
        let together = report(&format!("sliding_{name}"), &[&common[..], &["--batch", &file]].concat());
        for (index, prompt) in prompts.iter().enumerate() {
            let alone = report(
                &format!("sliding_{name}_{index}"),
                &[&common[..], &["--prompt", prompt]].concat(),
            );
            assert_eq!(together["texts"][index]["text"], alone["text"], "{flags}: {prompt}");
            let kept = &alone["stats"]["sliding"]["most_entries"];
            assert!(kept.as_u64().unwrap() < WINDOW as u64, "{alone}");
        }
    }
}

/// A checkpoint for text and images: its settings under text_config, its tensors under another name, and a part for
/// images.
fn with_images(name: &str, prefix: fn(&str) -> String, change: impl Fn(&mut Value)) -> PathBuf {
    let kind = Kind::Gemma3;
    let mut weights: std::collections::HashMap<_, _> = kind
        .weights()
        .into_iter()
        .map(|(name, tensor)| (prefix(&name), tensor))
        .collect();
    let images = prefix("model.norm.weight").replace("language_model.model.norm", "vision_tower.norm");
    let images = images.replace("language_model.norm", "vision_tower.norm");
    weights.insert(images, kind.weights()["model.norm.weight"].clone());
    let mut config = json!({
        "model_type": "gemma3", "text_config": kind.config(WINDOW), "vision_config": {"hidden_size": 8},
        "mm_tokens_per_image": 256, "image_token_index": 3, "torch_dtype": "bfloat16", "eos_token_id": [1, 106]
    });
    change(&mut config);
    let folder = Fixture::get().folder.join(name);
    kind.write_folder(&folder, &config, &weights);
    folder
}

#[test]
fn the_text_part_of_a_checkpoint_for_images_is_the_model() {
    let file = Fixture::get().path("text.txt");
    let nll = |name: &str, model: &Path| {
        let model = model.to_str().unwrap();
        let eval = report(
            name,
            &[on("eval", model, &file), words("--context 64 --windows 2 --dense")].concat(),
        );
        number(&eval, "nll")
    };
    let plain = nll("images_none", Path::new(gemma()));
    let older: fn(&str) -> String = |name| format!("language_model.{name}");
    let newer: fn(&str) -> String = |name| name.replace("model.", "model.language_model.");
    for (name, prefix) in [("older", older), ("newer", newer)] {
        assert_eq!(
            nll(&format!("images_{name}"), &with_images(name, prefix, |_| ())),
            plain,
            "{name}"
        );
    }
    let refused = |name: &str, change: &dyn Fn(&mut Value), parts: &[&str]| {
        let model = with_images(name, older, change);
        assert_error(&on("eval", model.to_str().unwrap(), &file), parts);
    };
    refused(
        "images_key",
        &|config| config["layer_scale"] = 2.into(),
        &["layer_scale", "not read"],
    );
    refused(
        "images_text",
        &|config| drop(config["text_config"].take()),
        &["text_config: expected the settings"],
    );
    // The original files name few keys: the others have transformers' defaults.
    let few = |config: &mut Value| {
        config["text_config"] = json!({"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS,
            "model_type": "gemma3_text", "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}});
    };
    refused(
        "images_few",
        &few,
        &["embed_tokens.weight: expected shape [262208, 64]"],
    );
}
