//! Which pairs merge: cosines and the two rules. O(N·D) per head for the causal rule.

use crate::config::{CompressionConfig, GroupRule, HeadStrategies, HeadTest, MergeRule, MergeStrategy};
use crate::cpu::number::bias::Apart;
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::rows::{HeadRows, RowGrid};
use crate::cpu::number::vectorized::dot;
use crate::problem::Problem;
use rayon::prelude::*;

/// The floor of a norm in the denominator of a cosine.
pub(crate) const MIN_NORM: f64 = 1e-12;

/// The rows of one head and their norms, in the accumulator's dtype.
pub(crate) struct NormedRows<'a, A> {
    rows: HeadRows<'a, A>,
    norms: Vec<A>,
}

/// Holds a head's rows where they need widening; see [`normed`].
pub(crate) type Widened<A> = Vec<A>;

/// Reads one head's rows in the accumulator's dtype (through `buffer` where they need widening) with their norms.
pub(crate) fn normed<'a, T: Element>(
    rows: HeadRows<'a, T>,
    tokens: usize,
    buffer: &'a mut Widened<T::Acc>,
) -> NormedRows<'a, T::Acc> {
    let rows = match T::as_acc(rows.data) {
        Some(data) => HeadRows {
            data,
            stride: rows.stride,
            dim: rows.dim,
        },
        None => {
            buffer.resize(tokens * rows.dim, T::Acc::ZERO);
            for (token, target) in buffer.chunks_exact_mut(rows.dim).enumerate() {
                T::widen(rows.row(token), target);
            }
            HeadRows::compact(buffer, rows.dim)
        }
    };
    let norms = (0..tokens).map(|t| dot(rows.row(t), rows.row(t)).root()).collect();
    NormedRows { rows, norms }
}

impl<A: Accumulator> NormedRows<'_, A> {
    pub fn row(&self, token: usize) -> &[A] {
        self.rows.row(token)
    }

    pub fn norm(&self, token: usize) -> A {
        self.norms[token]
    }
}

/// `cos(a[i], b[j])`, each vector divided by at least [`MIN_NORM`].
pub(crate) fn cosine<A: Accumulator>(a: &NormedRows<A>, i: usize, b: &NormedRows<A>, j: usize) -> A {
    cosine_of(a.row(i), a.norms[i], b.row(j), b.norms[j])
}

/// The cosine of two vectors whose norms are known.
pub(crate) fn cosine_of<A: Accumulator>(a: &[A], a_norm: A, b: &[A], b_norm: A) -> A {
    let floor = A::of(MIN_NORM);
    // The floor replaces a NaN norm here; the dot product is NaN then too.
    dot(a, b) / floor.larger(a_norm) / floor.larger(b_norm)
}

/// The strict comparison of a head's test; false for NaN.
pub(crate) fn qualifies<A: Accumulator>(test: HeadTest, cosine: A) -> bool {
    match test.strategy {
        MergeStrategy::Similarity => A::ONE - cosine < A::of(test.threshold),
        MergeStrategy::Difference => cosine.absolute() < A::of(test.threshold),
        MergeStrategy::Off => false,
    }
}

/// How far a pair is from passing a head's test, 1 at its threshold: what a budget goes by. Infinity for NaN.
pub(crate) fn distance<A: Accumulator>(test: HeadTest, cosine: A) -> f64 {
    let distance = match test.strategy {
        MergeStrategy::Similarity => (A::ONE - cosine).double(),
        MergeStrategy::Difference => cosine.absolute().double(),
        MergeStrategy::Off => 0.0,
    } / test.threshold;
    if distance.is_nan() {
        f64::INFINITY
    } else {
        distance
    }
}

/// The inputs of one call's decisions.
#[derive(Clone, Copy)]
pub(crate) struct DecideInput<'a, T: Element> {
    pub q: RowGrid<'a, T>,
    pub k: RowGrid<'a, T>,
    pub problem: Problem,
    pub strategies: &'a HeadStrategies,
    pub config: &'a CompressionConfig,
    /// The call's bias, where a pair must be seen to merge.
    pub apart: Option<Apart<'a, T::Acc>>,
}

impl<T: Element> DecideInput<'_, T> {
    /// Calls `body` with the left sides `a` (query or key rows, by criterion) and the right sides (keys) of query head
    /// `head`'s pairs.
    pub fn with_sides<R>(
        &self,
        batch: usize,
        head: usize,
        body: impl FnOnce(&NormedRows<T::Acc>, &NormedRows<T::Acc>) -> R,
    ) -> R {
        let (tokens, kv_head) = (self.problem.tokens, head / self.problem.group());
        let (mut left_buffer, mut right_buffer) = (Vec::new(), Vec::new());
        let right = normed(self.k.head(batch, kv_head), tokens, &mut right_buffer);
        match self.config.criterion.pairs_keys() {
            true => body(&right, &right),
            false => {
                let left = normed(self.q.head(batch, head), tokens, &mut left_buffer);
                body(&left, &right)
            }
        }
    }

    fn test(&self, batch: usize, head: usize) -> HeadTest {
        self.strategies.test(self.config, batch, head)
    }
}

/// The merge indicators (B, H, N-1), 0 or 1.
pub(crate) fn indicators<T: Element>(input: &DecideInput<T>) -> Vec<u8> {
    let Problem { batch, heads, .. } = input.problem;
    let pairs = input.problem.pairs();
    let mut bits = vec![0u8; batch * heads * pairs];
    if pairs == 0 || input.strategies.all_off() {
        return bits;
    }
    match input.config.rule {
        MergeRule::Reference => reference_rule(input, &mut bits),
        MergeRule::Causal => causal_rule(input, &mut bits),
    }
    bits
}

