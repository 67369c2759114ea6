//! The dropout mask: a counter-based generator, so that the same weight is dropped on every device and in backward.

use crate::config::Dropout;

/// Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four random words
/// for a counter and a key.
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    // The multipliers and the key's Weyl increments are the paper's.
    const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const INCREMENTS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    for _ in 0..10 {
        let p0 = MULTIPLIERS[0] * u64::from(c0);
        let p1 = MULTIPLIERS[1] * u64::from(c2);
        (c0, c2) = ((p1 >> 32) as u32 ^ c1 ^ k0, (p0 >> 32) as u32 ^ c3 ^ k1);
        (c1, c3) = (p1 as u32, p0 as u32);
        k0 = k0.wrapping_add(INCREMENTS[0]);
        k1 = k1.wrapping_add(INCREMENTS[1]);
    }
    [c0, c1, c2, c3]
}

/// Whether dropout keeps one softmax weight; a kept weight is scaled by `1 / (1 - p)`.
///
/// `batch_head` is `batch · heads + query head` and `column` the column's token. One Philox call serves four
/// neighbouring columns. The counter is `(column / 4, row, batch_head, 0)`, the key is the seed's low and high half,
/// and the word is number `column % 4`. The weight is kept when the word is at least `⌈p · 2³²⌉`.
pub fn dropout_keeps(dropout: Dropout, batch_head: usize, row: usize, column: usize) -> bool {
    let counter = [(column / 4) as u32, row as u32, batch_head as u32, 0];
    let key = [dropout.seed as u32, (dropout.seed >> 32) as u32];
    let word = philox4x32_10(counter, key)[column % 4];
    u64::from(word) >= (dropout.p * 4_294_967_296.0).ceil() as u64
}
