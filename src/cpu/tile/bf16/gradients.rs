//! Gradients of a tile by products of bf16 pairs: weights and gradients of logits are rounded to as many parts as rows.

use crate::cpu::number::aligned::Aligned;
use crate::cpu::tile::bf16::{x86, Differentials, Packed, PackedTile, PairProduct, PairStep, PairTiles, Pairs, PAD};
use crate::cpu::tile::softmax::RowSums;

/// The sums of the gradients of a tile's columns, rows `width` apart.
pub(crate) struct ColumnSums<'a> {
    pub keys: &'a mut [f32],
    pub values: &'a mut [f32],
    pub width: usize,
}

/// The block's output gradients and one tile: buffers of one thread.
pub(crate) struct PairGradients {
    /// Holds the output gradients in place of queries; its output is that of [`PairTiles::accumulate`], the queries'
    /// gradients.
    rows: PairTiles,
    /// Raw values as keys.
    pub near: Packed,
    /// See [`Differentials`].
    weights: Aligned<u16>,
    logits: Aligned<u16>,
}

impl PairGradients {
    /// For blocks of `leading` rows and tiles of at most `columns` columns; at most `near` of them are raw tokens.
    pub fn new(pairs: Pairs, leading: usize, (columns, near): (usize, usize), head_dim: usize) -> Self {
        let tile = columns.next_multiple_of(PAD) * pairs.split.parts() * leading;
        Self {
            rows: PairTiles::new(pairs, leading, columns, head_dim).with_row_pairs(),
            near: Packed::keys_only(pairs, head_dim, near),
            weights: Aligned::zeroed(tile),
            logits: Aligned::zeroed(tile),
        }
    }

    /// Loads the block's output gradients, (leading, D), `width` apart.
    pub fn load_rows(&mut self, grads: &[f32], size: (usize, usize)) {
        self.rows.load_queries(grads, size);
    }

    /// Loads gradients of the block's queries, (leading, D), `width` apart, to add to.
    pub fn load_queries(&mut self, rows: &[f32], size: (usize, usize)) {
        self.rows.load_output(rows, size);
    }

    /// Stores the gradients of the block's queries, without the scale.
    pub fn store_queries(&mut self, rows: &mut [f32], size: (usize, usize)) {
        self.rows.store_output(rows, size);
    }

    /// Adds the gradients of one tile of `count` columns. `products` holds the products of the columns with the
    /// queries, and `slopes` those of their softcap, or nothing; `grads` is a buffer of the size of `products`. `keys`
    /// are packed by rows and by dimension, values by rows (raw ones in [`Self::near`]).
    pub fn tile(
        &mut self,
        (products, slopes, grads): (&[f32], &[f32], &mut [f32]),
        queries: &mut PairTiles,
        (keys, values): (PackedTile, Option<PackedTile>),
        count: usize,
        rows: RowSums<f32>,
        sums: ColumnSums,
    ) {
        let values = values.unwrap_or(PackedTile {
            packed: &self.near,
            first: 0,
        });
        self.rows.scores(grads, values, count);
        x86::differentiate(Differentials {
            products,
            grads,
            slopes,
            leading: self.rows.leading,
            count,
            factor: self.rows.pairs.factor,
            split: self.rows.pairs.split,
            rows,
            weights: &mut self.weights,
            logits: &mut self.logits,
            plane: self.rows.capacity * self.rows.leading,
            logit_pairs: &mut self.rows.weights,
        });
        self.rows
            .accumulate_columns(&self.weights, count, sums.values, sums.width);
        queries.accumulate_columns(&self.logits, count, sums.keys, sums.width);
        self.rows.accumulate(keys, count);
    }
}

impl PairTiles {
    /// Makes a query NaN for [`Self::scores`] and 0 for [`Self::accumulate_columns`].
    pub fn poison(&mut self, row: usize) {
        let (dim, leading) = (self.dim, self.leading);
        self.queries[2 * row] = half::bf16::NAN.to_bits();
        for part in self.row_pairs.chunks_exact_mut(leading * dim) {
            let pairs = &mut part[row / 2 * 2 * dim..][..2 * dim];
            pairs.iter_mut().skip(row % 2).step_by(2).for_each(|x| *x = 0);
        }
    }

    /// `target[c, d] += sum_r tile[c, r] * row[r, d]` for a tile (columns, parts, leading) and the loaded rows;
    /// `target` has `count` rows of at least D numbers.
    fn accumulate_columns(&mut self, tile: &[u16], count: usize, target: &mut [f32], width: usize) {
        let (dim, leading) = (self.dim, self.leading);
        let lda = self.pairs.split.parts() * leading;
        self.steps.clear();
        for (part, row_part) in self.pairs.split.terms() {
            for row in (0..leading).step_by(32) {
                self.steps.push(PairStep {
                    a: part * leading + row,
                    b: row_part * leading * dim + row * dim,
                });
            }
        }
        let whole = count.is_multiple_of(PAD) && dim <= width;
        let m = count.next_multiple_of(PAD);
        if !whole {
            self.column_sums.make_room(m * dim);
        }
        let (c, ldc) = match whole {
            true => (&mut *target, width),
            false => (&mut self.column_sums[..], dim),
        };
        let product = PairProduct {
            m,
            n: dim,
            c,
            ldc,
            a: tile,
            lda,
            b: &self.row_pairs,
            ldb: 2 * dim,
            steps: &self.steps,
            accumulate: whole,
        };
        x86::product(self.pairs.kernel, product);
        if !whole {
            let rows = target.chunks_mut(width).zip(self.column_sums.chunks_exact(dim));
            for (target, sums) in rows.take(count) {
                target.iter_mut().zip(sums).for_each(|(x, y)| *x += *y);
            }
        }
    }
}
