//! One query row per head against a ragged list: bound by memory, so each key and value is read once and serves all
//! query heads of its group. Long lists are split over threads at fixed places, whatever the number of threads.

use super::fold::{all_finite, quarantine};
use super::list::List;
use super::softmax::finish_row;
use super::{Accumulator, Element, HeadRows};
use pulp::{Arch, Simd, WithSimd};
use std::ops::Range;

/// Entries of one task: at D = 64 in f32, 1 MiB of keys and values.
pub(crate) const SPLIT: usize = 2048;
/// Entries whose weights are held at once; their keys (widened, where stored as halves) stay in the L1 cache.
const TILE: usize = 64;

/// An unfinished softmax of the group's rows: maximum (base 2), sum and weighted values.
pub(crate) struct Partial<A> {
    max: Vec<A>,
    sum: Vec<A>,
    /// (group, D)
    output: Vec<A>,
}

/// Scaled queries (group, D) of one list and the buffers of one thread.
pub(crate) struct Decoder<'a, A> {
    pub queries: &'a [A],
    pub dim: usize,
}

impl<A: Accumulator> Partial<A> {
    pub fn new(group: usize, dim: usize) -> Self {
        Self {
            max: vec![A::NEG_INFINITY; group],
            sum: vec![A::ZERO; group],
            output: vec![A::ZERO; group * dim],
        }
    }

    /// Adds a partial result over other columns.
    pub fn merge(&mut self, other: &Self) {
        let dim = self.output.len() / self.max.len();
        for row in 0..self.max.len() {
            let max = self.max[row].larger(other.max[row]);
            let base = if max == A::NEG_INFINITY { A::ZERO } else { max };
            let (mine, theirs) = (
                (self.max[row] - base).exp2_nonpositive(),
                (other.max[row] - base).exp2_nonpositive(),
            );
            self.max[row] = max;
            self.sum[row] = self.sum[row] * mine + other.sum[row] * theirs;
            let rows = self.output[row * dim..].iter_mut().zip(&other.output[row * dim..]);
            rows.take(dim).for_each(|(x, y)| *x = *x * mine + *y * theirs);
        }
    }

    /// Writes the group's output rows.
    pub fn finish<Q: Element<Acc = A>>(mut self, mut outputs: impl Iterator<Item = impl AsMut<[Q]>>) {
        let dim = self.output.len() / self.max.len();
        for (row, sum) in self.output.chunks_exact_mut(dim).zip(&self.sum) {
            finish_row(*sum, row);
            if let Some(mut target) = outputs.next() {
                Q::narrow(row, target.as_mut())
            }
        }
    }
}

impl<A: Accumulator> Decoder<'_, A> {
    /// Far columns `range` of a list; the first split also takes the open chain and the window.
    pub fn split<S: Element<Acc = A>>(&self, list: &List<S>, range: Range<usize>) -> Partial<A> {
        let partial = Partial::new(self.queries.len() / self.dim, self.dim);
        Arch::new().dispatch(Split {
            decoder: self,
            list,
            range,
            partial,
        })
    }

    #[inline(always)]
    fn edge<I: Simd, S: Element<Acc = A>>(&self, simd: I, list: &List<S>, partial: &mut Partial<A>) {
        let Some(chain) = &list.open else { return };
        let (mut key, mut value) = (chain.key.clone(), chain.value.clone());
        quarantine(&mut key, &mut value);
        let size = [A::of((chain.size as f64).log2())];
        let (key, value) = (
            HeadRows::compact(&key[..], self.dim),
            HeadRows::compact(&value[..], self.dim),
        );
        self.rows(simd, (&key, &value), 0..1, &size, false, partial);
    }

    #[inline(always)]
    fn near<I: Simd, S: Element<Acc = A>>(&self, simd: I, list: &List<S>, partial: &mut Partial<A>) {
        let rows = list.recent_keys.len() / self.dim;
        let count = list.settings.window.min(list.seq_len);
        let clean = list.last_bad.is_none_or(|bad| bad + rows < list.seq_len);
        let keys = HeadRows::compact(&list.recent_keys[..], self.dim);
        let values = HeadRows::compact(&list.recent_values[..], self.dim);
        self.rows(
            simd,
            (&keys, &values),
            rows - count.min(rows)..rows,
            &[],
            !clean,
            partial,
        );
    }

    #[inline(always)]
    fn rows<I: Simd, S: Element<Acc = A>>(
        &self,
        simd: I,
        (keys, values): (&HeadRows<S>, &HeadRows<S>),
        range: Range<usize>,
        log2_sizes: &[A],
        check: bool,
        partial: &mut Partial<A>,
    ) {
        let mut buffers = (Vec::new(), Vec::new());
        let mut weights = [A::ZERO; TILE];
        for start in range.clone().step_by(TILE) {
            let count = TILE.min(range.end - start);
            let sizes = log2_sizes.get(start..start + count);
            match (S::as_acc(keys.data), S::as_acc(values.data)) {
                (Some(keys), Some(values)) if !check => {
                    let keys = HeadRows::compact(keys, self.dim).skip(start);
                    let values = HeadRows::compact(values, self.dim).skip(start);
                    self.tile(simd, (&keys, &values), count, sizes, &mut weights, partial);
                }
                _ => {
                    widen_rows(keys, start, count, &mut buffers.0);
                    widen_rows(values, start, count, &mut buffers.1);
                    if check {
                        let rows = buffers.0.chunks_exact_mut(self.dim);
                        let rows = rows.zip(buffers.1.chunks_exact_mut(self.dim));
                        rows.for_each(|(key, value)| {
                            quarantine(key, value);
                        });
                    }
                    let keys = HeadRows::compact(&buffers.0[..], self.dim);
                    let values = HeadRows::compact(&buffers.1[..], self.dim);
                    self.tile(simd, (&keys, &values), count, sizes, &mut weights, partial);
                }
            }
        }
    }

    /// At most [`TILE`] columns, for every row of the group while they are in the cache.
    #[inline(always)]
    fn tile<I: Simd>(
        &self,
        simd: I,
        (keys, values): (&HeadRows<A>, &HeadRows<A>),
        count: usize,
        log2_sizes: Option<&[A]>,
        weights: &mut [A; TILE],
        partial: &mut Partial<A>,
    ) {
        for (row, query) in self.queries.chunks_exact(self.dim).enumerate() {
            let mut max = partial.max[row];
            for column in 0..count {
                let mut logit = A::dot(simd, query, keys.row(column));
                if let Some(sizes) = log2_sizes {
                    logit += sizes[column];
                }
                weights[column] = logit;
                max = max.larger(logit);
            }
            weights[count..].fill(A::NEG_INFINITY);
            let base = if max == A::NEG_INFINITY { A::ZERO } else { max };
            let mut sum = A::ZERO;
            for weight in weights.iter_mut() {
                *weight = (*weight - base).exp2_nonpositive();
            }
            for weight in weights.iter() {
                sum += *weight;
            }
            let output = &mut partial.output[row * self.dim..][..self.dim];
            if max != partial.max[row] {
                let rescale = (partial.max[row] - base).exp2_nonpositive();
                output.iter_mut().for_each(|x| *x *= rescale);
                partial.sum[row] *= rescale;
                partial.max[row] = max;
            }
            partial.sum[row] += sum;
            add_weighted(simd, output, values, &weights[..count]);
        }
    }
}

