//! Reruns tests in a child process that uses other instructions.

use anyhow::Result;
use std::process::Command;

/// Runs tests of this file again with an environment variable set; false if this CPU has no such instructions.
fn again(variable: &str, value: &str, tests: &[&str]) -> Result<bool> {
    let output = Command::new(std::env::current_exe()?)
        .env(variable, value)
        .arg("--exact")
        .args(tests)
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

/// Runs tests again with loops compiled for each instruction set.
pub fn on_every_instruction_set(tests: &[&str]) -> Result<()> {
    on_each("SFATTENTION_SIMD", &["avx512", "avx2", "neon"], "scalar", tests)
}

/// Runs tests again with every kind of instructions that multiplies halves, and with none.
pub fn on_every_kernel(tests: &[&str]) -> Result<()> {
    on_each(KERNEL, &["amx", "avx512"], "off", tests)
}

/// The environment variable that names the instructions that multiply halves.
pub const KERNEL: &str = "SFATTENTION_BF16";

fn on_each(variable: &str, values: &[&str], without: &str, tests: &[&str]) -> Result<()> {
    for value in values {
        again(variable, value, tests)?;
    }
    assert!(again(variable, without, tests)?, "every CPU can do without");
    Ok(())
}
