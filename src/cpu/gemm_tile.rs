//! The two matrix products of a tile, through the gemm crate. All of the CPU path's `unsafe` is here.

use super::{Accumulator, HeadRows};
use gemm::{gemm, Parallelism};
use std::ops::Range;

/// A tile of scores or weights: column c holds one key's entry for every row of the block, `leading` apart.
pub(crate) struct Tile<'a, A> {
    pub data: &'a mut [A],
    pub leading: usize,
    pub columns: usize,
    /// The rows that are computed; entries of the others are undefined.
    pub rows: Range<usize>,
}

impl<A> Tile<'_, A> {
    fn check(&self) {
        assert!(!self.rows.is_empty() && self.rows.end <= self.leading && self.columns > 0);
        assert!(self.columns * self.leading <= self.data.len());
    }
}

fn check_rows<A>(rows: &HeadRows<A>, count: usize) {
    assert!(rows.dim > 0 && (count - 1) * rows.stride + rows.dim <= rows.data.len());
}

/// `tile[r, c] = query[r] . key[c]`; `queries` is (D, leading), transposed so that rows are the vector axis.
pub(crate) fn scores<A: Accumulator>(tile: &mut Tile<A>, queries: &[A], keys: &HeadRows<A>) {
    tile.check();
    check_rows(keys, tile.columns);
    assert!(keys.dim * tile.leading <= queries.len());
    let (leading, first) = (tile.leading as isize, tile.rows.start);
    // SAFETY: the asserts above bound every index: tile (rows.end - 1) + (columns - 1) * leading, queries
    // (rows.end - 1) + (dim - 1) * leading, keys (columns - 1) * stride + dim - 1. Nothing aliases the &mut tile.
    unsafe {
        gemm(
            tile.rows.len(),
            tile.columns,
            keys.dim,
            tile.data.as_mut_ptr().add(first),
            leading,
            1,
            false,
            queries.as_ptr().add(first),
            leading,
            1,
            keys.data.as_ptr(),
            keys.stride as isize,
            1,
            A::ZERO,
            A::ONE,
            false,
            false,
            false,
            Parallelism::None,
        )
    }
}

/// `output[r] += sum_c tile[r, c] * value[c]`; `output` is (leading, D).
pub(crate) fn accumulate<A: Accumulator>(output: &mut [A], tile: &Tile<A>, values: &HeadRows<A>) {
    tile.check();
    check_rows(values, tile.columns);
    assert!(tile.rows.end * values.dim <= output.len());
    let first = tile.rows.start;
    // SAFETY: the asserts above bound every index as in `scores`; output ends at rows.end * dim - 1. Nothing aliases
    // the &mut output.
    unsafe {
        gemm(
            tile.rows.len(),
            values.dim,
            tile.columns,
            output.as_mut_ptr().add(first * values.dim),
            1,
            values.dim as isize,
            true,
            tile.data.as_ptr().add(first),
            tile.leading as isize,
            1,
            values.data.as_ptr(),
            1,
            values.stride as isize,
            A::ONE,
            A::ONE,
            false,
            false,
            false,
            Parallelism::None,
        )
    }
}

/// `target[c] += sum_r tile[r, c] * row[r]`; `target` is (columns, D), `rows` (leading, D).
pub(crate) fn accumulate_columns<A: Accumulator>(target: &mut [A], tile: &Tile<A>, rows: &[A], dim: usize) {
    tile.check();
    assert!(tile.columns * dim <= target.len() && tile.rows.end * dim <= rows.len() && dim > 0);
    let first = tile.rows.start;
    // SAFETY: the asserts above bound every index as in `scores`; target ends at columns * dim - 1 and rows at
    // rows.end * dim - 1. Nothing aliases the &mut target.
    unsafe {
        gemm(
            tile.columns,
            dim,
            tile.rows.len(),
            target.as_mut_ptr(),
            1,
            dim as isize,
            true,
            tile.data.as_ptr().add(first),
            1,
            tile.leading as isize,
            rows.as_ptr().add(first * dim),
            1,
            dim as isize,
            A::ONE,
            A::ONE,
            false,
            false,
            false,
            Parallelism::None,
        )
    }
}
