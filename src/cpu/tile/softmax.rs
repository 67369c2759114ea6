//! The online softmax of a block of rows, in base 2: logits arrive multiplied by log2(e).

use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::finite::Check;
use crate::cpu::number::registers::exp2;
use crate::cpu::tile::gemm_tile::Tile;
use crate::instructions::arch;
use pulp::{Simd, WithSimd};

/// Rows that are computed at a time: two AVX-512 or four AVX2 registers of f32, so that the running maximum and sum of
/// a pass over the columns stay in registers.
pub(crate) const LANES: usize = 32;

/// The most by which logits may exceed a row's base (the number that its weights are relative to) before the base is
/// raised and the row's sums are scaled. Weights grow to 2^8, and few tiles after a row's first one scale anything.
/// Against raising the base at once, dense forward took 0.99 of the time, and 0.98 with four fifths hidden.
pub(crate) const SLACK: f32 = 8.0;

/// Running maximum and sum of every row of a block.
pub(crate) struct OnlineSoftmax<A> {
    /// The base that weights are relative to: at most [`SLACK`] less than the largest logit.
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

    /// Adds a row's first column, whose weight is 1 until far larger logits come. Minus infinity leaves the row empty.
    /// A NaN is kept, whether or not a tile follows.
    pub fn start(&mut self, row: usize, logit: A) {
        self.max[row] = logit;
        self.sum[row] = if logit == A::NEG_INFINITY {
            A::ZERO
        } else if logit.is_nan() {
            A::NAN
        } else {
            A::ONE
        };
    }

    /// Ends a row after its last column: a row of logits that are all minus infinity is NaN, unless it `sees_nothing`.
    pub fn settle(&mut self, rows: usize, sees_nothing: impl Fn(usize) -> bool) {
        for (row, sum) in self.sum[..rows].iter_mut().enumerate() {
            if *sum == A::ZERO && !sees_nothing(row) {
                *sum = A::NAN;
            }
        }
    }

    /// Adds one term without a value to each row's sum, after [`Self::settle`]; `output` is (leading, width). Minus
    /// infinity adds nothing.
    pub fn add_sink(&mut self, rows: usize, sink: A, output: &mut [A]) {
        let width = output.len() / self.max.len();
        let rows = output.chunks_exact_mut(width).take(rows);
        for ((max, sum), row) in self.max.iter_mut().zip(&mut self.sum).zip(rows) {
            add_sink(sink, (max, sum), row);
        }
    }

    /// Changes a tile of logits to weights relative to the maximum, in place, adds the weights to the sums, and scales
    /// `output` (leading, width) where a row's maximum was raised. The tile's rows are multiples of [`LANES`].
    pub fn push(&mut self, tile: &mut Tile<A>, output: &mut [A]) {
        debug_assert!(tile.rows.start.is_multiple_of(LANES) && tile.rows.end.is_multiple_of(LANES));
        arch().dispatch(Push {
            softmax: self,
            tile,
            output,
        })
    }

    /// The running maximum (base 2) and sum of all rows, for a tile that other code adds.
    pub fn state(&mut self) -> (&mut [A], &mut [A]) {
        (&mut self.max, &mut self.sum)
    }

    /// log2 of the sum of 2^logit over the row's columns, as a sum of two numbers: beside a large first number the
    /// second would be rounded away. Both are 0 where the row saw nothing: its logits are minus infinity, and stay so
    /// after any subtraction.
    pub fn log_sum_exp(&self, row: usize) -> [A; 2] {
        match self.sum[row] == A::ZERO {
            true => [A::ZERO; 2],
            false => [self.max[row], A::of(self.sum[row].double().log2())],
        }
    }

    /// See [`finish_row`].
    #[inline(always)]
    pub fn finish<T: Element<Acc = A>>(&self, row: usize, source: &mut [A], output: &mut [T]) {
        finish_row(self.sum[row], source, output)
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
        weigh(simd, tile, softmax);
        let width = output.len() / tile.leading;
        for row in tile.rows.clone() {
            let rescale = softmax.rescale[row];
            if rescale != A::ONE {
                output[row * width..][..width].iter_mut().for_each(|x| *x *= rescale);
            }
        }
    }
}

/// Changes a tile of logits to weights, and gradients of weights to gradients of logits: see [`differentiate_in`].
pub(crate) fn differentiate<'t, A: Accumulator>(weights: &mut Tile<'t, A>, logits: &mut Tile<'t, A>, rows: RowSums<A>) {
    arch().dispatch(Differentiate { weights, logits, rows })
}

