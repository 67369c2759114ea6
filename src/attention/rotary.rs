//! Rotary position embedding with prepared tables.

use candle_core::{bail, DType, Device, Result, Tensor};
use candle_nn::rotary_emb;

/// The entries of a head's vector that a rotary embedding turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotaryLayout {
    /// d and d + D/2: Hugging Face checkpoints.
    Half,
    /// 2d and 2d + 1: GGUF files and the original Llama weights.
    Interleaved,
}

/// Rotary position embedding of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RotaryConfig {
    /// Base of the frequencies, 10000 in the first Llama.
    pub theta: f64,
    /// The number of positions to prepare, at most 2^24; longer inputs are refused.
    pub max_tokens: usize,
    /// The pairs of entries that are turned together.
    pub layout: RotaryLayout,
}

/// The first whole number n where f32 does not hold n + 1.
const MOST_TOKENS: u32 = 1 << 24;

/// Prepared cosines and sines, (max_tokens, D / 2).
#[derive(Clone, Debug)]
pub(super) struct Rotary {
    cos: Tensor,
    sin: Tensor,
    layout: RotaryLayout,
}

impl Rotary {
    pub fn new(config: RotaryConfig, head_dim: usize, dtype: DType, device: &Device) -> Result<Self> {
        if !(config.theta.is_finite() && config.theta > 0.0) {
            bail!(
                "rotary theta: expected a positive number, got {}; Llama uses 10000",
                config.theta
            )
        }
        let max_tokens = match u32::try_from(config.max_tokens) {
            Ok(max_tokens) if max_tokens <= MOST_TOKENS => max_tokens,
            _ => bail!(
                "rotary max_tokens: expected at most {MOST_TOKENS}, up to where f32 tells positions apart, got {}; \
                 see the model's max_position_embeddings",
                config.max_tokens
            ),
        };
        let frequencies: Vec<f32> = (0..head_dim / 2)
            .map(|d| (config.theta.powf(-2.0 * d as f64 / head_dim as f64)) as f32)
            .collect();
        let frequencies = Tensor::new(frequencies, device)?.unsqueeze(0)?;
        let positions = Tensor::arange(0, max_tokens, device)?.to_dtype(DType::F32)?;
        // Element by element: on CUDA a matrix product may run in TF32, which has 10 bits for a position.
        let angles = positions.unsqueeze(1)?.broadcast_mul(&frequencies)?;
        Ok(Self {
            cos: angles.cos()?.to_dtype(dtype)?,
            sin: angles.sin()?.to_dtype(dtype)?,
            layout: config.layout,
        })
    }

    /// Turns (B, H, n, D), whose first token stands at `position`. The fused kernels cut gradients, so a tracked input
    /// uses candle's plain operations.
    pub fn apply(&self, xs: &Tensor, position: usize) -> Result<Tensor> {
        let (tokens, positions) = (xs.dim(2)?, self.cos.dim(0)?);
        if position + tokens > positions {
            bail!(
                "tokens: expected at most the rotary embedding's {positions} positions, got {}; raise max_tokens",
                position + tokens
            )
        }
        let rows = |table: &Tensor| table.narrow(0, position, tokens);
        let (cos, sin) = (rows(&self.cos)?, rows(&self.sin)?);
        let xs = xs.contiguous()?;
        match (self.layout, xs.track_op()) {
            (RotaryLayout::Half, false) => rotary_emb::rope(&xs, &cos, &sin),
            (RotaryLayout::Half, true) => rotary_emb::rope_slow(&xs, &cos, &sin),
            (RotaryLayout::Interleaved, false) => rotary_emb::rope_i(&xs, &cos, &sin),
            (RotaryLayout::Interleaved, true) => rotary_emb::rope_i_slow(&xs, &cos, &sin),
        }
    }
}
