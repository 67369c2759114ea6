//! Quantiles of numbers in bounded memory.

use std::collections::BTreeMap;

/// Numbers counted by their first 16 bits, in the order of the numbers. A bin is at most a 128th of its number wide.
#[derive(Clone, Debug, Default)]
pub(super) struct Histogram {
    counts: BTreeMap<u16, u64>,
    total: u64,
}

/// The bin of a number: negative numbers have the bits of their size turned around.
fn bin_of(x: f32) -> u16 {
    let bits = (x.to_bits() >> 16) as u16;
    match bits >> 15 {
        1 => !bits,
        _ => bits | 1 << 15,
    }
}

/// The number with the smallest size in a bin, and the finite one next to the largest.
fn edges(bin: u16) -> [f64; 2] {
    let (sign, bits) = match bin >> 15 {
        1 => (1.0, bin & !(1 << 15)),
        _ => (-1.0, !bin & !(1 << 15)),
    };
    let size = |bits: u32| sign * f64::from(f32::from_bits(bits).min(f32::MAX));
    let small = u32::from(bits) << 16;
    [size(small), size(small + 0xffff + 1)]
}

impl Histogram {
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts numbers. A NaN counts as above every threshold.
    pub fn extend(&mut self, numbers: &[f32]) {
        for x in numbers {
            if !x.is_nan() {
                *self.counts.entry(bin_of(*x)).or_default() += 1;
            }
            self.total += 1;
        }
    }

    /// The number below which a share `ratio` of the counted numbers lie; None if none were counted.
    pub fn quantile(&self, ratio: f64) -> Option<f64> {
        let wanted = ratio * self.total as f64;
        let mut below = 0.0;
        for (bin, count) in &self.counts {
            let count = *count as f64;
            if below + count >= wanted {
                let inside = ((wanted - below) / count).clamp(0.0, 1.0);
                let [mut low, mut high] = edges(*bin);
                if high < low {
                    (low, high) = (high, low);
                }
                return Some(low + inside * (high - low));
            }
            below += count;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_known_to_a_bin() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.quantile(0.5), None);
        let numbers: Vec<f32> = (1..=10_000).map(|i| i as f32 / 100.0).collect();
        numbers.chunks(77).for_each(|chunk| histogram.extend(chunk));
        for (ratio, expected) in [(0.1, 10.0), (0.5, 50.0), (0.75, 75.0), (0.99, 99.0)] {
            let got = histogram.quantile(ratio).unwrap();
            assert!((got / expected - 1.0).abs() < 2e-3, "{ratio}: {got}");
        }
    }

    #[test]
    fn odd_numbers_find_a_place() {
        let mut histogram = Histogram::new();
        histogram.extend(&[0.0, -1e-9, 1e-30, 1e30, f32::INFINITY, f32::NAN]);
        assert!(histogram.quantile(0.1).unwrap() < -9e-10);
        assert!(histogram.quantile(0.3).unwrap() < 1e-11);
        assert!(histogram.quantile(0.7).unwrap() > 1e6);
        // No number is above a NaN.
        assert_eq!(histogram.quantile(0.99), None);
    }
}
