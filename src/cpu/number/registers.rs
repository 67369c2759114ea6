//! f32 and f64 a register at a time, for any instruction set: a kernel is written once, over [`Registers`].

use crate::cpu::number::exp2::{EXP2_F32, EXP2_F64};
use pulp::Simd;

/// A number type; an instruction set's registers hold several of it. Every method is one instruction, or a few.
pub(crate) trait Registers: Copy + 'static {
    type Floats<S: Simd>: Copy;
    type Mask<S: Simd>: Copy;

    /// The polynomial of 2^x on [-1/2, 1/2], highest power first.
    const EXP2: &'static [Self];
    /// Added to x, it leaves round(x) and the exponent's bias in the sum's low bits.
    const ROUND_TO_EXPONENT: Self;
    /// The exponent of the smallest normal number.
    const LEAST_EXPONENT: Self;

    /// Numbers in a register.
    fn lanes<S: Simd>() -> usize;
    /// Whole registers, and the numbers that are left.
    fn registers<S: Simd>(numbers: &[Self]) -> (&[Self::Floats<S>], &[Self]);
    fn registers_mut<S: Simd>(numbers: &mut [Self]) -> (&mut [Self::Floats<S>], &mut [Self]);
    fn splat<S: Simd>(simd: S, x: Self) -> Self::Floats<S>;
    fn zeros<S: Simd>(simd: S) -> Self::Floats<S>;
    fn plus<S: Simd>(simd: S, x: Self::Floats<S>, y: Self::Floats<S>) -> Self::Floats<S>;
    fn minus<S: Simd>(simd: S, x: Self::Floats<S>, y: Self::Floats<S>) -> Self::Floats<S>;
    fn times<S: Simd>(simd: S, x: Self::Floats<S>, y: Self::Floats<S>) -> Self::Floats<S>;
    /// x · y + z, rounded once where the instruction set has a fused multiply-add.
    fn mul_add<S: Simd>(simd: S, x: Self::Floats<S>, y: Self::Floats<S>, z: Self::Floats<S>) -> Self::Floats<S>;
    fn maximum<S: Simd>(simd: S, x: Self::Floats<S>, y: Self::Floats<S>) -> Self::Floats<S>;
    fn across<S: Simd>(simd: S, x: Self::Floats<S>) -> Self;
    fn equal<S: Simd>(simd: S, x: Self::Floats<S>, y: Self::Floats<S>) -> Self::Mask<S>;
    fn less<S: Simd>(simd: S, x: Self::Floats<S>, y: Self::Floats<S>) -> Self::Mask<S>;
    /// x where the mask is set, else y.
    fn select<S: Simd>(simd: S, mask: Self::Mask<S>, x: Self::Floats<S>, y: Self::Floats<S>) -> Self::Floats<S>;
    /// The power of two whose exponent, with its bias, is in the low bits.
    fn exponent<S: Simd>(simd: S, bits: Self::Floats<S>) -> Self::Floats<S>;
}

