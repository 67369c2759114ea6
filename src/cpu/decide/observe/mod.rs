//! Deciding by observed mass: the weights that the rows of a token's window gave it, times the norm of its value.
//! O(N·(W + sinks)·D) per query head.
//!
//! A row's weights and the order in which a token's mass is summed (row by row, head by head) never depend on the
//! split. So any split into blocks, chunks or single tokens decides alike, to the last bit.

mod cached;
mod keys;
mod masses;

pub(crate) use cached::{Chunk, Observed, Recent};

use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::panels;
use crate::cpu::number::panels::PANEL;
use crate::cpu::number::rows::RowGrid;
use crate::cpu::work::tasks::for_each_task;
use crate::instructions::arch;
use crate::problem::Problem;
use keys::Keys;
use masses::{MassScratch, Observation};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// The least number of tokens that one task scores: with a window of 32, a thirty-second of the rows is computed twice.
const BLOCK: usize = 512;

/// The columns that a row reads, and the factor on its logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Local {
    /// The row itself and the tokens before it: at least 2 tokens.
    pub window: usize,
    /// The number of first tokens, which every row reads.
    pub sinks: usize,
    /// The factor on `query . key`.
    pub scale: f64,
}

impl Local {
    /// The first token of row `row`'s window.
    pub fn start(&self, row: usize) -> usize {
        (row + 1).saturating_sub(self.window)
    }

    /// The first panel that the rows of `row`'s panel read, apart from sinks.
    pub fn first_panel(&self, row: usize) -> usize {
        self.start(row / PANEL * PANEL) / PANEL
    }

    /// The rows whose weights count for `tokens`, at least one, of a sequence long enough for all of them.
    fn rows(&self, tokens: &Range<usize>) -> Range<usize> {
        tokens.start + self.window / 2..tokens.end + self.window - 1
    }
}

/// Changes masses to scores: multiplies them by `‖value‖`.
fn weigh<'v, T: Element>(masses: &mut [T::Acc], values: impl Iterator<Item = &'v [T]>) {
    arch().dispatch(Weigh { masses, values })
}

/// [`weigh`] as code for one instruction set.
struct Weigh<'m, A, I> {
    masses: &'m mut [A],
    values: I,
}

impl<'v, T: Element, I: Iterator<Item = &'v [T]>> WithSimd for Weigh<'_, T::Acc, I> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut wide = Vec::new();
        for (mass, value) in self.masses.iter_mut().zip(self.values) {
            let value = widened(value, &mut wide);
            *mass *= panels::dot(simd, value, value).root();
        }
    }
}

/// The row itself, or its copy in `buffer` where it needs widening.
fn widened<'r, T: Element>(row: &'r [T], buffer: &'r mut Vec<T::Acc>) -> &'r [T::Acc] {
    match T::as_acc(row) {
        Some(row) => row,
        None => {
            buffer.resize(row.len(), T::Acc::ZERO);
            T::widen(row, buffer);
            buffer
        }
    }
}

/// The inputs of one call's scores.
#[derive(Clone, Copy)]
pub(crate) struct ObserveInput<'a, T> {
    pub q: RowGrid<'a, T>,
    pub k: RowGrid<'a, T>,
    pub v: RowGrid<'a, T>,
    pub problem: Problem,
    pub local: Local,
}

impl<T: Element> ObserveInput<'_, T> {
    /// The number of tokens of each KV head that a whole window has seen and that a row has left behind.
    pub fn decided(&self) -> usize {
        self.problem.pairs().saturating_sub(self.local.window)
    }

    /// The scores (B, Hk, decided) of the KV heads that are `wanted(batch, kv_head)`; zeros for other heads.
    pub fn scores(&self, wanted: impl Fn(usize, usize) -> bool) -> Vec<T::Acc> {
        let Problem { batch, kv_heads, .. } = self.problem;
        let decided = self.decided();
        let mut scores = vec![T::Acc::ZERO; batch * kv_heads * decided];
        if decided == 0 {
            return scores;
        }
        let block = BLOCK.max(2 * self.local.window);
        let mut tasks = Vec::new();
        for (index, head) in scores.chunks_mut(decided).enumerate() {
            let at = (index / kv_heads, index % kv_heads);
            if wanted(at.0, at.1) {
                let blocks = head.chunks_mut(block).enumerate();
                tasks.extend(blocks.map(|(block_index, scores)| (at, block_index * block, scores)));
            }
        }
        for_each_task(tasks, ScoreWorker::default, |worker, (at, first, scores)| {
            self.score_block(at, first, scores, worker)
        });
        scores
    }

    fn score_block(&self, at: (usize, usize), first: usize, scores: &mut [T::Acc], worker: &mut ScoreWorker<T::Acc>) {
        let ((batch, kv_head), group) = (at, self.problem.group());
        let tokens = first..first + scores.len();
        let rows = self.local.rows(&tokens);
        let keys = self.k.head(batch, kv_head);
        let ScoreWorker {
            keys: all,
            sinks,
            scratch,
        } = worker;
        all.fill(
            self.local.first_panel(rows.start),
            self.local.start(rows.start)..rows.end,
            |token| {
                keys.prefetch(token);
                keys.row(token)
            },
        );
        sinks.fill(0, 0..self.local.sinks.min(rows.end), |token| keys.row(token));
        let queries: Vec<_> = (kv_head * group..(kv_head + 1) * group)
            .map(|head| self.q.head(batch, head))
            .collect();
        let observation = Observation {
            local: self.local,
            queries: &queries,
            first_query: 0,
            keys: all,
            sink_keys: sinks,
        };
        observation.add(rows, first, scores, scratch);
        let values = self.v.head(batch, kv_head);
        let value = |token| {
            values.prefetch(token);
            values.row(token)
        };
        weigh(scores, tokens.map(value));
    }
}

/// Buffers of one thread.
#[derive(Default)]
struct ScoreWorker<A: Accumulator> {
    keys: Keys<A>,
    sinks: Keys<A>,
    scratch: MassScratch<A>,
}
