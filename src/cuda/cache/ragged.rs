//! Batch rows of different numbers of tokens in one set of buffers, for steps of one token at most a row.

use super::{DeviceLists, SITS_OUT};
use crate::cuda::on_gpu::{Gpu, GpuElement};
use candle_core::Result;

/// Where batch rows differ.
#[derive(Clone)]
pub(super) struct Ragged {
    /// Tokens of each row.
    pub tokens: Vec<usize>,
    /// Whether a row takes the token of the step that runs.
    takes: Vec<bool>,
}

impl Ragged {
    /// Rows of these numbers of tokens; None where all have equally many.
    pub fn of(tokens: Vec<usize>) -> Option<Self> {
        let differ = tokens.iter().any(|count| *count != tokens[0]);
        differ.then(|| Self {
            takes: vec![true; tokens.len()],
            tokens,
        })
    }
}

impl<G: Gpu, T: GpuElement> DeviceLists<G, T> {
    /// Tokens of each batch row.
    pub fn row_lens(&self) -> Vec<usize> {
        match &self.ragged {
            Some(rows) => rows.tokens.clone(),
            None => vec![self.seq_len; self.batch],
        }
    }

    pub fn is_ragged(&self) -> bool {
        self.ragged.is_some()
    }

    /// Sets the numbers of tokens of all rows.
    pub(super) fn set_row_lens(&mut self, tokens: Vec<usize>) {
        self.seq_len = tokens.iter().copied().max().unwrap_or(0);
        self.ragged = Ragged::of(tokens);
        self.state.seen = None;
    }

    /// Runs `step`, which appends one token, for the batch rows that take one; it leaves the others as they are, and
    /// their output rows zeros. No bias and no dropout, which count tokens alike in all rows.
    ///
    /// # Errors
    /// An error of `step` or of the device.
    pub fn step<R>(&mut self, gpu: &G, takes: &[bool], step: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        if self.ragged.is_none() && takes.iter().all(|takes| *takes) {
            return step(self);
        }
        self.ragged = Some(Ragged {
            tokens: self.row_lens(),
            takes: takes.to_vec(),
        });
        self.upload_seen(gpu)?;
        let result = step(self);
        let tokens = self.row_lens();
        self.set_row_lens(tokens);
        result
    }

    /// Goes on in the step of lists that these are a copy of.
    pub(super) fn step_as(&mut self, gpu: &G, lists: &Self) -> Result<()> {
        self.ragged.clone_from(&lists.ragged);
        self.upload_seen(gpu)
    }

    /// Tells the kernels the rows' numbers of tokens, and which rows sit out.
    fn upload_seen(&mut self, gpu: &G) -> Result<()> {
        if let Some(rows) = &self.ragged {
            let word = |(tokens, takes): (&usize, &bool)| if *takes { *tokens as u32 } else { SITS_OUT };
            let words: Vec<u32> = rows.tokens.iter().zip(&rows.takes).map(word).collect();
            self.state.seen = Some(gpu.upload(&words)?);
        }
        Ok(())
    }

    /// Counts tokens that were appended to every row, or one to each row that takes one.
    ///
    /// # Errors
    /// An error of the device.
    pub(super) fn count(&mut self, gpu: &G, tokens: usize) -> Result<()> {
        self.state.pages.count(tokens);
        let Some(rows) = &mut self.ragged else {
            self.seq_len += tokens;
            return Ok(());
        };
        for (count, takes) in rows.tokens.iter_mut().zip(&rows.takes) {
            *count += if *takes { tokens } else { 0 };
        }
        self.seq_len = rows.tokens.iter().copied().max().unwrap_or(0);
        self.upload_seen(gpu)
    }

    /// Whether some row takes no token in the step that runs.
    pub(super) fn some_sit_out(&self) -> bool {
        self.ragged.as_ref().is_some_and(|rows| rows.takes.contains(&false))
    }
}
