//! Random arrays, numeric gradients and comparisons.

// The property tests of gradients, in peers/tests, use only a part.
#![allow(dead_code)]

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::reference::{Array4, Indicators};
use candle_sfattention::Fold;
use rand::{rngs::StdRng, Rng};

pub const FOLDS: [Fold; 3] = [Fold::PairSum, Fold::Mean, Fold::Drop];

pub fn random(rng: &mut StdRng, dims: [usize; 4]) -> Array4 {
    let len = dims.iter().product();
    Array4 {
        dims,
        data: (0..len).map(|_| rng.random_range(-1.0..1.0)).collect(),
    }
}

/// q (b, h, n, d), then k and v (b, hk, n, d).
pub fn random_qkv(rng: &mut StdRng, [b, h, hk, n, d]: [usize; 5]) -> [Array4; 3] {
    [
        random(rng, [b, h, n, d]),
        random(rng, [b, hk, n, d]),
        random(rng, [b, hk, n, d]),
    ]
}

pub fn random_bits(rng: &mut StdRng, dims: [usize; 3]) -> Indicators {
    let len = dims.iter().product();
    Indicators {
        dims,
        bits: (0..len).map(|_| rng.random_bool(0.6)).collect(),
    }
}

pub fn no_bits(dims: [usize; 3]) -> Indicators {
    Indicators {
        dims,
        bits: vec![false; dims.iter().product()],
    }
}

pub fn tensor(array: &Array4) -> Result<Tensor> {
    Ok(array.to_tensor(DType::F64, &Device::Cpu)?)
}

pub fn assert_close(what: &str, got: &[f64], expected: &[f64], relative: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!(
            (g - e).abs() <= relative * (1.0 + e.abs()),
            "{what}[{i}]: got {g}, expected {e}"
        );
    }
}

/// The gradient of `f` by central differences: error about step² plus 1e-16 / step.
pub fn numeric_gradient(at: &Array4, step: f64, f: impl Fn(&Array4) -> f64) -> Vec<f64> {
    let mut moved = at.clone();
    (0..at.data.len())
        .map(|i| {
            let mut value = |delta: f64| {
                moved.data[i] = at.data[i] + delta;
                f(&moved)
            };
            let difference = value(step) - value(-step);
            moved.data[i] = at.data[i];
            difference / (2.0 * step)
        })
        .collect()
}
