//! Decoding: one query row per head against one ragged list of a cache.
//!
//! A [`Decoder`] owns the scaled queries (group, D) of the query heads that share a list. A [`Partial`] owns an
//! unfinished softmax of these rows: maximum, sum and weighted values. The list owns the keys and values and is only
//! read.
//!
//! The idea: a step of decoding is bound by memory. So each stored key and value comes from memory once and serves all
//! query heads of the group, and one pass makes logits, weights and weighted values.
//!
//! The tricks:
//! 1. A list is split at fixed places, every [`SPLIT`] entries. Each split is a task with a partial of its own, and
//!    partials are merged in order. So any number of threads gives the same bits.
//! 2. The first split also reads the open chain and the window.
//! 3. A tile is at most [`TILE`] columns. Its weights and keys stay in the L1 cache. A group of more than four heads
//!    reads the tile again, from the caches.
//! 4. Four query rows are computed together: each register of a key or value is loaded once for all four.
//! 5. Keys and values further on are prefetched while the first four rows of a tile are computed.
//! 6. Halves are read as stored, two to a lane of 32 bits ([`Lanes`]). Queries and outputs are brought into the same
//!    order of lanes once per step, not once per entry. A list whose rows do not begin at a lane is widened tile by
//!    tile.
//! 7. Four values are added to the outputs at a time, so that the outputs are loaded and stored a quarter as often.
//! 8. Maxima and sums of a tile run in 16 lanes, so that no addition waits for the one before it.
//! 9. A closed chain is finite or already replaced when it is stored, so that far columns need no check. The window is
//!    checked only where the list's last token that was not finite is in its stored rows.

use crate::cpu::cache::list::List;
use crate::cpu::cache::piece::EntryPiece;
use crate::cpu::columns::chain::log2_size;
use crate::cpu::number::element::{Accumulator, Element, Lanes};
use crate::cpu::number::finite::{all_finite, quarantine};
use crate::cpu::number::rows::HeadRows;
use crate::cpu::number::vectorized::outlined;
use crate::cpu::tile::softcap::Softcap;
use crate::cpu::tile::softmax::{add_sink, finish_row};
use crate::instructions::arch;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Entries of one task: at D = 64 in f32, 1 MiB of keys and values.
pub(crate) const SPLIT: usize = 2048;
/// Columns whose weights are held at once; their keys stay in the L1 cache.
const TILE: usize = 64;
/// Rows of a group that read a key or a value together.
const TOGETHER: usize = 4;

/// An unfinished softmax of the group's rows: maximum (base 2), sum and weighted values.
pub(crate) struct Partial<A> {
    max: Vec<A>,
    sum: Vec<A>,
    /// (group, Dv)
    output: Vec<A>,
}

/// Scaled queries (group, D) of one list.
pub(crate) struct Decoder<A> {
    /// In the order of lanes where `lanes` is set.
    pub queries: Vec<A>,
    pub dim: usize,
    /// Size of a value.
    pub value_dim: usize,
    /// Whether the list's rows are read by lanes: see [`reads_lanes`].
    pub lanes: bool,
    /// Of logits in base 2.
    pub softcap: Option<Softcap<A>>,
}

/// Whether a list's rows can be read by lanes, without a copy.
pub(crate) fn reads_lanes<S: Element>(list: &List<S>) -> bool {
    let recent = [&list.recent_keys[..], &list.recent_values];
    // Rows in 8 bits are widened, so that queries stay in their order.
    if list.entries.code().is_some() {
        return false;
    }
    let mut stored = list.entries.stored().chain([recent]);
    stored.all(|[keys, values]| S::lanes(keys, list.dim).is_some() && S::lanes(values, list.value_dim).is_some())
}

impl<A: Accumulator> Partial<A> {
    /// For `group` rows of values of `dim` numbers.
    pub fn new(group: usize, dim: usize) -> Self {
        Self {
            max: vec![A::NEG_INFINITY; group],
            sum: vec![A::ZERO; group],
            output: vec![A::ZERO; group * dim],
        }
    }

