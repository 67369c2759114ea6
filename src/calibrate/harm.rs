//! The harm of hiding a token: the error that the later rows of its KV head's outputs would have, by dense attention.

use super::shape::ModelShape;
use crate::config::AttentionOptions;
use candle_core::{bail, DType, Device, Result, Tensor, D};

/// Rows whose weights are formed at once.
const ROWS: usize = 64;
/// The least 1 - a that a weight is divided by: a token with all of a row's attention.
const LEAST_REST: f32 = 1e-3;

/// What dense attention gives for the harm: one window of one layer.
pub(super) struct HarmInput<'a> {
    /// (1, H, N, D), as it reaches the attention.
    pub q: &'a Tensor,
    /// (1, Hk, N, D).
    pub k: &'a Tensor,
    /// (1, Hk, N, D).
    pub v: &'a Tensor,
    /// The output projection's weight, (hidden, H·D).
    pub projection: &'a Tensor,
    /// The stream at the layer's input, (1, N, hidden).
    pub stream: &'a Tensor,
}

impl HarmInput<'_> {
    /// The harm (Hk, N - 1 - window), f32, of hiding each token that the last row's window has left behind. O(N·D)
    /// memory, O(N²·D) time; on the tensors' device.
    pub fn harm(&self, model: &ModelShape, window: usize, options: &AttentionOptions) -> Result<Tensor> {
        let (hidden, tokens) = (self.projection.dim(0)?, self.k.dim(2)?);
        let expected = (1, tokens, hidden);
        if self.stream.dims3()? != expected {
            bail!(
                "stream: expected the layer's input (1, N, hidden) = {expected:?}, got {:?}; give the tensor that the \
                 layer's first norm reads",
                self.stream.dims()
            )
        }
        let decided = (tokens - 1).saturating_sub(window);
        let device = self.q.device();
        let mut harm = Tensor::zeros((model.kv_heads, decided), DType::F32, device)?;
        if decided == 0 {
            return Ok(harm);
        }
        let grams = self.grams(model)?;
        let norms = self.stream.to_dtype(DType::F32)?.sqr()?.sum(D::Minus1)?.squeeze(0)?;
        let group = model.heads / model.kv_heads;
        let mut heads = Vec::with_capacity(model.kv_heads);
        for kv_head in 0..model.kv_heads {
            let call = HeadHarm {
                q: rows(&self.q.narrow(1, kv_head * group, group)?)?,
                k: rows(&self.k.narrow(1, kv_head, 1)?)?,
                v: rows(&self.v.narrow(1, kv_head, 1)?)?,
                grams: grams.narrow(0, kv_head * group, group)?,
                norms: &norms,
                window,
                scale: options.scale(model.head_dim),
                softcap: options.softcap,
            };
            heads.push(call.harm(decided)?);
        }
        harm = (harm + Tensor::stack(&heads, 0)?)?;
        Ok(harm)
    }

    /// Wᵀ·W of each query head's columns of the projection, (H, D, D).
    fn grams(&self, model: &ModelShape) -> Result<Tensor> {
        let (hidden, columns) = self.projection.dims2()?;
        if columns != model.heads * model.head_dim {
            bail!(
                "projection: expected shape (hidden, {}), one column per head and dimension, got {:?}; give the output \
                 projection's weight",
                model.heads * model.head_dim,
                self.projection.dims()
            )
        }
        let parts = self.projection.to_dtype(DType::F32)?;
        let parts = parts.reshape((hidden, model.heads, model.head_dim))?.transpose(0, 1)?;
        let parts = parts.contiguous()?;
        parts.transpose(1, 2)?.contiguous()?.matmul(&parts)
    }
}

/// (1, h, N, D) as f32 (h, N, D), contiguous.
fn rows(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(DType::F32)?.squeeze(0)?.contiguous()
}

/// One KV head and its query heads.
struct HeadHarm<'a> {
    /// (group, N, D).
    q: Tensor,
    /// (1, N, D).
    k: Tensor,
    v: Tensor,
    /// (group, D, D).
    grams: Tensor,
    /// ‖x‖² of the stream, (N).
    norms: &'a Tensor,
    window: usize,
    scale: f64,
    softcap: Option<f64>,
}

impl HeadHarm<'_> {
    /// (decided)
    fn harm(&self, decided: usize) -> Result<Tensor> {
        let (group, tokens, dim) = self.q.dims3()?;
        let device = self.q.device();
        // v·G·v of every query head, (group, 1, N).
        let v = self.v.broadcast_as((group, tokens, dim))?.contiguous()?;
        let own = (v.matmul(&self.grams)? * &v)?.sum(D::Minus1)?.unsqueeze(1)?;
        let keys = self
            .k
            .broadcast_as((group, tokens, dim))?
            .transpose(1, 2)?
            .contiguous()?;
        let values = v.transpose(1, 2)?.contiguous()?;
        let mut harm = Tensor::zeros(decided, DType::F32, device)?;
        // No row before the first one beyond the window harms.
        for first in (0..tokens).step_by(ROWS) {
            let count = ROWS.min(tokens - first);
            if first + count <= self.window + 1 {
                continue;
            }
            let logits = (self.q.narrow(1, first, count)?.contiguous()?.matmul(&keys)? * self.scale)?;
            let logits = match self.softcap {
                Some(c) => ((logits / c)?.tanh()? * c)?,
                None => logits,
            };
            let (unseen, outside) = self.masks(first, count, tokens, device)?;
            let weights = candle_nn::ops::softmax_last_dim(&logits.broadcast_add(&unseen)?)?;
            let outputs = weights.matmul(&v)?;
            let turned = outputs.matmul(&self.grams)?;
            // ‖W(o - v)‖² = o·G·o - 2 v·G·o + v·G·v, at least 0.
            let whole = (&outputs * &turned)?.sum_keepdim(D::Minus1)?;
            let distance = whole
                .broadcast_add(&own)?
                .sub(&(turned.matmul(&values)? * 2.0)?)?
                .relu()?;
            let rest = weights.affine(-1.0, 1.0)?;
            let rest = rest.broadcast_maximum(&Tensor::new(LEAST_REST, device)?)?;
            let shares = (weights / rest)?.sqr()?;
            let norms = self.norms.narrow(0, first, count)?.reshape((1, count, 1))?;
            let harms = (shares * distance)?.broadcast_div(&norms)?.broadcast_mul(&outside)?;
            harm = (harm + harms.sum((0, 1))?.narrow(0, 0, decided)?)?;
        }
        Ok(harm)
    }

    /// -inf where a row does not see a token, else 0; and 1 where the token has left the row's window, else 0. Each
    /// (1, count, N).
    fn masks(&self, first: usize, count: usize, tokens: usize, device: &Device) -> Result<(Tensor, Tensor)> {
        let (mut unseen, mut outside) = (Vec::with_capacity(count * tokens), Vec::with_capacity(count * tokens));
        for row in first..first + count {
            unseen.extend((0..tokens).map(|t| if t > row { f32::NEG_INFINITY } else { 0.0 }));
            outside.extend((0..tokens).map(|t| if row > t + self.window { 1f32 } else { 0.0 }));
        }
        let mask = |numbers| Tensor::from_vec(numbers, (1, count, tokens), device);
        Ok((mask(unseen)?, mask(outside)?))
    }
}
