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

/// Dimensions that are multiplied at once.
const DIMS: usize = 4;

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

/// Keys by dimension, so that a query meets a register of tokens at once and nothing is summed across one: a logit is
/// the same sum in the same order wherever its token lies.
#[derive(Clone, Debug, Default)]
pub(crate) struct Keys<A> {
    /// (D, stride), dimensions padded with zeros to a multiple of [`DIMS`].
    data: Vec<A>,
    stride: usize,
    /// The token of column 0.
    first: usize,
}

impl<A: Accumulator> Keys<A> {
    /// Takes in the keys of `tokens` of them from token `first` on, in place of what was there.
    pub fn fill<'r, T: Element<Acc = A>>(&mut self, first: usize, tokens: usize, rows: impl Iterator<Item = &'r [T]>) {
        self.first = first;
        // Every window can be read to the end of its last register.
        self.stride = tokens + LANES;
        self.data.clear();
        let mut row_buffer = Vec::new();
        for (column, row) in rows.take(tokens).enumerate() {
            self.data
                .resize(row.len().next_multiple_of(DIMS) * self.stride, A::ZERO);
            row_buffer.resize(row.len(), A::ZERO);
            T::widen(row, &mut row_buffer);
            for (target, x) in self.data[column..].iter_mut().step_by(self.stride).zip(&row_buffer) {
                *target = *x;
            }
        }
    }

    /// `query . key` of `logits.len()` tokens from `token` on, a multiple of [`LANES`]; what lies beyond the last token
    /// means nothing. The query is padded like the keys.
    #[inline(always)]
    fn dot<S: Simd>(&self, simd: S, query: &[A], token: usize, logits: &mut [A]) {
        logits.fill(A::ZERO);
        let start = token - self.first;
        let rows = self.data.chunks_exact(DIMS * self.stride);
        for (rows, weights) in rows.zip(query.chunks_exact(DIMS)) {
            let row = |dim: usize| &rows[dim * self.stride + start..][..logits.len()];
            let rows = [row(0), row(1), row(2), row(3)];
            A::add_weighted(simd, logits, rows, [[weights[0], weights[1], weights[2], weights[3]]]);
        }
    }
}

/// The queries of one group and the keys that they look at.
pub(crate) struct Observation<'a, Q: Element> {
    pub local: Local,
    /// Of each head of the group, from token `first_query` on.
    pub queries: &'a [HeadRows<'a, Q>],
    pub first_query: usize,
    pub keys: &'a Keys<Q::Acc>,
    /// From token 0 on: at least those sinks that lie before a row's window.
    pub sink_keys: &'a Keys<Q::Acc>,
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
        // Sinks and window each begin at a register.
        let window_at = sinks.next_multiple_of(LANES);
        let columns = window_at + (row + 1 - start);
        let Scratch { query, weights } = scratch;
        weights.resize(columns.next_multiple_of(LANES), Q::Acc::ZERO);
        let factor = Q::Acc::of(scale * std::f64::consts::LOG2_E);
        for queries in self.queries {
            let source = queries.row(row - self.first_query);
            query.clear();
            query.resize(source.len().next_multiple_of(DIMS), Q::Acc::ZERO);
            Q::widen(source, &mut query[..source.len()]);
            query.iter_mut().for_each(|x| *x *= factor);
            let (sink_logits, logits) = weights.split_at_mut(window_at);
            if sinks > 0 {
                self.sink_keys.dot(simd, query, 0, sink_logits);
                sink_logits[sinks..].fill(Q::Acc::NEG_INFINITY);
            }
            self.keys.dot(simd, query, start, logits);
            logits[row + 1 - start..].fill(Q::Acc::NEG_INFINITY);
            let inverse = Q::Acc::ONE / exponentials(simd, weights);
            let weights = &weights[window_at + counted.start - start..];
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
        key_buffer.fill(
            first_key,
            rows.end - first_key,
            (first_key..rows.end).map(|token| keys.row(token)),
        );
        let sinks = self.local.sinks.min(rows.end);
        sink_buffer.fill(0, sinks, (0..sinks).map(|token| keys.row(token)));
        let queries: Vec<_> = (kv_head * group..(kv_head + 1) * group)
            .map(|head| self.q.head(batch, head))
            .collect();
        let observation = Observation {
            local: self.local,
            queries: &queries,
            first_query: 0,
            keys: key_buffer,
            sink_keys: sink_buffer,
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
    keys: Keys<A>,
    sinks: Keys<A>,
    value: Vec<A>,
    scratch: Scratch<A>,
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
        let past = (stale..recent.rows).map(|row| recent.keys.row(row));
        let rows = past.chain((0..chunk.count).map(|row| chunk.keys.row(row)));
        let (mut keys, mut sinks) = (Keys::default(), Keys::default());
        keys.fill(base, end - base, rows);
        sinks.fill(0, sink_keys.len() / dim, sink_keys.chunks_exact(dim));
        let mut masses = self.masses.clone();
        masses.resize(end - base, S::Acc::ZERO);
        let observation = Observation {
            local,
            queries: chunk.queries,
            first_query: first,
            keys: &keys,
            sink_keys: &sinks,
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
