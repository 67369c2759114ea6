//! Stored dtypes and the dtype their sums are kept in: f64 for f64, f32 for everything else.

use super::exp2::{EXP2_F32, EXP2_F64};
use super::gemm_tile::Tile;
use super::lanes::Lanes;
use super::pairs::Split;
use super::product::Product;
use super::softmax::{OnlineSoftmax, RowSums};
use candle_core::WithDType;
use pulp::Simd;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Sub};

/// Tokens of a panel of keys: one AVX-512 or two AVX2 registers of f32.
pub(crate) const PANEL: usize = 16;

/// A dtype that q, k and v may have.
pub(crate) trait Element: WithDType + Lanes {
    /// Its numbers as sums of bf16 parts, where they are such sums.
    const SPLIT: Option<Split>;

    fn widen(source: &[Self], target: &mut [Self::Acc]);
    fn narrow(source: &[Self::Acc], target: &mut [Self]);
    /// The slice itself where nothing needs widening.
    fn as_acc(source: &[Self]) -> Option<&[Self::Acc]>;
    fn as_acc_mut(target: &mut [Self]) -> Option<&mut [Self::Acc]>;
}

/// f32 or f64 arithmetic, written so that loops over it vectorise.
pub(crate) trait Accumulator:
    Element<Acc = Self, Lane = Self>
    + Copy
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
    + MulAssign
    + PartialOrd
    + Default
{
    const ZERO: Self;
    const ONE: Self;
    const NAN: Self;
    const NEG_INFINITY: Self;
    /// log2 of what no number reaches.
    const MAX_EXPONENT: f64;

    fn of(value: f64) -> Self;
    fn double(self) -> f64;
    /// The slices themselves in f32; empty ones in f64, whose products are never split.
    fn singles(slice: &[Self]) -> &[f32];
    fn singles_mut(slice: &mut [Self]) -> &mut [f32];
    fn root(self) -> Self;
    fn absolute(self) -> Self;
    /// The dot product of two rows, with this instruction set's registers and fused multiply-adds.
    fn dot<S: Simd>(simd: S, a: &[Self], b: &[Self]) -> Self;
    /// The dot products of G queries and the keys of the first `count` panels, each (D, [`PANEL`]), times a factor: query
    /// g's go to `logits[g * stride..]`. C registers of keys are read together. Each sum adds dimension by dimension.
    fn panel_dots<'k, S: Simd, const G: usize, const C: usize>(
        simd: S,
        queries: ([&[Self]; G], Self),
        panels: (usize, impl Fn(usize) -> &'k [Self]),
        logits: &mut [Self],
        stride: usize,
    );
    /// Raises each maximum to the value beside it; a NaN is passed over, to be caught when its weight is summed. The
    /// lengths are multiples of a register's.
    fn raise<S: Simd>(simd: S, max: &mut [Self], values: &[Self]);
    /// Makes the numbers of a panel's lanes outside of `start..end` those of `other`.
    fn keep_lanes<S: Simd>(simd: S, lanes: (u32, u32), panel: &mut [Self; PANEL], other: &[Self; PANEL]);
    /// Makes a product in this instruction set's registers; false, and nothing done, where it does not come out even.
    fn product<S: Simd>(simd: S, product: &mut Product<Self>) -> bool;
    /// Turns a tile of logits into weights, and takes them into the softmax's state.
    fn weigh<S: Simd>(simd: S, tile: &mut Tile<Self>, softmax: &mut OnlineSoftmax<Self>);
    /// Makes logits weights, 2^(logit - top), and adds each to the sum beside it. The lengths are multiples of a
    /// register's.
    fn add_weights<S: Simd>(simd: S, logits: &mut [Self], top: Self, sums: &mut [Self]);
    /// `weights` come as logits and become 2^(logit - log_sum_exp); `logits` come as gradients g of weights and become
    /// weight * (g - delta). A tile has a multiple of [`super::softmax::LANES`] rows.
    fn differentiate<S: Simd>(simd: S, weights: &mut Tile<Self>, logits: &mut Tile<Self>, rows: RowSums<Self>);
    /// 2^x for x <= 0 or not far above, 0 below the smallest normal number, NaN for NaN. Relative error at most 3e-7 in
    /// f32 and 1e-15 in f64 (rounding included; the polynomials alone are good to 1.9e-9 and 3.1e-18).
    fn exp2_nonpositive(self) -> Self;

    /// The larger one; a NaN in `other` is passed over, to be caught when its weight is summed.
    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if other > self {
            other
        } else {
            self
        }
    }

    #[inline(always)]
    fn is_nan(self) -> bool {
        self.partial_cmp(&self).is_none()
    }

    #[inline(always)]
    fn finite(self) -> bool {
        // x * 0 is NaN for NaN and for both infinities.
        self * Self::ZERO == Self::ZERO
    }
}

