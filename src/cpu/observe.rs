//! Deciding by observed mass: what the rows of a token's window gave it, times the norm of its value. O(N·(W + sinks)·D)
//! per query head.
//!
//! A row's weights and the order in which a token's mass is summed (row by row, head by head) are the same wherever it is
//! done, so that any split into blocks, chunks or single tokens decides alike, to the last bit.

use super::forward::for_each_task;
use super::{dot, Accumulator, Element, HeadRows, Rows};
use crate::config::{HeadTest, MergeStrategy};
use crate::problem::Problem;
use pulp::{Arch, Simd, WithSimd};
use std::ops::Range;

/// Columns are padded to a multiple of this: one AVX-512 or two AVX2 registers of f32.
const LANES: usize = 16;

/// Tokens that one task scores at the least: with a window of 32, a sixteenth of the rows is seen twice.
const BLOCK: usize = 256;

/// Which columns a row looks at, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Local {
    /// The row itself and the tokens before it: at least 2 in all.
    pub window: usize,
    /// The first tokens, which every row looks at.
    pub sinks: usize,
    /// On `query . key`.
    pub scale: f64,
}

impl Local {
    /// The first token of row `row`'s window.
    pub fn start(&self, row: usize) -> usize {
        (row + 1).saturating_sub(self.window)
    }

    /// The rows whose weights count for `tokens`, at least one, of a sequence long enough for all of them.
    fn rows(&self, tokens: &Range<usize>) -> Range<usize> {
        tokens.start + self.window / 2..tokens.end + self.window - 1
    }
}

/// The score below which a KV head's token is hidden: the least of its query heads' thresholds, since all must agree;
/// None where one of them is off.
pub(crate) fn threshold(tests: impl IntoIterator<Item = HeadTest>) -> Option<f64> {
    let least = |least: f64, test: HeadTest| match test.strategy {
        MergeStrategy::Off => None,
        _ => Some(least.min(test.threshold)),
    };
    tests.into_iter().try_fold(f64::INFINITY, least)
}

/// `mass · ‖value‖`.
pub(crate) fn score<T: Element>(mass: T::Acc, value: &[T], buffer: &mut [T::Acc]) -> T::Acc {
    T::widen(value, buffer);
    mass * dot(buffer, buffer).root()
}

/// The queries of one group and the keys that they look at.
pub(crate) struct Observation<'a, Q: Element> {
    pub local: Local,
    /// Of each head of the group, from token `first_query` on.
    pub queries: &'a [HeadRows<'a, Q>],
    pub first_query: usize,
    /// From token `first_key` on.
    pub keys: HeadRows<'a, Q::Acc>,
    pub first_key: usize,
    /// From token 0 on: at least those sinks that lie before a row's window.
    pub sink_keys: HeadRows<'a, Q::Acc>,
}

/// Buffers of one row.
#[derive(Default)]
pub(crate) struct Scratch<A> {
    query: Vec<A>,
    weights: Vec<A>,
}

impl<Q: Element> Observation<'_, Q> {
    /// Adds the weights of `rows` to the masses of the tokens from `base` on, where they count.
    pub fn add(&self, rows: Range<usize>, base: usize, masses: &mut [Q::Acc], scratch: &mut Scratch<Q::Acc>) {
        Arch::new().dispatch(Add {
            observation: self,
            rows,
            base,
            masses,
            scratch,
        })
    }

    #[inline(always)]
    fn add_row<S: Simd>(
        &self,
        simd: S,
        row: usize,
        (base, masses): (usize, &mut [Q::Acc]),
        scratch: &mut Scratch<Q::Acc>,
    ) {
        let Local { window, sinks, scale } = self.local;
        let start = self.local.start(row);
        let sinks = sinks.min(start);
        // Token t counts the rows from t + window / 2 on.
        let counted = start.max(base)..(row + 1).saturating_sub(window / 2).min(base + masses.len());
        if counted.is_empty() {
            return;
        }
        let columns = sinks + row + 1 - start;
        let Scratch { query, weights } = scratch;
        query.resize(self.keys.dim, Q::Acc::ZERO);
        weights.clear();
        weights.resize(columns.next_multiple_of(LANES), Q::Acc::NEG_INFINITY);
        let factor = Q::Acc::of(scale * std::f64::consts::LOG2_E);
        for queries in self.queries {
            Q::widen(queries.row(row - self.first_query), query);
            query.iter_mut().for_each(|x| *x *= factor);
            for (sink, logit) in weights[..sinks].iter_mut().enumerate() {
                *logit = Q::Acc::dot(simd, query, self.sink_keys.row(sink));
            }
            for (token, logit) in (start..).zip(&mut weights[sinks..columns]) {
                *logit = Q::Acc::dot(simd, query, self.keys.row(token - self.first_key));
            }
            weights[columns..].fill(Q::Acc::NEG_INFINITY);
            let inverse = Q::Acc::ONE / exponentials(simd, weights);
            let weights = &weights[sinks + counted.start - start..];
            for (mass, weight) in masses[counted.start - base..counted.end - base].iter_mut().zip(weights) {
                *mass += *weight * inverse;
            }
        }
    }
}

