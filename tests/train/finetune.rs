//! `train --finetune` starts from any checkpoint that the llama example reads, at that model's own perplexity, and
//! exports how its texts end. Sizes that a file names are checked against its contents.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use crate::fixture::{gguf_metadata, gguf_tensors, save_gguf, Fixture, HEAD_DIM};
use candle_core::quantized::gguf_file::Value as Gguf;
use candle_core::quantized::GgmlDType;
use candle_core::{safetensors, DType, Device, Tensor};
use serde_json::{json, Value};

const CONTEXT: &str = "32";

fn example(name: &str, args: &[&str]) -> Output {
    let mut command = Command::new(crate::example::path(name));
    command.args(args).env("RUST_BACKTRACE", "1").output().unwrap()
}

fn succeed(name: &str, args: &[&str]) -> Output {
    let output = example(name, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {args:?}: {stderr}");
    output
}

/// Exit code 1 and one line on stderr that starts with `error: ` and has every part.
fn fail(args: &[&str], parts: &[&str]) {
    let output = example("train", args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    assert!(
        stderr.starts_with("error: ") && stderr.trim_end().lines().count() == 1,
        "{args:?}: {stderr}"
    );
    for part in parts {
        assert!(stderr.contains(part), "{args:?}: {part:?} is not in {stderr}");
    }
}

/// The path of a text. The tests run side by side and read one file: the first caller writes it.
fn text() -> String {
    static PATH: OnceLock<String> = OnceLock::new();
    let write = || {
        let path = Fixture::get().path("long.txt");
        let words = fs::read_to_string(Fixture::get().path("text.txt")).unwrap();
        fs::write(&path, words.repeat(4)).unwrap();
        path
    };
    PATH.get_or_init(write).clone()
}

/// An empty folder's path.
fn out(name: &str) -> String {
    let path = Fixture::get().path(name);
    let _ = fs::remove_dir_all(&path);
    path
}

fn args<'a>(text: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let common = [
        "--text",
        text,
        "--out",
        out,
        "--context",
        CONTEXT,
        "--batch",
        "2",
        "--export-dtype",
        "f32",
        "--dense",
    ];
    [&common[..], more].concat()
}

