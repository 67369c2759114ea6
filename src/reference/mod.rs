//! The executable specification: the computations of this crate, in f64 and scalar loops, one function per equation.
//!
//! Every fast path is tested against these functions and none of them calls one. They are public so that a reader can
//! look up an equation, and a user can check a result; they are slow on purpose (a call allocates freely and takes
//! `O(N² · D)` per head).
//!
//! The steps are the same as everywhere in the crate:
//!
//! 1. [`indicators`] decides which tokens merge: [`cosine`], [`qualifies`], then [`causal_rule`] or [`reference_rule`];
//!    or [`observed_indicators`] does, by [`observed_mass`], or [`given_indicators`], by scores of the caller;
//! 2. [`fold()`] gives every token its folded key and value, [`visible_columns`] says which columns a row attends to;
//! 3. [`attention`], [`attention_gradients`] and [`sink_gradients`] compute one softmax per row over these columns;
//! 4. [`compression_loss`] and [`compression_loss_gradients`] are the training loss;
//! 5. [`harm()`] is what hiding a token would cost, to which a probe is fitted;
//! 6. [`dropout_keeps`] is the dropout mask, from [`philox4x32_10`].
//!
//! Arrays hold f64, so a decision is taken in f64. The fast paths decide in f32 for f32, f16 and bf16 inputs: a pair
//! whose cosine lies within rounding of its threshold may be decided differently there.

mod attend;
mod bias;
mod budget;
mod bytes;
mod dropout;
mod fold;
mod gradients;
mod harm;
mod loss;
mod merge;
mod observe;
mod segments;

pub use attend::attention;
pub use budget::{attention_under_budget, evictions, pair_scores};
pub use bytes::{attention_in_bytes, in_bytes};
pub use dropout::{dropout_keeps, philox4x32_10};
pub use fold::{fold, unfold, visible_columns, Column};
pub use gradients::{attention_gradients, column_bias_gradients, sink_gradients};
pub use harm::{harm, HarmLayer};
pub use loss::{
    compression_loss, compression_loss_gradients, compression_loss_gradients_in_segments, compression_loss_in_segments,
    LossTerms,
};
pub use merge::{
    causal_rule, cosine, indicators, indicators_in_segments, indicators_under, norm, qualifies, reference_rule, unit,
    NORM_FLOOR,
};
pub use observe::{given_indicators, local_columns, local_weights, observed_indicators, observed_mass, observing_rows};

use candle_core::{bail, DType, Device, Result, Tensor};

/// One head's tokens, a vector of head dimension each.
pub type HeadTokens = Vec<Vec<f64>>;

/// A row-major f64 array of shape (batch, heads, tokens, dim).
#[derive(Clone, Debug, PartialEq)]
pub struct Array4 {
    /// Batch, heads, tokens, dim.
    pub dims: [usize; 4],
    /// The entries, the last axis fastest: as many as the product of `dims`.
    pub data: Vec<f64>,
}

impl Array4 {
    /// An array of zeros.
    pub fn zeros(dims: [usize; 4]) -> Self {
        Self {
            dims,
            data: vec![0.0; dims.iter().product()],
        }
    }

    /// Copies a tensor of any float dtype, any strides and any device.
    ///
    /// # Errors
    /// A dtype that is not a float, or a rank that is not 4.
    pub fn from_tensor(tensor: &Tensor) -> Result<Self> {
        if !tensor.dtype().is_float() {
            bail!(
                "reference array: expected a float dtype, got {:?}; convert it with to_dtype",
                tensor.dtype()
            )
        }
        let &[batch, heads, tokens, dim] = tensor.dims() else {
            bail!(
                "reference array: expected shape (batch, heads, tokens, dim), got {:?}; reshape it",
                tensor.dims()
            )
        };
        Ok(Self {
            dims: [batch, heads, tokens, dim],
            data: to_f64(tensor)?,
        })
    }

    /// The array as a tensor, rounded once to `dtype`.
    ///
    /// # Errors
    /// `data` does not have as many entries as `dims` asks for, or candle cannot make such a tensor.
    pub fn to_tensor(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        self.check("reference array")?;
        let [batch, heads, tokens, dim] = self.dims;
        Tensor::from_slice(&self.data, (batch, heads, tokens, dim), &Device::Cpu)?
            .to_dtype(dtype)?
            .to_device(device)
    }

    /// One token's vector.
    ///
    /// # Panics
    /// When an index lies outside `dims`, like a slice index.
    pub fn row(&self, batch: usize, head: usize, token: usize) -> &[f64] {
        let start = self.row_start(batch, head, token);
        &self.data[start..start + self.dims[3]]
    }

    /// One token's vector, to write to.
    ///
    /// # Panics
    /// When an index lies outside `dims`, like a slice index.
    pub fn row_mut(&mut self, batch: usize, head: usize, token: usize) -> &mut [f64] {
        let start = self.row_start(batch, head, token);
        &mut self.data[start..start + self.dims[3]]
    }

    fn row_start(&self, batch: usize, head: usize, token: usize) -> usize {
        let [_, heads, tokens, dim] = self.dims;
        assert!(head < heads && token < tokens, "row outside of {:?}", self.dims);
        ((batch * heads + head) * tokens + token) * dim
    }

    fn head(&self, batch: usize, head: usize) -> HeadTokens {
        (0..self.dims[2]).map(|t| self.row(batch, head, t).to_vec()).collect()
    }

