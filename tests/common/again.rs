//! Reruns tests in a child process that has another environment variable.

use anyhow::Result;
use std::process::Command;

/// The name by which a test binary knows a test of a module, given as `module_path!()` says it: the crate left out.
pub fn full_name(module: &str, test: &str) -> String {
    match module.split_once("::") {
        Some((_, inner)) => format!("{inner}::{test}"),
        None => test.to_string(),
    }
}

/// Runs tests of a module again with an environment variable set; false if this CPU has no such instructions.
pub fn again(variable: &str, value: &str, module: &str, tests: &[&str]) -> Result<bool> {
    let output = Command::new(std::env::current_exe()?)
        .env(variable, value)
        .arg("--exact")
        .args(tests.iter().map(|test| full_name(module, test)))
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if text.contains("which this machine has") {
        println!("skipped: this CPU has no {value}");
        return Ok(false);
    }
    let passed = format!("{} passed", tests.len());
    assert!(output.status.success() && text.contains(&passed), "{value}: {text}");
    Ok(true)
}

/// Runs tests of a module (`module_path!()`) again with loops compiled for each instruction set.
pub fn on_every_instruction_set(module: &str, tests: &[&str]) -> Result<()> {
    on_each("SFATTENTION_SIMD", &["avx512", "avx2", "neon"], "scalar", module, tests)
}

/// Runs tests again with every kind of instructions that multiplies halves, and with none.
pub fn on_every_kernel(module: &str, tests: &[&str]) -> Result<()> {
    on_each(KERNEL, &["amx", "avx512"], "off", module, tests)
}

/// The environment variable that names the instructions that multiply halves.
pub const KERNEL: &str = "SFATTENTION_BF16";

fn on_each(variable: &str, values: &[&str], without: &str, module: &str, tests: &[&str]) -> Result<()> {
    for value in values {
        again(variable, value, module, tests)?;
    }
    assert!(again(variable, without, module, tests)?, "every CPU can do without");
    Ok(())
}