/// [`differentiate`] as code for one instruction set.
struct Differentiate<'s, 't, A> {
    weights: &'s mut Tile<'t, A>,
    logits: &'s mut Tile<'t, A>,
    rows: RowSums<'s, A>,
}

/// The numbers of each row's softmax that gradients read.
#[derive(Clone, Copy)]
pub(crate) struct RowSums<'s, A> {
    /// Minus the two parts of [`OnlineSoftmax::log_sum_exp`].
    pub minus_max: &'s [A],
    pub minus_log2_sum: &'s [A],
    /// Output gradient times output.
    pub delta: &'s [A],
}

impl<A: Accumulator> WithSimd for Differentiate<'_, '_, A> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        differentiate_in(simd, self.weights, self.logits, self.rows)
    }
}

/// Computes V registers of rows from `first` on; columns are read twice, while they are in the first cache.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn strip<A: Accumulator, S: Simd, const V: usize>(
    simd: S,
    tile: &mut Tile<A>,
    first: usize,
    softmax: &mut OnlineSoftmax<A>,
) {
    let rows = V * A::lanes::<S>();
    let empty = A::splat(simd, A::NEG_INFINITY);
    // Two maxima hide the latency of one.
    let mut tops = [[empty; V]; 2];
    let mut pairs = tile.data[..tile.columns * tile.leading].chunks_exact(2 * tile.leading);
    for pair in &mut pairs {
        let (even, odd) = pair.split_at(tile.leading);
        let (even, odd) = (
            A::registers::<S>(&even[first..][..rows]).0,
            A::registers::<S>(&odd[first..][..rows]).0,
        );
        for v in 0..V {
            tops[0][v] = A::maximum(simd, even[v], tops[0][v]);
            tops[1][v] = A::maximum(simd, odd[v], tops[1][v]);
        }
    }
    if let Some(last) = pairs.remainder().get(first..first + rows) {
        for v in 0..V {
            tops[0][v] = A::maximum(simd, A::registers::<S>(last).0[v], tops[0][v]);
        }
    }
    let max = A::registers_mut::<S>(&mut softmax.max[first..][..rows]).0;
    let (mut base, mut rescale) = ([empty; V], [empty; V]);
    for v in 0..V {
        let top = A::maximum(simd, tops[0][v], tops[1][v]);
        let passed = A::less(simd, A::plus(simd, max[v], A::splat(simd, A::of(SLACK.into()))), top);
        let top = A::select(simd, passed, top, max[v]);
        // A row that saw only minus infinities keeps weight 0: nothing is subtracted from its logits.
        base[v] = A::select(simd, A::equal(simd, top, empty), A::zeros(simd), top);
        rescale[v] = exp2::<A, S>(simd, A::minus(simd, max[v], base[v]));
        max[v] = top;
    }
    let mut sums = [A::zeros(simd); V];
    for column in tile.data.chunks_exact_mut(tile.leading).take(tile.columns) {
        let column = A::registers_mut::<S>(&mut column[first..][..rows]).0;
        for v in 0..V {
            let weight = exp2::<A, S>(simd, A::minus(simd, column[v], base[v]));
            column[v] = weight;
            sums[v] = A::plus(simd, sums[v], weight);
        }
    }
    let sum = A::registers_mut::<S>(&mut softmax.sum[first..][..rows]).0;
    let rescales = A::registers_mut::<S>(&mut softmax.rescale[first..][..rows]).0;
    for v in 0..V {
        sum[v] = A::mul_add(simd, sum[v], rescale[v], sums[v]);
        rescales[v] = rescale[v];
    }
}

/// Changes logits to weights, 2^(logit - top), and adds each to the sum at its index. The lengths are multiples of a
/// register's.
#[inline(always)]
pub(crate) fn add_weights<A: Accumulator, S: Simd>(simd: S, logits: &mut [A], top: A, sums: &mut [A]) {
    let top = A::splat(simd, top);
    for (x, sum) in A::registers_mut::<S>(logits)
        .0
        .iter_mut()
        .zip(A::registers_mut::<S>(sums).0)
    {
        *x = exp2::<A, S>(simd, A::minus(simd, *x, top));
        *sum = A::plus(simd, *sum, *x);
    }
}

