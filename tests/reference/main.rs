//! The reference beyond the golden cases; one module for each subject.

mod columns;
mod edges;
mod gradients;
mod rules;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::reference::{Array4, Indicators};
use candle_sfattention::Fold;
use rand::{rngs::StdRng, Rng};

const FOLDS: [Fold; 3] = [Fold::PairSum, Fold::Mean, Fold::Drop];

fn random(rng: &mut StdRng, dims: [usize; 4]) -> Array4 {
    let len = dims.iter().product();
    Array4 {
        dims,
        data: (0..len).map(|_| rng.random_range(-1.0..1.0)).collect(),
    }
}

/// q (b, h, n, d), then k and v (b, hk, n, d).
fn random_qkv(rng: &mut StdRng, [b, h, hk, n, d]: [usize; 5]) -> [Array4; 3] {
    [
        random(rng, [b, h, n, d]),
        random(rng, [b, hk, n, d]),
        random(rng, [b, hk, n, d]),
    ]
}

fn random_bits(rng: &mut StdRng, dims: [usize; 3]) -> Indicators {
    let len = dims.iter().product();
    Indicators {
        dims,
        bits: (0..len).map(|_| rng.random_bool(0.6)).collect(),
    }
}

fn no_bits(dims: [usize; 3]) -> Indicators {
    Indicators {
        dims,
        bits: vec![false; dims.iter().product()],
    }
}

fn tensor(array: &Array4) -> Result<Tensor> {
    Ok(array.to_tensor(DType::F64, &Device::Cpu)?)
}

fn assert_close(what: &str, got: &[f64], expected: &[f64], relative: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!(
            (g - e).abs() <= relative * (1.0 + e.abs()),
            "{what}[{i}]: got {g}, expected {e}"
        );
    }
}

fn bits(text: &str) -> Vec<bool> {
    text.chars().map(|c| c == '1').collect()
}