    /// Adds the partial result of other columns.
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
}

impl<A: Accumulator> Decoder<A> {
    /// Adds the sink logits (group) in base 2, divides by the sums and writes the group's output rows.
    pub fn finish<Q: Element<Acc = A>, S: Element<Acc = A>>(
        &self,
        mut partial: Partial<A>,
        sinks: Option<&[A]>,
        mut outputs: impl Iterator<Item = impl AsMut<[Q]>>,
    ) {
        let sums = partial.max.iter_mut().zip(&mut partial.sum);
        let rows = partial.output.chunks_exact_mut(self.value_dim).zip(sums);
        for (index, (row, (max, sum))) in rows.enumerate() {
            if self.lanes {
                S::restore(row);
            }
            // There is no bias here: logits that are all minus infinity have overflowed.
            if *sum == A::ZERO {
                *sum = A::NAN;
            }
            if let Some(sinks) = sinks {
                add_sink(sinks[index], (max, sum), row);
            }
            if let Some(mut target) = outputs.next() {
                finish_row(*sum, row, target.as_mut())
            }
        }
    }

    /// The partial result of the far columns `range` of a list; the split that begins at 0 also reads the open chain
    /// and the window.
    pub fn split<S: Element<Acc = A>>(&self, list: &List<S>, range: Range<usize>) -> Partial<A> {
        let partial = Partial::new(self.queries.len() / self.dim, self.value_dim);
        arch().dispatch(ListSplit {
            decoder: self,
            list,
            range,
            partial,
        })
    }

    /// Adds the open chain, as one column.
    #[inline(always)]
    fn edge<I: Simd, S: Element<Acc = A>>(&self, simd: I, list: &List<S>, partial: &mut Partial<A>) {
        let Some(chain) = &list.open else { return };
        let (mut key, mut value) = (chain.key.clone(), chain.value.clone());
        quarantine(&mut key, &mut value);
        if self.lanes {
            S::order(&mut key);
            S::order(&mut value);
        }
        let size = [log2_size(chain.size)];
        let (key, value) = (
            HeadRows::compact(&key[..], self.dim),
            HeadRows::compact(&value[..], self.value_dim),
        );
        self.columns::<I, A>(simd, (&key, &value), 1, Some(&size), partial);
    }

