//! Tests of this process again, in one that chooses other instructions.

use anyhow::Result;
use std::process::Command;

/// Runs tests of this file again with an environment variable set; false where this CPU has no such instructions.
pub fn again(variable: &str, value: &str, tests: &[&str]) -> Result<bool> {
    let output = Command::new(std::env::current_exe()?)
        .env(variable, value)
        .arg("--exact")
        .args(tests)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if text.contains("which this CPU has") {
        println!("skipped: this CPU has no {value}");
        return Ok(false);
    }
    let passed = format!("{} passed", tests.len());
    assert!(output.status.success() && text.contains(&passed), "{value}: {text}");
    Ok(true)
}