/// `MergeRule::Causal`: each query head decides alone, or the query heads of each KV head as one.
fn causal_rule<T: Element>(input: &DecideInput<T>, bits: &mut [u8]) {
    let Problem { heads, kv_heads, .. } = input.problem;
    let pairs = input.problem.pairs();
    match input.config.group_rule {
        GroupRule::PerQueryHead => bits
            .par_chunks_mut(pairs)
            .enumerate()
            .for_each(|(index, bits)| decide_group(input, index / heads, index % heads..index % heads + 1, bits)),
        GroupRule::Unanimous => {
            let group = input.problem.group();
            bits.par_chunks_mut(group * pairs)
                .enumerate()
                .for_each(|(index, bits)| {
                    let (batch, kv_head) = (index / kv_heads, index % kv_heads);
                    decide_group(input, batch, kv_head * group..(kv_head + 1) * group, bits);
                })
        }
    }
}

/// One run of the causal rule for `heads`, query heads of one group: a pair passes when it passes for each of them.
fn decide_group<T: Element>(input: &DecideInput<T>, batch: usize, heads: std::ops::Range<usize>, bits: &mut [u8]) {
    let pairs = input.problem.pairs();
    let (first, rest) = bits.split_at_mut(pairs);
    let tests: Vec<HeadTest> = heads.clone().map(|head| input.test(batch, head)).collect();
    // A head that is off vetoes its group.
    if tests.iter().any(|test| test.strategy.is_off()) {
        return;
    }
    let (tokens, kv_head) = (input.problem.tokens, heads.start / input.problem.group());
    let mut key_buffer = Vec::new();
    let keys = normed(input.k.head(batch, kv_head), tokens, &mut key_buffer);
    let mut query_buffers = vec![Vec::new(); heads.len()];
    let queries: Vec<_> = match input.config.criterion.pairs_keys() {
        true => Vec::new(),
        false => heads
            .clone()
            .zip(&mut query_buffers)
            .map(|(head, buffer)| normed(input.q.head(batch, head), tokens, buffer))
            .collect(),
    };
    let passes = |a: usize, p: usize| match queries.as_slice() {
        [] => {
            let cosine = cosine(&keys, a, &keys, p);
            tests.iter().all(|test| qualifies(*test, cosine))
        }
        queries => queries
            .iter()
            .zip(&tests)
            .all(|(query, test)| qualifies(*test, cosine(query, a, &keys, p))),
    };
    let seen = |t: usize| {
        let apart = input.apart.as_ref();
        apart.is_none_or(|apart| apart.pair_is_seen(batch, heads.clone(), t))
    };
    causal_run(first, input.config, |a, p| (p + 1 < a || seen(p)) && passes(a, p));
    for copy in rest.chunks_exact_mut(pairs) {
        copy.copy_from_slice(first);
    }
}

/// The scan of `MergeRule::Causal`; `passes(a, p)` is the test of token a against token p.
fn causal_run(bits: &mut [u8], config: &CompressionConfig, passes: impl Fn(usize, usize) -> bool) {
    let mut start: Option<usize> = None;
    for (t, bit) in bits.iter_mut().enumerate() {
        let merges = t >= config.sinks
            && match start {
                Some(p) => t - p < config.max_merge_level && passes(t + 1, t) && passes(t + 1, p),
                None => passes(t + 1, t),
            };
        *bit = u8::from(merges);
        start = if merges { start.or(Some(t)) } else { None };
    }
}

/// `MergeRule::Reference`: candidates of up to five levels, then sweeps that clear invalid bits of all heads together.
fn reference_rule<T: Element>(input: &DecideInput<T>, bits: &mut [u8]) {
    let (heads, pairs) = (input.problem.heads, input.problem.pairs());
    let levels = input.config.max_merge_level.min(pairs).min(5);
    // Bit l of candidates[t] is M[t][l].
    let mut candidates = vec![0u8; bits.len()];
    candidates.par_chunks_mut(pairs).enumerate().for_each(|(index, rows)| {
        let (batch, head) = (index / heads, index % heads);
        let test = input.test(batch, head);
        if test.strategy.is_off() {
            return;
        }
        input.with_sides(batch, head, |left, right| {
            for (t, row) in rows.iter_mut().enumerate() {
                for level in 0..levels.min(pairs - t) {
                    *row |= u8::from(qualifies(test, cosine(left, t + level + 1, right, t))) << level;
                }
            }
        })
    });
    for (bit, row) in bits.iter_mut().zip(&candidates) {
        *bit = row & 1;
    }
    for _ in 0..2 * levels {
        let adjacent = |head: &[u8]| head.windows(2).any(|pair| pair == [1, 1]);
        if !bits.par_chunks(pairs).any(adjacent) {
            break;
        }
        let cleared: usize = bits
            .par_chunks_mut(pairs)
            .zip(candidates.par_chunks(pairs))
            .map(|(bits, rows)| clear_invalid(bits, rows, levels))
            .sum();
        if cleared == 0 {
            break;
        }
    }
}

/// One sweep over one head; returns how many bits it cleared.
fn clear_invalid(bits: &mut [u8], candidates: &[u8], levels: usize) -> usize {
    let mut cleared = 0;
    let mut number = 0;
    for t in 0..bits.len() {
        if bits[t] == 0 {
            // Runs count from 0, but the one at the very start counts from 1.
            number = 0;
            continue;
        }
        if t == 0 {
            number = 1;
        }
        let unreachable = (1..levels).contains(&number) && candidates[t] >> number & 1 == 0;
        if number > levels || unreachable {
            bits[t] = 0;
            cleared += 1;
        }
        number += 1;
    }
    cleared
}
