//! Blocks of 32 weights, `start + step · n`, and where a GGUF file holds such blocks.

use candle_core::quantized::GgmlDType;
use half::f16;

/// Weights of a block.
pub const BLOCK: usize = 32;

/// The whole numbers of a block.
pub trait Numbers: Copy + Send + Sync + 'static {
    /// The first half of the block, and the second.
    fn halves(&self) -> ([u8; BLOCK / 2], [u8; BLOCK / 2]);
}

/// 4 bits each: a byte holds number i in its low half, and number i + 16 in its high half.
#[derive(Clone, Copy, Debug)]
pub struct Nibbles(pub [u8; BLOCK / 2]);

/// 8 bits each.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub [u8; BLOCK]);

impl Numbers for Nibbles {
    #[inline(always)]
    fn halves(&self) -> ([u8; BLOCK / 2], [u8; BLOCK / 2]) {
        (self.0.map(|byte| byte & 15), self.0.map(|byte| byte >> 4))
    }
}

impl Numbers for Bytes {
    #[inline(always)]
    fn halves(&self) -> ([u8; BLOCK / 2], [u8; BLOCK / 2]) {
        let (mut first, mut second) = ([0; BLOCK / 2], [0; BLOCK / 2]);
        first.copy_from_slice(&self.0[..BLOCK / 2]);
        second.copy_from_slice(&self.0[BLOCK / 2..]);
        (first, second)
    }
}

/// 32 weights `start + step · n`.
#[derive(Clone, Copy, Debug)]
pub struct Block<N> {
    pub step: f32,
    pub start: f32,
    pub numbers: N,
}

impl<N: Numbers> Block<N> {
    pub fn floats(&self) -> [f32; BLOCK] {
        let (first, second) = self.numbers.halves();
        let mut floats = [0.0; BLOCK];
        for (float, number) in floats.iter_mut().zip(first.into_iter().chain(second)) {
            *float = self.start + self.step * f32::from(number);
        }
        floats
    }
}

impl Block<Nibbles> {
    /// The blocks of a file's tensor, whose type has 4 bits a weight; None of other types.
    pub fn of_four_bits(dtype: GgmlDType, data: &[u8]) -> Option<Vec<Self>> {
        match dtype {
            GgmlDType::Q4_0 => Some(data.chunks_exact(18).map(Self::of_q4_0).collect()),
            GgmlDType::Q4_1 => Some(data.chunks_exact(20).map(Self::of_q4_1).collect()),
            GgmlDType::Q4K => Some(data.chunks_exact(144).flat_map(Self::of_q4_k).collect()),
            _ => None,
        }
    }

    /// d, 16 bytes: d · (n - 8).
    fn of_q4_0(bytes: &[u8]) -> Self {
        let step = half_at(bytes, 0);
        Self {
            step,
            start: -8.0 * step,
            numbers: Nibbles(array(&bytes[2..])),
        }
    }

    /// d, m, 16 bytes: m + d · n.
    fn of_q4_1(bytes: &[u8]) -> Self {
        Self {
            step: half_at(bytes, 0),
            start: half_at(bytes, 2),
            numbers: Nibbles(array(&bytes[4..])),
        }
    }

    /// d, dmin, 12 bytes with scales and minima of 8 blocks in 6 bits each, 128 bytes: two blocks share 32 of them, one
    /// in the low halves, one in the high ones.
    fn of_q4_k(bytes: &[u8]) -> [Self; 8] {
        let (d, dmin) = (half_at(bytes, 0), half_at(bytes, 2));
        let scales = &bytes[4..16];
        std::array::from_fn(|block| {
            let (scale, minimum) = match block {
                0..4 => (scales[block] & 63, scales[block + 4] & 63),
                _ => (
                    (scales[block + 4] & 15) | ((scales[block - 4] >> 6) << 4),
                    (scales[block + 4] >> 4) | ((scales[block] >> 6) << 4),
                ),
            };
            let shared = &bytes[16 + block / 2 * BLOCK..][..BLOCK];
            let number = |at: usize| (shared[at] >> (block % 2 * 4)) & 15;
            Self {
                step: d * f32::from(scale),
                start: -dmin * f32::from(minimum),
                numbers: Nibbles(std::array::from_fn(|at| number(at) | (number(at + BLOCK / 2) << 4))),
            }
        })
    }
}

impl Block<Bytes> {
    /// The blocks of a file's tensor, whose type has 8 bits a weight; None of other types.
    pub fn of_eight_bits(dtype: GgmlDType, data: &[u8]) -> Option<Vec<Self>> {
        match dtype {
            GgmlDType::Q8_0 => Some(data.chunks_exact(34).map(Self::of_q8_0).collect()),
            _ => None,
        }
    }

    /// d, 32 signed bytes: d · n.
    fn of_q8_0(bytes: &[u8]) -> Self {
        let step = half_at(bytes, 0);
        let signed: [u8; BLOCK] = array(&bytes[2..]);
        Self {
            step,
            start: -128.0 * step,
            numbers: Bytes(signed.map(|byte| byte ^ 128)),
        }
    }

    /// Up to 32 weights to the nearest of 256 values from the least to the largest. Weights that are not finite make
    /// the block's products NaN.
    pub fn nearest(weights: &[f32]) -> Self {
        let least = weights.iter().copied().fold(f32::INFINITY, f32::min);
        let largest = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let step = (largest - least) / 255.0;
        let finite = weights.iter().all(|weight| weight.is_finite());
        let number = |weight: &f32| match step > 0.0 {
            // `as` keeps to 0..=255.
            true => ((weight - least) / step).round() as u8,
            false => 0,
        };
        let mut numbers = [0; BLOCK];
        for (to, weight) in numbers.iter_mut().zip(weights) {
            *to = number(weight);
        }
        Self {
            step: if finite { step } else { f32::NAN },
            start: least,
            numbers: Bytes(numbers),
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// The first bytes.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    std::array::from_fn(|at| bytes[at])
}
