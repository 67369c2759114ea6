//! Merging in one head: folded vectors and their sizes, and the columns that a row sees.

use super::{add_scaled, HeadTokens};
use crate::config::Fold;

/// The folded vectors `F[x]` of one head and the sizes `n[x]` that enter the softmax as `ln n[x]`, for the raw vectors
/// `X` and the bits `m` (one fewer than the vectors):
///
/// * [`Fold::PairSum`]: `F[x] = X[x] + m[x-1]·X[x-1]`, `n[x] = 1`;
/// * [`Fold::Mean`]: `n[x] = 1 + m[x-1]·n[x-1]`, `F[x] = (X[x] + m[x-1]·n[x-1]·F[x-1]) / n[x]`;
/// * [`Fold::Drop`]: `F[x] = X[x]`, `n[x] = 1`.
///
/// Where a bit is 0 the left neighbour is not read, so NaN does not pass through it.
///
/// # Panics
/// With fewer bits, like a slice index.
pub fn fold(fold: Fold, rows: &[Vec<f64>], bits: &[bool]) -> (HeadTokens, Vec<f64>) {
    let mut folded = rows.to_vec();
    let mut sizes = vec![1.0; rows.len()];
    for x in 1..rows.len() {
        if !bits[x - 1] {
            continue;
        }
        match fold {
            Fold::PairSum => add_scaled(&mut folded[x], 1.0, &rows[x - 1]),
            Fold::Mean => {
                sizes[x] = 1.0 + sizes[x - 1];
                let (chain, rest) = folded.split_at_mut(x);
                add_scaled(&mut rest[0], sizes[x - 1], &chain[x - 1]);
                rest[0].iter_mut().for_each(|value| *value /= sizes[x]);
            }
            Fold::Drop => {}
        }
    }
    (folded, sizes)
}

/// The transpose of [`fold()`]: the gradient of the raw vectors from the gradient of the folded ones.
///
/// * [`Fold::PairSum`]: `dX[x] = dF[x] + m[x]·dF[x+1]`;
/// * [`Fold::Mean`]: from the right, `dX[x] = dF[x] / n[x]`, and `dF[x-1]` gains `m[x-1]·n[x-1]/n[x]·dF[x]`;
/// * [`Fold::Drop`]: `dX = dF`.
///
/// # Panics
/// With fewer bits or sizes than [`fold()`] has, like a slice index.
pub fn unfold(fold: Fold, gradients: &[Vec<f64>], bits: &[bool], sizes: &[f64]) -> HeadTokens {
    let mut unfolded = gradients.to_vec();
    for x in (0..gradients.len()).rev() {
        let joins_left = x > 0 && bits[x - 1];
        match fold {
            Fold::PairSum if joins_left => add_scaled(&mut unfolded[x - 1], 1.0, &gradients[x]),
            Fold::Mean => {
                unfolded[x].iter_mut().for_each(|value| *value /= sizes[x]);
                if joins_left {
                    let (chain, rest) = unfolded.split_at_mut(x);
                    add_scaled(&mut chain[x - 1], sizes[x - 1], &rest[0]);
                }
            }
            Fold::PairSum | Fold::Drop => {}
        }
    }
    unfolded
}

/// A column that a row attends to, with its token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// A folded token to the left of the edge that is not hidden.
    Far(usize),
    /// The folded token at the left border of the window, hidden or not.
    Edge(usize),
    /// A raw token inside the window.
    Near(usize),
}

impl Column {
    /// The token that gives the column its bias and its dropout.
    pub fn token(self) -> usize {
        match self {
            Self::Far(token) | Self::Edge(token) | Self::Near(token) => token,
        }
    }
}

/// The columns that row `row` of one head sees, in the order of their tokens; `bits` has one entry fewer than the head
/// has tokens.
///
/// Causal, with `x = row - window`: far columns `s < x` with `m[s] = 0`, the edge `x` if there is one, and near columns
/// `x < t <= row`. Not causal (`window` is 0): every `s` with `m[s] = 0`, and the edge `s = row`. With a
/// `sliding_window` L, only those whose token s has `s > row - L`.
pub fn visible_columns(
    bits: &[bool],
    row: usize,
    window: usize,
    causal: bool,
    sliding_window: Option<usize>,
) -> Vec<Column> {
    let mut columns = columns_of(bits, row, window, causal);
    if let Some(length) = sliding_window {
        columns.retain(|column| column.token() + length > row);
    }
    columns
}

fn columns_of(bits: &[bool], row: usize, window: usize, causal: bool) -> Vec<Column> {
    let far = |s: &usize| !bits.get(*s).copied().unwrap_or(false);
    if !causal {
        return (0..=bits.len())
            .filter(|s| *s == row || far(s))
            .map(|s| if s == row { Column::Edge(s) } else { Column::Far(s) })
            .collect();
    }
    let Some(x) = row.checked_sub(window) else {
        return (0..=row).map(Column::Near).collect();
    };
    (0..x)
        .filter(far)
        .map(Column::Far)
        .chain([Column::Edge(x)])
        .chain((x + 1..=row).map(Column::Near))
        .collect()
}
