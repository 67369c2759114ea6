//! [`KeyProbe`]: a linear form of a key before rotary embedding, whose values are the scores of
//! [`Criterion::Given`](crate::Criterion).

use super::shape::ModelShape;
use crate::config::shard::kv_heads_of;
use candle_core::{bail, DType, Device, Error, Result, Tensor, D};
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, PoisonError};

/// A score per token and KV head from the token's key: s = w·k + b, with weights for each layer and KV head. Low means
/// that later rows will not miss the token. The key is the layer's **before rotary embedding**: a rotated key also
/// carries its position. `ProbeFitter` (feature `fit`) fits one without training. Source: this crate.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sfattention::KeyProbe;
/// let weights = Tensor::randn(0f32, 1., (30, 3, 64), &Device::Cpu)?; // layers, KV heads, head_dim
/// let probe = KeyProbe::new(&weights, &Tensor::zeros((30, 3), weights.dtype(), &Device::Cpu)?)?;
/// let keys = Tensor::randn(0f32, 1., (1, 3, 100, 64), &Device::Cpu)?;
/// assert_eq!(probe.scores(7, &keys)?.dims(), [1, 3, 100]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<LayerProbe>", into = "Vec<LayerProbe>")]
pub struct KeyProbe(Vec<LayerProbe>);

/// The weights of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LayerProbe {
    /// (Hk, D).
    pub weights: Vec<Vec<f32>>,
    /// (Hk).
    pub offsets: Vec<f32>,
}

impl TryFrom<Vec<LayerProbe>> for KeyProbe {
    type Error = Error;

    fn try_from(layers: Vec<LayerProbe>) -> Result<Self> {
        let first = layers.first().map_or(&[][..], |layer| &layer.weights);
        let (kv_heads, head_dim) = (first.len(), first.first().map_or(0, Vec::len));
        if kv_heads == 0 || head_dim == 0 {
            bail!("probe: expected weights (layers, KV heads, head_dim), got none; fit one with ProbeFitter")
        }
        for (index, layer) in layers.iter().enumerate() {
            let alike = layer.weights.iter().all(|row| row.len() == head_dim);
            if layer.weights.len() != kv_heads || layer.offsets.len() != kv_heads || !alike {
                bail!(
                    "probe: expected {kv_heads} KV heads of {head_dim} weights and an offset in every layer, got \
                     others in layer {index}; fit it again"
                )
            }
            let mut numbers = layer.weights.iter().flatten().chain(&layer.offsets);
            if let Some(bad) = numbers.find(|x| !x.is_finite()) {
                bail!("probe: expected finite weights, got {bad} in layer {index}; fit it on samples that are finite")
            }
        }
        Ok(Self(layers))
    }
}

impl From<KeyProbe> for Vec<LayerProbe> {
    fn from(probe: KeyProbe) -> Self {
        probe.0
    }
}

impl KeyProbe {
    /// From weights (L, Hk, D) and offsets (L, Hk), floats on any device.
    ///
    /// # Errors
    /// Other ranks, sizes that do not fit, or numbers that are not finite.
    pub fn new(weights: &Tensor, offsets: &Tensor) -> Result<Self> {
        let fits = weights.rank() == 3 && offsets.dims() == &weights.dims()[..2];
        if !fits {
            bail!(
                "probe: expected weights (layers, KV heads, head_dim) and offsets (layers, KV heads), got {:?} and \
                 {:?}; stack those of all layers",
                weights.dims(),
                offsets.dims()
            )
        }
        let weights = weights.to_dtype(DType::F32)?.to_vec3()?;
        let layers = weights.into_iter().zip(offsets.to_dtype(DType::F32)?.to_vec2()?);
        let layer = |(weights, offsets)| LayerProbe { weights, offsets };
        Self::try_from(layers.map(layer).collect::<Vec<_>>())
    }

    /// The number of layers.
    pub fn layers(&self) -> usize {
        self.0.len()
    }

    /// The weights (L, Hk, D) and offsets (L, Hk), f32.
    ///
    /// # Errors
    /// An error of the device.
    pub fn tensors(&self, device: &Device) -> Result<[Tensor; 2]> {
        let weights: Vec<_> = self.0.iter().map(|layer| layer.weights.clone()).collect();
        let offsets: Vec<_> = self.0.iter().map(|layer| layer.offsets.clone()).collect();
        Ok([Tensor::new(weights, device)?, Tensor::new(offsets, device)?])
    }

