//! Rotary position embedding, with both pairings of coordinates and Llama 3's scaled frequencies.

use std::f64::consts::TAU;
use std::sync::{Mutex, PoisonError};

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor, D};
use candle_nn::rotary_emb;

use crate::model::LlamaConfig;

/// Which coordinates of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// `2i` with `2i + 1`: GGUF files, whose q and k rows were permuted for it.
    Interleaved,
    /// `i` with `i + D/2`: Hugging Face checkpoints.
    Halves,
}

/// The scaling of the frequencies `theta^(-2i/D)`.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency is divided by the same factor.
    Linear(f64),
    Llama3(Llama3Scaling),
    /// Each frequency is divided by its own factor: how GGUF files store Llama 3's.
    Factors(Vec<f64>),
}

/// Llama 3: wavelengths beyond `original_context / low_freq_factor` are stretched by `factor`, those within
/// `original_context / high_freq_factor` kept, with a ramp between.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3Scaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_context: f64,
}

impl Llama3Scaling {
    /// The scaled frequency.
    pub fn scaled(&self, frequency: f64) -> f64 {
        let turns = self.original_context * frequency / TAU;
        let kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
        let kept = kept.clamp(0.0, 1.0);
        frequency * (kept + (1.0 - kept) / self.factor)
    }
}

impl RopeScaling {
    /// Refuses numbers that give no rotation, or NaN; `half` is half the head dimension.
    pub fn check(&self, half: usize) -> Result<()> {
        let numbers = match self {
            Self::None => Vec::new(),
            Self::Linear(factor) => vec![*factor],
            Self::Llama3(scaling) => {
                ensure!(
                    scaling.high_freq_factor > scaling.low_freq_factor,
                    "rope scaling: expected high_freq_factor above low_freq_factor {}, got {}; the checkpoint is \
                     damaged",
                    scaling.low_freq_factor,
                    scaling.high_freq_factor
                );
                vec![
                    scaling.factor,
                    scaling.low_freq_factor,
                    scaling.high_freq_factor,
                    scaling.original_context,
                ]
            }
            Self::Factors(factors) => {
                ensure!(
                    factors.len() == half,
                    "rope factors: expected {half}, half the head dimension, got {}; the checkpoint is damaged",
                    factors.len()
                );
                factors.clone()
            }
        };
        for number in numbers {
            ensure!(
                number.is_finite() && number > 0.0,
                "rope scaling: expected numbers above 0, got {number}; the checkpoint is damaged"
            );
        }
        Ok(())
    }
}

/// The frequencies of a model, and the rotations of the positions it has met.
pub struct Rope {
    pairing: Pairing,
    dtype: DType,
    device: Device,
    /// `(R/2)` radians per position, where R numbers of a head are rotated.
    frequencies: Vec<f64>,
    /// Cosines and sines `(positions, R/2)` from position 0 on, kept for all steps and doubled when outgrown.
    tables: Mutex<Option<(Tensor, Tensor)>>,
}

impl Rope {
    pub fn new(config: &LlamaConfig, dtype: DType, device: &Device) -> Result<Self> {
        config.rope_scaling.check(config.rotary_dim() / 2)?;
        Ok(Self::with(
            config,
            config.rope_theta,
            &config.rope_scaling,
            dtype,
            device,
        ))
    }

    /// That of the layers that slide, if it is another one.
    #[allow(dead_code)] // not read by the train example
    pub fn sliding(config: &LlamaConfig, dtype: DType, device: &Device) -> Option<Self> {
        let theta = config.layer.sliding.as_ref()?.rope_theta?;
        Some(Self::with(config, theta, &RopeScaling::None, dtype, device))
    }

