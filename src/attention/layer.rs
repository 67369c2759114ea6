//! [`CompressedSelfAttention`]: a whole self-attention layer around [`CompressedAttention`].

use super::rotary::{Rotary, RotaryConfig};
use super::sink::CompressionLossSink;
use super::CompressedAttention;
use crate::cache::CompressedKvCache;
#[cfg(doc)]
use crate::op::compressed_attention;
use crate::plan::MergePlan;
use candle_core::{bail, Result, Tensor};
use candle_nn::{linear_b, Init, Linear, Module, RmsNorm, VarBuilder};

/// The sizes of a self-attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SelfAttentionConfig {
    /// Size of the layer's input and output.
    pub hidden_size: usize,
    /// H: query heads.
    pub num_heads: usize,
    /// Hk: key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// D: size of one head's vectors; `hidden_size / num_heads` in most models. Rotary embedding needs it even.
    pub head_dim: usize,
    /// Whether the q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// Whether the o projection has a bias.
    pub output_bias: bool,
    /// Rotary position embedding; `None` where the model has none or applies it elsewhere.
    pub rotary: Option<RotaryConfig>,
    /// RMS norm of each head's query and key before the rotary embedding, with the weights `q_norm` and `k_norm`; as in
    /// Qwen3 and Gemma 3. `None`: no norm.
    pub qk_norm: Option<QkNorm>,
}

/// The norm of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QkNorm {
    /// Added to the mean of squares.
    pub eps: f64,
    /// Whether the factor is 1 + weight, as in Gemma's checkpoints.
    pub one_plus_weight: bool,
}

/// The norm of one head's vectors (.., D).
#[derive(Clone, Debug)]
struct HeadNorm {
    /// (D), as the checkpoint has it: training changes it.
    weight: Tensor,
    settings: QkNorm,
}

impl HeadNorm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let factor = match self.settings.one_plus_weight {
            true => (&self.weight + 1.0)?,
            false => self.weight.clone(),
        };
        // The fused kernel cuts gradients.
        RmsNorm::new(factor, self.settings.eps).forward_diff(xs)
    }
}

impl SelfAttentionConfig {
    fn check(&self) -> Result<()> {
        let Self {
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = *self;
        if num_kv_heads == 0 || num_heads == 0 || num_heads % num_kv_heads != 0 {
            bail!(
                "num_heads: expected a positive multiple of num_kv_heads, got {num_heads} and {num_kv_heads}; \
                 each KV head must serve as many query heads"
            )
        }
        if self.hidden_size == 0 || head_dim == 0 {
            bail!(
                "hidden_size and head_dim: expected at least 1, got {} and {head_dim}; see the model's config.json",
                self.hidden_size
            )
        }
        if self.rotary.is_some_and(|rotary| rotary.dim.is_none()) && head_dim % 2 != 0 {
            bail!("head_dim: expected an even number for rotary embedding, got {head_dim}; set rotary to None")
        }
        if let Some(QkNorm { eps, .. }) = self.qk_norm.filter(|norm| !(norm.eps.is_finite() && norm.eps >= 0.0)) {
            bail!(
                "qk_norm eps: expected a number of at least 0, got {eps}; see rms_norm_eps in the model's config.json"
            )
        }
        Ok(())
    }
}

/// Query, key and value as they reach the attention, and the key before its rotary embedding.
struct Projected {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probed: Tensor,
}

/// A self-attention layer with compressed attention: `q_proj`, `k_proj`, `v_proj`, `o_proj` from a [`VarBuilder`],
/// optional norms of queries and keys, optional rotary embedding, input and output (B, N, hidden_size). Scale, softcap
/// and sliding window are the attention's options: with them it is the layer of Llama, Mistral, Qwen2, Qwen3, Gemma 2
/// and 3, Phi, StableLM and GLM. Its [`Module::forward`] gives the compression loss
/// to the [`CompressionLossSink`], if one is set.
#[derive(Clone, Debug)]
pub struct CompressedSelfAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    config: SelfAttentionConfig,
    rotary: Option<Rotary>,
    /// Of queries and of keys.
    norms: Option<[HeadNorm; 2]>,
    attention: CompressedAttention,
    sink: Option<CompressionLossSink>,
}