macro_rules! registers {
    ($float:ident, $lanes:ident, $floats:ident, $mask:ident, $exp2:ident, $magic:literal, $least:literal,
     $split:ident, $split_mut:ident, $splat:ident, $add:ident, $sub:ident, $mul:ident, $mul_add:ident, $max:ident,
     $sum:ident, $equal:ident, $less:ident, $select:ident, |$simd:ident, $bits:ident| $exponent:expr) => {
        impl Registers for $float {
            type Floats<S: Simd> = S::$floats;
            type Mask<S: Simd> = S::$mask;

            const EXP2: &'static [Self] = &$exp2;
            const ROUND_TO_EXPONENT: Self = $magic;
            const LEAST_EXPONENT: Self = $least;

            #[inline(always)]
            fn lanes<S: Simd>() -> usize {
                S::$lanes
            }
            #[inline(always)]
            fn registers<S: Simd>(numbers: &[Self]) -> (&[S::$floats], &[Self]) {
                S::$split(numbers)
            }
            #[inline(always)]
            fn registers_mut<S: Simd>(numbers: &mut [Self]) -> (&mut [S::$floats], &mut [Self]) {
                S::$split_mut(numbers)
            }
            #[inline(always)]
            fn splat<S: Simd>(simd: S, x: Self) -> S::$floats {
                simd.$splat(x)
            }
            #[inline(always)]
            fn zeros<S: Simd>(simd: S) -> S::$floats {
                simd.$splat(0.0)
            }
            #[inline(always)]
            fn plus<S: Simd>(simd: S, x: S::$floats, y: S::$floats) -> S::$floats {
                simd.$add(x, y)
            }
            #[inline(always)]
            fn minus<S: Simd>(simd: S, x: S::$floats, y: S::$floats) -> S::$floats {
                simd.$sub(x, y)
            }
            #[inline(always)]
            fn times<S: Simd>(simd: S, x: S::$floats, y: S::$floats) -> S::$floats {
                simd.$mul(x, y)
            }
            #[inline(always)]
            fn mul_add<S: Simd>(simd: S, x: S::$floats, y: S::$floats, z: S::$floats) -> S::$floats {
                simd.$mul_add(x, y, z)
            }
            #[inline(always)]
            fn maximum<S: Simd>(simd: S, x: S::$floats, y: S::$floats) -> S::$floats {
                simd.$max(x, y)
            }
            #[inline(always)]
            fn across<S: Simd>(simd: S, x: S::$floats) -> Self {
                simd.$sum(x)
            }
            #[inline(always)]
            fn equal<S: Simd>(simd: S, x: S::$floats, y: S::$floats) -> S::$mask {
                simd.$equal(x, y)
            }
            #[inline(always)]
            fn less<S: Simd>(simd: S, x: S::$floats, y: S::$floats) -> S::$mask {
                simd.$less(x, y)
            }
            #[inline(always)]
            fn select<S: Simd>(simd: S, mask: S::$mask, x: S::$floats, y: S::$floats) -> S::$floats {
                simd.$select(mask, x, y)
            }
            #[inline(always)]
            fn exponent<S: Simd>($simd: S, $bits: S::$floats) -> S::$floats {
                $exponent
            }
        }
    };
}

registers!(
    f32,
    F32_LANES,
    f32s,
    m32s,
    EXP2_F32,
    12_583_039.0,
    -126.0,
    as_simd_f32s,
    as_mut_simd_f32s,
    splat_f32s,
    add_f32s,
    sub_f32s,
    mul_f32s,
    mul_add_e_f32s,
    max_f32s,
    reduce_sum_f32s,
    equal_f32s,
    less_than_f32s,
    select_f32s,
    |simd, bits| {
        let bits = simd.transmute_u32s_f32s(bits);
        simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(bits, simd.splat_u32s(23)))
    }
);
registers!(
    f64,
    F64_LANES,
    f64s,
    m64s,
    EXP2_F64,
    6_755_399_441_056_767.0,
    -1022.0,
    as_simd_f64s,
    as_mut_simd_f64s,
    splat_f64s,
    add_f64s,
    sub_f64s,
    mul_f64s,
    mul_add_e_f64s,
    max_f64s,
    reduce_sum_f64s,
    equal_f64s,
    less_than_f64s,
    select_f64s,
    // Not every instruction set has a shift of 64 bits; a product replaces it.
    |simd, bits| {
        let bits = simd.transmute_u64s_f64s(bits);
        simd.transmute_f64s_u64s(simd.mul_u64s(bits, simd.splat_u64s(1 << 52)))
    }
);

/// 2^x a register at a time, for x up to the slack of a softmax's maximum: the bounds are those of
/// `Accumulator::exp2_nonpositive`.
#[inline(always)]
pub(crate) fn exp2<A: Registers, S: Simd>(simd: S, x: A::Floats<S>) -> A::Floats<S> {
    let magic = A::splat(simd, A::ROUND_TO_EXPONENT);
    let shifted = A::plus(simd, x, magic);
    let fraction = A::minus(simd, x, A::minus(simd, shifted, magic));
    let mut power = A::splat(simd, A::EXP2[0]);
    for coefficient in &A::EXP2[1..] {
        power = A::mul_add(simd, power, fraction, A::splat(simd, *coefficient));
    }
    let scaled = A::times(simd, power, A::exponent(simd, shifted));
    // A NaN fails the comparison and passes through the product.
    let vanishes = A::less(simd, x, A::splat(simd, A::LEAST_EXPONENT));
    A::select(simd, vanishes, A::zeros(simd), scaled)
}
