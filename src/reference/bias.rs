//! The additive bias, and the pairs of tokens that it keeps apart.

use candle_core::{bail, Result, Tensor};

use super::{to_f64, Axes, Indicators};
use crate::config::{AttentionOptions, Segment};

/// A bias that broadcasts to (B, H, Nq, N), as f64. Rows are given by their token index.
pub(super) struct Bias {
    dims: [usize; 4],
    data: Vec<f64>,
    queries: usize,
    /// The token index of the first query's row.
    first_row: usize,
    /// The batch row and the token that indices count from.
    first: [usize; 2],
}

impl Bias {
    pub(super) fn read(bias: &Tensor, sizes: Axes) -> Result<Self> {
        let full = [sizes.batch, sizes.heads, sizes.queries, sizes.tokens];
        let got = bias.dims();
        let padding = 4usize.saturating_sub(got.len());
        let mut dims = [1; 4];
        let fits = got.len() <= 4 && got.iter().zip(&full[padding..]).all(|(&d, &f)| d == f || d == 1);
        if !fits {
            bail!("bias: expected a shape that broadcasts to {full:?}, got {got:?}; reshape it or add axes of size 1")
        }
        dims[padding..].copy_from_slice(got);
        Ok(Self {
            dims,
            data: to_f64(bias)?,
            queries: sizes.queries,
            first_row: sizes.first_row,
            first: [0, 0],
        })
    }

    /// The same bias for a call on one segment: indices count from its first token.
    pub(super) fn alone(self, segment: &Segment) -> Self {
        Self {
            first: [segment.batch, segment.tokens.start],
            queries: segment.tokens.len(),
            ..self
        }
    }

    /// The entry of (batch, query head, row, column).
    pub(super) fn get(&self, [batch, head, row, column]: [usize; 4]) -> f64 {
        let [first_batch, first] = self.first;
        let index = [batch + first_batch, head, row + first - self.first_row, column + first];
        let pairs = self.dims.iter().zip(index);
        let flat = pairs.fold(0, |flat, (&dim, i)| flat * dim + if dim == 1 { 0 } else { i });
        self.data[flat]
    }

    fn hides(&self, [batch, head]: [usize; 2], row: usize, column: usize) -> bool {
        self.get([batch, head, row, column]) == f64::NEG_INFINITY
    }

    /// Whether row `t + 1`, which decides the pair (t, t + 1), sees both tokens, as a row without a query does. A pair
    /// that it does not see never qualifies.
    pub(super) fn pair_is_seen(&self, head: [usize; 2], t: usize) -> bool {
        t + 1 < self.first_row || !self.hides(head, t + 1, t) && !self.hides(head, t + 1, t + 1)
    }

    /// Refuses a head that hides tokens while its bias is -inf at a column that a row would see: the bias does not tell
    /// apart the tokens that are folded together.
    pub(super) fn check(&self, indicators: &Indicators, options: &AttentionOptions) -> Result<()> {
        let [batch, heads, pairs] = indicators.dims;
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            if !indicators.head(b, h).contains(&true) {
                continue;
            }
            for row in self.first_row..self.first_row + self.queries {
                let first = options
                    .sliding_window
                    .map_or(0, |length| (row + 1).saturating_sub(length));
                let last = if options.causal { row } else { pairs };
                if let Some(column) = (first..=last).find(|&column| self.hides([b, h], row, column)) {
                    bail!(
                        "bias: expected no -inf where tokens are hidden, got one at row {row}, column {column} of \
                         batch row {b}, head {h}; give padded rows and packed documents as \
                         AttentionOptions::segments, or make the head MergeStrategy::Off"
                    )
                }
            }
        }
        Ok(())
    }
}
