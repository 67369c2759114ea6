//! Stored dtypes, and the dtype that their sums are kept in: f64 for f64, f32 for every other dtype.

use crate::cpu::number::exp2::{EXP2_F32, EXP2_F64};
use crate::cpu::number::registers::Registers;
use candle_core::WithDType;
use pulp::Simd;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Sub};

/// How a dtype's numbers are split into bf16 parts; a finer split compares greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Split {
    /// bf16: one part.
    One,
    /// f16: two parts.
    Two,
}

/// Numbers that decoding reads one or two to a lane.
pub(crate) trait Lanes: Sized {
    /// The dtype of sums, softmax and folds.
    type Acc: Accumulator;
    type Lane: Copy + Sync;
    /// Numbers in a lane.
    const NUMBERS: usize;

    /// The rows as lanes; None where a row does not begin at a lane.
    fn lanes(source: &[Self], dim: usize) -> Option<&[Self::Lane]>;
    /// The dot products of G rows with a stored row; each register of the stored row is read once.
    fn dots<S: Simd, const G: usize>(simd: S, rows: [&[Self::Acc]; G], stored: &[Self::Lane]) -> [Self::Acc; G];
    /// `outputs[g] += weights[g][0] * stored[0] + ... + weights[g][3] * stored[3]`; each register of the stored rows is
    /// read once. `outputs` are G rows, one after the other.
    fn add_weighted<S: Simd, const G: usize>(
        simd: S,
        outputs: &mut [Self::Acc],
        stored: [&[Self::Lane]; 4],
        weights: [[Self::Acc; 4]; G],
    );
    /// Brings a row into the order of lanes.
    fn order(_: &mut [Self::Acc]) {}
    /// Brings a row back from the order of lanes.
    fn restore(_: &mut [Self::Acc]) {}
}

/// A dtype that q, k and v may have.
pub(crate) trait Element: WithDType + Lanes {
    /// The split of its numbers into bf16 parts, if they are exact sums of such parts.
    const SPLIT: Option<Split>;

    fn widen(source: &[Self], target: &mut [Self::Acc]);
    fn narrow(source: &[Self::Acc], target: &mut [Self]);
    /// The slice itself, if nothing needs widening.
    fn as_acc(source: &[Self]) -> Option<&[Self::Acc]>;
    fn as_acc_mut(target: &mut [Self]) -> Option<&mut [Self::Acc]>;
}

/// f32 or f64 arithmetic, written so that loops over it vectorise.
pub(crate) trait Accumulator:
    Registers
    + WithDType
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
    + MulAssign
    + Sum
    + PartialOrd
    + Default
{
    const ZERO: Self;
    const ONE: Self;
    const NAN: Self;
    const NEG_INFINITY: Self;
    /// A bound on the base-2 logarithm of every number: no number reaches 2^MAX_EXPONENT.
    const MAX_EXPONENT: f64;

    fn of(value: f64) -> Self;
    fn double(self) -> f64;
    /// The slices themselves in f32; empty slices in f64, whose products are never split.
    fn singles(slice: &[Self]) -> &[f32];
    fn singles_mut(slice: &mut [Self]) -> &mut [f32];
    fn root(self) -> Self;
    fn absolute(self) -> Self;
    /// 2^x for x <= 0 or slightly above, 0 below the smallest normal number, NaN for NaN. Relative error at most 3e-7
    /// in f32 and 1e-15 in f64 (rounding included; the polynomials alone are good to 1.9e-9 and 3.1e-18).
    fn exp2_nonpositive(self) -> Self;
    /// 2^x, at least the smallest normal number, and 2^x - 1, for x <= 0; NaN for NaN. The relative error of each is at
    /// most 3e-7 in f32 and 1e-15 in f64, for the difference near x = 0 too.
    fn exp2_and_less_one(self) -> [Self; 2];

    /// The larger number. A NaN in `other` is ignored here; it is found when its weight is summed.
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

impl<A: Accumulator> Element for A {
    const SPLIT: Option<Split> = None;

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

macro_rules! accumulator {
    ($float:ident, $bits:ident, $ibits:ident, $poly:ident, $magic:literal, $bias:literal, $mantissa:literal,
     |$slice:ident| $singles:expr) => {
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
                // A NaN fails the comparison and passes through the product.
                if self < Self::LEAST_EXPONENT {
                    0.0
                } else {
                    power * scale
                }
            }
            #[inline(always)]
            fn exp2_and_less_one(self) -> [Self; 2] {
                let x = if self < Self::LEAST_EXPONENT {
                    Self::LEAST_EXPONENT
                } else {
                    self
                };
                let shifted = x + $magic;
                let fraction = x - (shifted - $magic);
                // The polynomial's last coefficient is 1: without it, 2^f - 1 keeps its precision near 0.
                let mut quotient: $float = 0.0;
                for coefficient in &$poly[..$poly.len() - 1] {
                    quotient = quotient * fraction + coefficient;
                }
                let less_one = quotient * fraction;
                let exponent = (shifted.to_bits() as $ibits).wrapping_sub(($magic as $float).to_bits() as $ibits);
                let scale = $float::from_bits((exponent.wrapping_add($bias) as $bits) << $mantissa);
                [(less_one + 1.0) * scale, less_one * scale + (scale - 1.0)]
            }
        }
    };
}

accumulator!(f32, u32, i32, EXP2_F32, 12_582_912.0, 127, 23, |slice| slice);
accumulator!(f64, u64, i64, EXP2_F64, 6_755_399_441_055_744.0, 1023, 52, |_slice| {
    Default::default()
});
