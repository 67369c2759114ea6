//! The results of a run, as text and as JSON.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use candle_sfattention::CompressionConfig;
use serde::Serialize;

use crate::compression::Compression;
use crate::files::replace;
use crate::model_args::ModelArgs;
use crate::stats::Hidden;

/// The part of a report that the commands share: what ran, and the share of hidden tokens.
#[derive(Serialize)]
pub struct RunReport {
    model: String,
    strategy: String,
    config: CompressionConfig,
    #[serde(flatten)]
    hidden: Hidden,
    /// Predicted or generated tokens per second.
    tokens_per_second: f64,
}

impl RunReport {
    pub fn new(args: &ModelArgs, compression: &Compression, hidden: Hidden, tokens_per_second: f64) -> Self {
        Self {
            model: args.model.clone(),
            strategy: compression.label.clone(),
            config: compression.config.clone(),
            hidden,
            tokens_per_second,
        }
    }

    /// Hidden ratios and speed, in lines.
    pub fn print(&self, out: &mut dyn Write) -> Result<()> {
        self.hidden.print(out)?;
        writeln!(out, "tokens per second {:.1}", self.tokens_per_second)?;
        Ok(())
    }
}

/// Refuses a report file that cannot be written, before the work starts.
pub fn check_path(name: &str, path: Option<&Path>) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    ensure!(
        folder.is_dir() && !path.is_dir(),
        "{name}: expected a file in an existing folder, got {}; create the folder first",
        path.display()
    );
    Ok(())
}

pub fn write_json(name: &str, path: Option<&Path>, report: &impl Serialize) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let text = serde_json::to_string_pretty(report)? + "\n";
    write_file(path, &text).with_context(|| format!("{name} {}", path.display()))
}

/// Replaces the file with the whole text, or fails and keeps the old file.
pub fn write_file(path: &Path, text: &str) -> Result<()> {
    Ok(replace(path, |file| fs::write(file, text))?)
}