    /// The scores, f32 (B, Hk, n), of keys (B, Hk, n, D) of any float dtype before rotary embedding, on their device.
    ///
    /// # Errors
    /// A layer that the probe does not have, or keys of another shape.
    pub fn scores(&self, layer: usize, keys: &Tensor) -> Result<Tensor> {
        let [weights, offsets] = self.layer(layer)?.tensors(keys.device())?;
        scores_by(&weights, &offsets, keys)
    }

    /// The probe of the KV heads of rank `rank` of `world`: weights (L, Hk / world, D) and offsets (L, Hk / world). See
    /// [`HeadStrategies::shard`](crate::HeadStrategies::shard).
    ///
    /// # Errors
    /// A rank that the world does not have, more ranks than KV heads, or KV heads that are no multiple of the ranks.
    pub fn shard(&self, rank: usize, world: usize) -> Result<Self> {
        let own = kv_heads_of(rank, world, self.0[0].weights.len())?;
        let layer = |layer: &LayerProbe| LayerProbe {
            weights: layer.weights[own.clone()].to_vec(),
            offsets: layer.offsets[own.clone()].to_vec(),
        };
        Ok(Self(self.0.iter().map(layer).collect()))
    }

    /// The probe of one layer alone.
    pub(crate) fn of_layer(&self, layer: usize) -> Result<Self> {
        Ok(Self(vec![self.layer(layer)?.clone()]))
    }

    fn layer(&self, layer: usize) -> Result<&LayerProbe> {
        match self.0.get(layer) {
            Some(probe) => Ok(probe),
            None => bail!(
                "layer: expected one below {}, got {layer}; the probe is of another model",
                self.0.len()
            ),
        }
    }

    /// Refuses another model.
    pub(super) fn check(&self, model: &ModelShape) -> Result<()> {
        let sizes = [self.0.len(), self.0[0].weights.len(), self.0[0].weights[0].len()];
        if sizes != [model.layers, model.kv_heads, model.head_dim] {
            bail!("probe: expected layers, KV heads and head_dim of {model:?}, got {sizes:?}; fit one for this model")
        }
        Ok(())
    }
}

impl LayerProbe {
    /// The weights (Hk, D) and offsets (Hk), f32.
    fn tensors(&self, device: &Device) -> Result<[Tensor; 2]> {
        Ok([
            Tensor::new(self.weights.clone(), device)?,
            Tensor::new(&self.offsets[..], device)?,
        ])
    }
}

/// The scores of keys (B, Hk, n, D) by weights (Hk, D) and offsets (Hk).
fn scores_by(weights: &Tensor, offsets: &Tensor, keys: &Tensor) -> Result<Tensor> {
    let (kv_heads, dim) = weights.dims2()?;
    match *keys.dims() {
        [_, heads, _, width] if (heads, width) == (kv_heads, dim) => {}
        ref dims => bail!(
            "key: expected (batch, {kv_heads}, tokens, {dim}) before rotary embedding, got {dims:?}; the probe is of \
             another model"
        ),
    }
    let (weights, offsets) = (
        weights.reshape((1, kv_heads, 1, dim))?,
        offsets.reshape((1, kv_heads, 1))?,
    );
    let scores = keys.to_dtype(DType::F32)?.broadcast_mul(&weights)?.sum(D::Minus1)?;
    scores.broadcast_add(&offsets)
}

/// One layer of a probe. Its weights stay on the device of the last keys: a step of decoding uploads nothing.
#[derive(Debug)]
pub(crate) struct LayerScorer {
    probe: LayerProbe,
    held: Mutex<Option<[Tensor; 2]>>,
}

impl LayerScorer {
    /// # Errors
    /// A layer that the probe does not have.
    pub fn new(probe: &KeyProbe, layer: usize) -> Result<Self> {
        Ok(Self::of(probe.layer(layer)?.clone()))
    }

    fn of(probe: LayerProbe) -> Self {
        Self {
            probe,
            held: Mutex::new(None),
        }
    }

    /// As [`KeyProbe::scores`] of this layer.
    pub fn scores(&self, keys: &Tensor) -> Result<Tensor> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let [weights, offsets] = match held.take() {
            Some(tensors) if tensors[0].device().location() == keys.device().location() => tensors,
            _ => self.probe.tensors(keys.device())?,
        };
        let scores = scores_by(&weights, &offsets, keys);
        *held = Some([weights, offsets]);
        scores
    }
}

impl Clone for LayerScorer {
    fn clone(&self) -> Self {
        Self::of(self.probe.clone())
    }
}
