//! Panels: the numbers of 16 tokens side by side, whole registers of every instruction set.

use crate::cpu::number::element::Accumulator;
use crate::cpu::number::registers::Registers;
use pulp::Simd;

/// Tokens of a panel of keys: one AVX-512 or two AVX2 registers of f32.
pub(crate) const PANEL: usize = 16;

/// G queries by C columns of registers: their sums stay in G * C registers.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn dots<A: Accumulator, S: Simd, const G: usize, const C: usize>(
    simd: S,
    (mut queries, factor): ([&[A]; G], A),
    columns: [&[A::Floats<S>]; C],
    logits: &mut [A],
    stride: usize,
) {
    let (dim, registers) = (queries[0].len(), PANEL / A::lanes::<S>());
    for g in 0..G {
        queries[g] = &queries[g][..dim];
    }
    let mut sums = [[A::zeros(simd); C]; G];
    for d in 0..dim {
        for g in 0..G {
            let x = A::splat(simd, queries[g][d]);
            for c in 0..C {
                sums[g][c] = A::mul_add(simd, x, columns[c][d * registers], sums[g][c]);
            }
        }
    }
    let factor = A::splat(simd, factor);
    for g in 0..G {
        let target = A::registers_mut::<S>(&mut logits[g * stride..][..C * A::lanes::<S>()]).0;
        for c in 0..C {
            target[c] = A::times(simd, sums[g][c], factor);
        }
    }
}

/// The dot products of G queries and the keys of the first `count` panels, each (D, [`PANEL`]), times a factor. Query
/// g's products go to `logits[g * stride..]`. C registers of keys are read together. Each sum adds dimension by
/// dimension.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
pub(crate) fn panel_dots<'k, A: Accumulator, S: Simd, const G: usize, const C: usize>(
    simd: S,
    queries: ([&[A]; G], A),
    (count, panel): (usize, impl Fn(usize) -> &'k [A]),
    logits: &mut [A],
    stride: usize,
) {
    let (lanes, registers) = (A::lanes::<S>(), PANEL / A::lanes::<S>());
    let dim = queries.0[0].len();
    // Register i of all panels, from its first dimension to its last.
    let column = |i: usize| &A::registers::<S>(panel(i / registers)).0[i % registers..][..(dim - 1) * registers + 1];
    let mut first = 0;
    while first + C <= count * registers {
        let mut columns: [&[_]; C] = [&[]; C];
        for c in 0..C {
            columns[c] = column(first + c);
        }
        dots::<A, S, G, C>(simd, queries, columns, &mut logits[first * lanes..], stride);
        first += C;
    }
    if C > 3 && first + 3 <= count * registers {
        let columns = [column(first), column(first + 1), column(first + 2)];
        dots::<A, S, G, 3>(simd, queries, columns, &mut logits[first * lanes..], stride);
        first += 3;
    }
    for first in first..count * registers {
        dots::<A, S, G, 1>(simd, queries, [column(first)], &mut logits[first * lanes..], stride);
    }
}

/// Raises each maximum to the number at its index. A NaN is ignored here and found when its weight is summed. The
/// lengths are multiples of a register's.
#[inline(always)]
pub(crate) fn raise<A: Registers, S: Simd>(simd: S, max: &mut [A], values: &[A]) {
    for (m, x) in A::registers_mut::<S>(max).0.iter_mut().zip(A::registers::<S>(values).0) {
        *m = A::select(simd, A::less(simd, *m, *x), *x, *m);
    }
}

/// Replaces the numbers of a panel's lanes outside of `start..end` by the numbers of `other`.
#[inline(always)]
pub(crate) fn keep_lanes<A: Accumulator, S: Simd>(
    simd: S,
    (start, end): (u32, u32),
    panel: &mut [A; PANEL],
    other: &[A; PANEL],
) {
    let mut numbers = [A::ZERO; PANEL];
    for (lane, number) in numbers.iter_mut().enumerate() {
        *number = A::of(lane as f64);
    }
    let [start, end] = [start, end].map(|lane| A::splat(simd, A::of(f64::from(lane))));
    let pairs = A::registers_mut::<S>(panel)
        .0
        .iter_mut()
        .zip(A::registers::<S>(other).0);
    for ((x, other), lane) in pairs.zip(A::registers::<S>(&numbers).0) {
        let before_end = A::select(simd, A::less(simd, *lane, end), *x, *other);
        *x = A::select(simd, A::less(simd, *lane, start), *other, before_end);
    }
}

/// The dot product of two rows, with this instruction set's registers and fused multiply-adds.
#[inline(always)]
pub(crate) fn dot<A: Accumulator, S: Simd>(simd: S, a: &[A], b: &[A]) -> A {
    let ((a, a_tail), (b, b_tail)) = (A::registers::<S>(a), A::registers::<S>(b));
    // Two sums hide half of the latency of the additions.
    let mut sums = [A::zeros(simd); 2];
    for (index, (x, y)) in a.iter().zip(b).enumerate() {
        sums[index % 2] = A::mul_add(simd, *x, *y, sums[index % 2]);
    }
    let tail: A = a_tail.iter().zip(b_tail).map(|(x, y)| *x * *y).sum();
    A::across(simd, A::plus(simd, sums[0], sums[1])) + tail
}
