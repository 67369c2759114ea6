//! The norms of the decoder.

use anyhow::Result;
use candle_core::{Module, Tensor};
use candle_nn::{LayerNorm, RmsNorm};

use super::config::LlamaConfig;
use super::layer_options::NormKind;
use crate::weights::Weights;

/// A norm of the kind that the model has.
pub enum Norm {
    Rms(RmsNorm),
    Layer(LayerNorm),
}

impl Norm {
    /// Loads the vector of `len` factors at `path`, and the biases beside them where the kind has them.
    pub fn load(weights: &mut dyn Weights, path: &str, len: usize, config: &LlamaConfig) -> Result<Self> {
        let (weight, eps) = (weights.vector(path, len)?, config.norm_eps);
        Ok(match config.layer.norm {
            NormKind::Rms => Self::Rms(RmsNorm::new(weight, eps)),
            NormKind::Layer => Self::Layer(LayerNorm::new(weight, weights.bias(path, len)?, eps)),
        })
    }

    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Rms(norm) => norm.forward(xs)?,
            Self::Layer(norm) => norm.forward(xs)?,
        })
    }

    /// The factors.
    pub fn weight(&self) -> &Tensor {
        match self {
            Self::Rms(norm) => norm.weight(),
            Self::Layer(norm) => norm.weight(),
        }
    }
}