/// Turns logits (base 2) into weights relative to their maximum and returns their sum; a NaN makes the sum NaN.
#[inline(always)]
fn exponentials<A: Accumulator, S: Simd>(simd: S, weights: &mut [A]) -> A {
    let mut max = [A::NEG_INFINITY; LANES];
    for chunk in weights.chunks_exact(LANES) {
        A::raise(simd, &mut max, chunk);
    }
    let max = max.into_iter().fold(A::NEG_INFINITY, A::larger);
    let mut sums = [A::ZERO; LANES];
    for chunk in weights.chunks_exact_mut(LANES) {
        for lane in 0..LANES {
            chunk[lane] = (chunk[lane] - max).exp2_nonpositive();
            sums[lane] += chunk[lane];
        }
    }
    sums.into_iter().fold(A::ZERO, |sum, x| sum + x)
}

/// [`Observation::add`] as code for one instruction set.
struct Add<'s, 'o, Q: Element> {
    observation: &'s Observation<'o, Q>,
    rows: Range<usize>,
    base: usize,
    masses: &'s mut [Q::Acc],
    scratch: &'s mut Scratch<Q::Acc>,
}

impl<Q: Element> WithSimd for Add<'_, '_, Q> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for row in self.rows {
            self.observation
                .add_row(simd, row, (self.base, self.masses), self.scratch);
        }
    }
}

/// What the scores of one call read.
#[derive(Clone, Copy)]
pub(crate) struct ObserveInput<'a, T> {
    pub q: Rows<'a, T>,
    pub k: Rows<'a, T>,
    pub v: Rows<'a, T>,
    pub problem: Problem,
    pub local: Local,
}

impl<T: Element> ObserveInput<'_, T> {
    /// How many tokens of each KV head are seen by a whole window and then left behind by a row.
    pub fn decided(&self) -> usize {
        self.problem.pairs().saturating_sub(self.local.window)
    }

    /// The scores (B, Hk, decided) of the KV heads that are `wanted(batch, kv_head)`; zeros for others.
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
        for_each_task(tasks, Worker::default, |worker, (at, first, scores)| {
            self.score_block(at, first, scores, worker)
        });
        scores
    }

    fn score_block(&self, at: (usize, usize), first: usize, scores: &mut [T::Acc], worker: &mut Worker<T::Acc>) {
        let ((batch, kv_head), group) = (at, self.problem.group());
        let tokens = first..first + scores.len();
        let rows = self.local.rows(&tokens);
        let keys = self.k.head(batch, kv_head);
        let Worker {
            keys: key_buffer,
            sinks: sink_buffer,
            value,
            scratch,
        } = worker;
        let first_key = self.local.start(rows.start);
        let queries: Vec<_> = (kv_head * group..(kv_head + 1) * group)
            .map(|head| self.q.head(batch, head))
            .collect();
        let observation = Observation {
            local: self.local,
            queries: &queries,
            first_query: 0,
            keys: widened(keys, first_key..rows.end, key_buffer),
            first_key,
            sink_keys: widened(keys, 0..self.local.sinks.min(rows.end), sink_buffer),
        };
        observation.add(rows, first, scores, scratch);
        let values = self.v.head(batch, kv_head);
        value.resize(values.dim, T::Acc::ZERO);
        for (mass, token) in scores.iter_mut().zip(tokens) {
            *mass = score(*mass, values.row(token), value);
        }
    }
}

/// Buffers of one thread.
#[derive(Default)]
struct Worker<A> {
    keys: Vec<A>,
    sinks: Vec<A>,
    value: Vec<A>,
    scratch: Scratch<A>,
}

