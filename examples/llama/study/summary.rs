//! A report's numbers: JSON for programs, Markdown for people.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::held::{Held, Kept};
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
    /// The same of the layers that see all tokens, and of those that slide; none without layers that slide.
    pub apart: Option<Apart>,
    pub tokens_per_second: f64,
    pub passkey: Vec<Found>,
}

#[derive(Serialize)]
pub struct Apart {
    pub whole: Part,
    pub sliding: Part,
}

/// What one kind of layers keeps at the end of a window.
#[derive(Serialize)]
pub struct Part {
    pub hidden_ratio: f64,
    pub kv_bytes: f64,
    pub kv_bytes_of_dense: f64,
    pub entries_a_list: f64,
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
        out + &self.apart()
    }

    /// A table of what layers that slide keep, and what the others keep; empty without layers that slide.
    fn apart(&self) -> String {
        let rows = self
            .rows
            .iter()
            .filter_map(|row| Some((&row.method, row.apart.as_ref()?)));
        let rows: Vec<String> = rows
            .map(|(method, parts)| {
                let cells = [&parts.whole, &parts.sliding].map(|part| {
                    format!(
                        "{:.0} | {:.3} | {:.3} | {:.0}",
                        part.kv_bytes / 1024.0,
                        part.kv_bytes_of_dense,
                        part.hidden_ratio,
                        part.entries_a_list
                    )
                });
                format!("| {method} | {} |\n", cells.join(" | "))
            })
            .collect();
        if rows.is_empty() {
            return String::new();
        }
        let header =
            "\nLayers that see all tokens, then layers that slide, at the end of a window. A layer that slides \
                      keeps what its next row sees, in the dense cache too.\n\n\
                      | method | all: KiB | of dense | hidden | entries a list | slide: KiB | of dense | hidden | \
                      entries a list |\n|---|---|---|---|---|---|---|---|---|\n";
        header.to_string() + &rows.concat()
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
        let mut kept = Kept::default();
        prose.iter().for_each(|(_, record)| kept += record.kept);
        let all = kept.all();
        let part = |held: Held| Part {
            hidden_ratio: held.hidden_ratio(),
            kv_bytes: held.bytes as f64 / count,
            kv_bytes_of_dense: held.of_dense(),
            entries_a_list: held.entries_a_list(),
        };
        Ok(Self {
            method: name.clone(),
            family: method.family,
            perplexity: (sum(|record| record.score) / sum(|record| record.predicted as f64)).exp(),
            nll_over_dense,
            standard_error,
            copy: (copy.iter().map(|record| record.score).sum::<f64>()
                / copy.iter().map(|record| record.predicted as f64).sum::<f64>())
            .exp(),
            hidden_ratio: all.hidden_ratio(),
            kv_bytes: all.bytes as f64 / count,
            kv_bytes_of_dense: all.of_dense(),
            apart: (kept.sliding.lists > 0).then(|| Apart {
                whole: part(kept.whole),
                sliding: part(kept.sliding),
            }),
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
        at.hidden_ratio += (record.kept.all().hidden_ratio() - at.hidden_ratio) * share;
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
