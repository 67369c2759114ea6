//! Processes of this program, one for each measurement, since a process has one peak of memory.

use std::env;
use std::process::{Command, Stdio};

use anyhow::{bail, Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::de::DeserializeOwned;

/// Processes that run one after another, with a bar on stderr.
pub struct Children {
    bar: ProgressBar,
}

impl Children {
    pub fn new(count: usize) -> Result<Self> {
        let style = ProgressStyle::with_template("{bar:40} {pos}/{len} runs  {msg}  {elapsed}")?;
        Ok(Self {
            bar: ProgressBar::new(count as u64).with_style(style),
        })
    }

    /// Runs this program with its own arguments and `more`, and reads the JSON that it prints; `name` is for people.
    pub fn run<T: DeserializeOwned>(&mut self, name: &str, more: &[&str]) -> Result<T> {
        self.bar.set_message(name.to_string());
        self.bar.tick();
        let program = env::current_exe().context("bench: this program cannot find itself")?;
        let mut command = Command::new(program);
        command.args(env::args_os().skip(1)).args(more);
        let output = command.stdin(Stdio::null()).output()?;
        if !output.status.success() {
            self.bar.finish_and_clear();
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.trim().trim_start_matches("error: ");
            bail!(
                "{name}: {}",
                if said.is_empty() {
                    "the process was killed"
                } else {
                    said
                }
            )
        }
        self.bar.inc(1);
        serde_json::from_slice(&output.stdout).with_context(|| format!("{name}: its report"))
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