/// Rows `range` of a head in the accumulator's dtype, through `buffer` where they need widening.
fn widened<'a, T: Element>(
    rows: HeadRows<'a, T>,
    range: Range<usize>,
    buffer: &'a mut Vec<T::Acc>,
) -> HeadRows<'a, T::Acc> {
    let rows = rows.skip(range.start);
    if let Some(data) = T::as_acc(rows.data) {
        return HeadRows {
            data,
            stride: rows.stride,
            dim: rows.dim,
        };
    }
    buffer.resize(range.len() * rows.dim, T::Acc::ZERO);
    for (row, target) in buffer.chunks_exact_mut(rows.dim).enumerate() {
        T::widen(rows.row(row), target);
    }
    HeadRows::compact(buffer, rows.dim)
}

/// What a cache's list keeps to go on observing.
#[derive(Clone)]
pub(crate) struct Observed<S: Element> {
    /// The masses so far of the last min(window, seq_len) tokens.
    pub masses: Vec<S::Acc>,
    /// The keys of the first min(sinks, seq_len) tokens.
    pub sink_keys: Vec<S>,
}

/// The new tokens of one list.
#[derive(Clone, Copy)]
pub(crate) struct Chunk<'a, Q: Element, S: Element> {
    /// Of each head that shares the list.
    pub queries: &'a [HeadRows<'a, Q>],
    pub keys: HeadRows<'a, S>,
    pub values: HeadRows<'a, S>,
    /// New tokens, at least 1.
    pub count: usize,
    /// On `query . key`.
    pub scale: f64,
}

/// The last tokens before a chunk, raw: the latest of them, in order.
#[derive(Clone, Copy)]
pub(crate) struct Recent<'a, S> {
    pub keys: HeadRows<'a, S>,
    pub values: HeadRows<'a, S>,
    pub rows: usize,
}

impl<S: Element> Observed<S> {
    pub fn new() -> Self {
        Self {
            masses: Vec::new(),
            sink_keys: Vec::new(),
        }
    }

    pub fn bytes(&self) -> usize {
        self.masses.len() * size_of::<S::Acc>() + self.sink_keys.len() * size_of::<S>()
    }

    /// What is kept after `chunk`, which begins at token `first`; `settle(t, score)` is called for each token whose
    /// window is complete with it.
    pub fn after<Q: Element<Acc = S::Acc>>(
        &self,
        local: Local,
        (first, recent): (usize, Recent<S>),
        chunk: &Chunk<Q, S>,
        mut settle: impl FnMut(usize, S::Acc),
    ) -> Self {
        let (dim, end) = (chunk.keys.dim, first + chunk.count);
        let base = first - self.masses.len();
        let stale = recent.rows - self.masses.len();
        // A sink that a row finds outside of its window came with this chunk or before.
        let mut sink_keys = self.sink_keys.clone();
        for row in first..end.min(local.sinks) {
            sink_keys.extend_from_slice(chunk.keys.row(row - first));
        }
        let mut keys = vec![S::Acc::ZERO; (end - base) * dim];
        let past = (stale..recent.rows).map(|row| recent.keys.row(row));
        let rows = past.chain((0..chunk.count).map(|row| chunk.keys.row(row)));
        rows.zip(keys.chunks_exact_mut(dim))
            .for_each(|(row, target)| S::widen(row, target));
        let mut masses = self.masses.clone();
        masses.resize(end - base, S::Acc::ZERO);
        let wide_sinks = super::list::widened(&sink_keys);
        let observation = Observation {
            local,
            queries: chunk.queries,
            first_query: first,
            keys: HeadRows::compact(&keys, dim),
            first_key: base,
            sink_keys: HeadRows::compact(&wide_sinks, dim),
        };
        observation.add(first..end, base, &mut masses, &mut Scratch::default());
        let mut buffer = vec![S::Acc::ZERO; dim];
        for token in local.start(first)..(end + 1).saturating_sub(local.window) {
            let value = match token.checked_sub(first) {
                Some(row) => chunk.values.row(row),
                None => recent.values.row(token - base + stale),
            };
            settle(token, score(masses[token - base], value, &mut buffer));
        }
        masses.drain(..(end - base).saturating_sub(local.window));
        Self { masses, sink_keys }
    }
}
