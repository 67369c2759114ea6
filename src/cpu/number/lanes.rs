//! Rows of a cache as decoding reads them, straight from memory: accumulators as they are, halves two to a lane of 32
//! bits.
//!
//! Two halves are widened by shifts and masks, one register of even and one of odd index, so that no number changes its
//! lane. Queries and sums of values lie in the same order: all numbers of even index, then all of odd index.

use crate::cpu::number::element::{Accumulator, Lanes};
use half::slice::HalfFloatSliceExt;
use pulp::{Scalar, Simd};

impl<A: Accumulator> Lanes for A {
    type Acc = A;
    type Lane = A;
    const NUMBERS: usize = 1;

    fn lanes(source: &[Self], _: usize) -> Option<&[Self]> {
        Some(source)
    }
    // Loops go over indices: the compiler does not always inline closures over registers into this instruction set's
    // code.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn dots<S: Simd, const G: usize>(simd: S, rows: [&[Self]; G], stored: &[Self]) -> [Self; G] {
        let (stored, stored_tail) = A::registers::<S>(stored);
        let (mut heads, mut tails) = ([stored; G], [stored_tail; G]);
        for g in 0..G {
            let (head, tail) = A::registers::<S>(rows[g]);
            (heads[g], tails[g]) = (&head[..stored.len()], &tail[..stored_tail.len()]);
        }
        let mut sums = [A::zeros(simd); G];
        for i in 0..stored.len() {
            for g in 0..G {
                sums[g] = A::mul_add(simd, heads[g][i], stored[i], sums[g]);
            }
        }
        let mut dots = [A::ZERO; G];
        for g in 0..G {
            dots[g] = A::across(simd, sums[g]);
            for i in 0..stored_tail.len() {
                dots[g] += tails[g][i] * stored_tail[i];
            }
        }
        dots
    }
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn add_weighted<S: Simd, const G: usize>(
        simd: S,
        outputs: &mut [Self],
        stored: [&[Self]; 4],
        weights: [[Self; 4]; G],
    ) {
        let dim = stored[0].len();
        let [a, b, c, d] = [
            A::registers::<S>(stored[0]),
            A::registers::<S>(stored[1]),
            A::registers::<S>(stored[2]),
            A::registers::<S>(stored[3]),
        ];
        let count = a.0.len();
        let [a0, b0, c0, d0] = [a.0, &b.0[..count], &c.0[..count], &d.0[..count]];
        let mut outputs = outputs.chunks_exact_mut(dim);
        let pairs = [(); G].map(|_| A::registers_mut::<S>(outputs.next().unwrap_or_default()));
        for i in 0..count {
            for g in 0..G {
                let w = &weights[g];
                let x = &mut pairs[g].0[i];
                let sum = A::mul_add(simd, A::splat(simd, w[0]), a0[i], *x);
                let sum = A::mul_add(simd, A::splat(simd, w[1]), b0[i], sum);
                let sum = A::mul_add(simd, A::splat(simd, w[2]), c0[i], sum);
                *x = A::mul_add(simd, A::splat(simd, w[3]), d0[i], sum);
            }
        }
        for g in 0..G {
            let w = &weights[g];
            for (i, x) in pairs[g].1.iter_mut().enumerate() {
                *x += w[0] * a.1[i] + w[1] * b.1[i] + w[2] * c.1[i] + w[3] * d.1[i];
            }
        }
    }
}

/// Two halves in 32 bits; the half of even index is in the low bits.
trait Pair {
    /// Widens to the numbers of even index and the numbers of odd index.
    fn widen<S: Simd>(simd: S, pairs: S::u32s) -> [S::f32s; 2];
}

impl Pair for half::bf16 {
    #[inline(always)]
    fn widen<S: Simd>(simd: S, pairs: S::u32s) -> [S::f32s; 2] {
        let even = simd.wrapping_dyn_shl_u32s(pairs, simd.splat_u32s(16));
        let odd = simd.and_u32s(pairs, simd.splat_u32s(0xffff_0000));
        [simd.transmute_f32s_u32s(even), simd.transmute_f32s_u32s(odd)]
    }
}

impl Pair for half::f16 {
    #[inline(always)]
    fn widen<S: Simd>(simd: S, pairs: S::u32s) -> [S::f32s; 2] {
        let low = simd.wrapping_dyn_shl_u32s(pairs, simd.splat_u32s(16));
        [widen_high(simd, low), widen_high(simd, pairs)]
    }
}

/// f16 numbers in the upper halves of lanes.
#[inline(always)]
fn widen_high<S: Simd>(simd: S, numbers: S::u32s) -> S::f32s {
    // Read with f32's exponent bias, the number is 2^112 times too small, and exact: a subnormal half is subnormal in
    // f32 too.
    let magnitude = simd.and_u32s(numbers, simd.splat_u32s(0x7fff_0000));
    let magnitude = simd.wrapping_dyn_shr_u32s(magnitude, simd.splat_u32s(3));
    let sign = simd.and_u32s(numbers, simd.splat_u32s(0x8000_0000));
    let number = simd.transmute_f32s_u32s(simd.or_u32s(magnitude, sign));
    let number = simd.mul_f32s(number, simd.splat_f32s(f32::from_bits((112 + 127) << 23)));
    // A number that is not finite here is a NaN: a list holds no infinity.
    let finite = simd.less_than_u32s(magnitude, simd.splat_u32s(0x7c00 << 13));
    simd.select_f32s(finite, number, simd.splat_f32s(f32::NAN))
}