fn json(path: impl AsRef<Path>) -> Value {
    let path = path.as_ref();
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// The held-out perplexity in the first row of log.csv, before any step.
fn first_perplexity(out: &str) -> f64 {
    let log = fs::read_to_string(format!("{out}/log.csv")).unwrap();
    let mut lines = log.lines();
    let titles = lines.next().unwrap().split(',');
    let column = titles
        .into_iter()
        .position(|title| title == "held_out_perplexity")
        .unwrap();
    lines.next().unwrap().split(',').nth(column).unwrap().parse().unwrap()
}

/// The perplexity of `llama eval` on the held-out text.
fn perplexity(model: &str, out: &str) -> f64 {
    let (text, file) = (format!("{out}/held_out.txt"), format!("{out}/eval.json"));
    let args = [
        "eval",
        "--model",
        model,
        "--text",
        &text,
        "--context",
        CONTEXT,
        "--dense",
        "--json",
        &file,
    ];
    let more: &[&str] = if model.ends_with(".gguf") {
        &["--dequantize"]
    } else {
        &[]
    };
    succeed("llama", &[&args[..], more].concat());
    json(file)["perplexity"].as_f64().unwrap()
}

/// Fine-tunes from `model` and compares the perplexities before the first and after the last step with `llama eval`.
/// Returns the export.
fn finetune(model: &str, name: &str) -> String {
    finetune_within(model, name, 1.0)
}

/// As [`finetune`], with new ids that raise the first perplexity by at most `most`.
fn finetune_within(model: &str, name: &str, most: f64) -> String {
    let (text, out) = (text(), out(name));
    succeed(
        "train",
        &args(&text, &out, &["--steps", "3", "--lr", "1e-3", "--finetune", model]),
    );
    let close = |got: f64, expected: f64| {
        assert!(
            (got - expected).abs() <= 1e-4 * expected,
            "{model}: {got} instead of {expected}"
        );
    };
    let (first, expected) = (first_perplexity(&out), perplexity(model, &out));
    assert!(
        (1.0 - 1e-4..=most + 1e-4).contains(&(first / expected)),
        "{model}: {first} instead of {expected}"
    );
    let exported = format!("{out}/model");
    let summary = json(format!("{out}/summary.json"));
    let last = summary["held_out"]["perplexity"].as_f64().unwrap();
    close(last, perplexity(&exported, &out));
    assert!(
        (last - first_perplexity(&out)).abs() > 1e-3,
        "{model}: no step changed anything"
    );
    exported
}

/// The fixture with biases, a scaled rotation and FP8 weights, as a folder.
fn unusual() -> String {
    let folder = PathBuf::from(Fixture::get().path("unusual"));
    fs::create_dir_all(&folder).unwrap();
    let mut weights = crate::fixture::weights();
    for layer in 0..2 {
        for (index, part) in ["q_proj", "k_proj", "v_proj", "o_proj"].into_iter().enumerate() {
            let path = format!("model.layers.{layer}.self_attn.{part}");
            let rows = weights[&format!("{path}.weight")].dim(0).unwrap();
            let bias: Vec<f32> = (0..rows).map(|row| ((row + index) as f32).sin() / 2.0).collect();
            weights.insert(format!("{path}.bias"), Tensor::new(bias, &Device::Cpu).unwrap());
        }
    }
    let name = "model.layers.1.mlp.up_proj.weight";
    weights.insert(name.into(), weights[name].to_dtype(DType::F8E4M3).unwrap());
    weights.insert(format!("{name}_scale"), Tensor::new(&[1.5f32], &Device::Cpu).unwrap());
    safetensors::save(&weights, folder.join("model.safetensors")).unwrap();
    let mut config = crate::fixture::config();
    config["attention_bias"] = true.into();
    config["rope_scaling"] = json!({"type": "linear", "factor": 2.0});
    config["eos_token_id"] = json!([7, 260]);
    config["quantization_config"] = json!({"quant_method": "compressed-tensors", "format": "float-quantized"});
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(Fixture::get().folder.join("hf").join(file), folder.join(file)).unwrap();
    }
    fs::write(folder.join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    fs::write(folder.join("generation_config.json"), r#"{"eos_token_id": [7, 9]}"#).unwrap();
    folder.to_str().unwrap().into()
}

#[test]
fn a_folder_keeps_its_biases_scaling_ends_and_templates() {
    let model = unusual();
    let exported = finetune(&model, "from_unusual");
    for file in ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
        let read = |folder: &str| fs::read(format!("{folder}/{file}")).unwrap();
        assert!(read(&model) == read(&exported), "{file}");
    }
    let config = json(format!("{exported}/config.json"));
    assert_eq!(config["attention_bias"], true);
    assert_eq!(config["tie_word_embeddings"], false);
    assert_eq!(config["rope_scaling"], json!({"rope_type": "linear", "factor": 2.0}));
    let ends: Vec<u64> = serde_json::from_value(config["eos_token_id"].clone()).unwrap();
    for end in [7, 9, 260] {
        assert!(ends.contains(&end), "{end} is not in {ends:?}");
    }
}

/// The held-out windows begin with BOS here and in `llama eval` alike, before training and after it.
#[test]
fn a_folder_that_adds_bos_is_trained_with_it() {
    let (plain, model) = (Fixture::get().path("hf"), Fixture::get().path("with_bos"));
    fs::create_dir_all(&model).unwrap();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        fs::copy(format!("{plain}/{file}"), format!("{model}/{file}")).unwrap();
    }
    let mut config = json(format!("{plain}/tokenizer_config.json"));
    config["add_bos_token"] = true.into();
    fs::write(format!("{model}/tokenizer_config.json"), config.to_string()).unwrap();
    finetune(&model, "from_bos");
    let with = first_perplexity(&Fixture::get().path("from_bos"));
    finetune(&plain, "from_no_bos");
    let without = first_perplexity(&Fixture::get().path("from_no_bos"));
    assert!((with - without).abs() > 1e-3 * without, "{with}, {without}");
}

#[test]
fn shards_and_llama3_scaling_are_read() {
    let fixture = Fixture::get();
    finetune(&fixture.path("sharded"), "from_shards");
    let exported = finetune(&fixture.path("llama3"), "from_llama3");
    let scaling = &json(format!("{exported}/config.json"))["rope_scaling"];
    let expected = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    assert_eq!(*scaling, expected);
}