impl CompressedSelfAttention {
    /// Loads the projections `q_proj`, `k_proj`, `v_proj` and `o_proj` under `vb`, and the norms `q_norm` and `k_norm`
    /// where the config has them.
    ///
    /// # Errors
    /// Sizes that do not fit together, settings that have no meaning, or missing weights.
    pub fn new(config: SelfAttentionConfig, attention: CompressedAttention, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        attention.strategies().check_heads(config.num_heads)?;
        let (queries, keys) = (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        );
        let rotary = match config.rotary {
            Some(rotary) => Some(Rotary::new(rotary, config.head_dim, vb.dtype(), vb.device())?),
            None => None,
        };
        let norm = |settings: QkNorm, name: &str| {
            let start = Init::Const(if settings.one_plus_weight { 0.0 } else { 1.0 });
            let weight = vb.pp(name).get_with_hints(config.head_dim, "weight", start)?;
            Ok::<_, candle_core::Error>(HeadNorm { weight, settings })
        };
        let norms = match config.qk_norm {
            Some(settings) => Some([norm(settings, "q_norm")?, norm(settings, "k_norm")?]),
            None => None,
        };
        Ok(Self {
            norms,
            q_proj: linear_b(config.hidden_size, queries, config.qkv_bias, vb.pp("q_proj"))?,
            k_proj: linear_b(config.hidden_size, keys, config.qkv_bias, vb.pp("k_proj"))?,
            v_proj: linear_b(config.hidden_size, keys, config.qkv_bias, vb.pp("v_proj"))?,
            o_proj: linear_b(queries, config.hidden_size, config.output_bias, vb.pp("o_proj"))?,
            config,
            rotary,
            attention,
            sink: None,
        })
    }

    /// Gives the losses of [`Module::forward`] to `sink`.
    pub fn with_loss_sink(mut self, sink: CompressionLossSink) -> Self {
        self.sink = Some(sink);
        self
    }

    /// The attention between the projections.
    pub fn attention(&self) -> &CompressedAttention {
        &self.attention
    }

    /// The attention between the projections, to change its dropout.
    pub fn attention_mut(&mut self) -> &mut CompressedAttention {
        &mut self.attention
    }

    /// xs (B, N, hidden_size) -> output of the same shape, and the compression loss (`None` where N = 1, and
    /// with a probe).
    ///
    /// # Errors
    /// An input of another shape, more tokens than the rotary embedding has positions, or as [`compressed_attention`].
    pub fn forward_with_loss(&self, xs: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let Projected { q, k, v, probed } = self.project(xs, 0)?;
        if self.attention.has_probe() {
            let (output, _) = self.attention.forward_probed([&q, &k, &v], &probed)?;
            return Ok((self.merge_heads(&output)?, None));
        }
        let result = self.attention.forward_with_loss(&q, &k, &v)?;
        Ok((self.merge_heads(&result.output)?, result.compression_loss))
    }

    /// xs (B, N, hidden_size) -> output of the same shape, and the plan. The compression loss goes to the sink, if one
    /// is set. [`Module::forward`] does the same without returning the plan.
    ///
    /// # Errors
    /// As [`Self::forward_with_loss`].
    pub fn forward_with_plan(&self, xs: &Tensor) -> Result<(Tensor, MergePlan)> {
        let Projected { q, k, v, probed } = self.project(xs, 0)?;
        let (output, plan) = match self.sink.as_ref().filter(|_| !self.attention.has_probe()) {
            None => self.attention.forward_probed([&q, &k, &v], &probed)?,
            Some(sink) => {
                let result = self.attention.forward_with_loss(&q, &k, &v)?;
                result.compression_loss.into_iter().for_each(|loss| sink.push(loss));
                (result.output, result.plan)
            }
        };
        Ok((self.merge_heads(&output)?, plan))
    }

