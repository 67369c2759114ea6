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

/// The change of a rotary embedding's frequencies for contexts longer than those of its training.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum RotaryScaling {
    /// No change.
    #[default]
    None,
    /// Each frequency is divided by the factor.
    Linear(f64),
    /// Llama 3: wavelengths above `original_tokens / low` are divided by `factor`, those below `original_tokens / high`
    /// stay, with a linear blend between.
    Llama3 {
        /// 8 in Llama 3.1.
        factor: f64,
        /// `low_freq_factor`: 1 in Llama 3.1.
        low: f64,
        /// `high_freq_factor`: 4 in Llama 3.1.
        high: f64,
        /// `original_max_position_embeddings`.
        original_tokens: usize,
    },
    /// YaRN (arXiv 2309.00071): frequencies that turn less than `beta_slow` times in `original_tokens` are divided by
    /// `factor`, those that turn more than `beta_fast` times stay, with a linear blend between. Cosines and sines are
    /// multiplied by `0.1 ln(factor) + 1`.
    Yarn {
        /// The context is `factor * original_tokens`.
        factor: f64,
        /// `original_max_position_embeddings`.
        original_tokens: usize,
        /// 32 in most models.
        beta_fast: f64,
        /// 1 in most models.
        beta_slow: f64,
    },
}

impl RotaryScaling {
    fn check(&self) -> Result<()> {
        let (numbers, original) = match *self {
            Self::None => return Ok(()),
            Self::Linear(factor) => (vec![factor], 1),
            Self::Llama3 {
                factor,
                low,
                high,
                original_tokens,
            } => (vec![factor, low, high, high - low], original_tokens),
            Self::Yarn {
                factor,
                original_tokens,
                beta_fast,
                beta_slow,
            } => (
                vec![factor, beta_fast, beta_slow, beta_fast - beta_slow],
                original_tokens,
            ),
        };
        let positive = |x: &f64| x.is_finite() && *x > 0.0;
        if original == 0 || !numbers.iter().all(positive) {
            bail!(
                "rotary scaling: expected positive numbers, low below high and beta_slow below beta_fast, got \
                 {self:?}; see rope_scaling in the model's config.json"
            )
        }
        Ok(())
    }

    /// The frequencies of pairs 0 to `dim / 2`, and the factor on cosines and sines.
    fn frequencies(&self, theta: f64, dim: usize) -> (Vec<f64>, f64) {
        let plain = (0..dim / 2).map(|pair| theta.powf(-2.0 * pair as f64 / dim as f64));
        // From 0, where a frequency is divided by the factor, to 1, where it stays.
        let blend = |frequency: f64, factor: f64, stays: f64| frequency * (stays + (1.0 - stays) / factor);
        match *self {
            Self::None => (plain.collect(), 1.0),
            Self::Linear(factor) => (plain.map(|frequency| frequency / factor).collect(), 1.0),
            Self::Llama3 {
                factor,
                low,
                high,
                original_tokens,
            } => {
                let stays = |frequency: f64| {
                    let turns = original_tokens as f64 * frequency / std::f64::consts::TAU;
                    ((turns - low) / (high - low)).clamp(0.0, 1.0)
                };
                (plain.map(|f| blend(f, factor, stays(f))).collect(), 1.0)
            }
            Self::Yarn {
                factor,
                original_tokens,
                beta_fast,
                beta_slow,
            } => {
                // The pair that turns this often.
                let pair = |turns: f64| {
                    let wavelength = original_tokens as f64 / (turns * std::f64::consts::TAU);
                    dim as f64 * wavelength.ln() / (2.0 * theta.ln())
                };
                let first = pair(beta_fast).floor().max(0.0);
                let last = pair(beta_slow).ceil().min(dim as f64 - 1.0).max(first + 1e-3);
                let stays = |index: usize| 1.0 - ((index as f64 - first) / (last - first)).clamp(0.0, 1.0);
                let scaled = plain.enumerate().map(|(index, f)| blend(f, factor, stays(index)));
                (scaled.collect(), 0.1 * factor.ln() + 1.0)
            }
        }
    }
}

/// Rotary position embedding of queries and keys. [`Default`] has the numbers of the first Llama.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RotaryConfig {
    /// Base of the frequencies, 10000 in the first Llama.
    pub theta: f64,
    /// The number of positions to prepare, at most 2^24; longer inputs are refused.
    pub max_tokens: usize,
    /// The pairs of entries that are turned together.
    pub layout: RotaryLayout,
    /// The number of entries of a head that are turned, from the first on; even, at most D. `None` (default): all.
    /// StableLM, Phi and GLM turn a part: D times their `partial_rotary_factor`.
    pub dim: Option<usize>,
    /// The change of frequencies for long contexts. Default: none.
    pub scaling: RotaryScaling,
}

impl Default for RotaryConfig {
    fn default() -> Self {
        Self {
            theta: 10_000.0,
            max_tokens: 2048,
            layout: RotaryLayout::Half,
            dim: None,
            scaling: RotaryScaling::None,
        }
    }
}

/// The first whole number n where f32 does not hold n + 1.
const MOST_TOKENS: u32 = 1 << 24;

/// Prepared cosines and sines, (max_tokens, dim / 2).
#[derive(Clone, Debug)]
pub(super) struct Rotary {
    cos: Tensor,
    sin: Tensor,
    dim: usize,
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
        let dim = config.dim.unwrap_or(head_dim);
        if dim == 0 || dim > head_dim || !dim.is_multiple_of(2) {
            bail!("rotary dim: expected an even number from 2 to the head_dim {head_dim}, got {dim}; None turns all")
        }
        config.scaling.check()?;
        let (frequencies, factor) = config.scaling.frequencies(config.theta, dim);
        let frequencies: Vec<f32> = frequencies.into_iter().map(|frequency| frequency as f32).collect();
        let frequencies = Tensor::new(frequencies, device)?.unsqueeze(0)?;
        let positions = Tensor::arange(0, max_tokens, device)?.to_dtype(DType::F32)?;
        // Element by element: on CUDA a matrix product may run in TF32, which has 10 bits for a position.
        let angles = positions.unsqueeze(1)?.broadcast_mul(&frequencies)?;
        Ok(Self {
            cos: (angles.cos()? * factor)?.to_dtype(dtype)?,
            sin: (angles.sin()? * factor)?.to_dtype(dtype)?,
            dim,
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
        let head_dim = xs.dim(3)?;
        if self.dim == head_dim {
            return self.turn(xs, position);
        }
        let turned = self.turn(&xs.narrow(3, 0, self.dim)?, position)?;
        // Candle joins the last axis as the first one of a transpose.
        Tensor::cat(&[&turned, &xs.narrow(3, self.dim, head_dim - self.dim)?], 3)?.contiguous()
    }

    fn turn(&self, xs: &Tensor, position: usize) -> Result<Tensor> {
        let rows = |table: &Tensor| table.narrow(0, position, xs.dim(2)?);
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
