//! Finite numbers that a list's storage dtype cannot hold: found before anything changes.

use crate::cpu::cache::list::{Decided, List};
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::rows::HeadRows;
use crate::cpu::number::vectorized::vectorized;
use candle_core::DType;

/// The largest finite number of a dtype that stores keys and values.
pub(crate) fn largest_of(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => half::f16::MAX.to_f64(),
        DType::BF16 => half::bf16::MAX.to_f64(),
        DType::F64 => f64::MAX,
        _ => f32::MAX.into(),
    }
}

/// The absolute value of the largest finite number of a head's first `count` rows.
pub(crate) fn largest_in<T: Element>(rows: &HeadRows<T>, count: usize) -> f64 {
    let (mut room, mut largest) = (vec![T::Acc::ZERO; rows.dim], T::Acc::ZERO);
    vectorized(
        #[inline(always)]
        || {
            for row in 0..count {
                T::widen(rows.row(row), &mut room);
                largest = room.iter().fold(largest, |largest, x| largest.larger(size(*x)));
            }
        },
    );
    largest.double()
}

/// |x| of a finite number, 0 of any other.
#[inline(always)]
fn size<A: Accumulator>(x: A) -> A {
    if x.finite() {
        x.absolute()
    } else {
        A::ZERO
    }
}

impl<S: Element> List<S> {
    /// The size of the largest sum of two neighbouring keys or values that the chunk folds and S cannot hold. A pair is
    /// checked when its right token arrives, so that any chunking refuses the same tokens.
    pub fn too_large_sum(
        &self,
        decided: &Decided<S>,
        keys: &HeadRows<S>,
        values: &HeadRows<S>,
        count: usize,
    ) -> Option<f64> {
        if !self.settings.fold.sums_pairs() {
            return None;
        }
        let base = self.bits_base();
        let merged = |row: usize| {
            let pair = (self.seq_len + row).checked_sub(1);
            pair.is_some_and(|pair| decided.bits[pair - base] == 1)
        };
        let before = if merged(0) { self.last_raw() } else { None };
        let mut largest: f64 = 0.0;
        for (rows, mut left) in [keys, values].into_iter().zip(before.unwrap_or_default()) {
            left.resize(rows.dim, S::Acc::ZERO);
            let mut right = vec![S::Acc::ZERO; rows.dim];
            for row in (0..count).filter(|row| merged(*row)) {
                if row > 0 {
                    S::widen(rows.row(row - 1), &mut left);
                }
                S::widen(rows.row(row), &mut right);
                for (left, right) in left.iter().zip(&right) {
                    if left.finite() && right.finite() {
                        // In f64: a sum that overflows f32 is finite there.
                        largest = largest.max((left.double() + right.double()).abs());
                    }
                }
            }
        }
        (largest > largest_of(S::DTYPE)).then_some(largest)
    }

    /// Key and value of the last token, as appended.
    fn last_raw(&self) -> Option<[Vec<S::Acc>; 2]> {
        let last = |rows: &[S], dim: usize| {
            let mut row = vec![S::Acc::ZERO; dim];
            S::widen(&rows[rows.len() - dim..], &mut row);
            row
        };
        match (self.recent_keys.is_empty(), &self.open) {
            (false, _) => Some([
                last(&self.recent_keys, self.dim),
                last(&self.recent_values, self.value_dim),
            ]),
            (true, Some(open)) => {
                let [_, _, key, value] = open.rows();
                Some([key.to_vec(), value.to_vec()])
            }
            (true, None) => None,
        }
    }
}
