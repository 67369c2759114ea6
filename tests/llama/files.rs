//! Files that the examples write replace the old ones, or leave them unchanged if the disk is full.

use crate::example::path;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/llama/assets");

fn run(name: &str, folder: &Path, args: &str) -> Output {
    let mut command = Command::new(path(name));
    command
        .current_dir(folder)
        .args(args.split_whitespace())
        .output()
        .unwrap()
}

/// Runs an example whose files may hold nothing.
fn run_on_a_full_disk(name: &str, folder: &Path, args: &str) -> Output {
    run_with_files_up_to(0, name, folder, args)
}

/// Runs an example whose files may hold at most `blocks` blocks of 512 or 1024 bytes; a longer write is an error, not a
/// signal.
fn run_with_files_up_to(blocks: usize, name: &str, folder: &Path, args: &str) -> Output {
    let limit = format!(r#"ulimit -f {blocks}; trap "" XFSZ; exec "$0" "$@""#);
    let mut command = Command::new("sh");
    command
        .args(["-c", &limit])
        .arg(path(name))
        .args(args.split_whitespace())
        .current_dir(folder);
    command.output().unwrap()
}

/// An empty folder with a text.
fn folder(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join("example_files")
        .join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    let line = "The whale sees the old captain. A sailor follows the white sea, and the whale sinks.\n";
    fs::write(folder.join("text.txt"), line.repeat(60)).unwrap();
    folder
}

/// Every file below the folder, by its path in it.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(contents(&path));
        } else {
            all.insert(path.clone(), fs::read(path).unwrap());
        }
    }
    all
}

/// Asserts that the command overwrites its old files, and on a full disk fails without changing any file.
fn keeps_old_files(name: &str, args: &str, written: &[&str]) {
    let folder = folder(name);
    let args = args.replace("MODEL", MODEL);
    for file in written {
        fs::write(folder.join(file), "what was there").unwrap();
    }
    let output = run("llama", &folder, &args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for file in written {
        let length = fs::metadata(folder.join(file)).unwrap().len();
        assert!(length > 100, "{file}: {length} bytes");
        fs::write(folder.join(file), "what was there").unwrap();
    }
    let before = contents(&folder);
    let output = run_on_a_full_disk("llama", &folder, &args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("File too large"), "{error}");
    assert!(contents(&folder) == before, "files changed, or were left behind");
}

#[test]
fn json_survives_a_full_disk() {
    keeps_old_files(
        "json",
        "eval --model MODEL --text text.txt --context 64 --json out.json",
        &["out.json"],
    );
}

#[test]
fn stats_survive_a_full_disk() {
    keeps_old_files(
        "stats",
        "generate --model MODEL --prompt whale --max-tokens 4 --stats stats.json",
        &["stats.json"],
    );
}

#[test]
fn plots_survive_a_full_disk() {
    keeps_old_files(
        "plots",
        "bench --model MODEL --text text.txt --prompts 64 --decode 4 --svg plot.svg",
        &["plot.svg"],
    );
}

#[test]
fn policies_survive_a_full_disk() {
    keeps_old_files(
        "policies",
        "calibrate --model MODEL --text text.txt --context 64 --windows 2 --repeats 0 --window 8 --sinks 1 --target \
         0.3 --out policy.json",
        &["policy.json"],
    );
}

#[test]
fn a_report_survives_a_full_disk() {
    let folder = folder("report");
    let args = format!(
        "report --model {MODEL} --text text.txt --out out --context 64 --passkey 100 --windows 2 --calibration 2 \
         --ratios 0.3 --window 8 --sinks 1 --methods dense"
    );
    let output = run("llama", &folder, &args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let before = contents(&folder);
    for name in [
        "report.json",
        "report.md",
        "perplexity.svg",
        "copy.svg",
        "policy-0.3.json",
    ] {
        assert!(before[&folder.join("out").join(name)].len() > 100, "{name}");
    }
    // Everything is measured and in the ledger; only the results are written anew.
    let output = run_on_a_full_disk("llama", &folder, &args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("File too large"), "{error}");
    assert!(contents(&folder) == before, "files changed, or were left behind");
}

/// A ledger without its first line would continue with records of other settings.
#[test]
fn a_ledger_without_settings_is_refused() {
    let folder = folder("ledger");
    fs::create_dir(folder.join("out")).unwrap();
    fs::write(folder.join("out/progress.jsonl"), "").unwrap();
    let args = format!(
        "report --model {MODEL} --text text.txt --out out --context 64 --passkey 100 --windows 2 --methods dense \
                        --calibration 2 --ratios 0.3 --window 8 --sinks 1"
    );
    let output = run("llama", &folder, &args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("expected a report of the same settings") && error.contains("got none"),
        "{error}"
    );
}

#[test]
fn training_survives_a_full_disk() {
    let folder = folder("training");
    let args = "--text text.txt --out run --hidden 16 --intermediate 16 --layers 1 --heads 2 --kv-heads 1 --vocab 300 \
                --batch 1 --context 16 --eval-windows 1 --export-dtype f32 --dense --steps";
    let output = run("train", &folder, &format!("{args} 2"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let before = contents(&folder);
    for name in ["model/model.safetensors", "summary.json", "log.csv", "loss.svg"] {
        assert!(before.contains_key(&folder.join("run").join(name)), "{name}");
    }
    // Either the records do not fit, or only the weights do not.
    for (blocks, named) in [(0, "held_out.txt"), (16, "run/model")] {
        let output = run_with_files_up_to(blocks, "train", &folder, &format!("{args} 2 --resume"));
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains("File too large"), "{error}");
        assert!(error.contains(named), "{error}");
        assert!(contents(&folder) == before, "files changed, or were left behind");
    }
    // A checkpoint and an export replace the old ones.
    let output = run("train", &folder, &format!("{args} 2 --resume"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let names: Vec<PathBuf> = contents(&folder).into_keys().collect();
    assert_eq!(names, before.into_keys().collect::<Vec<_>>());
}
