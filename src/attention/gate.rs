//! [`KeyGate`]: a probe of keys while it is trained with the model.

use crate::calibrate::KeyProbe;
use crate::config::CompressionConfig;
use crate::cpu::number::philox::logistic;
use candle_core::{bail, DType, Device, Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder};

/// The temperature of the relaxed gate.
const TEMPERATURE: f64 = 0.7;
/// The factor from a fitted probe's scores to a gate's logits.
const STEEPNESS: f64 = 3.0;

/// One layer's gate: z = w·k + b of each token's key before rotary embedding, with weights for each KV head. A token is
/// hidden, once it has left the window, with probability sigmoid(z).
///
/// Training has two phases. In the soft one [`Self::relaxed`] gives a column bias that fades tokens, with a gradient
/// for w and b. In the hard one the gate stands still: the [`KeyProbe`] of [`Self::probe`] decides, and only the
/// model's weights train on. The names of the weights are `weight` (Hk, D) and `bias` (Hk). Source: this crate.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_sfattention::{attend, AttentionOptions, CompressionConfig, HeadStrategies, KeyGate, MergePlan};
/// use candle_sfattention::MergeStrategy::Off;
/// let (vars, config) = (VarMap::new(), CompressionConfig::calibrated());
/// let gate = KeyGate::new(2, 64, &config, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
/// let random = |heads| Tensor::randn(0f32, 1., (1, heads, 100, 64), &Device::Cpu);
/// let (q, kv) = (random(8)?, random(2)?); // kv stands for the keys before their rotation, too
/// let faded = gate.relaxed(&kv, 7)?;
/// let options = AttentionOptions { column_bias: Some(faded.column_bias), ..Default::default() };
/// let plan = MergePlan::new(&q, &kv, &kv, &HeadStrategies::uniform(Off), &config, &options)?;
/// let loss = (attend(&q, &kv, &kv, &plan, &options)?.sqr()?.mean_all()? + (0.5 - faded.hidden_share)?.relu()?)?;
/// assert!(loss.backward()?.get(&vars.all_vars()[0]).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct KeyGate {
    /// (Hk, D).
    weight: Tensor,
    /// (Hk).
    bias: Tensor,
    sinks: usize,
    window: usize,
}

/// A draw of a relaxed gate.
#[derive(Clone, Debug)]
pub struct RelaxedGate {
    /// c = -softplus(u), f32 (B, Hk, N), for [`AttentionOptions::column_bias`](crate::AttentionOptions); 0 for sinks
    /// and for tokens that never leave the window.
    pub column_bias: Tensor,
    /// The mean of sigmoid(u) over the tokens that can be hidden, a scalar; 0 where there is none.
    pub hidden_share: Tensor,
}

