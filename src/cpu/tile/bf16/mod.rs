//! Matrix products of bf16 pairs, where the CPU has instructions for them that pay: Intel's AMX, or AMD's AVX512-BF16.
//!
//! The instructions multiply bf16 exactly and sum in f32. A bf16 number is one part; an f16 number is exactly the sum
//! of two bf16 parts. So a product of two f16 numbers is the sum of products of parts, where the smallest product is
//! left out. Folded rows and weights are rounded to the same number of parts. f32 as three parts and six products has
//! f32's precision, and took 0.97 to 1.1 times as long as the gemm crate, so f32 stays with the gemm crate.
//!
//! One shape of product serves all uses: `C (M, N) = A (M, K) · B (K, N)` with A by rows, B in pairs (K / 2, N, 2), and
//! N the rows of a block of queries. So tiles have the layout that they have everywhere else: a column of the tile is
//! one key.

mod gradients;
mod pack;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(not(target_arch = "x86_64"))]
#[path = "none.rs"]
mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_amx;

pub(crate) use gradients::{ColumnSums, PairGradients};
pub(crate) use pack::{Packed, PackedTile};

use crate::cpu::number::aligned::Aligned;
pub(crate) use crate::cpu::number::element::Split;
use crate::cpu::tile::softmax::{RowSums, LANES};
use crate::cpu::tile::transpose::to_columns;
use crate::instructions::bf16::{kernel, PairInstructions};

/// The multiple that A's dimensions and the number of columns are padded to: two tiles of 16 rows, or 16 pairs.
pub(crate) const PAD: usize = 32;

/// A tile of products, and the targets of its weights and gradients.
pub(crate) struct Differentials<'a> {
    /// Products of queries and keys, (columns, leading).
    pub products: &'a [f32],
    /// Gradients of the weights, (columns, leading).
    pub grads: &'a [f32],
    /// Factors from gradients of logits to those of products, (columns, leading), with a softcap; else empty.
    pub slopes: &'a [f32],
    pub leading: usize,
    pub count: usize,
    /// The factor from products to logits in base 2.
    pub factor: f32,
    pub split: Split,
    pub rows: RowSums<'a, f32>,
    /// (columns, parts, leading), with zeros up to a multiple of [`PAD`] columns.
    pub weights: &'a mut [u16],
    /// Gradients of logits, in the same layout.
    pub logits: &'a mut [u16],
    /// Gradients of logits as (parts, columns / 2, leading, 2), parts `plane` apart.
    pub logit_pairs: &'a mut [u16],
    pub plane: usize,
}

impl Split {
    pub fn parts(self) -> usize {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }

    /// The products of parts that are summed, (A's part, B's part), small ones first.
    pub fn terms(self) -> &'static [(usize, usize)] {
        match self {
            Self::One => &[(0, 0)],
            Self::Two => &[(0, 1), (1, 0), (0, 0)],
        }
    }
}

/// The kernel, split and factor of one call's products.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pairs {
    kernel: PairInstructions,
    pub split: Split,
    /// The factor from a product of a query and a key to a logit in base 2: scale · log2(e).
    pub factor: f32,
}

impl Pairs {
    /// None where the CPU has no such instructions or they do not pay. AVX512-BF16 is at most twice as fast as f32, so
    /// it serves bf16 alone.
    pub fn new(split: Split, scale: f64, softcap: Option<f64>) -> Option<Self> {
        let factor = (scale * std::f64::consts::LOG2_E) as f32;
        let kernel = (*kernel().as_ref().ok()?)?;
        let pays = kernel == PairInstructions::Amx || split == Split::One;
        // The softmax compares products before they are multiplied, which needs a positive factor.
        // A softcap in the unit of products needs a factor with room beside it: see `Softcap::new`.
        let fits = softcap.is_none() || (factor.log2().abs() <= 20.0);
        (pays && factor.is_normal() && factor > 0.0 && fits).then_some(Self { kernel, split, factor })
    }
}

