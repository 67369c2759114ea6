//! f16 and bf16: stored dtypes that are widened to f32.

use crate::cpu::number::element::{Element, Split};
use half::slice::HalfFloatSliceExt;

impl Element for half::f16 {
    const SPLIT: Option<Split> = Some(Split::Two);

    fn widen(source: &[Self], target: &mut [f32]) {
        source.convert_to_f32_slice(target)
    }
    fn narrow(source: &[f32], target: &mut [Self]) {
        target.convert_from_f32_slice(source)
    }
    fn as_acc(_: &[Self]) -> Option<&[f32]> {
        None
    }
    fn as_acc_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

impl Element for half::bf16 {
    const SPLIT: Option<Split> = Some(Split::One);

    // half's own conversion goes number by number; these two loops vectorise.
    #[inline(always)]
    fn widen(source: &[Self], target: &mut [f32]) {
        for (x, target) in source.iter().zip(target) {
            *target = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
    }
    #[inline(always)]
    fn narrow(source: &[f32], target: &mut [Self]) {
        for (x, target) in source.iter().zip(target) {
            *target = Self::from_bits(bf16_bits(*x));
        }
    }
    fn as_acc(_: &[Self]) -> Option<&[f32]> {
        None
    }
    fn as_acc_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

/// Rounds to bf16, ties to even; a NaN stays NaN.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    (if x.is_nan() { 0x7fc0 } else { rounded }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn bf16_converts_as_half_does() {
        let mut wide = [0f32];
        for bits in 0..=u16::MAX {
            let x = bf16::from_bits(bits);
            bf16::widen(&[x], &mut wide);
            assert!(wide[0] == x.to_f32() || (wide[0].is_nan() && x.is_nan()), "{bits:#x}");
            // Halfway to the next number, on it, and just beside it.
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(bits) << 16 | low);
                let mut narrow = [bf16::ZERO];
                bf16::narrow(&[x], &mut narrow);
                let expected = bf16::from_f32(x);
                assert!(
                    narrow[0] == expected || (narrow[0].is_nan() && expected.is_nan()),
                    "{x}"
                );
            }
        }
    }
}
