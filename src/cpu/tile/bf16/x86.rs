//! The instructions of x86-64: which ones the CPU has, the products by AVX512-BF16, and the softmax between two
//! products.

use crate::cpu::number::exp2::{EXP2_F32, EXP2_SHORT};
use crate::cpu::tile::bf16::{x86_amx, Differentials, PairInstructions, PairProduct, Split, Strip, PAD};
use crate::cpu::tile::softmax::LANES;
use std::arch::x86_64::*;

pub(crate) fn product(kernel: PairInstructions, product: PairProduct) {
    match kernel {
        // SAFETY: `kernels` has found the instructions.
        PairInstructions::Amx => unsafe { x86_amx::product(product) },
        // SAFETY: as above.
        PairInstructions::Avx512Bf16 => unsafe { product_avx512(product) },
    }
}

/// Rows of C that are summed at once: with 32 columns 16 registers, which hide the latency of the products.
const ROWS: usize = 8;

#[target_feature(enable = "avx512f,avx512bf16")]
fn product_avx512(product: PairProduct) {
    product.check();
    let PairProduct {
        m,
        n,
        c,
        ldc,
        a,
        lda,
        b,
        ldb,
        steps,
        accumulate,
    } = product;
    for row in (0..m).step_by(ROWS) {
        for column in (0..n).step_by(PAD) {
            // SAFETY: `check` bounds everything that is read and written: rows row..row + 8 (m is a multiple of 32) of
            // A and C, 16 pairs of columns column..column + 32 of B, in every step. Nothing else borrows C.
            unsafe {
                let c = c.as_mut_ptr().add(row * ldc + column);
                let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
                if accumulate {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        sums[0] = _mm512_loadu_ps(c.add(r * ldc));
                        sums[1] = _mm512_loadu_ps(c.add(r * ldc + 16));
                    }
                }
                for step in steps {
                    let a = a.as_ptr().add(row * lda + step.a);
                    let b = b.as_ptr().add(step.b + 2 * column);
                    for pair in 0..16 {
                        let b = b.add(pair * ldb);
                        let columns = [load_pairs(b), load_pairs(b.add(32))];
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let one = a.add(r * lda + 2 * pair).cast::<i32>().read_unaligned();
                            let one = into_pairs(_mm512_set1_epi32(one));
                            sums[0] = _mm512_dpbf16_ps(sums[0], one, columns[0]);
                            sums[1] = _mm512_dpbf16_ps(sums[1], one, columns[1]);
                        }
                    }
                }
                for (r, sums) in sums.iter().enumerate() {
                    _mm512_storeu_ps(c.add(r * ldc), sums[0]);
                    _mm512_storeu_ps(c.add(r * ldc + 16), sums[1]);
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn load_pairs(source: *const u16) -> __m512bh {
    // SAFETY: the caller vouches for 64 bytes.
    into_pairs(unsafe { _mm512_loadu_si512(source.cast()) })
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn into_pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid patterns.
    unsafe { std::mem::transmute(bits) }
}

/// Changes a strip's products to weights, relative to the new maximum; raises `max`, adds to `sum`.
pub(crate) fn softmax(strip: Strip, max: &mut [f32], sum: &mut [f32]) {
    // SAFETY: a `Strip` is only made where `kernels` has found AVX-512.
    unsafe {
        match strip.split {
            Split::One => softmax_parts::<1>(strip, max, sum),
            Split::Two => softmax_parts::<2>(strip, max, sum),
        }
    }
}

/// Loads 16 numbers from `at` on.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(slice: &[f32], at: usize) -> __m512 {
    let numbers = &slice[at..][..16];
    // SAFETY: 16 numbers were checked to be there.
    unsafe { _mm512_loadu_ps(numbers.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(slice: &mut [f32], at: usize, x: __m512) {
    let numbers = &mut slice[at..][..16];
    // SAFETY: 16 numbers were checked to be there.
    unsafe { _mm512_storeu_ps(numbers.as_mut_ptr(), x) }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn softmax_parts<const PARTS: usize>(strip: Strip, max: &mut [f32], sum: &mut [f32]) {
    let Strip {
        tile,
        leading,
        first,
        count,
        factor,
        weights,
        plane,
        output,
        ..
    } = strip;
    assert!(tile.len() >= count.saturating_sub(1) * leading + first + LANES);
    let padded = count.next_multiple_of(PAD);
    assert!(weights.len() >= (PARTS - 1) * plane + padded * leading && first + LANES <= leading);
    let factor = _mm512_set1_ps(factor);
    let empty = _mm512_set1_ps(f32::NEG_INFINITY);
    for half in 0..LANES / 16 {
        let lane = half * 16;
        let row = first + lane;
        // The second operand wins where one is NaN: a NaN product is ignored here and found in the sum.
        let mut tops = [empty; 2];
        for column in (0..count).step_by(2) {
            tops[0] = _mm512_max_ps(load(tile, column * leading + row), tops[0]);
            let next = (column + 1).min(count - 1);
            tops[1] = _mm512_max_ps(load(tile, next * leading + row), tops[1]);
        }
        let old = load(max, lane);
        let new = _mm512_max_ps(_mm512_mul_ps(_mm512_max_ps(tops[0], tops[1]), factor), old);
        // A row that saw only minus infinities keeps weight 0: nothing is subtracted from its logits.
        let unseen = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(new, empty);
        let base = _mm512_mask_mov_ps(new, unseen, _mm512_setzero_ps());
        // Products are multiplied and rounded as the maximum was, so that no weight is above 1, for logits of any size.
        let mut sums = [_mm512_setzero_ps(); 2];
        for pair in 0..padded / 2 {
            let mut both = [_mm512_setzero_ps(); 2];
            let column = 2 * pair;
            if column < count {
                let x = load(tile, column * leading + row);
                both[0] = exp2::<PARTS>(_mm512_sub_ps(_mm512_mul_ps(x, factor), base));
                sums[0] = _mm512_add_ps(sums[0], both[0]);
            }
            if column + 1 < count {
                let x = load(tile, (column + 1) * leading + row);
                both[1] = exp2::<PARTS>(_mm512_sub_ps(_mm512_mul_ps(x, factor), base));
                sums[1] = _mm512_add_ps(sums[1], both[1]);
            }
            for part in 0..PARTS {
                let at = part * plane + (pair * leading + row) * 2;
                let target = &mut weights[at..][..32];
                let packed = take_part(&mut both);
                // SAFETY: 32 numbers of 16 bits were checked to be there.
                unsafe { _mm512_storeu_si512(target.as_mut_ptr().cast(), packed) };
            }
        }
        let rescale = exp2::<2>(_mm512_sub_ps(old, base));
        let total = _mm512_fmadd_ps(load(sum, lane), rescale, _mm512_add_ps(sums[0], sums[1]));
        store(max, lane, new);
        store(sum, lane, total);
        if _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(rescale, _mm512_set1_ps(1.0)) != 0 {
            for at in (row..output.len()).step_by(leading) {
                let scaled = _mm512_mul_ps(load(output, at), rescale);
                store(output, at, scaled);
            }
        }
    }
}

/// Two columns' weights as pairs of bf16, ties away from zero; the rest of each weight stays.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn take_part(both: &mut [__m512; 2]) -> __m512i {
    let half = _mm512_set1_epi32(0x8000);
    let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let even = _mm512_add_epi32(_mm512_castps_si512(both[0]), half);
    let odd = _mm512_add_epi32(_mm512_castps_si512(both[1]), half);
    let (even_part, odd_part) = (_mm512_and_si512(even, high), _mm512_and_si512(odd, high));
    both[0] = _mm512_sub_ps(both[0], _mm512_castsi512_ps(even_part));
    both[1] = _mm512_sub_ps(both[1], _mm512_castsi512_ps(odd_part));
    _mm512_or_si512(_mm512_srli_epi32::<16>(even), odd_part)
}

/// Changes a tile's products to weights, and the gradients of weights to gradients of logits.
pub(crate) fn differentiate(tile: Differentials) {
    // SAFETY: `Differentials` are only made where `kernels` has found the instructions.
    unsafe {
        match tile.split {
            Split::One => differentiate_parts::<1>(tile),
            Split::Two => differentiate_parts::<2>(tile),
        }
    }
}

/// Two columns by 32 rows at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn differentiate_parts<const PARTS: usize>(tile: Differentials) {
    let Differentials {
        products,
        grads,
        slopes,
        leading,
        count,
        factor,
        rows,
        weights,
        logits,
        logit_pairs,
        plane,
        ..
    } = tile;
    let factor = _mm512_set1_ps(factor);
    for pair in 0..count.next_multiple_of(PAD) / 2 {
        for row in (0..leading).step_by(32) {
            let mut weight = [[_mm512_setzero_ps(); 2]; 2];
            let mut logit = weight;
            for half in 0..2 {
                let at = row + 16 * half;
                let (max, log2_sum) = (load(rows.minus_max, at), load(rows.minus_log2_sum, at));
                let delta = load(rows.delta, at);
                for column in 0..2 {
                    if 2 * pair + column < count {
                        let at = (2 * pair + column) * leading + at;
                        // Rounded before the maximum is subtracted, as in the forward: large logits cancel exactly.
                        let logit_2 = _mm512_mul_ps(load(products, at), factor);
                        let x = exp2::<PARTS>(_mm512_add_ps(_mm512_add_ps(logit_2, max), log2_sum));
                        weight[column][half] = x;
                        let gradient = _mm512_mul_ps(x, _mm512_sub_ps(load(grads, at), delta));
                        logit[column][half] = match slopes.is_empty() {
                            true => gradient,
                            // As `uncap` of `softcap`: a masked column's slope is not read.
                            false => {
                                let seen = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(x, _mm512_setzero_ps());
                                _mm512_maskz_mul_ps(seen, gradient, load(slopes, at))
                            }
                        };
                    }
                }
            }
            for part in 0..PARTS {
                let mut rounded = [_mm512_setzero_si512(); 2];
                for column in 0..2 {
                    let at = ((2 * pair + column) * PARTS + part) * leading + row;
                    store_pairs(weights, at, take_rounded(&mut weight[column]));
                    rounded[column] = take_rounded(&mut logit[column]);
                    store_pairs(logits, at, rounded[column]);
                }
                let at = part * plane + (pair * leading + row) * 2;
                for (half, pairs) in interleave(rounded).into_iter().enumerate() {
                    store_pairs(logit_pairs, at + 32 * half, pairs);
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_pairs(slice: &mut [u16], at: usize, x: __m512i) {
    let numbers = &mut slice[at..][..32];
    // SAFETY: 32 numbers of 16 bits were checked to be there.
    unsafe { _mm512_storeu_si512(numbers.as_mut_ptr().cast(), x) }
}

/// 32 numbers as bf16, ties to even, a NaN a NaN; the rest of each number stays.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn take_rounded(numbers: &mut [__m512; 2]) -> __m512i {
    // SAFETY: both are 512 bits without invalid patterns.
    let bits: __m512i = unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(numbers[1], numbers[0])) };
    let halves = [_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64::<1>(bits)];
    for (x, half) in numbers.iter_mut().zip(halves) {
        let part = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half));
        *x = _mm512_sub_ps(*x, _mm512_castsi512_ps(part));
    }
    bits
}

/// Two columns' numbers of 32 rows as pairs, row by row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn interleave(columns: [__m512i; 2]) -> [__m512i; 2] {
    // Rows 0 to 3, 8 to 11, 16 to 19 and 24 to 27, then the other rows.
    let low = _mm512_unpacklo_epi16(columns[0], columns[1]);
    let high = _mm512_unpackhi_epi16(columns[0], columns[1]);
    let order = |first: i64| {
        _mm512_setr_epi64(
            first,
            first + 1,
            first + 8,
            first + 9,
            first + 2,
            first + 3,
            first + 10,
            first + 11,
        )
    };
    [
        _mm512_permutex2var_epi64(low, order(0), high),
        _mm512_permutex2var_epi64(low, order(4), high),
    ]
}

/// 2^x for x <= 0 or slightly above, 0 below the smallest normal number, NaN for NaN.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp2<const PARTS: usize>(x: __m512) -> __m512 {
    let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
    let whole = _mm512_roundscale_ps::<0>(x);
    let fraction = _mm512_sub_ps(x, whole);
    let polynomial = |coefficients: &[f32]| {
        let mut power = _mm512_set1_ps(coefficients[0]);
        for coefficient in &coefficients[1..] {
            power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(*coefficient));
        }
        power
    };
    let power = if PARTS == 1 {
        polynomial(&EXP2_SHORT)
    } else {
        polynomial(&EXP2_F32)
    };
    _mm512_maskz_scalef_ps(normal, power, whole)
}
