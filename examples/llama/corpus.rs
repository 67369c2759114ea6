//! Windows of a text, plain and repeated, and a model's likelihood of them.

use std::fs;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use candle_core::{Device, Tensor, D};

use crate::finite;
use crate::load::text::Start;
use crate::load::Checkpoint;
use crate::model::Llama;
use crate::weights::Pass;

/// Rows of logits held at once: 64 rows of 50k f32 are 12 MiB, and three such buffers live together.
const LOGIT_ROWS: usize = 64;

/// The tokens that a model reads; predictions from `first` on count.
///
/// A checkpoint's BOS stands in place of the first token of a text's window. So a window is as long as without BOS, and
/// the same tokens are predicted; BOS itself never is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    pub tokens: Vec<u32>,
    /// The first token that is predicted, at least 1.
    first: usize,
    copy: bool,
}

impl Window {
    /// The tokens; all but the first count.
    pub fn prose(tokens: &[u32], start: &Start) -> Self {
        Self {
            tokens: start.over(tokens),
            first: start.count().max(1),
            copy: false,
        }
    }

    /// Its first half twice: `[A][A again]`, with one BOS before both. The second half counts.
    pub fn copy(tokens: &[u32], start: &Start) -> Self {
        let half = (tokens.len() - start.count()) / 2;
        Self {
            tokens: start.over_twice(tokens),
            first: (start.count() + half).max(1),
            copy: true,
        }
    }

    /// Whether it is a passage twice.
    pub fn is_copy(&self) -> bool {
        self.copy
    }

    /// How many predictions count.
    pub fn predicted(&self) -> usize {
        self.tokens.len() - self.first
    }

    /// The summed negative log likelihood of the tokens that count, given the hidden states `(1, N, hidden)`.
    pub fn nll(&self, model: &Llama, hidden: &Tensor) -> Result<f64> {
        self.nll_as(model, hidden, Pass::Prompt)
    }

    /// As [`Self::nll`], by the matrix for this pass.
    pub fn nll_as(&self, model: &Llama, hidden: &Tensor, pass: Pass) -> Result<f64> {
        let mut sum = 0.0;
        let end = self.tokens.len();
        for first in (self.first..end).step_by(LOGIT_ROWS) {
            let rows = LOGIT_ROWS.min(end - first);
            // Row t predicts token t + 1.
            sum += nll(
                &logits_as(model, hidden, first - 1, rows, pass)?,
                &self.tokens[first..first + rows],
            )?;
        }
        Ok(sum)
    }
}

/// Logits `(n, vocabulary)` of rows `first..first + n` of hidden states `(1, N, hidden)`; both are finite or an error.
fn logits_as(model: &Llama, hidden: &Tensor, first: usize, n: usize, pass: Pass) -> Result<Tensor> {
    let logits = model.logits_as(hidden, first, n, pass)?;
    // A quantized product reads NaN as 0, so logits alone do not show it.
    finite::check("hidden state", &hidden.narrow(1, first, n)?.squeeze(0)?, first)?;
    finite::check("logits", &logits, first)?;
    Ok(logits)
}

/// Refuses hidden states `(1, N, hidden)` with NaN in any row, or NaN logits of the last one.
pub fn check(model: &Llama, hidden: &Tensor) -> Result<()> {
    let n = hidden.dim(1)?;
    finite::check("hidden state", &hidden.squeeze(0)?, 0)?;
    finite::check("logits", &model.logits(hidden, n - 1, 1)?, n - 1)
}

/// Σ log Σ exp(logits) - logits[target] over rows `(n, vocabulary)`; rows in f32, their sum in f64.
fn nll(logits: &Tensor, targets: &[u32]) -> Result<f64> {
    let targets = Tensor::new(targets, &Device::Cpu)?.unsqueeze(1)?;
    let picked = logits.gather(&targets, D::Minus1)?.squeeze(1)?;
    let losses = (logits.log_sum_exp(D::Minus1)? - picked)?;
    Ok(losses.to_vec1::<f32>()?.into_iter().map(f64::from).sum())
}

/// Reads a text file, which must not be empty.
pub fn read(file: &Path) -> Result<String> {
    let text = fs::read_to_string(file).with_context(|| format!("text {}", file.display()))?;
    ensure!(
        !text.trim().is_empty(),
        "text {}: expected some text, got an empty file; give another with --text",
        file.display()
    );
    Ok(text)
}

/// Refuses windows that the model was not made for, or that have no place for two tokens after `start`.
pub fn check_context(context: usize, checkpoint: &Checkpoint, start: &Start) -> Result<()> {
    let (least, limit) = (2 + start.count(), checkpoint.config.context_length);
    ensure!(
        (least..=limit).contains(&context),
        "context: expected {least} to {limit}, the model's context length, got {context}; change --context"
    );
    Ok(())
}
