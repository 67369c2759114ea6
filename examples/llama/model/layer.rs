//! One layer of the decoder: attention, feed-forward part and norms, as [`LayerOptions`] say.

use anyhow::Result;
use candle_core::Tensor;
use candle_nn::ops;
use candle_sfattention::{AttentionOptions, CompressedAttention, CompressedKvCache, MergeStats};

use super::config::LlamaConfig;
use super::layer_options::{Activation, LayerOptions};
use super::norm::Norm;
use crate::ranks::Ranks;
use crate::rope::Rotation;
use crate::weights::{Linear, Pass, Weights};

/// Projections, rotary embedding and compressed attention of one layer.
pub struct SelfAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    pub output: Linear,
    /// Norms of each head's query and key.
    query_norm: Option<Norm>,
    key_norm: Option<Norm>,
    pub attention: CompressedAttention,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// The ranks whose outputs are summed.
    ranks: Ranks,
}

impl SelfAttention {
    fn load(
        weights: &mut dyn Weights,
        path: &str,
        config: &LlamaConfig,
        attention: CompressedAttention,
        ranks: &Ranks,
    ) -> Result<Self> {
        let hidden = config.hidden_size;
        let (query_rows, kv_rows) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let mut head_norm = |name: &str| match config.layer.qk_norm {
            true => Norm::load(weights, &format!("{path}.{name}"), config.head_dim, config).map(Some),
            false => Ok(None),
        };
        let (query_norm, key_norm) = (head_norm("q_norm")?, head_norm("k_norm")?);
        Ok(Self {
            query: weights.linear(&format!("{path}.q_proj"), query_rows, hidden)?,
            key: weights.linear(&format!("{path}.k_proj"), kv_rows, hidden)?,
            value: weights.linear(&format!("{path}.v_proj"), kv_rows, hidden)?,
            output: weights.linear(&format!("{path}.o_proj"), hidden, query_rows)?,
            query_norm,
            key_norm,
            attention,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            ranks: ranks.clone(),
        })
    }

    /// The rows `(1, N, hidden)` of a whole sequence, and the tokens hidden from them.
    pub fn forward(&self, xs: &Tensor, rotation: &Rotation) -> Result<(Tensor, MergeStats)> {
        let projected = self.project(xs, Pass::Prompt)?;
        let [q, k, v] = rotated(&projected, rotation)?;
        let (out, plan) = self.attention.forward_probed([&q, &k, &v], &projected[1])?;
        Ok((self.merge_heads(&out, Pass::Prompt)?, plan.stats()?))
    }

    /// The rows of new tokens `(1, n, hidden)` over all that `cache` has seen.
    pub fn forward_cached(
        &self,
        xs: &Tensor,
        rotation: &Rotation,
        cache: &mut CompressedKvCache,
        pass: Pass,
    ) -> Result<Tensor> {
        let projected = self.project(xs, pass)?;
        let [q, k, v] = rotated(&projected, rotation)?;
        let out = self
            .attention
            .forward_cached_probed([&q, &k, &v], &projected[1], cache)?;
        self.merge_heads(&out, pass)
    }

    /// The rows of the next token of each sequence `(1, sequences, hidden)`, each over its own cache. Projections take
    /// all rows at once.
    pub fn forward_batch<'c>(
        &self,
        xs: &Tensor,
        rotations: &[&Rotation],
        caches: impl Iterator<Item = &'c mut CompressedKvCache>,
        pass: Pass,
    ) -> Result<Tensor> {
        let qkv = self.project(xs, pass)?;
        let mut rows = Vec::with_capacity(rotations.len());
        for (index, (rotation, cache)) in rotations.iter().zip(caches).enumerate() {
            let own = |xs: &Tensor| xs.narrow(2, index, 1);
            let projected = [own(&qkv[0])?, own(&qkv[1])?, own(&qkv[2])?];
            let [q, k, v] = rotated(&projected, rotation)?;
            rows.push(
                self.attention
                    .forward_cached_probed([&q, &k, &v], &projected[1], cache)?,
            );
        }
        self.merge_heads(&Tensor::cat(&rows, 2)?, pass)
    }

    /// Queries, keys and values `(B, heads, N, D)`, before rotation.
    pub fn project(&self, xs: &Tensor, pass: Pass) -> Result<[Tensor; 3]> {
        let (batch, n, _) = xs.dims3()?;
        // (B, N, heads·D) -> (B, heads, N, D), a view.
        let split = |xs: Tensor, heads, norm: Option<&Norm>| -> Result<Tensor> {
            let xs = xs.reshape((batch, n, heads, self.head_dim))?;
            let xs = match norm {
                Some(norm) => norm.forward(&xs)?,
                None => xs,
            };
            Ok(xs.transpose(1, 2)?)
        };
        Ok([
            split(self.query.through(xs, pass)?, self.heads, self.query_norm.as_ref())?,
            split(self.key.through(xs, pass)?, self.kv_heads, self.key_norm.as_ref())?,
            split(self.value.through(xs, pass)?, self.kv_heads, None)?,
        ])
    }

    /// `(B, heads, N, D) -> (B, N, hidden)`, of the heads of all ranks.
    pub fn merge_heads(&self, out: &Tensor, pass: Pass) -> Result<Tensor> {
        self.ranks
            .sum(self.output.through(&out.transpose(1, 2)?.flatten_from(2)?, pass)?)
    }
}

