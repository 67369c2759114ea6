//! Philox 4x32-10, the counter-based generator of Salmon et al. (SC 2011). Any device and the backward pass can draw a
//! dropout mask again, in any order.

use crate::config::Dropout;
use crate::cpu::number::element::Accumulator;
use rayon::prelude::*;

/// One batch row and head of a dropout mask.
#[derive(Clone, Copy)]
pub(crate) struct DropoutMask {
    key: [u32; 2],
    batch_head: u32,
    /// Added to rows and columns.
    first: usize,
    /// A word below this is dropped: p in units of 2^-32.
    cut: u64,
    /// 1 / (1 - p).
    scale: f64,
}

impl DropoutMask {
    /// `batch_head` is `batch * heads + head`, counting query heads.
    pub fn new(dropout: Dropout, batch_head: usize) -> Self {
        Self {
            key: [dropout.seed as u32, (dropout.seed >> 32) as u32],
            batch_head: batch_head as u32,
            first: 0,
            cut: (dropout.p * 4_294_967_296.0).ceil() as u64,
            scale: 1.0 / (1.0 - dropout.p),
        }
    }

    /// The mask of rows and columns that count from a token on.
    pub fn from(self, first: usize) -> Self {
        Self { first, ..self }
    }

    /// The factor on the weight of this row and column (token indices): 0 or 1 / (1 - p).
    pub fn factor<A: Accumulator>(&self, row: usize, column: usize) -> A {
        if self.keeps(row, column) {
            A::of(self.scale)
        } else {
            A::ZERO
        }
    }

    /// Whether the weight stays. Four neighbouring columns share one draw.
    fn keeps(&self, row: usize, column: usize) -> bool {
        let (row, column) = (row + self.first, column + self.first);
        let draw = philox4x32_10([(column / 4) as u32, row as u32, self.batch_head, 0], self.key);
        u64::from(draw[column % 4]) >= self.cut
    }
}

/// Logistic noise, ln(p / (1 - p)) of a uniform p, for `count` places; the same for the same seed. Four neighbouring
/// places share one draw.
pub(crate) fn logistic(seed: u64, count: usize) -> Vec<f32> {
    let key = [seed as u32, (seed >> 32) as u32];
    let noise = |place: usize| {
        let draw = philox4x32_10([(place / 4) as u32, ((place / 4) >> 32) as u32, 0, 1], key);
        // Never 0 and never 1.
        let p = (f64::from(draw[place % 4]) + 0.5) / 4_294_967_296.0;
        (p / (1.0 - p)).ln() as f32
    };
    (0..count).into_par_iter().map(noise).collect()
}

fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let high_low = |factor: u32, word: u32| {
            let product = u64::from(factor) * u64::from(word);
            ((product >> 32) as u32, product as u32)
        };
        let (high0, low0) = high_low(0xD251_1F53, counter[0]);
        let (high1, low1) = high_low(0xCD9E_8D57, counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that Random123 ships.
    #[test]
    fn known_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, answer) in cases {
            assert_eq!(philox4x32_10(counter, key), answer);
        }
    }
}
