//! Rows of f32 as parts in bf16, in the orders that the products read.

use crate::cpu::number::aligned::Aligned;
use crate::cpu::number::halves::bf16_bits;
use crate::cpu::number::vectorized::vectorized;
use crate::cpu::tile::bf16::{Pairs, Split, PAD};
use crate::cpu::tile::transpose::to_columns;
use pulp::bytemuck::{cast_slice, cast_slice_mut};

/// The largest finite bf16 number.
const MAX: f32 = 3.389_531_4e38;

/// Splits 32 numbers into parts, each part `plane` apart: the next part holds the rest of the part before.
#[inline(always)]
fn store_parts(parts: usize, numbers: &[f32; 32], plane: usize, target: &mut [u16]) {
    let mut rest = *numbers;
    for part in 0..parts {
        let mut bits = [0u16; 32];
        for (bits, x) in bits.iter_mut().zip(&mut rest) {
            // Numbers near the largest would round to infinity; an infinity itself must become NaN.
            *bits = bf16_bits(if x.is_infinite() { f32::NAN } else { x.clamp(-MAX, MAX) });
            *x -= f32::from_bits(u32::from(*bits) << 16);
        }
        target[part * plane..][..32].copy_from_slice(&bits);
    }
}

/// Rows (leading, `head_dim`), `width` apart, to (parts, dim / 2, leading, 2): pairs of a row's neighbouring numbers.
/// `split_rows` is a buffer for (parts, leading, dim).
pub(crate) fn interleave(
    split: Split,
    rows: &[f32],
    (head_dim, width): (usize, usize),
    (leading, dim): (usize, usize),
    split_rows: &mut [u16],
    target: &mut [u16],
) {
    let (parts, plane) = (split.parts(), dim * leading);
    vectorized(
        #[inline(always)]
        || {
            for (index, row) in rows.chunks_exact(width).take(leading).enumerate() {
                for (chunk, source) in row[..head_dim].chunks(32).enumerate() {
                    let mut numbers = [0f32; 32];
                    numbers[..source.len()].copy_from_slice(source);
                    store_parts(parts, &numbers, plane, &mut split_rows[index * dim + chunk * 32..]);
                }
            }
        },
    );
    // A pair is as long as an f32, and this loop only moves it.
    for (rows, columns) in split_rows.chunks_exact(plane).zip(target.chunks_exact_mut(plane)) {
        to_columns::<f32>(cast_slice(rows), (dim / 2, dim / 2), leading, cast_slice_mut(columns));
    }
}

/// Rows of `dim` to pairs of neighbouring rows, (rows / 2, dim, 2).
pub(crate) fn pair_rows(rows: &[u16], dim: usize, target: &mut [u16]) {
    vectorized(
        #[inline(always)]
        || {
            for (rows, target) in rows.chunks_exact(2 * dim).zip(target.chunks_exact_mut(2 * dim)) {
                let (even, odd) = rows.split_at(dim);
                for (pair, (even, odd)) in target.as_chunks_mut().0.iter_mut().zip(even.iter().zip(odd)) {
                    *pair = [*even, *odd];
                }
            }
        },
    )
}

/// Keys and values of columns in token order, packed one by one.
pub(crate) struct Packed {
    /// (columns, parts, D)
    pub keys: Aligned<u16>,
    /// (columns / 32, parts, D, 32): each 32 columns' values by dimension, or their keys for gradients.
    pub values: Aligned<u16>,
    parts: usize,
    dim: usize,
    columns: usize,
    /// The values of the columns since the last multiple of 32, (32, D).
    staged: Vec<f32>,
    /// The staged values, transposed to (D, 32).
    transposed: Aligned<f32>,
    row: Vec<f32>,
}

/// Columns from a multiple of [`PAD`] on.
#[derive(Clone, Copy)]
pub(crate) struct PackedTile<'p> {
    pub packed: &'p Packed,
    pub first: usize,
}

impl Packed {
    pub fn tile(&self, first: usize) -> PackedTile<'_> {
        PackedTile { packed: self, first }
    }

    /// Room for `columns` columns; columns that are never pushed count as zeros.
    pub fn new(pairs: Pairs, head_dim: usize, columns: usize) -> Self {
        let (parts, dim) = (pairs.split.parts(), head_dim.next_multiple_of(PAD));
        let padded = columns.next_multiple_of(PAD);
        Self {
            keys: Aligned::zeroed(padded * parts * dim),
            values: Aligned::zeroed(padded * parts * dim),
            parts,
            dim,
            columns: 0,
            staged: vec![0.0; 32 * dim],
            transposed: Aligned::zeroed(32 * dim),
            row: vec![0.0; dim],
        }
    }

    /// Room for keys alone.
    pub fn keys_only(pairs: Pairs, head_dim: usize, columns: usize) -> Self {
        Self {
            values: Aligned::default(),
            ..Self::new(pairs, head_dim, columns)
        }
    }

    /// Starts again and keeps the buffers. Old numbers are overwritten up to the next multiple of 32.
    pub fn clear(&mut self) {
        self.columns = 0;
    }

    pub fn push(&mut self, key: &[f32], value: &[f32]) {
        self.push_key(key);
        let column = self.columns - 1;
        self.staged[column % 32 * self.dim..][..value.len()].copy_from_slice(value);
        if self.columns.is_multiple_of(32) {
            self.flush();
        }
    }

    /// Adds a column whose value is never read.
    pub fn push_key(&mut self, key: &[f32]) {
        let (parts, dim, column) = (self.parts, self.dim, self.columns);
        self.row[..key.len()].copy_from_slice(key);
        let target = &mut self.keys[column * parts * dim..][..parts * dim];
        let row = &self.row;
        vectorized(
            #[inline(always)]
            || {
                for (d, numbers) in row.as_chunks::<32>().0.iter().enumerate() {
                    store_parts(parts, numbers, dim, &mut target[d * 32..]);
                }
            },
        );
        self.columns += 1;
    }

    /// Must be called after the last column.
    pub fn finish(&mut self) {
        if !self.columns.is_multiple_of(32) {
            self.staged[self.columns % 32 * self.dim..].fill(0.0);
            self.flush();
        }
    }

    fn flush(&mut self) {
        let (parts, dim) = (self.parts, self.dim);
        let block = (self.columns - 1) / 32;
        let target = &mut self.values[block * parts * dim * 32..][..parts * dim * 32];
        to_columns(&self.staged, (dim, dim), 32, &mut self.transposed);
        let transposed = self.transposed.as_chunks::<32>().0;
        vectorized(
            #[inline(always)]
            || {
                for (d, numbers) in transposed.iter().enumerate() {
                    store_parts(parts, numbers, dim * 32, &mut target[d * 32..]);
                }
            },
        )
    }
}
