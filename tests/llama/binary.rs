//! Running the example's binary.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;

use crate::fixture::Fixture;

/// The example's binary, which cargo builds next to the tests.
pub fn llama(args: &[&str]) -> Output {
    llama_with(args, &[])
}

/// [`llama`] with variables of the environment.
pub fn llama_with(args: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(crate::example::path("llama"));
    // One line without a backtrace is promised even if RUST_BACKTRACE is set.
    command
        .args(args)
        .env("RUST_BACKTRACE", "1")
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .env_remove("HF_HUB_OFFLINE")
        .env_remove("TRANSFORMERS_OFFLINE")
        .env_remove("HF_HUB_CACHE")
        .envs(variables.iter().copied());
    command.output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs a command with `--json`, which must succeed, and returns the JSON.
pub fn report(name: &str, args: &[&str]) -> Value {
    let file = Fixture::get().path(&format!("{name}.json"));
    let output = llama(&[args, &["--json", &file]].concat());
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

pub fn number(report: &Value, key: &str) -> f64 {
    report[key]
        .as_f64()
        .unwrap_or_else(|| panic!("{key}: not a number in {report}"))
}

/// Exit code 1 and one line on stderr that starts with `error: ` and has every part.
pub fn assert_error(args: &[&str], parts: &[&str]) {
    let output = llama(args);
    assert_failed(args, &output, parts);
    assert!(output.stdout.is_empty(), "{args:?}: {}", text(&output.stdout));
}

/// [`assert_error`] for a command that has run, and may have printed before.
pub fn assert_failed(args: &[&str], output: &Output, parts: &[&str]) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    assert!(
        stderr.starts_with("error: ") && stderr.trim_end().lines().count() == 1,
        "{args:?}: {stderr}"
    );
    for part in parts {
        assert!(stderr.contains(part), "{args:?}: {part:?} is not in {stderr}");
    }
}
