//! The rows of log.csv, and the plots of its columns.

use std::path::Path;

use anyhow::Result;

use crate::plot::{draw, Curve};
use crate::record::{read, LogRow};

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

impl LogRow for Row {
    const HEADER: &'static str = "step,phase,divergence,hidden_share,gradient_norm,tokens_per_second";

    fn step(&self) -> usize {
        self.step
    }

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

/// OUT/divergence.svg and OUT/hidden_share.svg.
pub fn plot(out: &Path) -> Result<()> {
    let rows: Vec<Row> = read(out)?;
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
