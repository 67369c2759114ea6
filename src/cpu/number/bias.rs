//! The additive bias: its change to base 2 without overflow, and the rules for -inf.

use crate::cpu::number::element::Accumulator;
use candle_core::{bail, Result};
use rayon::prelude::*;
use std::ops::Range;

/// An additive bias as a strided (B, H, rows, N) view; its first row is the call's first row.
#[derive(Clone, Copy)]
pub(crate) struct BiasView<'a, A> {
    pub data: &'a [A],
    pub offset: usize,
    pub strides: [usize; 4],
}

impl<'a, A: Accumulator> BiasView<'a, A> {
    /// The view from a batch row on, with a token as its first row and column.
    pub fn from(mut self, batch: usize, token: usize) -> Self {
        let [b, _, row, column] = self.strides;
        self.offset += batch * b + token * (row + column);
        self
    }

    /// The view from a row and a column on.
    pub fn skip(mut self, row: usize, column: usize) -> Self {
        self.offset += row * self.strides[2] + column * self.strides[3];
        self
    }

    /// The entry of a batch row, a query head, a row of the call and a column.
    pub fn get(&self, [batch, head, row, column]: [usize; 4]) -> A {
        let [b, h, r, c] = self.strides;
        self.data[self.offset + batch * b + head * h + row * r + column * c]
    }

    /// The entries of one column.
    pub fn column(
        &self,
        [batch, head]: [usize; 2],
        rows: Range<usize>,
        column: usize,
    ) -> impl Iterator<Item = A> + use<'a, A> {
        let [b, h, stride, c] = self.strides;
        let (data, start) = (self.data, self.offset + batch * b + head * h + column * c);
        rows.map(move |row| data[start + row * stride])
    }

    /// The entry of a column for every row of the call, where the bias does not depend on the row.
    #[inline(always)]
    pub fn of_all_rows(&self, [batch, head]: [usize; 2], column: usize) -> Option<A> {
        (self.strides[2] == 0).then(|| self.get([batch, head, 0, column]))
    }

    fn hides(&self, at: [usize; 4]) -> bool {
        self.get(at) == A::NEG_INFINITY
    }

    /// Whether a row of a head sees none of these columns.
    pub fn hides_all(&self, [batch, head, row]: [usize; 3], mut columns: Range<usize>) -> bool {
        columns.all(|column| self.hides([batch, head, row, column]))
    }
}

/// The -inf entries of a call's bias. Two neighbours merge only where the later token's row sees both. Without this
/// rule a row would read one of them through the other.
#[derive(Clone, Copy)]
pub(crate) struct Apart<'a, A> {
    bias: BiasView<'a, A>,
    /// The token index of the call's first row.
    first_row: usize,
}

impl<'a, A: Accumulator> Apart<'a, A> {
    pub fn new(bias: BiasView<'a, A>, first_row: usize) -> Self {
        Self { bias, first_row }
    }

    /// Whether row `t + 1` sees t and t + 1, for each of these query heads. A row before the call's first one has no
    /// bias.
    pub fn pair_is_seen(&self, batch: usize, mut heads: Range<usize>, t: usize) -> bool {
        let Some(row) = (t + 1).checked_sub(self.first_row) else {
            return true;
        };
        heads.all(|head| {
            [t, t + 1]
                .iter()
                .all(|column| !self.bias.hides([batch, head, row, *column]))
        })
    }

    /// Refuses -inf at a column that one of the call's `rows` would see. The head `at` (batch row, query head) hides
    /// tokens, and a bias does not say which of the folded tokens a row may see. `seen` gives the tokens that a row (a
    /// token index) sees without a bias.
    fn check(&self, [batch, head]: [usize; 2], rows: usize, seen: impl Fn(usize) -> Range<usize>) -> Result<()> {
        let seen = |row: usize| seen(self.first_row + row);
        // Where the bias does not depend on the row, a column is looked at once for all rows.
        let alike = self.bias.strides[2] == 0;
        for row in if alike { rows - 1..rows } else { 0..rows } {
            let mut columns = seen(if alike { 0 } else { row }).start..seen(row).end;
            if let Some(column) = columns.find(|column| self.bias.hides([batch, head, row, *column])) {
                let row = match alike {
                    true => (0..rows).find(|row| seen(*row).contains(&column)).unwrap_or(row),
                    false => row,
                };
                bail!(
                    "bias: expected no -inf at a column that a row sees where tokens are hidden, got one at row {}, \
                     column {column} of batch row {batch}, head {head}; give padded rows and packed documents as \
                     AttentionOptions::segments, or make the head MergeStrategy::Off",
                    self.first_row + row
                )
            }
        }
        Ok(())
    }

