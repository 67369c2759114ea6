//! Folding of one head's keys and values, token by token, and the way home of its gradients.

use super::columns::{Bits, RawRows};
use super::{Accumulator, Element};
use crate::config::Fold;
use std::sync::LazyLock;

/// Walks along a head's tokens and holds the folded key, value and size of the one it stands on.
#[derive(Clone)]
pub(crate) struct ChainFold<A> {
    fold: Fold,
    pub key: Vec<A>,
    pub value: Vec<A>,
    /// Tokens in the chain so far, for [`Fold::Mean`]; 1 for the other folds.
    pub size: usize,
    raw_key: Vec<A>,
    raw_value: Vec<A>,
}

impl<A: Accumulator> ChainFold<A> {
    pub fn new(fold: Fold, dim: usize) -> Self {
        let row = || vec![A::ZERO; dim];
        Self {
            fold,
            key: row(),
            value: row(),
            size: 1,
            raw_key: row(),
            raw_value: row(),
        }
    }

    /// Steps to the next token, into which the one before is folded when `merged`.
    #[inline(always)]
    pub fn step<T: Element<Acc = A>>(&mut self, merged: bool, key: &[T], value: &[T]) {
        if !merged || self.fold == Fold::Drop {
            T::widen(key, &mut self.key);
            T::widen(value, &mut self.value);
            self.size = 1;
            if self.fold == Fold::PairSum {
                self.raw_key.copy_from_slice(&self.key);
                self.raw_value.copy_from_slice(&self.value);
            }
            return;
        }
        match self.fold {
            Fold::PairSum => {
                pair_sum(&mut self.key, &mut self.raw_key, key);
                pair_sum(&mut self.value, &mut self.raw_value, value);
            }
            _ => {
                T::widen(key, &mut self.raw_key);
                T::widen(value, &mut self.raw_value);
                running_mean(&mut self.key, &self.raw_key, self.size);
                running_mean(&mut self.value, &self.raw_value, self.size);
                self.size += 1;
            }
        }
    }

    /// A quarantined pair sum from its two raw rows. What [`Self::step`] goes on from is not kept.
    #[inline(always)]
    pub fn pair<T: Element<Acc = A>>(&mut self, keys: (&[T], &[T]), values: (&[T], &[T])) {
        let mut check = Check::default();
        check.sum(keys, &mut self.raw_key, &mut self.key);
        check.sum(values, &mut self.raw_value, &mut self.value);
        if !check.passed() {
            spoil(&mut self.key, &mut self.value);
        }
    }

    /// Stands on the token before `token` if that one is folded into it, having walked its chain as far as the fold
    /// reads; `resume` is a chain on an earlier token to start from.
    pub fn approach<T: Element<Acc = A>>(
        &mut self,
        token: usize,
        bits: Bits,
        raw: &RawRows<T>,
        resume: Option<(usize, &ChainFold<A>)>,
    ) {
        let joins_left = |t: usize| t > 0 && bits.hidden(t - 1);
        let floor = resume.map_or(0, |(stands_on, _)| stands_on + 1);
        let mut start = token;
        while self.fold != Fold::Drop && start > floor && joins_left(start) {
            start -= 1;
            // One raw left neighbour is all a pair sum reads.
            if self.fold == Fold::PairSum {
                break;
            }
        }
        let resume = resume.filter(|_| start == floor && joins_left(start));
        if let Some((_, chain)) = resume {
            self.clone_from(chain);
        }
        for t in start..token {
            self.step(t > start || resume.is_some(), raw.key(t), raw.value(t));
        }
    }

    /// See [`quarantine`].
    #[inline(always)]
    pub fn quarantine(&mut self) {
        quarantine(&mut self.key, &mut self.value);
    }

    /// The token it stands on as an edge.
    pub fn edge(&self) -> Edge<'_, A> {
        Edge {
            key: &self.key,
            value: &self.value,
            log2_size: log2_size(self.size),
        }
    }

    /// Key, value, raw key and raw value: with fold and size, all of its state.
    pub fn rows(&self) -> [&[A]; 4] {
        [&self.key, &self.value, &self.raw_key, &self.raw_value]
    }

    /// A chain that goes on from the [`Self::rows`] of another.
    pub fn from_rows(fold: Fold, size: usize, [key, value, raw_key, raw_value]: [Vec<A>; 4]) -> Self {
        Self {
            fold,
            key,
            value,
            size,
            raw_key,
            raw_value,
        }
    }

    /// Numbers held.
    pub fn len(&self) -> usize {
        self.key.len() + self.value.len() + self.raw_key.len() + self.raw_value.len()
    }
}