/// One product: `c[m * ldc + n] = sum of a · b` over steps, pairs and both numbers of a pair, or the sum added to `c`.
struct PairProduct<'a> {
    /// Multiples of 32.
    m: usize,
    n: usize,
    c: &'a mut [f32],
    ldc: usize,
    /// Row m of step s is `a[m * lda + steps[s].a..][..32]`.
    a: &'a [u16],
    lda: usize,
    /// Pair p of column n of step s is `b[steps[s].b + p * ldb + 2 * n..][..2]`, 16 pairs.
    b: &'a [u16],
    ldb: usize,
    steps: &'a [PairStep],
    accumulate: bool,
}

/// The starts of 32 numbers of the summed dimension in A and B, counted in numbers.
#[derive(Clone, Copy)]
#[repr(C)]
struct PairStep {
    a: usize,
    b: usize,
}

impl PairProduct<'_> {
    /// Panics where an index would leave its slice; the kernels rely on this check.
    fn check(&self) {
        assert!(self.m > 0 && self.m.is_multiple_of(PAD) && self.n > 0 && self.n.is_multiple_of(PAD));
        assert!((self.m - 1) * self.ldc + self.n <= self.c.len() && self.n <= self.ldc);
        for step in self.steps {
            assert!(step.a + (self.m - 1) * self.lda + 32 <= self.a.len());
            assert!(step.b + 15 * self.ldb + 2 * self.n <= self.b.len());
        }
    }
}

/// [`LANES`] rows of a tile of products, and the targets of their weights.
struct Strip<'a> {
    /// (columns, leading)
    tile: &'a [f32],
    leading: usize,
    /// The strip's first row.
    first: usize,
    count: usize,
    /// The factor from products to logits in base 2.
    factor: f32,
    split: Split,
    /// (parts, columns / 2, leading, 2), parts `plane` apart.
    weights: &'a mut [u16],
    plane: usize,
    /// (D, leading), scaled from the old maximum to the new one.
    output: &'a mut [f32],
}

/// One tile of logits and weights, and the weighted values of its rows: buffers of one thread.
pub(crate) struct PairTiles {
    pairs: Pairs,
    leading: usize,
    dim: usize,
    /// The queries, (parts, D / 2, leading, 2).
    queries: Aligned<u16>,
    /// The queries as (parts, leading, D), before they are transposed.
    split_queries: Aligned<u16>,
    /// The queries as (parts, leading / 2, D, 2), pairs of rows, where gradients are made; else empty.
    row_pairs: Aligned<u16>,
    /// Weights of one tile, (parts, columns / 2, leading, 2).
    weights: Aligned<u16>,
    capacity: usize,
    steps: Vec<PairStep>,
    /// Weighted values (D, leading).
    output: Aligned<f32>,
    /// Weighted values as (leading, D).
    output_rows: Aligned<f32>,
    /// Sums of columns (columns, D) for tiles that are not whole squares.
    column_sums: Aligned<f32>,
}

impl PairTiles {
    /// For blocks of `leading` rows and tiles of up to `columns` columns.
    pub fn new(pairs: Pairs, leading: usize, columns: usize, head_dim: usize) -> Self {
        let (dim, capacity) = (head_dim.next_multiple_of(PAD), columns.next_multiple_of(PAD));
        let parts = pairs.split.parts();
        Self {
            pairs,
            leading,
            dim,
            queries: Aligned::zeroed(parts * dim * leading),
            split_queries: Aligned::zeroed(parts * dim * leading),
            row_pairs: Aligned::default(),
            weights: Aligned::zeroed(parts * capacity * leading),
            capacity,
            steps: Vec::new(),
            output: Aligned::zeroed(dim * leading),
            output_rows: Aligned::zeroed(dim * leading),
            column_sums: Aligned::default(),
        }
    }

    /// Adds the queries by pairs of rows, which [`Self::accumulate_columns`] reads.
    pub fn with_row_pairs(mut self) -> Self {
        self.row_pairs = Aligned::zeroed(self.queries.len());
        self
    }

