//! The next token: the likeliest one, or one that is drawn.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Tensor, D};
use candle_nn::ops::softmax_last_dim;
use rand::distr::weighted::WeightedIndex;
use rand::distr::Distribution;
use rand::{rngs::StdRng, SeedableRng};

/// A lower temperature takes the likeliest token: divided by it, logits would leave the range of f32.
const COLDEST: f64 = 1e-7;

/// Draws tokens; the same seed draws the same tokens from the same logits.
pub struct Sampler {
    temperature: f64,
    top_p: Option<f64>,
    random: StdRng,
}

impl Sampler {
    pub fn new(temperature: f64, top_p: Option<f64>, seed: u64) -> Result<Self> {
        ensure!(
            temperature.is_finite() && temperature >= 0.0,
            "temperature: expected a number of at least 0, got {temperature}; 0 takes the likeliest token"
        );
        if let Some(p) = top_p {
            ensure!(
                p > 0.0 && p <= 1.0,
                "top-p: expected a probability above 0 and at most 1, got {p}; 1 samples from all"
            );
        }
        Ok(Self {
            temperature,
            top_p,
            random: StdRng::seed_from_u64(seed),
        })
    }

    /// A token, given logits `(vocabulary)`.
    pub fn sample(&mut self, logits: &Tensor) -> Result<u32> {
        let logits = logits.to_dtype(DType::F32)?;
        if self.temperature < COLDEST {
            return Ok(logits.argmax(D::Minus1)?.to_scalar()?);
        }
        let mut weights = softmax_last_dim(&(logits / self.temperature)?)?.to_vec1()?;
        if let Some(share) = self.top_p.filter(|p| *p < 1.0) {
            keep_likeliest(&mut weights, share as f32);
        }
        let tokens = WeightedIndex::new(&weights).context("sampling: the logits are not usable")?;
        Ok(tokens.sample(&mut self.random) as u32)
    }
}

/// Keeps the fewest tokens that together reach `share`; all others get the weight 0.
fn keep_likeliest(weights: &mut [f32], share: f32) {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
    let mut kept = 0.0;
    for token in order {
        if kept < share {
            kept += weights[token];
        } else {
            weights[token] = 0.0;
        }
    }
}