    /// Appends n >= 1 new tokens xs (B, n, hidden_size) to `cache` and returns their output, of the same shape, over
    /// all tokens in it. Positions start at [`CompressedKvCache::seq_len`]. Any chunking of a sequence gives the result
    /// of [`Module::forward`] on the whole sequence, to rounding. There is no compression loss and no gradient:
    /// differentiating the result is an error.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{VarBuilder, VarMap};
    /// # use candle_sfattention::*;
    /// # let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    /// # let sizes = SelfAttentionConfig {
    /// #     hidden_size: 16, num_heads: 2, num_kv_heads: 1, head_dim: 8, qkv_bias: false, output_bias: false,
    /// #     rotary: None, qk_norm: None,
    /// # };
    /// # let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    /// # let attention = CompressedAttention::new(strategies, CompressionConfig::pretrained(), Default::default())?;
    /// # let layer = CompressedSelfAttention::new(sizes, attention, vb)?;
    /// let mut cache = layer.attention().new_cache(Default::default())?;
    /// layer.forward_cached(&Tensor::zeros((1, 100, 16), DType::F32, &Device::Cpu)?, &mut cache)?; // the prompt
    /// let next = layer.forward_cached(&Tensor::zeros((1, 1, 16), DType::F32, &Device::Cpu)?, &mut cache)?;
    /// assert_eq!((next.dims(), cache.seq_len()), (&[1, 1, 16][..], 101));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// An input of another shape, more tokens than the rotary embedding has positions, or as
    /// [`CompressedAttention::forward_cached`]. The cache is then unchanged.
    pub fn forward_cached(&self, xs: &Tensor, cache: &mut CompressedKvCache) -> Result<Tensor> {
        let Projected { q, k, v, probed } = self.project(xs, cache.seq_len())?;
        let output = self.attention.forward_cached_probed([&q, &k, &v], &probed, cache)?;
        self.merge_heads(&output)
    }

    /// xs (B, N, hidden_size) -> query (B, H, N, D), key and value (B, Hk, N, D), rotated from `position` on, with
    /// their axes in the attention's order.
    fn project(&self, xs: &Tensor, position: usize) -> Result<Projected> {
        let (batch, tokens) = match *xs.dims() {
            [batch, tokens, hidden] if hidden == self.config.hidden_size && batch * tokens > 0 => (batch, tokens),
            [_, _, hidden] if hidden == self.config.hidden_size => bail!(
                "input: expected at least one batch row and token, got {:?}; skip the call when there is nothing to \
                 attend",
                xs.dims()
            ),
            ref dims => bail!(
                "input: expected shape (batch, tokens, {}), got {dims:?}; the last axis is the layer's hidden_size",
                self.config.hidden_size
            ),
        };
        let split = |projection: &Linear, heads: usize| {
            let rows = projection.forward(xs)?;
            rows.reshape((batch, tokens, heads, self.config.head_dim))?
                .transpose(1, 2)
        };
        let q = split(&self.q_proj, self.config.num_heads)?;
        let k = split(&self.k_proj, self.config.num_kv_heads)?;
        let v = split(&self.v_proj, self.config.num_kv_heads)?;
        let (q, k) = match &self.norms {
            Some([q_norm, k_norm]) => (q_norm.forward(&q)?, k_norm.forward(&k)?),
            None => (q, k),
        };
        let layout = self.attention.options().layout;
        let probed = layout.turned(&k)?;
        let (q, k) = match &self.rotary {
            Some(rotary) => (rotary.apply(&q, position)?, rotary.apply(&k, position)?),
            None => (q, k),
        };
        let [q, k, v] = layout.turned_all([&q, &k, &v])?;
        Ok(Projected { q, k, v, probed })
    }

    /// (B, H, N, D) in the attention's order -> (B, N, hidden_size)
    fn merge_heads(&self, output: &Tensor) -> Result<Tensor> {
        let output = self.attention.options().layout.turned(output)?;
        self.o_proj.forward(&output.transpose(1, 2)?.flatten_from(2)?)
    }
}

impl Module for CompressedSelfAttention {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        Ok(self.forward_with_plan(xs)?.0)
    }
}