/// A GGUF file with its order of rows, quantized weights, single biases and Llama 3's factors becomes an equivalent
/// folder.
#[test]
fn a_gguf_file_becomes_a_folder_with_its_template() {
    let fixture = Fixture::get();
    let model = fixture.path("biased.gguf");
    let mut weights = crate::fixture::weights();
    let bias: Vec<f32> = (0..2 * HEAD_DIM).map(|row| (row as f32).cos()).collect();
    weights.insert(
        "model.layers.1.self_attn.k_proj.bias".into(),
        Tensor::new(bias, &Device::Cpu).unwrap(),
    );
    save_gguf(
        model.as_ref(),
        &gguf_metadata("llama"),
        &gguf_tensors(&weights, GgmlDType::Q8_0),
    );
    let exported = finetune(&model, "from_gguf");
    let template = |config: &Value| config["chat_template"].as_str().map(String::from);
    let config = json(format!("{exported}/tokenizer_config.json"));
    let of_folder = json(fixture.folder.join("hf/tokenizer_config.json"));
    assert!(template(&config).is_some());
    assert_eq!(template(&config), template(&of_folder));
    assert_eq!(config["eos_token"], "<|im_end|>");
    assert_eq!(json(format!("{exported}/config.json"))["eos_token_id"], 260);

    // Llama 3's frequencies for its theta, in GGUF's form.
    let factors = |odd: f32| -> Tensor {
        let half = HEAD_DIM / 2;
        let factor = |i: usize| {
            let wavelength = std::f64::consts::TAU * 500_000f64.powf(i as f64 / half as f64);
            let kept = ((8192.0 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0);
            (1.0 / (kept + (1.0 - kept) / 32.0)) as f32 * if i == 1 { odd } else { 1.0 }
        };
        Tensor::new((0..half).map(factor).collect::<Vec<_>>(), &Device::Cpu).unwrap()
    };
    let mut metadata = gguf_metadata("llama");
    metadata.retain(|(key, _)| key != "llama.rope.freq_base");
    metadata.push(("llama.rope.freq_base".into(), Gguf::F32(500_000.0)));
    let save = |odd: f32| {
        let mut weights = crate::fixture::weights();
        weights.insert("rope_freqs.weight".into(), factors(odd));
        save_gguf(model.as_ref(), &metadata, &gguf_tensors(&weights, GgmlDType::F32));
    };
    save(1.0);
    let exported = finetune(&model, "from_llama3_gguf");
    assert_eq!(json(format!("{exported}/config.json"))["rope_scaling"]["factor"], 32.0);
    save(1.5);
    let (text, out) = (text(), out("from_odd_gguf"));
    fail(
        &args(&text, &out, &["--finetune", &model]),
        &["finetune: ", "rope_freqs.weight: expected Llama 3's factors"],
    );
}

/// The fixture's folder with another tokenizer.json, whose vocabulary `change` may damage.
fn with_vocabulary(name: &str, change: impl Fn(&mut Value)) -> String {
    let fixture = Fixture::get();
    let folder = fixture.folder.join(name);
    fs::create_dir_all(&folder).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer_config.json"] {
        fs::copy(fixture.folder.join("hf").join(file), folder.join(file)).unwrap();
    }
    let mut tokenizer = json(fixture.folder.join("hf/tokenizer.json"));
    change(&mut tokenizer["model"]["vocab"]);
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    folder.to_str().unwrap().into()
}