/// Rotates queries and keys.
pub fn rotated([q, k, v]: &[Tensor; 3], rotation: &Rotation) -> Result<[Tensor; 3]> {
    Ok([rotation.apply(q)?, rotation.apply(k)?, v.clone()])
}

/// A gated feed-forward part: `down(act(gate(x)) * up(x))`.
struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: Activation,
    /// The ranks whose outputs are summed.
    ranks: Ranks,
}

impl Mlp {
    fn load(weights: &mut dyn Weights, path: &str, config: &LlamaConfig, ranks: &Ranks) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            gate: weights.linear(&format!("{path}.gate_proj"), inner, hidden)?,
            up: weights.linear(&format!("{path}.up_proj"), inner, hidden)?,
            down: weights.linear(&format!("{path}.down_proj"), hidden, inner)?,
            activation: config.layer.activation,
            ranks: ranks.clone(),
        })
    }

    fn forward(&self, xs: &Tensor, pass: Pass) -> Result<Tensor> {
        let gate = self.gate.through(xs, pass)?;
        let gate = match self.activation {
            Activation::Silu => ops::silu(&gate)?,
            Activation::GeluTanh => gate.gelu()?,
        };
        let inner = (gate * self.up.through(xs, pass)?)?;
        self.ranks.sum(self.down.through(&inner, pass)?)
    }
}

/// One layer. A norm stands before each of its two parts, and after it too where the model has sandwich norms.
pub struct Layer {
    attention_norm: Norm,
    pub attention: SelfAttention,
    attention_output_norm: Option<Norm>,
    mlp_norm: Norm,
    mlp: Mlp,
    mlp_output_norm: Option<Norm>,
    /// Factor on what each part adds.
    residual_scale: Option<f64>,
}

impl Layer {
    pub fn load(
        weights: &mut dyn Weights,
        path: &str,
        config: &LlamaConfig,
        attention: CompressedAttention,
        ranks: &Ranks,
    ) -> Result<Self> {
        let mut of_stream = |name: &str| Norm::load(weights, &format!("{path}.{name}"), config.hidden_size, config);
        let attention_norm = of_stream("input_layernorm")?;
        // A Llama's norm before its feed-forward part has the name of Gemma's norm after attention.
        let (attention_output_norm, mlp_norm, mlp_output_norm) = match config.layer.sandwich_norms {
            false => (None, of_stream("post_attention_layernorm")?, None),
            true => (
                Some(of_stream("post_attention_layernorm")?),
                of_stream("pre_feedforward_layernorm")?,
                Some(of_stream("post_feedforward_layernorm")?),
            ),
        };
        Ok(Self {
            attention_norm,
            attention: SelfAttention::load(weights, &format!("{path}.self_attn"), config, attention, ranks)?,
            attention_output_norm,
            mlp_norm,
            mlp: Mlp::load(weights, &format!("{path}.mlp"), config, ranks)?,
            mlp_output_norm,
            residual_scale: config.layer.residual_scale,
        })
    }

    /// The stream `(1, N, hidden)` after this layer; `attend` gets the normed stream.
    pub fn forward(
        &self,
        stream: &Tensor,
        pass: Pass,
        attend: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let attended = attend(&self.attention_norm.forward(stream)?)?;
        let stream = (stream + self.added(self.attention_output_norm.as_ref(), attended)?)?;
        let mixed = self.mlp.forward(&self.mlp_norm.forward(&stream)?, pass)?;
        Ok((stream + self.added(self.mlp_output_norm.as_ref(), mixed)?)?)
    }

    /// What a part that gave `xs` adds to the stream; `norm` stands after it.
    fn added(&self, norm: Option<&Norm>, xs: Tensor) -> Result<Tensor> {
        let xs = norm.map_or(Ok(xs.clone()), |norm| norm.forward(&xs))?;
        Ok(match self.residual_scale {
            Some(scale) => (xs * scale)?,
            None => xs,
        })
    }

    /// The norms before the two parts, which every model has.
    pub fn norms(&self) -> [&Norm; 2] {
        [&self.attention_norm, &self.mlp_norm]
    }
}

/// Logits z under a softcap c: `c tanh(z / c)`.
pub fn capped(logits: &Tensor, cap: f64) -> Result<Tensor> {
    Ok(((logits / cap)?.tanh()? * cap)?)
}

/// The attention of a layer with the scale, the softcap and the window that its model needs.
pub fn fitted(attention: &CompressedAttention, layer: usize, options: &LayerOptions) -> Result<CompressedAttention> {
    let options = AttentionOptions {
        softmax_scale: options.softmax_scale,
        softcap: options.softcap,
        sliding_window: options.window(layer),
        ..attention.options().clone()
    };
    Ok(attention.clone().with_options(options)?)
}
