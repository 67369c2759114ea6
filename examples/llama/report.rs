//! What a run found, for people and for programs.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{ensure, Context, Result};
use candle_sfattention::CompressionConfig;
use serde::Serialize;

use crate::args::ModelArgs;
use crate::compression::Compression;
use crate::model::HiddenCounts;

/// The part that both commands report: what ran, and how much of it was hidden.
#[derive(Serialize)]
pub struct RunReport {
    model: String,
    strategy: String,
    config: CompressionConfig,
    /// Hidden pairs / pairs, over all heads and layers.
    hidden_ratio: f64,
    hidden_ratio_per_layer: Vec<f64>,
    /// Predicted or generated tokens per second.
    tokens_per_second: f64,
}

impl RunReport {
    pub fn new(args: &ModelArgs, compression: &Compression, counts: &HiddenCounts, tokens_per_second: f64) -> Self {
        Self {
            model: args.model.clone(),
            strategy: compression.label.clone(),
            config: compression.config.clone(),
            hidden_ratio: counts.ratio(),
            hidden_ratio_per_layer: counts.ratio_per_layer(),
            tokens_per_second,
        }
    }

    /// Hidden ratios and speed, in lines.
    pub fn print(&self, out: &mut dyn Write) -> Result<()> {
        writeln!(out, "hidden ratio      {:.4}", self.hidden_ratio)?;
        for (row, layers) in self.hidden_ratio_per_layer.chunks(10).enumerate() {
            let first = row * 10;
            let ratios: Vec<String> = layers.iter().map(|ratio| format!("{ratio:.3}")).collect();
            writeln!(
                out,
                "  layers {first:>3}..{:<3}  {}",
                first + layers.len() - 1,
                ratios.join(" ")
            )?;
        }
        writeln!(out, "tokens per second {:.1}", self.tokens_per_second)?;
        Ok(())
    }
}

/// Refuses a report file that could not be written, before the work it is to report.
pub fn check_json_path(path: Option<&Path>) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    ensure!(
        folder.is_dir() && !path.is_dir(),
        "json: expected a file in an existing folder, got {}; create the folder first",
        path.display()
    );
    Ok(())
}

pub fn write_json(path: Option<&Path>, report: &impl Serialize) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let write = || -> Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        serde_json::to_writer_pretty(&mut file, report)?;
        writeln!(file)?;
        Ok(file.flush()?)
    };
    write().with_context(|| format!("json {}", path.display()))
}
