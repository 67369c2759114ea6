//! Quantiles of positive numbers in bounded memory.

/// Numbers counted by their logarithm.
#[derive(Clone, Debug)]
pub(super) struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

/// Bins of an octave: a threshold is known to 1 %, and interpolated within its bin.
const PER_OCTAVE: f64 = 64.0;
/// 2^-40 is far below any score that differs from 0, 2^24 far above any.
const LOWEST: f64 = -40.0;
const BINS: usize = 64 * 64;

impl Histogram {
    pub fn new() -> Self {
        Self {
            counts: vec![0; BINS],
            total: 0,
        }
    }

    /// Counts numbers. A NaN counts as above every threshold.
    pub fn extend(&mut self, numbers: &[f32]) {
        for x in numbers {
            let bin = ((f64::from(*x).log2() - LOWEST) * PER_OCTAVE).floor();
            // The logarithm of zero is minus infinity here, and that of a negative rounding of zero is NaN.
            let bin = if *x <= 0.0 {
                0.0
            } else {
                bin.clamp(0.0, (BINS - 1) as f64)
            };
            if !x.is_nan() {
                self.counts[bin as usize] += 1;
            }
            self.total += 1;
        }
    }

    /// The number below which a share `ratio` of the counted numbers lie; None if none were counted.
    pub fn quantile(&self, ratio: f64) -> Option<f64> {
        let wanted = ratio * self.total as f64;
        let mut below = 0.0;
        for (bin, count) in self.counts.iter().enumerate() {
            let count = *count as f64;
            if count > 0.0 && below + count >= wanted {
                let inside = ((wanted - below) / count).clamp(0.0, 1.0);
                return Some(((bin as f64 + inside) / PER_OCTAVE + LOWEST).exp2());
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
        assert!(histogram.quantile(0.3).unwrap() < 1e-11);
        assert!(histogram.quantile(0.7).unwrap() > 1e6);
        // No number is above a NaN.
        assert_eq!(histogram.quantile(0.99), None);
    }
}
