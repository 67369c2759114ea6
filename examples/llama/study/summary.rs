//! A report's numbers, each with its samples and its standard error.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::held::{Held, Kept};
use super::ledger::{Ledger, Record};
use super::mean::Mean;
use super::method::Method;
use super::tables;
use crate::report::write_file;

#[derive(Serialize)]
pub struct Summary {
    pub model: String,
    pub rows: Vec<Row>,
}

/// One method. What is counted at the end of a window is missing where a method has no windows.
#[derive(Serialize)]
pub struct Row {
    pub method: String,
    pub family: &'static str,
    pub perplexity: Option<f64>,
    /// Mean difference between the windows' nll per token and dense, and its standard error.
    pub nll_over_dense: Option<f64>,
    pub standard_error: Option<f64>,
    /// Perplexity of the second half of `[A][A again]`.
    pub copy: Option<f64>,
    pub hidden_ratio: Option<f64>,
    pub kv_bytes: Option<f64>,
    pub kv_bytes_of_dense: Option<f64>,
    /// The same of the layers that see all tokens, and of those that slide; none without layers that slide.
    pub apart: Option<Apart>,
    pub tokens_per_second: Option<f64>,
    pub passkey: Vec<Found>,
    /// Of the windows, and of their copy tests, per token.
    pub prose: Option<Compared>,
    pub copied: Option<Compared>,
    /// Of each kind of question at each length, pass keys among them.
    pub tasks: Vec<Asked>,
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

/// A method beside dense, over samples. Errors are standard errors over the samples, of paired differences.
#[derive(Serialize)]
pub struct Compared {
    /// Negative log likelihood.
    pub nats: Mean,
    pub nats_over_dense: Mean,
    /// KL(dense || method) per predicted token, in nats.
    pub divergence: Mean,
    /// The share of predicted tokens whose likeliest one is dense's.
    pub agreement: Mean,
}

/// Questions of one kind and length; nats are those of a whole answer.
#[derive(Serialize)]
pub struct Asked {
    pub task: String,
    pub length: usize,
    #[serde(flatten)]
    pub compared: Compared,
    /// The share of answers that are right at each place.
    pub found: Mean,
    pub found_over_dense: Mean,
    /// At the end of the text.
    pub hidden_ratio: f64,
    pub kv_bytes_of_dense: f64,
}

impl Compared {
    /// `per_token`: whether nats are those of a token, or of all predicted ones.
    fn new(pairs: &[[&Record; 2]], per_token: bool) -> Option<Self> {
        if pairs.is_empty() {
            return None;
        }
        let nats = |record: &Record| match per_token {
            true => record.score / record.predicted as f64,
            false => record.score,
        };
        let share = |value: f64, record: &Record| value / record.predicted as f64;
        Some(Self {
            nats: Mean::of(pairs.iter().map(|[own, _]| nats(own))),
            nats_over_dense: Mean::of(pairs.iter().map(|[own, dense]| nats(own) - nats(dense))),
            divergence: Mean::of(pairs.iter().map(|[own, _]| share(own.divergence, own))),
            agreement: Mean::of(pairs.iter().map(|[own, _]| share(own.agreed as f64, own))),
        })
    }
}

impl Asked {
    fn new((task, length): &(String, usize), pairs: &[[&Record; 2]]) -> Option<Self> {
        let found = |record: &Record| f64::from(u8::from(record.found == Some(true)));
        let mut kept = Kept::default();
        pairs.iter().for_each(|[own, _]| kept += own.kept);
        Some(Self {
            task: task.clone(),
            length: *length,
            compared: Compared::new(pairs, false)?,
            found: Mean::of(pairs.iter().map(|[own, _]| found(own))),
            found_over_dense: Mean::of(pairs.iter().map(|[own, dense]| found(own) - found(dense))),
            hidden_ratio: kept.all().hidden_ratio(),
            kv_bytes_of_dense: kept.all().of_dense(),
        })
    }
}

impl Summary {
    /// `asked`: each kind of question with its length.
    pub fn new(model: &str, methods: &[Method], asked: &[(String, usize)], ledger: &Ledger) -> Result<Self> {
        let rows = methods.iter().map(|method| Row::new(method, asked, ledger));
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
        write_file(&folder.join("report.md"), &tables::markdown(self))
    }
}

impl Row {
    fn new(method: &Method, asked: &[(String, usize)], ledger: &Ledger) -> Result<Self> {
        let name = method.name();
        let (prose, copy) = (ledger.of(&name, "prose")?, ledger.of(&name, "copy")?);
        let tasks = asked.iter().map(|(task, length)| {
            let pairs = ledger.of(&name, &format!("{task} {length}"))?;
            Ok(Asked::new(&(task.clone(), *length), &pairs))
        });
        let tasks: Vec<Asked> = tasks.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        let mut kept = Kept::default();
        prose.iter().for_each(|[record, _]| kept += record.kept);
        let (all, count) = (kept.all(), prose.len().max(1) as f64);
        let part = |held: Held| Part {
            hidden_ratio: held.hidden_ratio(),
            kv_bytes: held.bytes as f64 / count,
            kv_bytes_of_dense: held.of_dense(),
            entries_a_list: held.entries_a_list(),
        };
        let held = (!prose.is_empty()).then_some(all);
        let sum = |pairs: &[[&Record; 2]], value: fn(&Record) -> f64| -> f64 {
            pairs.iter().map(|[record, _]| value(record)).sum()
        };
        let perplexity = |pairs: &[[&Record; 2]]| {
            let tokens = sum(pairs, |record| record.predicted as f64);
            (tokens > 0.0).then(|| (sum(pairs, |record| record.score) / tokens).exp())
        };
        let [prose_beside, copied] = [&prose, &copy].map(|pairs| Compared::new(pairs, true));
        let over_dense = prose_beside.as_ref().map(|prose| prose.nats_over_dense);
        Ok(Self {
            method: name,
            family: method.family,
            perplexity: perplexity(&prose),
            nll_over_dense: over_dense.map(|mean| mean.mean),
            standard_error: over_dense.map(|mean| mean.standard_error),
            copy: perplexity(&copy),
            hidden_ratio: held.map(|held| held.hidden_ratio()),
            kv_bytes: held.map(|held| held.bytes as f64 / count),
            kv_bytes_of_dense: held.map(|held| held.of_dense()),
            apart: (kept.sliding.lists > 0).then(|| Apart {
                whole: part(kept.whole),
                sliding: part(kept.sliding),
            }),
            tokens_per_second: (!prose.is_empty())
                .then(|| sum(&prose, |record| record.tokens as f64) / sum(&prose, |record| record.seconds)),
            passkey: tasks
                .iter()
                .filter(|asked| asked.task == "passkey")
                .map(Found::of)
                .collect(),
            prose: prose_beside,
            copied,
            tasks,
        })
    }
}

impl Found {
    fn of(asked: &Asked) -> Self {
        let tries = asked.found.samples;
        Self {
            length: asked.length,
            found: (asked.found.mean * tries as f64).round() as usize,
            tries,
            nll: asked.compared.nats.mean,
            hidden_ratio: asked.hidden_ratio,
        }
    }
}
