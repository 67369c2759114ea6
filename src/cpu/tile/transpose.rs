//! Rows to columns, by squares of registers.

use crate::cpu::number::element::Accumulator;
use crate::cpu::number::panels::PANEL;
use crate::instructions::arch;
use pulp::{Simd, WithSimd};

/// (leading, D), rows `width` apart, to (D, leading); `leading` is a multiple of [`PANEL`].
pub(crate) fn to_columns<A: Accumulator>(rows: &[A], (dim, width): (usize, usize), leading: usize, target: &mut [A]) {
    arch().dispatch(ToColumns {
        rows,
        dim,
        width,
        leading,
        target,
    })
}

/// [`to_columns`] as code for one instruction set.
struct ToColumns<'a, A> {
    rows: &'a [A],
    dim: usize,
    width: usize,
    leading: usize,
    target: &'a mut [A],
}

impl<A: Accumulator> WithSimd for ToColumns<'_, A> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for first in (0..self.leading).step_by(PANEL) {
            let mut rows: [&[A]; PANEL] = [&[]; PANEL];
            for (row, target) in rows.iter_mut().enumerate() {
                *target = &self.rows[(first + row) * self.width..][..self.dim];
            }
            transpose(simd, rows, &mut self.target[first..], self.leading);
        }
    }
}

/// Transposes the first [`PANEL`] of `rows` (each of D numbers, `width` apart) to the first [`PANEL`] columns of
/// (D, leading).
#[inline(always)]
pub(crate) fn transpose<A: Accumulator, S: Simd>(simd: S, rows: [&[A]; PANEL], target: &mut [A], leading: usize) {
    let mut singles: [&[f32]; PANEL] = [&[]; PANEL];
    for (single, row) in singles.iter_mut().zip(rows) {
        *single = A::singles(row);
    }
    let done = match S::F32_LANES {
        _ if singles[0].is_empty() => 0,
        16 => squares::<S, 16>(simd, singles, A::singles_mut(target), leading),
        8 => squares::<S, 8>(simd, singles, A::singles_mut(target), leading),
        _ => 0,
    };
    for d in done..rows[0].len() {
        for (x, row) in target[d * leading..][..PANEL].iter_mut().zip(rows) {
            *x = row[d];
        }
    }
}

/// [`transpose`] by squares of L registers of L lanes, as far as whole squares go; returns the number of dimensions
/// that they cover.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn squares<S: Simd, const L: usize>(simd: S, rows: [&[f32]; PANEL], target: &mut [f32], leading: usize) -> usize {
    let whole = rows[0].len() / L;
    let mut registers: [&[S::f32s]; PANEL] = [&[]; PANEL];
    for c in 0..PANEL {
        registers[c] = &S::as_simd_f32s(rows[c]).0[..whole];
    }
    for index in 0..whole {
        for part in 0..PANEL / L {
            let mut square = [simd.splat_f32s(0.0); L];
            for i in 0..L {
                square[i] = registers[part * L + i][index];
            }
            // Quarters off the diagonal change places, then the quarters of each quarter, down to single numbers.
            swap::<S, L, 8>(simd, &mut square);
            swap::<S, L, 4>(simd, &mut square);
            swap::<S, L, 2>(simd, &mut square);
            swap::<S, L, 1>(simd, &mut square);
            for i in 0..L {
                let target = &mut target[(index * L + i) * leading + part * L..][..L];
                S::as_mut_simd_f32s(target).0[0] = square[i];
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