/// log2 of how many tokens a mean has; of the usual numbers nothing is computed.
pub(crate) fn log2_size<A: Accumulator>(size: usize) -> A {
    static LOGARITHMS: LazyLock<[f64; 64]> = LazyLock::new(|| std::array::from_fn(|size| (size as f64).log2()));
    A::of(LOGARITHMS.get(size).copied().unwrap_or_else(|| (size as f64).log2()))
}

/// Adds a raw row, through `room` where it has to be widened.
#[inline(always)]
pub(crate) fn add_row<T: Element>(sum: &mut [T::Acc], row: &[T], room: &mut [T::Acc]) {
    let row = T::as_acc(row).unwrap_or_else(|| {
        T::widen(row, room);
        room
    });
    sum.iter_mut().zip(row).for_each(|(x, y)| *x += *y);
}

#[inline(always)]
fn pair_sum<T: Element>(folded: &mut [T::Acc], raw: &mut [T::Acc], next: &[T]) {
    folded.copy_from_slice(raw);
    T::widen(next, raw);
    for (f, x) in folded.iter_mut().zip(raw.iter()) {
        *f += *x;
    }
}

#[inline(always)]
fn running_mean<A: Accumulator>(mean: &mut [A], next: &[A], size: usize) {
    // Two weights, and not a sum that is divided: it could overflow where the mean does not.
    let inverse = A::ONE / A::of((size + 1) as f64);
    let rest = A::ONE - inverse;
    for (m, x) in mean.iter_mut().zip(next) {
        *m = *x * inverse + rest * *m;
    }
}

/// Replaces a key or value that is not finite by a NaN key and a zero value: whoever sees the column becomes NaN
/// through its logit, and nobody else is touched by 0 * NaN. Whether it did.
#[inline(always)]
pub(crate) fn quarantine<A: Accumulator>(key: &mut [A], value: &mut [A]) -> bool {
    let bad = !(all_finite(key) && all_finite(value));
    if bad {
        spoil(key, value);
    }
    bad
}

/// What [`quarantine`] makes of a key and a value.
#[cold]
pub(crate) fn spoil<A: Accumulator>(key: &mut [A], value: &mut [A]) {
    key.fill(A::NAN);
    value.fill(A::ZERO);
}

#[inline(always)]
pub(crate) fn all_finite<A: Accumulator>(row: &[A]) -> bool {
    let mut check = Check::default();
    check.take(row);
    check.passed()
}

/// Finds out whether all numbers of some rows are finite: x * 0 is NaN for those that are not. Chunks are worked on as
/// values: written in place, number by number, they might be what is read next, and would be handled one by one.
#[derive(Default)]
pub(crate) struct Check<A>([A; CHECK_LANES]);

const CHECK_LANES: usize = 16;

impl<A: Accumulator> Check<A> {
    #[inline(always)]
    pub fn take(&mut self, row: &[A]) {
        let (chunks, rest) = row.as_chunks::<CHECK_LANES>();
        chunks.iter().for_each(|chunk| self.lanes(chunk));
        self.lanes(rest);
    }

    /// Takes a row as it is stored; through `room` where it has to be widened.
    #[inline(always)]
    pub fn raw<T: Element<Acc = A>>(&mut self, row: &[T], room: &mut [A]) {
        match T::as_acc(row) {
            Some(row) => self.take(row),
            None => self.copy(row, room),
        }
    }

    /// At most as many numbers as there are lanes.
    #[inline(always)]
    fn lanes(&mut self, row: &[A]) {
        for (check, x) in self.0.iter_mut().zip(row) {
            *check += *x * A::ZERO;
        }
    }

    /// Takes a row while it is copied.
    #[inline(always)]
    pub fn copy<T: Element<Acc = A>>(&mut self, source: &[T], target: &mut [A]) {
        match T::as_acc(source) {
            Some(source) => self.scale(source, A::ONE, target),
            None => {
                T::widen(source, target);
                self.take(target);
            }
        }
    }

    /// Takes the sum of two rows while it is made; through `room` where they have to be widened.
    #[inline(always)]
    pub fn sum<T: Element<Acc = A>>(&mut self, (left, right): (&[T], &[T]), room: &mut [A], target: &mut [A]) {
        let (Some(left), Some(right)) = (T::as_acc(left), T::as_acc(right)) else {
            T::widen(right, target);
            add_row(target, left, room);
            return self.take(target);
        };
        let (left, left_rest) = left.as_chunks::<CHECK_LANES>();
        let (right, right_rest) = right.as_chunks::<CHECK_LANES>();
        let (targets, target_rest) = target.as_chunks_mut::<CHECK_LANES>();
        for ((target, left), right) in targets.iter_mut().zip(left).zip(right) {
            let mut sum = *right;
            sum.iter_mut().zip(left).for_each(|(x, y)| *x += *y);
            self.lanes(&sum);
            *target = sum;
        }
        for ((target, left), right) in target_rest.iter_mut().zip(left_rest).zip(right_rest) {
            *target = *right + *left;
        }
        self.lanes(target_rest);
    }