    /// The raw tokens of the window, as columns to read.
    fn near<'l, S: Element<Acc = A>>(&self, list: &'l List<S>) -> ListPart<'l, S> {
        let rows = list.recent_keys.len() / self.dim;
        let count = list.settings.near().min(list.seq_len);
        ListPart {
            keys: HeadRows::compact(&list.recent_keys[..], self.dim),
            values: HeadRows::compact(&list.recent_values[..], self.value_dim),
            range: rows - count.min(rows)..rows,
            log2_sizes: &[],
            check: list.last_bad.is_some_and(|bad| bad + rows >= list.seq_len),
        }
    }

    #[inline(always)]
    fn part<I: Simd, S: Element<Acc = A>>(&self, simd: I, part: ListPart<S>, partial: &mut Partial<A>) {
        let ListPart {
            keys, values, check, ..
        } = part;
        let lanes = |data, dim| S::lanes(data, dim).filter(|_| self.lanes && !check);
        if let (Some(keys), Some(values)) = (lanes(keys.data, keys.dim), lanes(values.data, values.dim)) {
            // Rows that fit into registers together read all of the part in one call; others share a tile's keys and
            // values while the first cache holds them.
            let step = match self.queries.len() / self.dim {
                0..=TOGETHER => part.range.len().max(1),
                _ => TILE,
            };
            for start in part.range.clone().step_by(step) {
                let count = step.min(part.range.end - start);
                let sizes = part.log2_sizes.get(start..start + count);
                let keys = HeadRows::compact(keys, self.dim / S::NUMBERS).skip(start);
                let values = HeadRows::compact(values, self.value_dim / S::NUMBERS).skip(start);
                self.columns::<I, S>(simd, (&keys, &values), count, sizes, partial);
            }
            return;
        }
        let mut buffers = (Vec::new(), Vec::new());
        for start in part.range.clone().step_by(TILE) {
            let count = TILE.min(part.range.end - start);
            let sizes = part.log2_sizes.get(start..start + count);
            widen_rows(&keys, start, count, &mut buffers.0);
            widen_rows(&values, start, count, &mut buffers.1);
            if check {
                let rows = buffers.0.chunks_exact_mut(self.dim);
                let rows = rows.zip(buffers.1.chunks_exact_mut(self.value_dim));
                rows.for_each(|(key, value)| {
                    quarantine(key, value);
                });
            }
            if self.lanes {
                let rows = buffers.0.chunks_exact_mut(self.dim);
                rows.chain(buffers.1.chunks_exact_mut(self.value_dim))
                    .for_each(S::order);
            }
            let keys = HeadRows::compact(&buffers.0[..], self.dim);
            let values = HeadRows::compact(&buffers.1[..], self.value_dim);
            self.columns::<I, A>(simd, (&keys, &values), count, sizes, partial);
        }
    }

    /// Adds far columns in 8 bits: each tile is widened once for all rows of the group, and stays in the L1 cache.
    #[inline(always)]
    fn coded<I: Simd, S: Element<Acc = A>>(
        &self,
        simd: I,
        list: &List<S>,
        range: Range<usize>,
        partial: &mut Partial<A>,
    ) {
        let mut keys = vec![A::ZERO; TILE * self.dim];
        let mut values = vec![A::ZERO; TILE * self.value_dim];
        let (mut room, mut sizes) = (EntryPiece::empty(), Vec::new());
        let end = range.end;
        for start in range.step_by(TILE) {
            let tile = start..end.min(start + TILE);
            let count = tile.len();
            let columns = list.entries.columns(tile.clone(), &mut room);
            let rows = keys
                .chunks_exact_mut(self.dim)
                .zip(values.chunks_exact_mut(self.value_dim));
            list.entries.widen(columns, rows.take(count));
            let sizes = list.entries.log2_sizes(tile, &mut sizes);
            let keys = HeadRows::compact(&keys[..], self.dim);
            let values = HeadRows::compact(&values[..], self.value_dim);
            self.columns::<I, A>(simd, (&keys, &values), count, sizes, partial);
        }
    }

    /// Adds columns for every row of the group, four rows at a time. Each key and value is read once
    /// for the four, so that memory and arithmetic do not wait for each other in turns.
    #[inline(always)]
    fn columns<I: Simd, S: Lanes<Acc = A>>(
        &self,
        simd: I,
        (keys, values): (&HeadRows<S::Lane>, &HeadRows<S::Lane>),
        count: usize,
        log2_sizes: Option<&[A]>,
        partial: &mut Partial<A>,
    ) {
        let group = self.queries.len() / self.dim;
        for first in (0..group).step_by(TOGETHER) {
            let rows = TileRows::<S> {
                queries: &self.queries[first * self.dim..],
                dim: self.dim,
                value_dim: self.value_dim,
                keys: *keys,
                values: *values,
                count,
                log2_sizes,
                softcap: self.softcap,
                prefetch: first == 0,
                max: &mut partial.max[first..],
                sum: &mut partial.sum[first..],
                output: &mut partial.output[first * self.value_dim..],
            };
            match group - first {
                1 => outlined(simd, GroupRows::<S, 1>(rows)),
                2 => outlined(simd, GroupRows::<S, 2>(rows)),
                3 => outlined(simd, GroupRows::<S, 3>(rows)),
                _ => outlined(simd, GroupRows::<S, 4>(rows)),
            }
        }
    }
}

