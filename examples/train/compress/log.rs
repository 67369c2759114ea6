//! log.csv, a row per step, and the plots of its columns.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::checkpoint::write_file;
use crate::plot::{draw, Curve};

const HEADER: &str = "step,phase,divergence,hidden_share,gradient_norm,tokens_per_second";

#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub step: usize,
    /// Whether tokens are hidden, rather than faded.
    pub hides: bool,
    /// KL(dense ‖ student), nats per token.
    pub divergence: f64,
    /// Of the tokens that can be hidden; while they fade, the mean of their gates.
    pub hidden_share: f64,
    pub gradient_norm: f64,
    pub tokens_per_second: f64,
}

impl Row {
    fn line(&self) -> String {
        let phase = if self.hides { "hides" } else { "fades" };
        format!(
            "{},{phase},{},{},{},{:.1}",
            self.step, self.divergence, self.hidden_share, self.gradient_norm, self.tokens_per_second
        )
    }

    fn parse(line: &str) -> Option<Self> {
        let fields: [&str; 6] = line.split(',').collect::<Vec<_>>().try_into().ok()?;
        let number = |field: &str| field.parse::<f64>().ok();
        Some(Self {
            step: fields[0].parse().ok()?,
            hides: fields[1] == "hides",
            divergence: number(fields[2])?,
            hidden_share: number(fields[3])?,
            gradient_norm: number(fields[4])?,
            tokens_per_second: number(fields[5])?,
        })
    }
}

pub struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Keeps the rows up to `step`, which a resumed run does not write again.
    pub fn open(out: &Path, step: usize) -> Result<Self> {
        let path = out.join("log.csv");
        let mut text = format!("{HEADER}\n");
        if step > 0 {
            for row in read(out)?.iter().filter(|row| row.step <= step) {
                text += &(row.line() + "\n");
            }
        }
        write_file(&path, &text)?;
        let file = OpenOptions::new().append(true).open(&path);
        Ok(Self {
            file: file.with_context(|| format!("{}", path.display()))?,
            path,
        })
    }

    pub fn push(&mut self, row: &Row) -> Result<()> {
        writeln!(self.file, "{}", row.line()).with_context(|| format!("{}", self.path.display()))
    }
}

/// The rows of a run's log, without a line that was cut short by a kill.
fn read(out: &Path) -> Result<Vec<Row>> {
    let path = out.join("log.csv");
    let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    Ok(text.lines().skip(1).filter_map(Row::parse).collect())
}

/// OUT/divergence.svg and OUT/hidden_share.svg.
pub fn plot(out: &Path) -> Result<()> {
    let rows = read(out)?;
    type Value = fn(&Row) -> f64;
    let plots: [(&str, &str, Value); 2] = [
        ("divergence", "KL(dense, student) (nats per token)", |row| {
            row.divergence
        }),
        (
            "hidden_share",
            "share of the tokens past the window that fade, or are hidden",
            |row| row.hidden_share,
        ),
    ];
    for (file, title, value) in plots {
        let curve = |name: &str, hides| Curve {
            name: name.into(),
            points: rows
                .iter()
                .filter(|row| row.hides == hides)
                .map(|row| (row.step as f64, value(row)))
                .collect(),
        };
        let curves = [curve("tokens fade", false), curve("tokens are hidden", true)];
        draw(&out.join(format!("{file}.svg")), title, false, &curves)?;
    }
    Ok(())
}