    fn add_head(&mut self, batch: usize, head: usize, rows: &[Vec<f64>]) {
        for (token, row) in rows.iter().enumerate() {
            add_scaled(self.row_mut(batch, head, token), 1.0, row)
        }
    }

    fn check(&self, name: &str) -> Result<()> {
        check_len(name, &self.dims, self.data.len())
    }
}

/// The merge indicators of one call: bit `t` of a head says that token `t` is folded into `t + 1` and its column
/// hidden.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Indicators {
    /// Batch, query heads, tokens - 1 (0 for no tokens).
    pub dims: [usize; 3],
    /// The bits, the last axis fastest: as many as the product of `dims`.
    pub bits: Vec<bool>,
}

impl Indicators {
    /// Reads a u8 tensor of zeros and ones, of shape (batch, query heads, tokens - 1).
    ///
    /// # Errors
    /// Another dtype, another rank, or another value.
    pub fn from_tensor(tensor: &Tensor) -> Result<Self> {
        let (&[batch, heads, pairs], DType::U8) = (tensor.dims(), tensor.dtype()) else {
            bail!(
                "indicators: expected u8 of shape (batch, heads, tokens - 1), got {:?} of shape {:?}; \
                 convert them with to_dtype and reshape",
                tensor.dtype(),
                tensor.dims()
            )
        };
        let values = tensor.flatten_all()?.to_vec1::<u8>()?;
        if let Some(bad) = values.iter().find(|&&bit| bit > 1) {
            bail!("indicators: expected the values 0 and 1, got {bad}; compare with ne(0) first")
        }
        Ok(Self {
            dims: [batch, heads, pairs],
            bits: values.into_iter().map(|bit| bit == 1).collect(),
        })
    }

    /// The bits as a u8 tensor.
    ///
    /// # Errors
    /// `bits` does not have as many entries as `dims` asks for, or candle cannot make such a tensor.
    pub fn to_tensor(&self, device: &Device) -> Result<Tensor> {
        check_len("indicators", &self.dims, self.bits.len())?;
        let values: Vec<u8> = self.bits.iter().map(|&bit| bit.into()).collect();
        let [batch, heads, pairs] = self.dims;
        Tensor::from_vec(values, (batch, heads, pairs), device)
    }

    /// One head's bits.
    ///
    /// # Panics
    /// When an index lies outside `dims`, like a slice index.
    pub fn head(&self, batch: usize, head: usize) -> &[bool] {
        let [_, heads, pairs] = self.dims;
        assert!(head < heads, "head outside of {:?}", self.dims);
        let start = (batch * heads + head) * pairs;
        &self.bits[start..start + pairs]
    }
}

/// The axes of one call, once its arrays are known to fit together.
#[derive(Clone, Copy)]
struct Axes {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    tokens: usize,
    /// The number of queries, and the token index of the first one's row.
    queries: usize,
    first_row: usize,
}

impl Axes {
    fn new(q: &Array4, k: &Array4) -> Result<Self> {
        Self::of_tokens(q, k, q.dims[2])
    }

    /// As [`Self::new`], with queries of a part of the rows: the last rows where the call is causal, any where each
    /// row sees all tokens.
    fn of_rows(q: &Array4, k: &Array4, causal: bool) -> Result<Self> {
        let (queries, tokens) = (q.dims[2], k.dims[2]);
        match causal {
            true if queries > tokens => Self::new(q, k),
            true => Ok(Self {
                first_row: tokens - queries,
                ..Self::of_tokens(q, k, tokens)?
            }),
            false => Self::of_tokens(q, k, tokens),
        }
    }

    fn of_tokens(q: &Array4, k: &Array4, tokens: usize) -> Result<Self> {
        q.check("q")?;
        k.check("k")?;
        let [batch, heads, queries, dim] = q.dims;
        let kv_heads = k.dims[1];
        if kv_heads == 0 || heads % kv_heads != 0 || k.dims != [batch, kv_heads, tokens, dim] {
            bail!(
                "k: expected shape ({batch}, kv heads, {tokens}, {dim}) with kv heads a divisor of {heads}, got {:?}; \
                 q has shape {:?}",
                k.dims,
                q.dims
            )
        }
        Ok(Self {
            batch,
            heads,
            kv_heads,
            tokens,
            queries,
            first_row: 0,
        })
    }

    /// The token indices of the queries' rows.
    fn rows(&self) -> std::ops::Range<usize> {
        self.first_row..self.first_row + self.queries
    }

    fn pairs(&self) -> usize {
        self.tokens.saturating_sub(1)
    }

    fn kv_head(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads)
    }

    fn batch_heads(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.batch).flat_map(move |b| (0..self.heads).map(move |h| (b, h)))
    }
}

fn check_len(name: &str, dims: &[usize], len: usize) -> Result<()> {
    let expected = dims.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
    if expected != Some(len) {
        bail!("{name}: expected as many entries as shape {dims:?} asks for, got {len}; use from_tensor or zeros")
    }
    Ok(())
}

fn to_f64(tensor: &Tensor) -> Result<Vec<f64>> {
    // The conversion happens on the CPU: not every device has f64.
    let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    tensor.flatten_all()?.to_vec1::<f64>()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn add_scaled(into: &mut [f64], factor: f64, from: &[f64]) {
    for (x, y) in into.iter_mut().zip(from) {
        *x += factor * y
    }
}