    /// Loads the block's queries, (leading, D), `width` apart and not scaled.
    pub fn load_queries(&mut self, rows: &[f32], (head_dim, width): (usize, usize)) {
        pack::interleave(
            self.pairs.split,
            rows,
            (head_dim, width),
            (self.leading, self.dim),
            &mut self.split_queries,
            &mut self.queries,
        );
        if !self.row_pairs.is_empty() {
            pack::pair_rows(&self.split_queries, self.dim, &mut self.row_pairs);
        }
    }

    /// `tile[c * leading + r] = query[r] . key[c]` for `count` keys.
    pub fn scores(&mut self, tile: &mut [f32], columns: PackedTile, count: usize) {
        let PackedTile { packed, first } = columns;
        let (dim, leading) = (self.dim, self.leading);
        let plane = dim * leading;
        self.steps.clear();
        for (part, query_part) in self.pairs.split.terms() {
            for d in (0..dim).step_by(32) {
                self.steps.push(PairStep {
                    a: part * dim + d,
                    b: query_part * plane + d * leading,
                });
            }
        }
        let lda = self.pairs.split.parts() * dim;
        x86::product(
            self.pairs.kernel,
            PairProduct {
                m: count.next_multiple_of(PAD),
                n: leading,
                c: tile,
                ldc: leading,
                a: &packed.keys[first * lda..],
                lda,
                b: &self.queries,
                ldb: 2 * leading,
                steps: &self.steps,
                accumulate: false,
            },
        )
    }

    /// Changes a tile of products to weights; raises `max` (base 2), adds to `sum`, and scales the output so far.
    pub fn softmax(&mut self, tile: &[f32], count: usize, max: &mut [f32], sum: &mut [f32]) {
        let leading = self.leading;
        assert!(max.len() >= leading && sum.len() >= leading && leading.is_multiple_of(LANES));
        for first in (0..leading).step_by(LANES) {
            let strip = Strip {
                tile,
                leading,
                first,
                count,
                factor: self.pairs.factor,
                split: self.pairs.split,
                weights: &mut self.weights,
                plane: self.capacity * leading,
                output: &mut self.output,
            };
            x86::softmax(strip, &mut max[first..][..LANES], &mut sum[first..][..LANES]);
        }
    }

    /// `output[d, r] += sum_c weight[r, c] * value[c, d]` for the columns of the last [`Self::softmax`].
    pub fn accumulate(&mut self, columns: PackedTile, count: usize) {
        let PackedTile { packed, first } = columns;
        let (dim, leading) = (self.dim, self.leading);
        let parts = self.pairs.split.parts();
        let plane = self.capacity * leading;
        self.steps.clear();
        for block in 0..count.div_ceil(32) {
            for (part, weight_part) in self.pairs.split.terms() {
                self.steps.push(PairStep {
                    a: ((first / 32 + block) * parts + part) * dim * 32,
                    b: weight_part * plane + block * 32 * leading,
                });
            }
        }
        x86::product(
            self.pairs.kernel,
            PairProduct {
                m: dim,
                n: leading,
                c: &mut self.output,
                ldc: leading,
                a: &packed.values,
                lda: 32,
                b: &self.weights,
                ldb: 2 * leading,
                steps: &self.steps,
                accumulate: true,
            },
        )
    }

    /// Loads weighted values (leading, D), `width` apart, to add to.
    pub fn load_output(&mut self, rows: &[f32], (head_dim, width): (usize, usize)) {
        to_columns(rows, (head_dim, width), self.leading, &mut self.output);
    }

    /// Stores the weighted values as (leading, D), `width` apart.
    pub fn store_output(&mut self, rows: &mut [f32], (head_dim, width): (usize, usize)) {
        let leading = self.leading;
        to_columns(&self.output, (leading, leading), self.dim, &mut self.output_rows);
        let pairs = rows
            .chunks_exact_mut(width)
            .zip(self.output_rows.chunks_exact(self.dim));
        pairs.for_each(|(row, output)| row[..head_dim].copy_from_slice(&output[..head_dim]));
    }
}