    /// [`Self::check`] for the heads, by batch row and query head, that hide tokens; an entry that several heads share
    /// is read once.
    pub fn check_all(
        &self,
        hiding: impl Iterator<Item = [usize; 2]>,
        rows: usize,
        seen: impl Fn(usize) -> Range<usize> + Sync,
    ) -> Result<()> {
        let [b, h, ..] = self.bias.strides;
        let mut heads: Vec<[usize; 2]> = hiding.collect();
        heads.sort_by_key(|[batch, head]| batch * b + head * h);
        heads.dedup_by_key(|[batch, head]| *batch * b + *head * h);
        heads.into_par_iter().try_for_each(|at| self.check(at, rows, &seen))
    }
}

/// Changes a bias to the number that is added to a logit: multiplies it by a factor, without overflow. A finite bias
/// stays finite: beyond `limit` its logarithm grows in its place. So larger biases stay larger, and a dot product can
/// still be added.
#[derive(Clone, Copy)]
pub(crate) struct BiasUnit<A> {
    factor: A,
    limit: A,
    /// log2 of `limit`.
    exponent: f64,
    log2_factor: f64,
}

impl<A: Accumulator> BiasUnit<A> {
    /// For tiles whose numbers times `to_base_2` (above 0) are logits in base 2.
    pub fn new(to_base_2: f64) -> Self {
        let factor = std::f64::consts::LOG2_E / to_base_2;
        // An eighth of the largest number, in base 2 as in the tile.
        let exponent = A::MAX_EXPONENT - 3.0 - to_base_2.log2().max(0.0).ceil();
        Self {
            factor: A::of(factor),
            limit: A::of(exponent.exp2()),
            exponent,
            log2_factor: factor.log2(),
        }
    }

    #[inline(always)]
    pub fn of(&self, bias: A) -> A {
        let scaled = bias * self.factor;
        if scaled.absolute() < self.limit || bias == A::NEG_INFINITY {
            return scaled;
        }
        self.beyond(bias)
    }

    #[cold]
    fn beyond(&self, bias: A) -> A {
        if !bias.finite() {
            return bias;
        }
        let log2 = bias.absolute().double().log2() + self.log2_factor;
        let size = 1.0 + (log2 - self.exponent) / A::MAX_EXPONENT;
        A::of(size.min(2.0) * self.exponent.exp2() * bias.double().signum())
    }
}

/// Sink logits as logits in base 2; a finite one stays finite.
pub(crate) fn sinks_in_base_2<A: Accumulator>(sinks: &[f64]) -> Vec<A> {
    let unit = BiasUnit::<A>::new(1.0);
    sinks.iter().map(|sink| unit.of(A::of(*sink))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Finite numbers stay finite and in order, with room for a product beside them, in any unit.
    fn any_size<A: Accumulator + std::fmt::Debug>(numbers: &[f64]) {
        for to_base_2 in [1.0, 0.18, 1e-6, 37.0, 1e6] {
            let unit = BiasUnit::<A>::new(to_base_2);
            let mut last = A::NEG_INFINITY;
            for number in numbers {
                let got = unit.of(A::of(*number));
                assert!(
                    got.finite() && got > last,
                    "{number} in units of {to_base_2}: {got:?} after {last:?}"
                );
                let base_2 = got.double() * to_base_2;
                assert!(
                    A::of(base_2 * 2.0).finite(),
                    "{number} in units of {to_base_2}: {base_2}"
                );
                let exact = number * std::f64::consts::LOG2_E;
                if exact.abs() < 1e30 {
                    assert!(
                        (base_2 - exact).abs() <= 1e-6 * exact.abs(),
                        "{number}: {base_2} for {exact}"
                    );
                }
                last = got;
            }
            assert!(unit.of(A::NEG_INFINITY) == A::NEG_INFINITY && !unit.of(A::NAN).finite());
            assert!(!unit.of(A::of(f64::INFINITY)).finite());
        }
    }

    #[test]
    fn a_finite_bias_of_any_size_stays_finite_and_in_order() {
        let singles = [
            f32::MIN,
            -3.39e38,
            -3e38,
            -2e38,
            -1e38,
            -1e37,
            -1e30,
            -65504.0,
            -1.0,
            0.0,
            1e-3,
            5.0,
            1e38,
            f32::MAX,
        ];
        any_size::<f32>(&singles.map(f64::from));
        any_size::<f64>(&[
            f64::MIN,
            -1.7e308,
            -1e308,
            -1e300,
            -1e30,
            -1.0,
            0.0,
            2.0,
            1e308,
            f64::MAX,
        ]);
    }
}
