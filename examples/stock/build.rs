//! Finds the source of the candle-transformers that Cargo.lock names, and lists the models to compile from it.
//!
//! The crate's own feature `flash-attn` asks for CUDA. So the files are compiled here, unchanged, with the feature and
//! without CUDA. On the CPU Qwen3 never reaches its call of `flash_attn`: `qwen3_flash` is its file with one line
//! edited, so that it takes the path that it takes on a GPU.

use anyhow::{ensure, Context, Result};
use std::env;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

const MODELS: &[&str] = &[
    "gemma",
    "gemma2",
    "gemma3",
    "granite",
    "helium",
    "llama",
    "mistral",
    "qwen3",
    "stable_lm",
    "with_tracing",
];
/// Of the whole crate, which models use.
const SHARED: &[&str] = &["quantized_var_builder", "utils"];
const ON_GPU_ONLY: &str = "if !on_cpu {";

fn main() -> Result<()> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let source = source()?;
    let mut models = String::new();
    for name in MODELS {
        module(&mut models, name, &source.join("models").join(format!("{name}.rs")))?;
    }
    let qwen3 = on_any_device(&source.join("models/qwen3.rs"), &out)?;
    module(&mut models, "qwen3_flash", &qwen3)?;
    let mut shared = String::new();
    for name in SHARED {
        module(&mut shared, name, &source.join(format!("{name}.rs")))?;
    }
    std::fs::write(out.join("models.rs"), models)?;
    std::fs::write(out.join("shared.rs"), shared)?;
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=../../Cargo.lock");
    Ok(())
}

/// The folder `src` of candle-transformers.
fn source() -> Result<PathBuf> {
    let output = Command::new(env::var("CARGO")?)
        .args(["metadata", "--format-version", "1", "--locked"])
        .output()
        .context("cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("packages of cargo metadata")?;
    let manifest = packages
        .iter()
        .find(|package| package["name"] == "candle-transformers")
        .and_then(|package| package["manifest_path"].as_str())
        .context("candle-transformers: expected it in Cargo.lock, which the member peers brings in")?;
    let folder = Path::new(manifest)
        .parent()
        .context("the folder of candle-transformers")?;
    Ok(folder.join("src"))
}

fn module(list: &mut String, name: &str, path: &Path) -> Result<()> {
    ensure!(
        path.exists(),
        "{}: expected a model of candle-transformers",
        path.display()
    );
    writeln!(list, "#[path = {path:?}]\npub mod {name};")?;
    Ok(())
}

fn on_any_device(path: &Path, out: &Path) -> Result<PathBuf> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let found = text.matches(ON_GPU_ONLY).count();
    ensure!(
        found == 1,
        "{}: expected {ON_GPU_ONLY:?} once, found it {found} times; candle-transformers has changed",
        path.display()
    );
    let edited = out.join("qwen3_flash.rs");
    std::fs::write(&edited, text.replace(ON_GPU_ONLY, "{"))?;
    Ok(edited)
}