impl KeyGate {
    /// Loads `weight` (Hk, D) and `bias` (Hk) under `vb`; new ones are 0, so that a token is hidden with probability
    /// one half. `config` gives sinks and window.
    ///
    /// # Errors
    /// Weights of another shape.
    pub fn new(kv_heads: usize, head_dim: usize, config: &CompressionConfig, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints((kv_heads, head_dim), "weight", Init::Const(0.0))?,
            bias: vb.get_with_hints(kv_heads, "bias", Init::Const(0.0))?,
            sinks: config.sinks,
            window: config.window,
        })
    }

    /// Where a gate starts from layer `layer` of a fitted probe with one threshold θ per KV head: z = 3 (θ - s), so
    /// that the tokens below the threshold are those of z above 0. Returns `weight` (Hk, D) and `bias` (Hk), f32.
    ///
    /// # Errors
    /// A layer that the probe does not have, or another number of thresholds than KV heads.
    pub fn start(probe: &KeyProbe, layer: usize, thresholds: &[f64]) -> Result<[Tensor; 2]> {
        let [weights, offsets] = probe.of_layer(layer)?.tensors(&Device::Cpu)?;
        let (weights, offsets) = (weights.get(0)?, offsets.get(0)?);
        if thresholds.len() != offsets.dim(0)? {
            bail!(
                "thresholds: expected one for each of the {} KV heads, got {}; give those of the layer",
                offsets.dim(0)?,
                thresholds.len()
            )
        }
        let thresholds = Tensor::new(thresholds, offsets.device())?.to_dtype(DType::F32)?;
        Ok([(weights * -STEEPNESS)?, ((thresholds - offsets)? * STEEPNESS)?])
    }

    /// The logits z, f32 (B, Hk, N), of keys (B, Hk, N, D) of any float dtype before rotary embedding.
    ///
    /// # Errors
    /// Keys of another shape.
    pub fn logits(&self, keys: &Tensor) -> Result<Tensor> {
        let (kv_heads, dim) = self.weight.dims2()?;
        match *keys.dims() {
            [_, heads, _, width] if (heads, width) == (kv_heads, dim) => {}
            ref dims => bail!(
                "key: expected (batch, {kv_heads}, tokens, {dim}) before rotary embedding, got {dims:?}; the gate is \
                 of another layer"
            ),
        }
        // A product with a column, whose gradient is one as well.
        let columns = (keys.dim(0)?, kv_heads, dim, 1);
        let weight = self.weight.to_dtype(DType::F32)?.reshape((1, kv_heads, dim, 1))?;
        let bias = self.bias.to_dtype(DType::F32)?.reshape((1, kv_heads, 1))?;
        let keys = keys.to_dtype(DType::F32)?.contiguous()?;
        let products = keys.matmul(&weight.broadcast_as(columns)?.contiguous()?)?;
        products.squeeze(3)?.broadcast_add(&bias)
    }

    /// Fades tokens: u = (z + logistic noise) / 0.7. The noise is the same for the same seed. Gradients reach the gate
    /// and the keys.
    ///
    /// # Errors
    /// As [`Self::logits`].
    pub fn relaxed(&self, keys: &Tensor, seed: u64) -> Result<RelaxedGate> {
        // All axes but the last; `logits` refuses keys of another shape.
        let shape = &keys.dims()[..keys.rank().saturating_sub(1)];
        self.relaxed_by(keys, &Self::noise(seed, shape, keys.device())?)
    }

    /// Logistic noise, f32 of `shape`, the same for the same seed: for the layers of a step in one piece.
    ///
    /// # Errors
    /// Those of the device.
    pub fn noise(seed: u64, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        Tensor::from_vec(logistic(seed, shape.elem_count()), shape, device)
    }

    /// [`Self::relaxed`] with its noise given, f32 (B, Hk, N).
    ///
    /// # Errors
    /// As [`Self::logits`], and noise of another shape.
    pub fn relaxed_by(&self, keys: &Tensor, noise: &Tensor) -> Result<RelaxedGate> {
        let z = self.logits(keys)?;
        let (batch, kv_heads, tokens) = z.dims3()?;
        if noise.dims() != z.dims() {
            bail!(
                "noise: expected {:?}, a number for each key, got {:?}; draw it with KeyGate::noise",
                z.dims(),
                noise.dims()
            )
        }
        let u = ((z + noise)? / TEMPERATURE)?;
        let end = tokens.saturating_sub(self.window + 1);
        let can = (0..tokens).map(|t| if (self.sinks..end).contains(&t) { 1f32 } else { 0.0 });
        let can = Tensor::from_iter(can, u.device())?.reshape((1, 1, tokens))?;
        // softplus(u) = max(u, 0) + ln(1 + exp(-|u|))
        let rest = (u.abs()?.neg()?.exp()? + 1.0)?.log()?;
        let softplus = (u.relu()? + &rest)?;
        // sigmoid(u) = exp(u - softplus(u))
        let hidden = (&u - &softplus)?.exp()?.broadcast_mul(&can)?;
        let count = batch * kv_heads * end.saturating_sub(self.sinks);
        Ok(RelaxedGate {
            column_bias: softplus.neg()?.broadcast_mul(&can)?,
            hidden_share: (hidden.sum_all()? / count.max(1) as f64)?,
        })
    }

    /// Gates of all layers as a probe, whose scores are -z: with thresholds of 0 a token of z above 0 is hidden, and a
    /// threshold θ hides those of z above -θ. The probe has no graph.
    ///
    /// # Errors
    /// No gates, gates of different sizes, or weights that are not finite.
    pub fn probe(gates: &[Self]) -> Result<KeyProbe> {
        if gates.is_empty() {
            bail!("gates: expected one per layer, got none; give those of all layers")
        }
        let stack = |of: fn(&Self) -> &Tensor| {
            let rows: Vec<_> = gates.iter().map(|gate| of(gate).detach()).collect();
            Tensor::stack(&rows, 0)?.neg()
        };
        KeyProbe::new(&stack(|gate| &gate.weight)?, &stack(|gate| &gate.bias)?)
    }
}