/// `weights` come as logits and become 2^(logit - log_sum_exp). `logits` come as gradients g of weights and become
/// weight * (g - delta). A tile has a multiple of [`LANES`] rows.
#[inline(always)]
fn differentiate_in<A: Accumulator, S: Simd>(simd: S, weights: &mut Tile<A>, logits: &mut Tile<A>, sums: RowSums<A>) {
    let rows = weights.rows.clone();
    let max = A::registers::<S>(&sums.minus_max[rows.clone()]).0;
    let log2_sum = A::registers::<S>(&sums.minus_log2_sum[rows.clone()]).0;
    let delta = A::registers::<S>(&sums.delta[rows.clone()]).0;
    let columns = weights.data.chunks_exact_mut(weights.leading);
    let columns = columns.zip(logits.data.chunks_exact_mut(logits.leading));
    for (weight, logit) in columns.take(weights.columns) {
        let weight = A::registers_mut::<S>(&mut weight[rows.clone()]).0.iter_mut();
        let logit = A::registers_mut::<S>(&mut logit[rows.clone()]).0.iter_mut();
        let sums = max.iter().zip(log2_sum).zip(delta);
        for ((weight, logit), ((max, log2_sum), delta)) in weight.zip(logit).zip(sums) {
            *weight = exp2::<A, S>(simd, A::plus(simd, A::plus(simd, *weight, *max), *log2_sum));
            *logit = A::times(simd, *weight, A::minus(simd, *logit, *delta));
        }
    }
}

/// Changes a tile of logits to weights, and adds them to the softmax's state.
#[inline(always)]
fn weigh<A: Accumulator, S: Simd>(simd: S, tile: &mut Tile<A>, softmax: &mut OnlineSoftmax<A>) {
    let rows = tile.rows.clone();
    if S::IS_SCALAR {
        // The compiler keeps this many rows in registers.
        return rows
            .step_by(8)
            .for_each(|first| strip::<A, S, 8>(simd, tile, first, softmax));
    }
    for first in rows.step_by(2 * A::lanes::<S>()) {
        strip::<A, S, 2>(simd, tile, first, softmax);
    }
}

/// Adds a term without a value to a row's sum. Logits far above it leave the row as it is, bit for bit.
#[inline(always)]
pub(crate) fn add_sink<A: Accumulator>(sink: A, (max, sum): (&mut A, &mut A), output: &mut [A]) {
    if sink == A::NEG_INFINITY {
        return;
    }
    if sink > *max {
        let rescale = (*max - sink).exp2_nonpositive();
        output.iter_mut().for_each(|x| *x *= rescale);
        (*max, *sum) = (sink, *sum * rescale + A::ONE);
    } else {
        *sum += (sink - *max).exp2_nonpositive();
    }
}