/// Stored columns that a task reads: rows `range` of keys and values.
struct ListPart<'l, S: Element> {
    keys: HeadRows<'l, S>,
    values: HeadRows<'l, S>,
    range: Range<usize>,
    log2_sizes: &'l [S::Acc],
    /// Whether a row may hold a number that is not finite.
    check: bool,
}

/// A tile of columns and the rows of the group that read it.
struct TileRows<'t, S: Lanes> {
    queries: &'t [S::Acc],
    dim: usize,
    value_dim: usize,
    keys: HeadRows<'t, S::Lane>,
    values: HeadRows<'t, S::Lane>,
    count: usize,
    log2_sizes: Option<&'t [S::Acc]>,
    softcap: Option<Softcap<S::Acc>>,
    prefetch: bool,
    max: &'t mut [S::Acc],
    sum: &'t mut [S::Acc],
    /// (rows, Dv)
    output: &'t mut [S::Acc],
}

/// The first G rows of a tile. A function of its own for each instruction set: it stands once in the binary, for every
/// source of columns.
struct GroupRows<'t, S: Lanes, const G: usize>(TileRows<'t, S>);

impl<S: Lanes, const G: usize> WithSimd for GroupRows<'_, S, G> {
    type Output = ();

    #[inline(always)]
    fn with_simd<I: Simd>(self, simd: I) {
        let TileRows {
            queries,
            dim,
            value_dim,
            keys,
            values,
            count,
            log2_sizes,
            softcap,
            prefetch,
            max,
            sum,
            output,
        } = self.0;
        let queries: [&[S::Acc]; G] = std::array::from_fn(|row| &queries[row * dim..][..dim]);
        for start in (0..count).step_by(TILE) {
            let (keys, values) = (keys.skip(start), values.skip(start));
            let columns = TILE.min(count - start);
            let mut weights = [[S::Acc::NEG_INFINITY; TILE]; G];
            for column in 0..columns {
                if prefetch {
                    keys.prefetch(column);
                    values.prefetch(column);
                }
                let size = match (log2_sizes, softcap) {
                    (Some(sizes), None) => sizes[start + column],
                    (None, _) | (_, Some(_)) => S::Acc::ZERO,
                };
                let logits = S::dots(simd, queries, keys.row(column));
                for (weights, logit) in weights.iter_mut().zip(logits) {
                    weights[column] = logit + size;
                }
            }
            if let Some(softcap) = softcap {
                let sizes = log2_sizes.map_or(&[][..], |sizes| &sizes[start..start + columns]);
                weights.iter_mut().for_each(|row| cap(softcap, row, columns, sizes));
            }
            for (row, weights) in weights.iter_mut().enumerate() {
                push(
                    &mut max[row],
                    &mut sum[row],
                    weights,
                    &mut output[row * value_dim..][..value_dim],
                );
            }
            add_weighted::<I, S, G>(simd, output, &values, &weights, columns);
        }
    }
}

/// Caps the first `columns` products of a row, and adds log2 n of each column where there is one.
#[inline(always)]
fn cap<A: Accumulator>(softcap: Softcap<A>, row: &mut [A; TILE], columns: usize, sizes: &[A]) {
    softcap.column(row, &mut []);
    row[columns..].fill(A::NEG_INFINITY);
    row.iter_mut().zip(sizes).for_each(|(x, size)| *x += *size);
}

/// Turns a tile's logits into weights relative to the row's new maximum; rescales the row's sum and output to it.
#[inline(always)]
fn push<A: Accumulator>(row_max: &mut A, row_sum: &mut A, weights: &mut [A; TILE], output: &mut [A]) {
    let max = row_max.larger(by_lanes(weights, A::NEG_INFINITY, A::larger));
    let base = if max == A::NEG_INFINITY { A::ZERO } else { max };
    for weight in weights.iter_mut() {
        *weight = (*weight - base).exp2_nonpositive();
    }
    let sum = by_lanes(weights, A::ZERO, |x, y| x + y);
    if max != *row_max {
        let rescale = (*row_max - base).exp2_nonpositive();
        output.iter_mut().for_each(|x| *x *= rescale);
        *row_sum *= rescale;
        *row_max = max;
    }
    *row_sum += sum;
}

