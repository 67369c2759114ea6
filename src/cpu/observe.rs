//! Deciding by observed mass: what the rows of a token's window gave it, times the norm of its value. O(N·(W + sinks)·D)
//! per query head.
//!
//! A row's weights and the order in which a token's mass is summed (row by row, head by head) are the same wherever it is
//! done, so that any split into blocks, chunks or single tokens decides alike, to the last bit.

use super::forward::for_each_task;
use super::{arch, dot, Accumulator, Element, HeadRows, Rows};
use crate::config::{HeadTest, MergeStrategy};
use crate::problem::Problem;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Columns are padded to a multiple of this: one AVX-512 or two AVX2 registers of f32.
const LANES: usize = 16;

/// Dimensions that are multiplied at once.
const DIMS: usize = 4;

/// Rows whose logits are summed at once: each register of keys is read for all of them.
const TOGETHER: usize = 4;

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
        // A register of tokens at a time, so that stores do not go to another cache line each.
        let mut some: Vec<A> = Vec::new();
        let mut rows = rows.take(tokens).peekable();
        let mut column = 0;
        while let Some(dim) = rows.peek().map(|row| row.len()) {
            self.data.resize(dim.next_multiple_of(DIMS) * self.stride, A::ZERO);
            some.resize(dim * LANES, A::ZERO);
            for (row, target) in rows.by_ref().take(LANES).zip(some.chunks_exact_mut(dim)) {
                T::widen(row, target);
            }
            let count = LANES.min(tokens - column);
            for (d, target) in self.data.chunks_exact_mut(self.stride).take(dim).enumerate() {
                for (x, row) in target[column..][..count].iter_mut().zip(some.chunks_exact(dim)) {
                    *x = row[d];
                }
            }
            column += LANES;
        }
    }

    /// `query . key` of G queries, (G, D) padded like the keys, and the `columns` tokens from `token` on, a multiple of
    /// [`LANES`]; what lies beyond the last token means nothing. Each logit is summed dimension by dimension.
    #[inline(always)]
    fn dots<S: Simd, const G: usize>(&self, simd: S, queries: &[A], token: usize, columns: usize, logits: &mut [A]) {
        logits.fill(A::ZERO);
        let (start, dim) = (token - self.first, queries.len() / G);
        let rows = self.data.chunks_exact(DIMS * self.stride);
        for (index, rows) in rows.take(dim / DIMS).enumerate() {
            let row = |d: usize| &rows[d * self.stride + start..][..columns];
            let rows = [row(0), row(1), row(2), row(3)];
            let mut weights = [[A::ZERO; DIMS]; G];
            for (g, weights) in weights.iter_mut().enumerate() {
                weights.copy_from_slice(&queries[g * dim + index * DIMS..][..DIMS]);
            }
            A::add_weighted(simd, logits, rows, weights);
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

/// Buffers of the rows that are seen to together.
#[derive(Default)]
pub(crate) struct Scratch<A> {
    queries: Vec<A>,
    /// Logits of the sinks and of the tokens in any of the rows' windows.
    sinks: Vec<A>,
    window: Vec<A>,
    /// One row's weights, its sinks' and its own window's, each from a register's start: so its sum is the same
    /// whichever rows it is seen to with.
    weights: Vec<A>,
}

impl<Q: Element> Observation<'_, Q> {
    /// Adds the weights of `rows` to the masses of the tokens from `base` on, where they count.
    pub fn add(&self, rows: Range<usize>, base: usize, masses: &mut [Q::Acc], scratch: &mut Scratch<Q::Acc>) {
        arch().dispatch(Add {
            observation: self,
            rows,
            base,
            masses,
            scratch,
        })
    }

    /// Adds the weights of G rows from `first` on.
    #[inline(always)]
    fn add_rows<S: Simd, const G: usize>(
        &self,
        simd: S,
        first: usize,
        (base, masses): (usize, &mut [Q::Acc]),
        scratch: &mut Scratch<Q::Acc>,
    ) {
        let last = first + G - 1;
        let (start, sinks) = (self.local.start(first), self.local.sinks.min(self.local.start(last)));
        if (first..=last).all(|row| self.counted(row, base, masses.len()).is_empty()) {
            return;
        }
        let columns = (last + 1 - start).next_multiple_of(LANES);
        let sink_columns = sinks.next_multiple_of(LANES);
        scratch.window.resize(G * columns, Q::Acc::ZERO);
        scratch.sinks.resize(G * sink_columns, Q::Acc::ZERO);
        for queries in self.queries {
            let Scratch {
                queries: rows,
                sinks: sink_logits,
                window,
                weights,
            } = &mut *scratch;
            self.load(queries, first..first + G, rows);
            if sinks > 0 {
                self.sink_keys.dots::<S, G>(simd, rows, 0, sink_columns, sink_logits);
            }
            self.keys.dots::<S, G>(simd, rows, start, columns, window);
            for (g, (logits, sink_logits)) in window
                .chunks_exact(columns)
                .zip(
                    sink_logits
                        .chunks_exact(sink_columns.max(1))
                        .chain(std::iter::repeat(&[][..])),
                )
                .enumerate()
            {
                let own = self.local.start(first + g) - start..first + g + 1 - start;
                let at = gather(
                    weights,
                    sink_logits,
                    self.local.sinks.min(start + own.start),
                    &logits[own.clone()],
                );
                let inverse = Q::Acc::ONE / exponentials(simd, weights);
                let counted = self.counted(first + g, base, masses.len());
                if !counted.is_empty() {
                    let weights = &weights[at + counted.start - start - own.start..];
                    for (mass, weight) in masses[counted.start - base..counted.end - base].iter_mut().zip(weights) {
                        *mass += *weight * inverse;
                    }
                }
            }
        }
    }

    /// The tokens of `base..base + count` that count row `row`: t does from t + window / 2 on.
    fn counted(&self, row: usize, base: usize, count: usize) -> Range<usize> {
        let Local { window, .. } = self.local;
        self.local.start(row).max(base)..(row + 1).saturating_sub(window / 2).min(base + count)
    }

    /// Queries of `rows`, padded like keys and multiplied by scale * log2(e).
    #[inline(always)]
    fn load(&self, queries: &HeadRows<Q>, rows: Range<usize>, target: &mut Vec<Q::Acc>) {
        let factor = Q::Acc::of(self.local.scale * std::f64::consts::LOG2_E);
        let dim = queries.dim.next_multiple_of(DIMS);
        target.clear();
        target.resize(rows.len() * dim, Q::Acc::ZERO);
        for (row, target) in rows.zip(target.chunks_exact_mut(dim)) {
            Q::widen(queries.row(row - self.first_query), &mut target[..queries.dim]);
            target.iter_mut().for_each(|x| *x *= factor);
        }
    }
}

/// One row's logits: the first `sinks` of `sink_logits`, then its window's, each padded to a register with minus
/// infinity. Returns where the window begins.
#[inline(always)]
fn gather<A: Accumulator>(weights: &mut Vec<A>, sink_logits: &[A], sinks: usize, window: &[A]) -> usize {
    let at = sinks.next_multiple_of(LANES);
    weights.clear();
    weights.resize((at + window.len()).next_multiple_of(LANES), A::NEG_INFINITY);
    weights[..sinks].copy_from_slice(&sink_logits[..sinks]);
    weights[at..][..window.len()].copy_from_slice(window);
    at
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
        let (observation, target) = (self.observation, (self.base, self.masses));
        let mut row = self.rows.start;
        while row + TOGETHER <= self.rows.end {
            observation.add_rows::<S, TOGETHER>(simd, row, (target.0, &mut *target.1), self.scratch);
            row += TOGETHER;
        }
        for row in row..self.rows.end {
            observation.add_rows::<S, 1>(simd, row, (target.0, &mut *target.1), self.scratch);
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
