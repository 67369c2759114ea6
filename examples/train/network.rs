//! A Llama's forward pass whose every weight gets a gradient.
//!
//! Weights may be f32 while products run in a half dtype: each matrix is cast where it is read, and its gradient comes
//! back in f32. The residual stream and the norms stay in the dtype of the weights' masters.

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_nn::{Init, VarBuilder};

use crate::model::LlamaConfig;
use crate::ops;
use crate::rope::{Rope, Rotation};

/// A matrix `(rows, columns)` and its bias, cast to the dtype of what it multiplies.
struct Matrix {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Matrix {
    fn new(columns: usize, rows: usize, bias: bool, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints((rows, columns), "weight", Init::Const(0.0))?,
            bias: match bias {
                true => Some(vb.get_with_hints(rows, "bias", Init::Const(0.0))?),
                false => None,
            },
        })
    }

    /// xs (n, columns) -> (n, rows).
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let ys = ops::linear(xs, &self.weight)?;
        Ok(match &self.bias {
            Some(bias) => ys.broadcast_add(&bias.to_dtype(xs.dtype())?)?,
            None => ys,
        })
    }
}

/// The norm of rows before a product.
struct Norm {
    weight: Tensor,
    eps: f64,
}

impl Norm {
    fn new(width: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(width, "weight", Init::Const(1.0))?;
        Ok(Self { weight, eps })
    }

    /// Rows (n, width), in `dtype`.
    fn forward(&self, xs: &Tensor, dtype: DType) -> Result<Tensor> {
        Ok(ops::rms_norm(xs, &self.weight, self.eps, dtype)?)
    }
}

/// The inputs of one layer's attention.
pub struct AttentionCall<'a> {
    pub layer: usize,
    /// Query (B, H, N, D), key and value (B, Hk, N, D), rotated.
    pub qkv: [&'a Tensor; 3],
    /// The key before its rotation.
    pub unrotated: &'a Tensor,
    /// The output projection (hidden, H·D).
    pub projection: &'a Tensor,
    /// The residual stream that its output will be added to, (B, N, hidden).
    #[cfg_attr(not(feature = "fit"), allow(dead_code))] // read where probes are fitted
    pub stream: &'a Tensor,
}

/// Projections and the attention between them.
struct SelfAttention {
    query: Matrix,
    key: Matrix,
    value: Matrix,
    output: Matrix,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

struct Layer {
    attention_norm: Norm,
    attention: SelfAttention,
    mlp_norm: Norm,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

impl Layer {
    fn new(config: &LlamaConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, inner, eps) = (config.hidden_size, config.intermediate_size, config.norm_eps);
        let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let (own, mlp, bias) = (vb.pp("self_attn"), vb.pp("mlp"), config.attention_bias);
        Ok(Self {
            attention_norm: Norm::new(hidden, eps, vb.pp("input_layernorm"))?,
            attention: SelfAttention {
                query: Matrix::new(hidden, queries, bias, own.pp("q_proj"))?,
                key: Matrix::new(hidden, keys, bias, own.pp("k_proj"))?,
                value: Matrix::new(hidden, keys, bias, own.pp("v_proj"))?,
                output: Matrix::new(queries, hidden, bias, own.pp("o_proj"))?,
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
            },
            mlp_norm: Norm::new(hidden, eps, vb.pp("post_attention_layernorm"))?,
            gate: Matrix::new(hidden, inner, config.mlp_bias, mlp.pp("gate_proj"))?,
            up: Matrix::new(hidden, inner, config.mlp_bias, mlp.pp("up_proj"))?,
            down: Matrix::new(inner, hidden, config.mlp_bias, mlp.pp("down_proj"))?,
        })
    }
}

/// All layers, without the loss.
pub struct Network {
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Norm,
    /// The output matrix; the embedding if they are tied.
    head: Tensor,
    rope: Rope,
    products: DType,
}

impl Network {
    /// Takes every weight of `root` by its Hugging Face name; matrices multiply in `products`.
    pub fn new(config: &LlamaConfig, root: &VarBuilder, products: DType) -> Result<Self> {
        let (vb, table) = (root.pp("model"), (config.vocab_size, config.hidden_size));
        let embedding = vb.get(table, "embed_tokens.weight")?;
        let head = match config.tied {
            true => embedding.clone(),
            false => root.get(table, "lm_head.weight")?,
        };
        let layers = (0..config.layers).map(|index| Layer::new(config, vb.pp("layers").pp(index)));
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            norm: Norm::new(config.hidden_size, config.norm_eps, vb.pp("norm"))?,
            embedding,
            head,
            rope: Rope::new(config, products, root.device())?,
            products,
        })
    }

    /// The output matrix (vocabulary, hidden), in the dtype of its master.
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// Hidden states (B·N, hidden) of inputs (B, N) u32, normed, in the dtype of the products; `attend` computes each
    /// layer's attention, (B, H, N, D).
    pub fn hidden(&self, inputs: &Tensor, attend: &mut dyn FnMut(&AttentionCall) -> Result<Tensor>) -> Result<Tensor> {
        let (batch, tokens) = inputs.dims2()?;
        let mut stream = ops::embed(&self.embedding, &inputs.flatten_all()?)?;
        let rotation = self.rope.at(0, tokens)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = layer.attention_norm.forward(&stream, self.products)?;
            let attended = layer
                .attention
                .forward(index, &normed, &stream, (batch, &rotation), attend)?;
            stream = (&stream + attended.to_dtype(stream.dtype())?)?;
            let normed = layer.mlp_norm.forward(&stream, self.products)?;
            let inner = ops::silu_times(&layer.gate.forward(&normed)?, &layer.up.forward(&normed)?)?;
            stream = (&stream + layer.down.forward(&inner)?.to_dtype(stream.dtype())?)?;
        }
        self.norm.forward(&stream, self.products)
    }
}

impl SelfAttention {
    /// Normed rows (B·N, hidden) and their stream -> rows of the output projection.
    fn forward(
        &self,
        layer: usize,
        xs: &Tensor,
        stream: &Tensor,
        (batch, rotation): (usize, &Rotation),
        attend: &mut dyn FnMut(&AttentionCall) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let tokens = xs.dim(0)? / batch;
        let split = |matrix: &Matrix, heads| -> Result<Tensor> {
            Ok(matrix.forward(xs)?.reshape((batch, tokens, heads, self.head_dim))?)
        };
        let unrotated = split(&self.key, self.kv_heads)?;
        let q = ops::rotate(&split(&self.query, self.heads)?, rotation)?.transpose(1, 2)?;
        let k = ops::rotate(&unrotated, rotation)?.transpose(1, 2)?;
        let v = split(&self.value, self.kv_heads)?.transpose(1, 2)?;
        let unrotated = unrotated.transpose(1, 2)?;
        let output = attend(&AttentionCall {
            layer,
            qkv: [&q, &k, &v],
            unrotated: &unrotated,
            projection: &self.output.weight,
            stream: &stream.reshape((batch, tokens, ()))?,
        })?;
        let rows = output
            .transpose(1, 2)?
            .reshape((batch * tokens, self.heads * self.head_dim))?;
        self.output.forward(&rows)
    }
}