/// Joins all numbers in 16 independent lanes, then the lanes: a sum or a maximum without a long chain of latencies.
#[inline(always)]
fn by_lanes<A: Accumulator>(numbers: &[A; TILE], start: A, join: impl Fn(A, A) -> A) -> A {
    let mut lanes = [start; 16];
    for chunk in numbers.as_chunks::<16>().0 {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = join(*lane, *x);
        }
    }
    lanes.into_iter().fold(start, join)
}

/// One task, as code for one instruction set.
struct ListSplit<'a, A, S: Element<Acc = A>> {
    decoder: &'a Decoder<A>,
    list: &'a List<S>,
    range: Range<usize>,
    partial: Partial<A>,
}

impl<A: Accumulator, S: Element<Acc = A>> WithSimd for ListSplit<'_, A, S> {
    type Output = Partial<A>;

    #[inline(always)]
    fn with_simd<I: Simd>(mut self, simd: I) -> Partial<A> {
        let Self { decoder, list, .. } = self;
        if self.range.start == 0 {
            decoder.edge(simd, list, &mut self.partial);
            decoder.part(simd, decoder.near(list), &mut self.partial);
        }
        let mut room = EntryPiece::empty();
        if list.entries.code().is_some() {
            decoder.coded(simd, list, self.range, &mut self.partial);
            return self.partial;
        }
        for run in list.entries.runs(self.range, TILE) {
            let columns = list.entries.columns(run.clone(), &mut room);
            let far = ListPart {
                keys: columns.keys,
                values: columns.values,
                log2_sizes: columns.log2_sizes,
                check: false,
                range: 0..run.len(),
            };
            decoder.part(simd, far, &mut self.partial);
        }
        self.partial
    }
}

/// Adds weighted values four at a time, so that the outputs are loaded and stored a quarter as often.
#[inline(always)]
fn add_weighted<I: Simd, S: Lanes, const G: usize>(
    simd: I,
    outputs: &mut [S::Acc],
    values: &HeadRows<S::Lane>,
    weights: &[[S::Acc; TILE]; G],
    count: usize,
) {
    let quads = count / 4;
    for quad in 0..quads {
        let at = 4 * quad;
        let mut quad_weights = [[S::Acc::ZERO; 4]; G];
        for (target, row) in quad_weights.iter_mut().zip(weights) {
            target.copy_from_slice(&row[at..at + 4]);
        }
        let rows = [
            values.row(at),
            values.row(at + 1),
            values.row(at + 2),
            values.row(at + 3),
        ];
        S::add_weighted(simd, outputs, rows, quad_weights);
    }
    if 4 * quads < count {
        // The last row stands in for missing rows, with weight 0: a value is finite.
        let at = |i: usize| (4 * quads + i).min(count - 1);
        let rows = [0, 1, 2, 3].map(|i| values.row(at(i)));
        let mut rest = [[S::Acc::ZERO; 4]; G];
        for (target, row) in rest.iter_mut().zip(weights) {
            target[..count - 4 * quads].copy_from_slice(&row[4 * quads..count]);
        }
        S::add_weighted(simd, outputs, rows, rest);
    }
}

#[inline(always)]
fn widen_rows<S: Element>(rows: &HeadRows<S>, start: usize, count: usize, buffer: &mut Vec<S::Acc>) {
    buffer.resize(count * rows.dim, S::Acc::ZERO);
    (start..start + count).for_each(|row| rows.prefetch(row));
    let source = &rows.data[start * rows.dim..][..count * rows.dim];
    S::widen(source, buffer);
}

/// Widens, folds and scales one query row; a row that is not finite becomes NaN.
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