    /// Takes a row while it is multiplied by `factor`.
    #[inline(always)]
    pub fn scale(&mut self, source: &[A], factor: A, target: &mut [A]) {
        let (chunks, rest) = source.as_chunks::<CHECK_LANES>();
        let (targets, target_rest) = target.as_chunks_mut::<CHECK_LANES>();
        for (target, chunk) in targets.iter_mut().zip(chunks) {
            let mut scaled = *chunk;
            scaled.iter_mut().for_each(|x| *x *= factor);
            self.lanes(&scaled);
            *target = scaled;
        }
        target_rest
            .iter_mut()
            .zip(rest)
            .for_each(|(target, x)| *target = *x * factor);
        self.lanes(target_rest);
    }

    #[inline(always)]
    pub fn passed(&self) -> bool {
        self.0.iter().all(|check| *check == A::ZERO)
    }
}

/// One folded token as a column that a single row sees.
#[derive(Clone, Copy)]
pub(crate) struct Edge<'e, A> {
    pub key: &'e [A],
    pub value: &'e [A],
    pub log2_size: A,
}

/// Takes gradients of folded rows (tokens, D) home to the rows they were folded from, in place: the transpose of the
/// fold.
#[inline(always)]
pub(crate) fn unfold<A: Accumulator>(fold: Fold, gradients: &mut [A], bits: &[u8], dim: usize) {
    let hidden = |t: usize| bits.get(t) == Some(&1);
    let tokens = gradients.len() / dim;
    match fold {
        Fold::Drop => {}
        Fold::PairSum => {
            for t in (0..tokens).filter(|t| hidden(*t)) {
                let (mine, right) = gradients.split_at_mut((t + 1) * dim);
                let pairs = mine[t * dim..].iter_mut().zip(right);
                pairs.for_each(|(x, y)| *x += *y);
            }
        }
        Fold::Mean => {
            // F[t] = (X[t] + n[t-1] F[t-1]) / n[t]: each token of a chain of n has 1/n[t] of every later F[t].
            let mut size = 1;
            let sizes: Vec<usize> = (0..tokens)
                .map(|t| {
                    size = if t > 0 && hidden(t - 1) { size + 1 } else { 1 };
                    size
                })
                .collect();
            for t in (0..tokens).rev() {
                let inverse = A::ONE / A::of(sizes[t] as f64);
                let (mine, right) = gradients.split_at_mut((t + 1) * dim);
                let mine = &mut mine[t * dim..];
                mine.iter_mut().for_each(|x| *x *= inverse);
                if hidden(t) {
                    mine.iter_mut().zip(right).for_each(|(x, y)| *x += *y);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Check;

    /// Rows longer and shorter than a chunk, with one number at each place that is not finite.
    #[test]
    fn sums_and_products_are_checked_at_every_place() {
        for dim in [1, 15, 16, 17, 40] {
            let left: Vec<f32> = (0..dim).map(|i| i as f32).collect();
            for bad in std::iter::once(None).chain((0..dim).map(Some)) {
                let mut right: Vec<f32> = (0..dim).map(|i| 0.5 - i as f32).collect();
                if let Some(bad) = bad {
                    right[bad] = f32::INFINITY;
                }
                let (mut sum, mut scaled, mut room) = (vec![0.0; dim], vec![0.0; dim], vec![0.0; dim]);
                let (mut of_sum, mut of_scaled) = (Check::default(), Check::default());
                of_sum.sum((&left[..], &right[..]), &mut room, &mut sum);
                of_scaled.scale(&right, 2.0, &mut scaled);
                assert_eq!(
                    (of_sum.passed(), of_scaled.passed()),
                    (bad.is_none(), bad.is_none()),
                    "{dim} {bad:?}"
                );
                for i in 0..dim {
                    assert_eq!((sum[i], scaled[i]), (left[i] + right[i], right[i] * 2.0));
                }
            }
        }
        // Two finite numbers whose sum is not.
        let (mut check, mut sum) = (Check::default(), [0.0]);
        check.sum((&[f32::MAX][..], &[f32::MAX][..]), &mut [0.0], &mut sum);
        assert!(!check.passed());
    }
}