/// One task, as code for one instruction set.
struct Split<'a, A, S: Element<Acc = A>> {
    decoder: &'a Decoder<'a, A>,
    list: &'a List<S>,
    range: Range<usize>,
    partial: Partial<A>,
}

impl<A: Accumulator, S: Element<Acc = A>> WithSimd for Split<'_, A, S> {
    type Output = Partial<A>;

    #[inline(always)]
    fn with_simd<I: Simd>(mut self, simd: I) -> Partial<A> {
        let Self { decoder, list, .. } = self;
        if self.range.start == 0 {
            decoder.edge(simd, list, &mut self.partial);
            decoder.near(simd, list, &mut self.partial);
        }
        let keys = HeadRows::compact(&list.keys[..], decoder.dim);
        let values = HeadRows::compact(&list.values[..], decoder.dim);
        let sizes = &list.log2_sizes;
        decoder.rows(simd, (&keys, &values), self.range, sizes, false, &mut self.partial);
        self.partial
    }
}

/// Four values at a time, so that the output is loaded and stored a quarter as often.
#[inline(always)]
fn add_weighted<I: Simd, A: Accumulator>(simd: I, output: &mut [A], values: &HeadRows<A>, weights: &[A]) {
    let (quads, tail) = weights.as_chunks::<4>();
    for (quad, weights) in quads.iter().enumerate() {
        let rows = [0, 1, 2, 3].map(|i| values.row(4 * quad + i));
        A::add_weighted(simd, output, rows, *weights);
    }
    for (column, weight) in (weights.len() - tail.len()..).zip(tail) {
        for (x, y) in output.iter_mut().zip(values.row(column)) {
            *x += *weight * *y;
        }
    }
}

#[inline(always)]
fn widen_rows<S: Element>(rows: &HeadRows<S>, start: usize, count: usize, buffer: &mut Vec<S::Acc>) {
    buffer.resize(count * rows.dim, S::Acc::ZERO);
    let source = &rows.data[start * rows.dim..][..count * rows.dim];
    S::widen(source, buffer);
}

/// Scales and folds one query row; a row that is not finite becomes NaN.
pub(crate) fn load_query<Q: Element>(row: &[Q], fold_in: Option<&[Q::Acc]>, scale: f64, target: &mut [Q::Acc]) {
    Q::widen(row, target);
    if let Some(previous) = fold_in {
        target.iter_mut().zip(previous).for_each(|(x, y)| *x += *y);
    }
    if !all_finite(target) {
        target.fill(Q::Acc::NAN);
    }
    let factor = Q::Acc::of(scale * std::f64::consts::LOG2_E);
    target.iter_mut().for_each(|x| *x *= factor);
}
