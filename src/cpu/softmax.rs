//! The online softmax of a block of rows, in base 2: logits arrive multiplied by log2(e).

use super::gemm_tile::Tile;
use super::{arch, Accumulator};
use pulp::{Simd, WithSimd};

/// Rows are handled this many at a time: two AVX-512 or four AVX2 registers of f32, so that the running maximum and
/// sum of a pass over the columns stay in registers.
pub(crate) const LANES: usize = 32;

/// Running maximum and sum of every row of a block.
pub(crate) struct OnlineSoftmax<A> {
    max: Vec<A>,
    sum: Vec<A>,
    rescale: Vec<A>,
}

impl<A: Accumulator> OnlineSoftmax<A> {
    /// For blocks of up to `rows` rows, a multiple of [`LANES`].
    pub fn new(rows: usize) -> Self {
        debug_assert_eq!(rows % LANES, 0);
        Self {
            max: vec![A::NEG_INFINITY; rows],
            sum: vec![A::ZERO; rows],
            rescale: vec![A::ONE; rows],
        }
    }

    /// Starts a new block: no row has seen a column.
    pub fn reset(&mut self) {
        self.max.fill(A::NEG_INFINITY);
        self.sum.fill(A::ZERO);
    }

    /// A row's first column, whose weight is 1 until larger logits come. Minus infinity leaves the row empty.
    pub fn start(&mut self, row: usize, logit: A) {
        self.max[row] = logit;
        self.sum[row] = if logit == A::NEG_INFINITY { A::ZERO } else { A::ONE };
    }

    /// Turns a tile of logits into weights relative to the new maximum, in place, adds them to the sums, and scales
    /// `output` (rows, D) from the old maximum to the new one. The tile's rows are multiples of [`LANES`].
    pub fn push(&mut self, tile: &mut Tile<A>, output: &mut [A]) {
        debug_assert!(tile.rows.start.is_multiple_of(LANES) && tile.rows.end.is_multiple_of(LANES));
        arch().dispatch(Push {
            softmax: self,
            tile,
            output,
        })
    }

    #[inline(always)]
    fn push_lanes<S: Simd>(&mut self, simd: S, tile: &mut Tile<A>, first: usize) {
        let lanes = |slice: &[A]| -> [A; LANES] { slice[first..][..LANES].try_into().unwrap_or([A::NAN; LANES]) };
        let old = lanes(&self.max);
        let mut max = old;
        let columns = tile.data.chunks_exact(tile.leading).take(tile.columns);
        for column in columns {
            A::raise(simd, &mut max, &column[first..][..LANES]);
        }
        // A row that saw only minus infinities keeps weight 0: nothing is subtracted from them.
        let base = max.map(|m| if m == A::NEG_INFINITY { A::ZERO } else { m });
        let mut sum = [A::ZERO; LANES];
        for column in tile.data.chunks_exact_mut(tile.leading).take(tile.columns) {
            let column = &mut column[first..][..LANES];
            for lane in 0..LANES {
                let weight = (column[lane] - base[lane]).exp2_nonpositive();
                column[lane] = weight;
                sum[lane] += weight;
            }
        }
        for lane in 0..LANES {
            let rescale = (old[lane] - base[lane]).exp2_nonpositive();
            self.rescale[first + lane] = rescale;
            self.max[first + lane] = max[lane];
            self.sum[first + lane] = self.sum[first + lane] * rescale + sum[lane];
        }
    }

    /// The running maximum (base 2) and sum of all rows, for a tile that is pushed elsewhere.
    pub fn state(&mut self) -> (&mut [A], &mut [A]) {
        (&mut self.max, &mut self.sum)
    }

    /// log2 of the sum of 2^logit over the row's columns; minus infinity where it saw none.
    pub fn log_sum_exp(&self, row: usize) -> A {
        self.max[row] + A::of(self.sum[row].double().log2())
    }

    /// See [`finish_row`].
    pub fn finish(&self, row: usize, output: &mut [A]) {
        finish_row(self.sum[row], output)
    }
}

/// [`OnlineSoftmax::push`] as code for one instruction set.
struct Push<'s, 't, A> {
    softmax: &'s mut OnlineSoftmax<A>,
    tile: &'s mut Tile<'t, A>,
    output: &'s mut [A],
}

impl<A: Accumulator> WithSimd for Push<'_, '_, A> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { softmax, tile, output } = self;
        for first in tile.rows.clone().step_by(LANES) {
            softmax.push_lanes(simd, tile, first);
        }
        let dim = output.len() / tile.leading;
        for row in tile.rows.clone() {
            let rescale = softmax.rescale[row];
            if rescale != A::ONE {
                output[row * dim..][..dim].iter_mut().for_each(|x| *x *= rescale);
            }
        }
    }
}

/// Divides a row of the output by its sum. A row that holds anything not finite, or that saw nothing, becomes NaN
/// throughout, so that no part of it passes for a result.
pub(crate) fn finish_row<A: Accumulator>(sum: A, output: &mut [A]) {
    let inverse = A::ONE / sum;
    let mut check = A::ZERO;
    for x in output.iter_mut() {
        *x *= inverse;
        check += *x * A::ZERO;
    }
    if check != A::ZERO || !inverse.finite() {
        output.fill(A::NAN);
    }
}