#[test]
fn the_embedding_has_a_row_for_the_largest_id() {
    let rows = |folder: &str, name: &str| {
        let weights = safetensors::load(format!("{folder}/model.safetensors"), &Device::Cpu).unwrap();
        weights[name].dim(0).unwrap()
    };
    let gap = with_vocabulary("gap_in_ids", |vocabulary| vocabulary["zzz"] = 300.into());
    let ids = crate::fixture::tokens().len() as f64;
    // The mean of logits is at most the logarithm of the mean likelihood: 40 new ids add at most 40 average ones.
    let exported = finetune_within(&gap, "from_gap", 301.0 / ids);
    assert_eq!(json(format!("{exported}/config.json"))["vocab_size"], 301);
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        assert_eq!(rows(&exported, name), 301, "{name}");
    }
    // The old rows keep their places.
    let old = safetensors::load(format!("{gap}/model.safetensors"), &Device::Cpu).unwrap();
    let new = safetensors::load(format!("{exported}/model.safetensors"), &Device::Cpu).unwrap();
    let name = "model.embed_tokens.weight";
    let kept = new[name].narrow(0, 0, old[name].dim(0).unwrap()).unwrap();
    let moved = (&kept - &old[name]).unwrap().abs().unwrap().max_all().unwrap();
    assert!(moved.to_scalar::<f32>().unwrap() < 0.02);

    // A new model of this tokenizer.
    let (text, out) = (text(), out("new_with_gap"));
    let tokenizer = format!("{gap}/tokenizer.json");
    let small = "--steps 1 --hidden 16 --intermediate 16 --layers 1 --heads 2 --kv-heads 1";
    let small: Vec<&str> = small.split_whitespace().chain(["--tokenizer", &tokenizer]).collect();
    succeed("train", &args(&text, &out, &small));
    assert_eq!(rows(&format!("{out}/model"), name), 301);
}

#[test]
fn sizes_beyond_what_the_files_hold_are_one_line() {
    let text = text();
    let far = with_vocabulary("far_ids", |vocabulary| vocabulary["zzz"] = 4_000_000_000u32.into());
    let tokenizer = format!("{far}/tokenizer.json");
    let beyond = ["tokenizer: expected ids below 65536", "got 4000000000"];
    fail(&args(&text, &out("far"), &["--finetune", &far]), &beyond);
    fail(&args(&text, &out("far"), &["--tokenizer", &tokenizer]), &beyond);

    // A run with a damaged last checkpoint.
    let run = out("spoilt");
    let small =
        "--hidden 16 --intermediate 16 --layers 1 --heads 2 --kv-heads 1 --vocab 300 --steps 2".split_whitespace();
    let small: Vec<&str> = small.collect();
    succeed("train", &args(&text, &run, &small));
    let checkpoint = format!("{run}/checkpoints/step-00000002");
    let resume: Vec<&str> = small.iter().copied().chain(["--resume"]).collect();
    succeed("train", &args(&text, &run, &resume));
    let config = json(format!("{checkpoint}/config.json"));
    for key in [
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ] {
        for size in [0, 1 << 20, 1u64 << 24, 1 << 32, u64::MAX] {
            // A longer context would change no result, but it differs from the run's own settings.
            let mut config = config.clone();
            config[key] = size.into();
            fs::write(format!("{checkpoint}/config.json"), config.to_string()).unwrap();
            fail(&args(&text, &run, &resume), &["expected"]);
        }
    }
    fs::write(format!("{checkpoint}/config.json"), config.to_string()).unwrap();
    let mut tokenizer = json(format!("{checkpoint}/tokenizer.json"));
    tokenizer["model"]["vocab"]["zzz"] = 4_000_000_000u32.into();
    fs::write(format!("{checkpoint}/tokenizer.json"), tokenizer.to_string()).unwrap();
    fail(&args(&text, &run, &resume), &["tokenizer: expected ids below"]);
}

/// A run that started from a GGUF file resumes from its own checkpoint as if it had never stopped.
#[test]
fn a_finetuned_run_resumes() {
    let (text, model) = (text(), Fixture::get().path("f32.gguf"));
    let run = |name: &str, more: &[&str]| -> String {
        let out = Fixture::get().path(name);
        let flags = ["--finetune", &model, "--checkpoint-every", "2", "--steps", "4"];
        succeed("train", &args(&text, &out, &[&flags[..], more].concat()));
        out
    };
    let (whole, again) = (out("whole"), out("again"));
    run("whole", &[]);
    run("again", &[]);
    // Back to the state after step 2.
    fs::remove_dir_all(format!("{again}/checkpoints/step-00000004")).unwrap();
    run("again", &["--resume"]);
    for file in [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        let read = |out: &str| fs::read(format!("{out}/model/{file}")).unwrap();
        assert!(read(&whole) == read(&again), "{file}");
    }
}