    fn with(config: &LlamaConfig, theta: f64, scaling: &RopeScaling, dtype: DType, device: &Device) -> Self {
        let half = config.rotary_dim() / 2;
        let plain = (0..half).map(|i| theta.powf(-(i as f64) / half as f64));
        let frequencies = match scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear(factor) => plain.map(|frequency| frequency / factor).collect(),
            RopeScaling::Llama3(scaling) => plain.map(|frequency| scaling.scaled(frequency)).collect(),
            RopeScaling::Factors(factors) => plain
                .zip(factors)
                .map(|(frequency, factor)| frequency / factor)
                .collect(),
        };
        Self {
            pairing: config.rope_pairing,
            dtype,
            device: device.clone(),
            frequencies,
            tables: Mutex::new(None),
        }
    }

    /// The rotations of the positions `position..position + n`: one table for all layers.
    pub fn at(&self, position: usize, n: usize) -> Result<Rotation> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let (cos, sin) = match tables.take() {
            Some(tables) if tables.0.dim(0)? >= position + n => tables,
            _ => {
                let positions = (position + n).next_power_of_two();
                (self.table(positions, f64::cos)?, self.table(positions, f64::sin)?)
            }
        };
        let rows = |table: &Tensor| table.narrow(0, position, n);
        let rotation = Rotation {
            pairing: self.pairing,
            cos: rows(&cos)?,
            sin: rows(&sin)?,
        };
        *tables = Some((cos, sin));
        Ok(rotation)
    }

    /// The average of the rotations of the positions `position..position + count` in f32, for each of `n` rows.
    #[allow(dead_code)] // read by rankings
    pub fn average(&self, position: usize, count: usize, n: usize) -> Result<Rotation> {
        let Rotation { pairing, cos, sin } = self.at(position, count)?;
        let mean = |table: Tensor| -> Result<Tensor> {
            let mean = table.to_dtype(DType::F32)?.mean_keepdim(0)?;
            Ok(mean.broadcast_as((n, table.dim(1)?))?.contiguous()?)
        };
        Ok(Rotation {
            pairing,
            cos: mean(cos)?,
            sin: mean(sin)?,
        })
    }

    fn table(&self, positions: usize, f: fn(f64) -> f64) -> Result<Tensor> {
        let angles = (0..positions).flat_map(|t| self.frequencies.iter().map(move |w| t as f64 * w));
        let values: Vec<f32> = angles.map(|angle| f(angle) as f32).collect();
        let table = Tensor::from_vec(values, (positions, self.frequencies.len()), &Device::Cpu)?;
        Ok(table.to_dtype(self.dtype)?.to_device(&self.device)?)
    }
}

/// Cosines and sines `(N, R/2)` of consecutive positions, which turn the first R numbers of each head.
#[derive(Clone)]
pub struct Rotation {
    pairing: Pairing,
    cos: Tensor,
    sin: Tensor,
}

impl Rotation {
    /// Rotates `xs (B, heads, N, D)`.
    pub fn apply(&self, xs: &Tensor) -> Result<Tensor> {
        self.turn(xs, |xs| match self.pairing {
            Pairing::Interleaved => rotary_emb::rope_i(xs, &self.cos, &self.sin),
            Pairing::Halves => rotary_emb::rope(xs, &self.cos, &self.sin),
        })
    }

    /// Rotates `xs (B, N, heads, D)`.
    #[allow(dead_code)] // the train example needs it
    pub fn apply_to_tokens(&self, xs: &Tensor) -> Result<Tensor> {
        match self.pairing {
            Pairing::Interleaved => Ok(self.apply(&xs.transpose(1, 2)?)?.transpose(1, 2)?.contiguous()?),
            Pairing::Halves => self.turn(xs, |xs| rotary_emb::rope_thd(xs, &self.cos, &self.sin)),
        }
    }

    /// The rotation by the opposite angles.
    #[allow(dead_code)] // the train example needs it
    pub fn back(&self) -> Result<Self> {
        Ok(Self {
            sin: self.sin.neg()?,
            ..self.clone()
        })
    }

    /// Gives the rotated numbers of each head to `turn`; the others stay as they are.
    fn turn(&self, xs: &Tensor, turn: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Tensor> {
        let (size, rotated) = (xs.dim(D::Minus1)?, 2 * self.cos.dim(D::Minus1)?);
        if rotated == size {
            return Ok(turn(&xs.contiguous()?)?);
        }
        let part = |from: usize, count: usize| xs.narrow(D::Minus1, from, count)?.contiguous();
        let (turned, rest) = (turn(&part(0, rotated)?)?, part(rotated, size - rotated)?);
        Ok(Tensor::cat(&[&turned, &rest], D::Minus1)?)
    }
}
