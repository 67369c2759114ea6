//! Keys by panels: what a query meets a register of tokens at once in.

use crate::cpu::element::PANEL;
use crate::cpu::{arch, Accumulator, Element};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Keys by panels of [`PANEL`] tokens, each by dimension, so that nothing is summed across a register.
#[derive(Clone, Debug, Default)]
pub(crate) struct Keys<A> {
    /// (panels, D, PANEL)
    data: Vec<A>,
    dim: usize,
    /// Which panel of the sequence is the first.
    first: usize,
}

impl<A: Accumulator> Keys<A> {
    /// Takes in the keys of `tokens`, in place of what was there, from panel `first` on. Tokens that are missing there or
    /// in the last panel are zeros.
    pub fn fill<'r, T: Element<Acc = A>>(
        &mut self,
        first: usize,
        tokens: Range<usize>,
        row: impl Fn(usize) -> &'r [T],
    ) {
        (self.first, self.dim) = (first, 0);
        if !tokens.is_empty() {
            self.dim = row(tokens.start).len();
            let panels = tokens.end.div_ceil(PANEL) - first;
            // All of it is written over.
            self.data.resize(panels * self.dim * PANEL, A::ZERO);
            arch().dispatch(Fill {
                keys: self,
                tokens,
                row,
            })
        }
    }

    /// Panel `index` of the sequence, (D, PANEL).
    #[inline(always)]
    pub fn panel(&self, index: usize) -> &[A] {
        &self.data[(index - self.first) * self.dim * PANEL..][..self.dim * PANEL]
    }
}

/// [`Keys::fill`] as code for one instruction set.
struct Fill<'k, A, F> {
    keys: &'k mut Keys<A>,
    tokens: Range<usize>,
    row: F,
}

impl<'r, T: Element, F: Fn(usize) -> &'r [T]> WithSimd for Fill<'_, T::Acc, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { keys, tokens, row } = self;
        let dim = keys.dim;
        // Rows that need widening, and zeros for those that are missing.
        let mut wide = vec![T::Acc::ZERO; PANEL * dim];
        for (panel, target) in keys.data.chunks_exact_mut(PANEL * dim).enumerate() {
            let first = (keys.first + panel) * PANEL;
            let present = |c: usize| tokens.contains(&(first + c)).then(|| row(first + c));
            for (c, wide) in wide.chunks_exact_mut(dim).enumerate() {
                match present(c) {
                    Some(row) if T::as_acc(row).is_none() => T::widen(row, wide),
                    Some(_) => {}
                    None => wide.fill(T::Acc::ZERO),
                }
            }
            let mut rows: [&[T::Acc]; PANEL] = [&[]; PANEL];
            for (c, target) in rows.iter_mut().enumerate() {
                *target = present(c).and_then(T::as_acc).unwrap_or(&wide[c * dim..][..dim]);
            }
            transpose(simd, rows, target);
        }
    }
}

/// Rows of D to (D, PANEL).
#[inline(always)]
fn transpose<A: Accumulator, S: Simd>(simd: S, rows: [&[A]; PANEL], target: &mut [A]) {
    let mut singles: [&[f32]; PANEL] = [&[]; PANEL];
    for (single, row) in singles.iter_mut().zip(rows) {
        *single = A::singles(row);
    }
    let done = match S::F32_LANES {
        _ if singles[0].is_empty() => 0,
        16 => squares::<S, 16>(simd, singles, A::singles_mut(target)),
        8 => squares::<S, 8>(simd, singles, A::singles_mut(target)),
        _ => 0,
    };
    for (d, target) in target.as_chunks_mut::<PANEL>().0.iter_mut().enumerate().skip(done) {
        for (x, row) in target.iter_mut().zip(rows) {
            *x = row[d];
        }
    }
}

/// [`transpose`] by squares of L registers of L lanes, as far as there are whole ones; returns how many dimensions those
/// have.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn squares<S: Simd, const L: usize>(simd: S, rows: [&[f32]; PANEL], target: &mut [f32]) -> usize {
    let whole = rows[0].len() / L;
    let mut registers: [&[S::f32s]; PANEL] = [&[]; PANEL];
    for c in 0..PANEL {
        registers[c] = &S::as_simd_f32s(rows[c]).0[..whole];
    }
    let target = S::as_mut_simd_f32s(target).0.chunks_exact_mut(PANEL);
    for (index, target) in target.take(whole).enumerate() {
        for part in 0..PANEL / L {
            let mut square = [simd.splat_f32s(0.0); L];
            for i in 0..L {
                square[i] = registers[part * L + i][index];
            }
            // Quarters off the diagonal change places, then those of each quarter, down to single numbers.
            swap::<S, L, 8>(simd, &mut square);
            swap::<S, L, 4>(simd, &mut square);
            swap::<S, L, 2>(simd, &mut square);
            swap::<S, L, 1>(simd, &mut square);
            for i in 0..L {
                target[i * (PANEL / L) + part] = square[i];
            }
        }
    }
    whole * L
}

/// Swaps the quarters off the diagonal, of HALF rows and lanes each, in every square of twice as many on the diagonal.
#[inline(always)]
fn swap<S: Simd, const L: usize, const HALF: usize>(simd: S, square: &mut [S::f32s; L]) {
    const NUMBERS: [u32; PANEL] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    if HALF >= L {
        return;
    }
    let left = simd.and_u32s(S::as_simd_u32s(&NUMBERS).0[0], simd.splat_u32s(HALF as u32));
    let left = simd.equal_u32s(left, simd.splat_u32s(0));
    for i in 0..L {
        if i & HALF == 0 {
            let (upper, lower) = (square[i], square[i + HALF]);
            square[i] = simd.select_f32s(left, upper, simd.rotate_right_f32s(lower, HALF));
            square[i + HALF] = simd.select_f32s(left, simd.rotate_left_f32s(upper, HALF), lower);
        }
    }
}
