//! log.csv: a row per step.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::checkpoint::write_file;
use crate::evaluate::HeldOut;

const HEADER: &str =
    "step,train_loss,cross_entropy,compression_loss,lambda,gradient_norm,held_out_perplexity,hidden_ratio,\
     tokens_per_second";

/// One step; step 0 is the model before training, and has only the held-out measurements.
#[derive(Clone, Debug, Default)]
pub struct Row {
    pub step: usize,
    pub losses: Option<StepLosses>,
    pub held_out: Option<HeldOut>,
}

#[derive(Clone, Copy, Debug)]
pub struct StepLosses {
    /// Cross entropy + λ·compression loss.
    pub total: f64,
    pub cross_entropy: f64,
    pub compression: f64,
    pub lambda: f64,
    pub gradient_norm: f64,
    pub tokens_per_second: f64,
}

/// A row of a log.csv.
pub trait LogRow: Sized {
    /// The names of the columns.
    const HEADER: &'static str;

    /// The step of the row, from 1; 0 is the model before training.
    fn step(&self) -> usize;

    fn line(&self) -> String;

    /// None of a line that was cut short.
    fn parse(line: &str) -> Option<Self>;
}

impl LogRow for Row {
    const HEADER: &'static str = HEADER;

    fn step(&self) -> usize {
        self.step
    }

    fn line(&self) -> String {
        let losses = self.losses.map_or(",,,,".into(), |x| {
            let StepLosses {
                total,
                cross_entropy,
                compression,
                lambda,
                gradient_norm,
                ..
            } = x;
            format!("{total},{cross_entropy},{compression},{lambda},{gradient_norm}")
        });
        let held_out = self
            .held_out
            .map_or(",".into(), |x| format!("{},{}", x.perplexity, x.hidden_ratio));
        let speed = self
            .losses
            .map_or(String::new(), |x| format!("{:.1}", x.tokens_per_second));
        format!("{},{losses},{held_out},{speed}", self.step)
    }

    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(',').map(|field| field.parse::<f64>().ok());
        let step = fields.next()?? as usize;
        let rest: [Option<f64>; 8] = fields.collect::<Vec<_>>().try_into().ok()?;
        let [total, cross_entropy, compression, lambda, gradient_norm, perplexity, hidden_ratio, speed] = rest;
        let losses = || {
            Some(StepLosses {
                total: total?,
                cross_entropy: cross_entropy?,
                compression: compression?,
                lambda: lambda?,
                gradient_norm: gradient_norm?,
                tokens_per_second: speed?,
            })
        };
        let held_out = || {
            Some(HeldOut {
                perplexity: perplexity?,
                hidden_ratio: hidden_ratio?,
            })
        };
        Some(Self {
            step,
            losses: losses(),
            held_out: held_out(),
        })
    }
}

pub struct Record {
    path: PathBuf,
    file: File,
}

impl Record {
    /// Keeps the rows up to `step`, which a resumed run does not write again.
    pub fn open<R: LogRow>(out: &Path, step: Option<usize>) -> Result<Self> {
        let path = out.join("log.csv");
        let mut text = format!("{}\n", R::HEADER);
        if let Some(step) = step {
            for row in read::<R>(out)?.iter().filter(|row| row.step() <= step) {
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

    pub fn push(&mut self, row: &impl LogRow) -> Result<()> {
        writeln!(self.file, "{}", row.line()).with_context(|| format!("{}", self.path.display()))
    }
}

/// The rows of a run's log, without a line that was cut short by a kill.
pub fn read<R: LogRow>(out: &Path) -> Result<Vec<R>> {
    let path = out.join("log.csv");
    let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    Ok(text.lines().skip(1).filter_map(R::parse).collect())
}