/// Divides a row by its sum and stores it. A row that holds a number that is not finite becomes NaN throughout, so that
/// no part of it passes for a result. A row that saw nothing, whose sum is 0, is zeros.
#[inline(always)]
pub(crate) fn finish_row<T: Element>(sum: T::Acc, row: &mut [T::Acc], output: &mut [T]) {
    if sum == T::Acc::ZERO {
        return output.fill(T::zero());
    }
    let inverse = T::Acc::ONE / sum;
    let mut check = Check::default();
    match T::as_acc_mut(output) {
        Some(output) => check.scale(row, inverse, output),
        None => {
            row.iter_mut().for_each(|x| *x *= inverse);
            check.take(row);
            T::narrow(row, output);
        }
    }
    if !check.passed() || !inverse.finite() {
        row.fill(T::Acc::NAN);
        T::narrow(row, output);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    /// Tiles whose logits climb, stay or fall by `step`: the result is an exact softmax, and each row's weights are
    /// relative to its largest logit or at most [`SLACK`] less.
    fn tiles_that_climb<A: Accumulator>(step: f64, tolerance: f64) {
        let (tiles, columns) = (7, 5);
        let logit = |tile: usize, column: usize, row: usize| {
            step * tile as f64 + ((tile * 31 + column * 17 + row * 7) % 13) as f64 / 4.0
        };
        let value = |tile: usize, column: usize| (tile * columns + column) as f64 / 10.0;
        let mut softmax = OnlineSoftmax::<A>::new(LANES);
        let mut output = vec![A::ZERO; LANES];
        for tile in 0..tiles {
            let mut data: Vec<A> = (0..columns * LANES)
                .map(|i| A::of(logit(tile, i / LANES, i % LANES)))
                .collect();
            softmax.push(
                &mut Tile {
                    data: &mut data,
                    leading: LANES,
                    columns,
                    rows: 0..LANES,
                },
                &mut output,
            );
            for (i, weight) in data.iter().enumerate() {
                output[i % LANES] += *weight * A::of(value(tile, i / LANES));
            }
        }
        for (row, output) in output.iter().enumerate() {
            let seen = || (0..tiles).flat_map(|tile| (0..columns).map(move |column| (tile, column)));
            let top = seen()
                .map(|(tile, column)| logit(tile, column, row))
                .fold(f64::MIN, f64::max);
            let weight = |(tile, column)| (logit(tile, column, row) - top).exp2();
            let sum: f64 = seen().map(weight).sum();
            let mean = seen().map(|at| weight(at) * value(at.0, at.1)).sum::<f64>() / sum;
            let got = output.double() / softmax.sum[row].double();
            assert!(
                (got - mean).abs() <= tolerance * mean,
                "step {step}, row {row}: {got} for {mean}"
            );
            let [max, log2_sum] = softmax.log_sum_exp(row).map(A::double);
            let (got, exact) = (max + log2_sum, top + sum.log2());
            assert!(
                (got - exact).abs() <= tolerance * exact.abs().max(1.0),
                "step {step}, row {row}: {got} for {exact}"
            );
            let below = (A::of(top) - softmax.max[row]).double();
            assert!(
                (0.0..=f64::from(SLACK)).contains(&below),
                "step {step}, row {row}: {below}"
            );
        }
    }

    #[test]
    fn weights_stay_relative_to_nearly_the_largest_logit() {
        for step in [0.0, 1.0, 3.0, 5.0, 7.9, 8.1, 40.0, 200.0, -1.0, -9.0, -200.0] {
            tiles_that_climb::<f32>(step, 2e-6);
            tiles_that_climb::<f64>(step, 1e-14);
        }
    }

    /// 2^x to a relative error of 1.2e-7, by registers and by numbers, on every instruction set: for every f32 from
    /// -126 to 0, and from 2^-31 to the most that a logit may exceed its base.
    #[test]
    fn exp2_is_within_its_bound_for_every_f32_in_range() {
        let chunk = 1 << 20;
        let ranges = [(-0f32, -126f32), (2f32.powi(-31), SLACK)].map(|(first, last)| (first.to_bits(), last.to_bits()));
        for (name, arch) in crate::instructions::known() {
            let chunks = ranges.iter().flat_map(|(first, last)| {
                let end = move |first: u32| (*last).min(first + (chunk as u32 - 1));
                (*first..=*last).step_by(chunk).map(move |first| (first, end(first)))
            });
            let worst = chunks
                .collect::<Vec<_>>()
                .into_par_iter()
                .map(|(first, last)| arch.dispatch(Worst(first, last)))
                .reduce(|| 0.0, f64::max);
            println!("{name}: relative error at most {worst:e}");
            assert!(worst <= 1.2e-7, "{name}: {worst:e}");
        }
    }

    /// The largest relative error over a range of bit patterns.
    struct Worst(u32, u32);

    impl pulp::WithSimd for Worst {
        type Output = f64;

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, simd: S) -> f64 {
            let Self(first, last) = self;
            let mut worst = 0.0;
            let mut registers = [0f32; 256];
            for first in (first..=last).step_by(registers.len()) {
                let x = |index: usize| f32::from_bits(last.min(first + index as u32));
                for (index, target) in registers.iter_mut().enumerate() {
                    *target = x(index);
                }
                add_weights(simd, &mut registers, 0.0, &mut [0.0; 256]);
                for (index, power) in registers.iter().enumerate() {
                    // Where 2^x rounds to 1 or its left neighbours, x ln 2 gives the error from 1 to 1e-14.
                    let x = f64::from(x(index));
                    let exact = if x.abs() < 1e-7 {
                        1.0 + x * std::f64::consts::LN_2
                    } else {
                        x.exp2()
                    };
                    for power in [f64::from(*power), f64::from((x as f32).exp2_nonpositive())] {
                        let error = (power / exact - 1.0).abs();
                        worst = f64::max(worst, if error.is_nan() { f64::INFINITY } else { error });
                    }
                }
            }
            worst
        }
    }
}
