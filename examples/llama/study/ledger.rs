//! The measurements so far, one line of JSON each, so that a stopped report resumes.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::held::Kept;
use crate::report::write_file;

/// One method on one task.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Summed negative log likelihood of the predicted tokens.
    pub score: f64,
    pub predicted: usize,
    /// Summed KL(dense || method), in nats.
    pub divergence: f64,
    /// Predicted tokens where the likeliest one is dense's.
    pub agreed: usize,
    /// For a question: whether the likeliest token is right at each place of the answer.
    pub found: Option<bool>,
    pub tokens: usize,
    /// What caches hold at the end of the sequence.
    pub kept: Kept,
    /// Of the forward pass without the logits.
    pub seconds: f64,
}

#[derive(Serialize, Deserialize)]
enum Line {
    Settings(String),
    Record(String, Record),
}

pub struct Ledger {
    file: File,
    records: BTreeMap<String, Record>,
}

impl Ledger {
    /// Resumes the ledger `path`, which must have the same settings, or begins it.
    pub fn open(path: &Path, settings: &str) -> Result<Self> {
        let mut records = BTreeMap::new();
        if !path.exists() {
            let first = serde_json::to_string(&Line::Settings(settings.into()))? + "\n";
            write_file(path, &first).with_context(|| path.display().to_string())?;
        }
        let mut found = None;
        for (index, line) in BufReader::new(File::open(path)?).lines().enumerate() {
            match (index, serde_json::from_str(&line?)) {
                (0, Ok(Line::Settings(first))) => found = Some(first),
                (_, Ok(Line::Record(key, record))) => drop(records.insert(key, record)),
                // A run that was killed may leave half a line behind.
                _ => {}
            }
        }
        ensure!(
            found.as_deref() == Some(settings),
            "{}: expected a report of the same settings, {settings}, got {}; choose another --out",
            path.display(),
            found.unwrap_or("none".into())
        );
        let file = OpenOptions::new().append(true).open(path);
        let mut file = file.with_context(|| path.display().to_string())?;
        // Ends a line that was cut short.
        writeln!(file)?;
        Ok(Self { file, records })
    }

    pub fn get(&self, key: &str) -> Option<&Record> {
        self.records.get(key)
    }

    pub fn add(&mut self, key: &str, record: Record) -> Result<()> {
        let line = serde_json::to_string(&Line::Record(key.into(), record.clone()))?;
        writeln!(self.file, "{line}")?;
        self.records.insert(key.into(), record);
        Ok(())
    }

    /// The records of a method whose task begins with `test`, each with that of dense on the same task.
    pub fn of(&self, method: &str, test: &str) -> Result<Vec<[&Record; 2]>> {
        let prefix = format!("{method} {test} ");
        let records = self.records.iter().filter(|(key, _)| key.starts_with(&prefix));
        let pair = |(key, record): (&String, _)| {
            let dense = self.get(&format!("dense{}", &key[method.len()..]));
            Ok([record, dense.context("dense was not measured")?])
        };
        records.map(pair).collect()
    }
}