/// See [`Lanes::dots`].
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn dots<H: Pair, S: Simd, const G: usize>(simd: S, rows: [&[f32]; G], stored: &[u32]) -> [f32; G] {
    let (registers, tail) = S::as_simd_u32s(stored);
    let (count, first) = (registers.len(), stored.len() - tail.len());
    let halves = rows.map(|row| row.split_at(stored.len()));
    let heads = halves.map(|(even, odd)| (&S::as_simd_f32s(even).0[..count], &S::as_simd_f32s(odd).0[..count]));
    let mut sums = [[simd.splat_f32s(0.0); 2]; G];
    for i in 0..count {
        let [even, odd] = H::widen(simd, registers[i]);
        for g in 0..G {
            sums[g][0] = simd.mul_add_e_f32s(heads[g].0[i], even, sums[g][0]);
            sums[g][1] = simd.mul_add_e_f32s(heads[g].1[i], odd, sums[g][1]);
        }
    }
    let mut dots = [0.0; G];
    for g in 0..G {
        dots[g] = simd.reduce_sum_f32s(simd.add_f32s(sums[g][0], sums[g][1]));
        for (i, pair) in tail.iter().enumerate() {
            let [even, odd] = H::widen(Scalar, *pair);
            dots[g] += halves[g].0[first + i] * even + halves[g].1[first + i] * odd;
        }
    }
    dots
}

/// See [`Lanes::add_weighted`].
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn add_weighted<H: Pair, S: Simd, const G: usize>(
    simd: S,
    outputs: &mut [f32],
    stored: [&[u32]; 4],
    weights: [[f32; 4]; G],
) {
    let half = stored[0].len();
    let count = S::as_simd_u32s(stored[0]).0.len();
    let first = half - S::as_simd_u32s(stored[0]).1.len();
    let registers = stored.map(|row| &S::as_simd_u32s(row).0[..count]);
    let mut rows = outputs.chunks_exact_mut(2 * half);
    for g in 0..G {
        let Some(row) = rows.next() else { return };
        let (even, odd) = row.split_at_mut(half);
        let w = weights[g];
        for i in 0..half - first {
            for c in 0..4 {
                let [x, y] = H::widen(Scalar, stored[c][first + i]);
                even[first + i] += w[c] * x;
                odd[first + i] += w[c] * y;
            }
        }
    }
    let mut rows = outputs.chunks_exact_mut(2 * half);
    let heads = [(); G].map(|_| {
        let (even, odd) = rows.next().unwrap_or_default().split_at_mut(half);
        [S::as_mut_simd_f32s(even).0, S::as_mut_simd_f32s(odd).0]
    });
    for i in 0..count {
        let mut sums = [[simd.splat_f32s(0.0); 2]; G];
        for g in 0..G {
            sums[g] = [heads[g][0][i], heads[g][1][i]];
        }
        for c in 0..4 {
            let [even, odd] = H::widen(simd, registers[c][i]);
            for g in 0..G {
                let weight = simd.splat_f32s(weights[g][c]);
                sums[g] = [
                    simd.mul_add_e_f32s(weight, even, sums[g][0]),
                    simd.mul_add_e_f32s(weight, odd, sums[g][1]),
                ];
            }
        }
        for g in 0..G {
            [heads[g][0][i], heads[g][1][i]] = sums[g];
        }
    }
}

macro_rules! halves {
    ($half:ty) => {
        impl Lanes for $half {
            type Acc = f32;
            type Lane = u32;
            const NUMBERS: usize = 2;

            fn lanes(source: &[Self], dim: usize) -> Option<&[u32]> {
                if !dim.is_multiple_of(2) {
                    return None;
                }
                match source {
                    // The address of an empty slice need not be aligned to a lane.
                    [] => Some(&[]),
                    _ => pulp::bytemuck::try_cast_slice(source.reinterpret_cast()).ok(),
                }
            }
            fn order(row: &mut [f32]) {
                let (even, odd): (Vec<f32>, Vec<f32>) =
                    row.as_chunks().0.iter().map(|[even, odd]| (*even, *odd)).unzip();
                row[..even.len()].copy_from_slice(&even);
                row[even.len()..].copy_from_slice(&odd);
            }
            fn restore(row: &mut [f32]) {
                let old = row.to_vec();
                let (even, odd) = old.split_at(old.len() / 2);
                for (pair, (even, odd)) in row.as_chunks_mut().0.iter_mut().zip(even.iter().zip(odd)) {
                    *pair = [*even, *odd];
                }
            }
            #[inline(always)]
            fn dots<S: Simd, const G: usize>(simd: S, rows: [&[f32]; G], stored: &[u32]) -> [f32; G] {
                dots::<Self, S, G>(simd, rows, stored)
            }
            #[inline(always)]
            fn add_weighted<S: Simd, const G: usize>(
                simd: S,
                outputs: &mut [f32],
                stored: [&[u32]; 4],
                weights: [[f32; 4]; G],
            ) {
                add_weighted::<Self, S, G>(simd, outputs, stored, weights)
            }
        }
    };
}

halves!(half::f16);
halves!(half::bf16);
