//! A report's numbers: JSON for programs, Markdown for people.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::ledger::{Ledger, Record};
use super::method::Method;
use crate::report::write_file;

#[derive(Serialize)]
pub struct Summary {
    pub model: String,
    pub rows: Vec<Row>,
}

#[derive(Serialize)]
pub struct Row {
    pub method: String,
    pub family: &'static str,
    pub perplexity: f64,
    /// Mean difference between the windows' nll per token and dense, and its standard error.
    pub nll_over_dense: f64,
    pub standard_error: f64,
    /// Perplexity of the second half of `[A][A again]`.
    pub copy: f64,
    pub hidden_ratio: f64,
    pub kv_bytes: f64,
    pub kv_bytes_of_dense: f64,
    /// Of `kv_bytes`, those of layers that slide.
    pub kv_bytes_sliding: f64,
    pub tokens_per_second: f64,
    pub passkey: Vec<Found>,
}

/// The share of pass keys found in texts of one length.
#[derive(Serialize)]
pub struct Found {
    pub length: usize,
    pub found: usize,
    pub tries: usize,
    /// Mean negative log likelihood of a whole key.
    pub nll: f64,
    pub hidden_ratio: f64,
}

impl Summary {
    pub fn new(model: &str, methods: &[Method], ledger: &Ledger) -> Result<Self> {
        let rows = methods.iter().map(|method| Row::new(method, ledger));
        Ok(Self {
            model: model.into(),
            rows: rows.collect::<Result<_>>()?,
        })
    }

    pub fn write(&self, folder: &Path) -> Result<()> {
        write_file(
            &folder.join("report.json"),
            &(serde_json::to_string_pretty(self)? + "\n"),
        )?;
        write_file(&folder.join("report.md"), &self.markdown())
    }

    pub fn markdown(&self) -> String {
        let mut out = format!("# {}\n\n", self.model);
        out += "| method | perplexity | nll over dense | copy test | hidden | KV of dense | tokens/s | pass key |\n";
        out += "|---|---|---|---|---|---|---|---|\n";
        for row in &self.rows {
            let passkey = row.passkey.iter();
            let passkey: Vec<String> = passkey
                .map(|at| {
                    format!(
                        "{}: {}/{} ({:.2} nats a key, {:.3} hidden)",
                        at.length, at.found, at.tries, at.nll, at.hidden_ratio
                    )
                })
                .collect();
            out += &format!(
                "| {} | {:.2} | {:+.4} ± {:.4} | {:.3} | {:.3} | {:.3} | {:.0} | {} |\n",
                row.method,
                row.perplexity,
                row.nll_over_dense,
                row.standard_error,
                row.copy,
                row.hidden_ratio,
                row.kv_bytes_of_dense,
                row.tokens_per_second,
                if passkey.is_empty() {
                    "-".into()
                } else {
                    passkey.join(", ")
                },
            );
        }
        out += "\nThe error is the standard error of the windows' paired differences. Hidden: entries left out at the \
                end of a window, of all.\n";
        let sliding = self.rows.iter().filter(|row| row.kv_bytes_sliding > 0.0);
        let sliding: Vec<String> = sliding
            .map(|row| {
                let kib = |bytes: f64| bytes / 1024.0;
                format!(
                    "| {} | {:.0} | {:.0} |",
                    row.method,
                    kib(row.kv_bytes - row.kv_bytes_sliding),
                    kib(row.kv_bytes_sliding)
                )
            })
            .collect();
        if !sliding.is_empty() {
            out +=
                "\nKiB of keys and values at the end of a window; a layer that slides keeps its window, in the dense \
                    cache too:\n\n| method | layers that see all tokens | layers that slide |\n|---|---|---|\n";
            out += &(sliding.join("\n") + "\n");
        }
        out
    }
}

impl Row {
    fn new(method: &Method, ledger: &Ledger) -> Result<Self> {
        let name = method.name();
        let prose: Vec<_> = ledger.of(&name, "prose ").collect();
        let dense: Vec<_> = ledger.of("dense", "prose ").collect();
        let copy: Vec<_> = ledger.of(&name, "copy ").map(|(_, record)| record).collect();
        let per_token = |record: &Record| record.score / record.predicted as f64;
        let differences: Vec<f64> = prose
            .iter()
            .map(|(task, record)| {
                let other = dense.iter().find(|(other, _)| other == task);
                Ok(per_token(record) - per_token(other.context("dense was not measured")?.1))
            })
            .collect::<Result<_>>()?;
        let (nll_over_dense, standard_error) = mean_and_error(&differences);
        let sum = |value: fn(&Record) -> f64| prose.iter().map(|(_, record)| value(record)).sum::<f64>();
        let count = prose.len().max(1) as f64;
        Ok(Self {
            method: name.clone(),
            family: method.family(),
            perplexity: (sum(|record| record.score) / sum(|record| record.predicted as f64)).exp(),
            nll_over_dense,
            standard_error,
            copy: (copy.iter().map(|record| record.score).sum::<f64>()
                / copy.iter().map(|record| record.predicted as f64).sum::<f64>())
            .exp(),
            hidden_ratio: sum(|record| record.hidden_ratio) / count,
            kv_bytes: sum(|record| record.bytes as f64) / count,
            kv_bytes_of_dense: sum(|record| record.bytes as f64) / sum(|record| record.bytes_dense as f64),
            kv_bytes_sliding: sum(|record| record.bytes_sliding as f64) / count,
            tokens_per_second: sum(|record| record.tokens as f64) / sum(|record| record.seconds),
            passkey: passkeys(ledger.of(&name, "passkey ")),
        })
    }
}

fn passkeys<'a>(records: impl Iterator<Item = (&'a str, &'a Record)>) -> Vec<Found> {
    let mut all: Vec<Found> = Vec::new();
    for (_, record) in records {
        let length = record.tokens;
        let known = all.iter().position(|found| found.length == length);
        let index = known.unwrap_or_else(|| {
            all.push(Found {
                length,
                found: 0,
                tries: 0,
                nll: 0.0,
                hidden_ratio: 0.0,
            });
            all.len() - 1
        });
        let at = &mut all[index];
        at.tries += 1;
        let share = 1.0 / at.tries as f64;
        at.nll += (record.score - at.nll) * share;
        at.hidden_ratio += (record.hidden_ratio - at.hidden_ratio) * share;
        at.found += usize::from(record.found == Some(true));
    }
    all.sort_by_key(|found| found.length);
    all
}

/// The mean and its standard error, 0 for a single number.
fn mean_and_error(numbers: &[f64]) -> (f64, f64) {
    let count = numbers.len() as f64;
    let mean = numbers.iter().sum::<f64>() / count;
    let squares: f64 = numbers.iter().map(|x| (x - mean).powi(2)).sum();
    (mean, (squares / (count - 1.0).max(1.0) / count).sqrt())
}
