//! Rows that hold a number that is not finite: found while rows are read, copied or added, and replaced.

use crate::cpu::number::element::{Accumulator, Element};

/// Adds a raw row, through `room` where the row has to be widened.
#[inline(always)]
pub(crate) fn add_row<T: Element>(sum: &mut [T::Acc], row: &[T], room: &mut [T::Acc]) {
    let row = T::as_acc(row).unwrap_or_else(|| {
        T::widen(row, room);
        room
    });
    sum.iter_mut().zip(row).for_each(|(x, y)| *x += *y);
}

/// Replaces a key or value that is not finite by a NaN key and a zero value, and returns whether it did. A row that
/// sees the column becomes NaN through its logit; 0 * NaN reaches no other row.
#[inline(always)]
pub(crate) fn quarantine<A: Accumulator>(key: &mut [A], value: &mut [A]) -> bool {
    let bad = !(all_finite(key) && all_finite(value));
    if bad {
        spoil(key, value);
    }
    bad
}

/// Makes the key NaN and the value 0, as [`quarantine`] does.
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

/// Finds out whether all numbers of some rows are finite: x * 0 is NaN for a number that is not. Chunks are held as
/// values. If they were written in place, number by number, the compiler would have to assume that a write changes the
/// next read, and would not vectorise.
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

    /// Checks a stored row, through `room` where the row has to be widened.
    #[inline(always)]
    pub fn raw<T: Element<Acc = A>>(&mut self, row: &[T], room: &mut [A]) {
        match T::as_acc(row) {
            Some(row) => self.take(row),
            None => self.copy(row, room),
        }
    }

    /// Checks at most one chunk of numbers.
    #[inline(always)]
    fn lanes(&mut self, row: &[A]) {
        for (check, x) in self.0.iter_mut().zip(row) {
            *check += *x * A::ZERO;
        }
    }

    /// Copies and checks a row.
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

    /// Writes and checks the sum of two rows, through `room` where they have to be widened.
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

    /// Multiplies a row by `factor` and checks it.
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

#[cfg(test)]
mod tests {
    use crate::cpu::number::finite::Check;

    /// Rows longer and shorter than a chunk, with one number that is not finite at each place.
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
        // Two finite numbers with an infinite sum.
        let (mut check, mut sum) = (Check::default(), [0.0]);
        check.sum((&[f32::MAX][..], &[f32::MAX][..]), &mut [0.0], &mut sum);
        assert!(!check.passed());
    }
}