macro_rules! accumulator {
    ($float:ident, $bits:ident, $ibits:ident, split $split:expr, singles ($slice:ident) $singles:expr, dots $dots:ident, product $product:ident, weigh $weigh:ident, differentiate $differentiate:ident, add_weights $add_weights:ident, simd ($lanes:ident, $floats:ident, $as:ident, $as_mut:ident, $splat:ident, $fma:ident, $add:ident, $mul:ident, $sum:ident, $greater:ident, $select:ident), magic $magic:expr, bias $bias:expr, mantissa $mantissa:expr, min $min:expr, $poly:expr) => {
        impl Element for $float {
            const SPLIT: Option<Split> = $split;

            fn widen(source: &[Self], target: &mut [Self]) {
                target.copy_from_slice(source)
            }
            fn narrow(source: &[Self], target: &mut [Self]) {
                target.copy_from_slice(source)
            }
            fn as_acc(source: &[Self]) -> Option<&[Self]> {
                Some(source)
            }
            fn as_acc_mut(target: &mut [Self]) -> Option<&mut [Self]> {
                Some(target)
            }
        }

        /// G queries by C columns of registers: their sums stay in G * C registers.
        #[inline(always)]
        #[allow(clippy::needless_range_loop)]
        fn $dots<S: Simd, const G: usize, const C: usize>(
            simd: S,
            (mut queries, factor): ([&[$float]; G], $float),
            columns: [&[S::$floats]; C],
            logits: &mut [$float],
            stride: usize,
        ) {
            let (dim, registers) = (queries[0].len(), PANEL / S::$lanes);
            for g in 0..G {
                queries[g] = &queries[g][..dim];
            }
            let mut sums = [[simd.$splat(0.0); C]; G];
            for d in 0..dim {
                for g in 0..G {
                    let x = simd.$splat(queries[g][d]);
                    for c in 0..C {
                        sums[g][c] = simd.$fma(x, columns[c][d * registers], sums[g][c]);
                    }
                }
            }
            let factor = simd.$splat(factor);
            for g in 0..G {
                let target = S::$as_mut(&mut logits[g * stride..][..C * S::$lanes]).0;
                for c in 0..C {
                    target[c] = simd.$mul(sums[g][c], factor);
                }
            }
        }

        impl Accumulator for $float {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NAN: Self = $float::NAN;
            const NEG_INFINITY: Self = $float::NEG_INFINITY;
            const MAX_EXPONENT: f64 = $float::MAX_EXP as f64;

            #[inline(always)]
            fn of(value: f64) -> Self {
                value as $float
            }
            #[inline(always)]
            fn double(self) -> f64 {
                self as f64
            }
            fn singles($slice: &[Self]) -> &[f32] {
                $singles
            }
            fn singles_mut($slice: &mut [Self]) -> &mut [f32] {
                $singles
            }
            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn absolute(self) -> Self {
                self.abs()
            }
            #[inline(always)]
            fn dot<S: Simd>(simd: S, a: &[Self], b: &[Self]) -> Self {
                let ((a, a_tail), (b, b_tail)) = (S::$as(a), S::$as(b));
                // Two sums hide half of the latency of the additions.
                let mut sums = [simd.$splat(0.0); 2];
                for (index, (x, y)) in a.iter().zip(b).enumerate() {
                    sums[index % 2] = simd.$fma(*x, *y, sums[index % 2]);
                }
                let tail: $float = a_tail.iter().zip(b_tail).map(|(x, y)| x * y).sum();
                simd.$sum(simd.$add(sums[0], sums[1])) + tail
            }
            #[inline(always)]
            #[allow(clippy::needless_range_loop)]
            fn panel_dots<'k, S: Simd, const G: usize, const C: usize>(
                simd: S,
                queries: ([&[Self]; G], Self),
                (count, panel): (usize, impl Fn(usize) -> &'k [Self]),
                logits: &mut [Self],
                stride: usize,
            ) {
                let registers = PANEL / S::$lanes;
                let dim = queries.0[0].len();
                // Register i of all panels, from its first dimension to its last.
                let column = |i: usize| &S::$as(panel(i / registers)).0[i % registers..][..(dim - 1) * registers + 1];
                let mut first = 0;
                while first + C <= count * registers {
                    let mut columns: [&[_]; C] = [&[]; C];
                    for c in 0..C {
                        columns[c] = column(first + c);
                    }
                    let target = &mut logits[first * S::$lanes..];
                    $dots::<S, G, C>(simd, queries, columns, target, stride);
                    first += C;
                }
                if C > 3 && first + 3 <= count * registers {
                    let columns = [column(first), column(first + 1), column(first + 2)];
                    let target = &mut logits[first * S::$lanes..];
                    $dots::<S, G, 3>(simd, queries, columns, target, stride);
                    first += 3;
                }
                for first in first..count * registers {
                    let target = &mut logits[first * S::$lanes..];
                    $dots::<S, G, 1>(simd, queries, [column(first)], target, stride);
                }
            }
            #[inline(always)]
            fn raise<S: Simd>(simd: S, max: &mut [Self], values: &[Self]) {
                for (m, x) in S::$as_mut(max).0.iter_mut().zip(S::$as(values).0) {
                    *m = simd.$select(simd.$greater(*x, *m), *x, *m);
                }
            }
            #[inline(always)]
            fn keep_lanes<S: Simd>(
                simd: S,
                (start, end): (u32, u32),
                panel: &mut [Self; PANEL],
                other: &[Self; PANEL],
            ) {
                const NUMBERS: [$float; PANEL] = [
                    0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.,
                ];
                let (start, end) = (simd.$splat(start as $float), simd.$splat(end as $float));
                let pairs = S::$as_mut(panel).0.iter_mut().zip(S::$as(other).0);
                for ((x, other), lane) in pairs.zip(S::$as(&NUMBERS).0) {
                    let before_end = simd.$select(simd.$greater(end, *lane), *x, *other);
                    *x = simd.$select(simd.$greater(start, *lane), *other, before_end);
                }
            }
            #[inline(always)]
            fn product<S: Simd>(simd: S, product: &mut Product<Self>) -> bool {
                super::product::$product(simd, product)
            }
            #[inline(always)]
            fn weigh<S: Simd>(simd: S, tile: &mut Tile<Self>, softmax: &mut OnlineSoftmax<Self>) {
                super::softmax::$weigh(simd, tile, softmax)
            }
            #[inline(always)]
            fn add_weights<S: Simd>(simd: S, logits: &mut [Self], top: Self, sums: &mut [Self]) {
                super::softmax::$add_weights(simd, logits, top, sums)
            }
            #[inline(always)]
            fn differentiate<S: Simd>(simd: S, weights: &mut Tile<Self>, logits: &mut Tile<Self>, rows: RowSums<Self>) {
                super::softmax::$differentiate(simd, weights, logits, rows)
            }
            #[inline(always)]
            fn exp2_nonpositive(self) -> Self {
                // Adding 1.5 * 2^mantissa leaves round(x) in the low bits of the sum.
                let shifted = self + $magic;
                let fraction = self - (shifted - $magic);
                let mut power: $float = 0.0;
                for coefficient in $poly {
                    power = power * fraction + coefficient;
                }
                let exponent = (shifted.to_bits() as $ibits).wrapping_sub(($magic as $float).to_bits() as $ibits);
                let scale = $float::from_bits((exponent.wrapping_add($bias) as $bits) << $mantissa);
                // A NaN fails the comparison and goes through the product.
                if self < $min {
                    0.0
                } else {
                    power * scale
                }
            }
        }
    };
}

accumulator!(f32, u32, i32, split None, singles (slice) slice, dots dots_f32, product product_f32, weigh weigh_f32, differentiate differentiate_f32, add_weights add_weights_f32, simd (F32_LANES, f32s, as_simd_f32s, as_mut_simd_f32s, splat_f32s, mul_add_e_f32s, add_f32s, mul_f32s, reduce_sum_f32s, greater_than_f32s, select_f32s), magic 12_582_912.0, bias 127, mantissa 23, min -126.0, EXP2_F32);
accumulator!(f64, u64, i64, split None, singles (_slice) Default::default(), dots dots_f64, product product_f64, weigh weigh_f64, differentiate differentiate_f64, add_weights add_weights_f64, simd (F64_LANES, f64s, as_simd_f64s, as_mut_simd_f64s, splat_f64s, mul_add_e_f64s, add_f64s, mul_f64s, reduce_sum_f64s, greater_than_f64s, select_f64s), magic 6_755_399_441_055_744.0, bias 1023, mantissa 52, min -1022.0, EXP2_F64);
