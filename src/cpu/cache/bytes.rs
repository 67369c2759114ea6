//! Rows in 8 bits: a code for each number, and a scale for each row.

use crate::config::ByteCode;
use crate::cpu::number::element::Accumulator;
use float8::F8E4M3;
use half::bf16;

impl ByteCode {
    /// The largest number of the code.
    const fn largest(self) -> f64 {
        match self {
            Self::I8 => 127.0,
            Self::F8E4M3 => 448.0,
        }
    }

    /// Appends the codes of a row, and returns its scale: NaN for a row that is not finite.
    pub fn encode<A: Accumulator>(self, row: &[A], codes: &mut Vec<u8>) -> bf16 {
        let largest = row.iter().fold(A::ZERO, |largest, x| {
            // NaN and infinity make NaN.
            if x.finite() && largest.finite() {
                largest.larger(x.absolute())
            } else {
                A::NAN
            }
        });
        if !largest.finite() || largest == A::ZERO {
            codes.resize(codes.len() + row.len(), 0);
            return if largest == A::ZERO { bf16::ZERO } else { bf16::NAN };
        }
        let scale = round_up(largest.double() / self.largest());
        let wide = f64::from(scale);
        codes.extend(row.iter().map(|x| {
            let x = x.double() / wide;
            match self {
                Self::I8 => x.round_ties_even() as i8 as u8,
                Self::F8E4M3 => F8E4M3::from_f64(x).to_bits(),
            }
        }));
        scale
    }

    /// The numbers of a row's codes. To be inlined into code for an instruction set.
    #[inline(always)]
    pub fn decode<A: Accumulator>(self, codes: &[u8], scale: bf16, row: &mut [A]) {
        let scale = A::of(scale.to_f64());
        match self {
            Self::I8 => {
                for (x, code) in row.iter_mut().zip(codes) {
                    *x = A::of(f64::from(*code as i8)) * scale;
                }
            }
            Self::F8E4M3 => {
                for (x, code) in row.iter_mut().zip(codes) {
                    *x = A::of(f64::from(f8(*code))) * scale;
                }
            }
        }
    }
}

/// The number of a code that is not NaN.
#[inline(always)]
fn f8(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    // f32's exponent has a bias of 127, this one of 7.
    let number = f32::from_bits((magnitude << 20) + (120 << 23));
    // Below 2^-6 there is no leading one.
    let number = if magnitude < 8 { (number - LEAST) * 2.0 } else { number };
    f32::from_bits(number.to_bits() | u32::from(code & 0x80) << 24)
}

/// 2^-7.
const LEAST: f32 = 1.0 / 128.0;

/// The least bf16 number, of at least the smallest normal one, that is not below a positive number.
fn round_up(x: f64) -> bf16 {
    let near = bf16::from_f64(x).max(bf16::MIN_POSITIVE);
    match f64::from(near) < x {
        true => bf16::from_bits(near.to_bits() + 1),
        false => near,
    }
}

#[cfg(test)]
mod tests {
    use super::{f8, round_up};
    use crate::config::{ByteCode, Storage};
    use crate::reference::in_bytes;
    use float8::F8E4M3;

    /// All codes stand for the numbers that the format says.
    #[test]
    fn every_code_is_its_number() {
        for code in 0..=u8::MAX {
            if code & 0x7f != 0x7f {
                assert_eq!(f8(code), F8E4M3::from_bits(code).to_f32(), "{code:#x}");
            }
        }
        for x in [1e-45, 3e-39, 0.3, 1.0, 1.0 + 1e-9, 255.5, 3e38] {
            let up = f64::from(round_up(x));
            assert!(up >= x && up <= (x * (1.0 + 1.0 / 128.0)).max(1.2e-38), "{x} {up}");
        }
    }

    /// Rows of every size of number, midpoints between codes among them, round as the reference does.
    #[test]
    fn rows_round_as_in_the_reference() {
        for (code, storage) in [(ByteCode::I8, Storage::I8), (ByteCode::F8E4M3, Storage::F8E4M3)] {
            let number = |i: i32| f64::from(i * 7919 % 1009 - 504) / 37.0 * (f64::from(i % 23) - 11.0).exp2();
            let mut rows: Vec<Vec<f64>> = (0..40).map(|r| (0..59).map(|i| number(59 * r + i)).collect()).collect();
            // Whole and half codes exactly: the scale is 1 where the largest is the code's.
            let most = code.largest();
            rows.push((0..=897).map(|i| f64::from(i) / 2.0).filter(|x| *x <= most).collect());
            rows.push((0..256).map(|i| f64::from(i) / 1024.0).chain([most]).collect());
            rows.extend([
                vec![0.0; 5],
                vec![1e-30, -3e-31],
                vec![3e38, -1.0],
                vec![1.0, f64::NAN],
                vec![f64::INFINITY],
            ]);
            for row in rows {
                let expected = in_bytes(&row, storage).expect("8 bits");
                let mut codes = Vec::new();
                let scale = code.encode(&row, &mut codes);
                let mut got = vec![1.0f64; row.len()];
                code.decode(&codes, scale, &mut got);
                for (got, expected) in got.iter().zip(&expected) {
                    assert!(
                        got == expected || got.is_nan() && expected.is_nan(),
                        "{storage}: {got} {expected} {row:?}"
                    );
                }
            }
        }
    }
}
