//! Prunings after a context, at a given number of entries: rankings of the context's tokens from papers, in our own
//! code.
//!
//! Rows of the context attend densely, as in a prefill that is cut back afterwards. The rows of the question and the
//! answer attend to the kept tokens of the context and to each other.

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor, D};
use candle_nn::ops::softmax_last_dim;
use candle_sfattention::{attend, AttentionOptions, CompressionConfig, MergePlan};

use crate::model::{capped, LayerCall};

/// How the tokens of a context are ranked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ranking {
    /// SnapKV (arXiv 2404.14469): the attention of the last 32 rows, averaged over 7 neighbours. These rows' own tokens
    /// are kept.
    SnapKv,
    /// A simple and effective L2 norm (arXiv 2406.11430): keys of small norm are kept.
    KNorm,
    /// Expected attention (arXiv 2510.00636): the attention of queries with the mean and the covariance of the
    /// context's, rotated by the average of the next 512 positions, times the norm of the value. The first 4 tokens are
    /// kept, and leave the statistics.
    Expected,
}

impl Ranking {
    pub const ALL: [Self; 3] = [Self::SnapKv, Self::KNorm, Self::Expected];

    pub fn name(self) -> &'static str {
        match self {
            Self::SnapKv => "snapkv",
            Self::KNorm => "knorm",
            Self::Expected => "expected",
        }
    }

    /// Scores `(KV heads, context)` in f32 of the first `context` tokens. The highest are kept.
    pub fn scores(self, call: &LayerCall, context: usize) -> Result<Tensor> {
        match self {
            Self::SnapKv => last_rows(call, context),
            Self::KNorm => Ok(norms(&first(call.qkv[1], context)?)?.neg()?),
            Self::Expected => expected(call, context),
        }
    }
}

/// The first tokens of `xs (1, heads, N, D)` as `(heads, context, D)` in f32.
fn first(xs: &Tensor, context: usize) -> Result<Tensor> {
    Ok(xs
        .narrow(2, 0, context)?
        .squeeze(0)?
        .to_dtype(DType::F32)?
        .contiguous()?)
}

/// L2 norms of the rows.
fn norms(xs: &Tensor) -> Result<Tensor> {
    Ok(xs.sqr()?.sum(D::Minus1)?.sqrt()?)
}

/// `(heads, ..)` as `(KV heads, heads a KV head, ..)`, averaged over the second.
fn group_mean(xs: &Tensor, kv_heads: usize) -> Result<Tensor> {
    let (heads, columns) = xs.dims2()?;
    Ok(xs.reshape((kv_heads, heads / kv_heads, columns))?.mean(1)?)
}

/// Infinite scores for tokens that are kept in any case.
fn always(kv_heads: usize, count: usize, device: &Device) -> Result<Tensor> {
    Ok(Tensor::full(f32::INFINITY, (kv_heads, count), device)?)
}

fn last_rows(call: &LayerCall, context: usize) -> Result<Tensor> {
    const ROWS: usize = 32;
    const KERNEL: usize = 7;
    let [q, k, _] = call.qkv;
    let rows = ROWS.min(context);
    let before = context - rows;
    if before == 0 {
        return always(k.dim(1)?, rows, q.device());
    }
    let (keys, kv_heads) = (first(k, context)?, k.dim(1)?);
    let (heads, head_dim) = (q.dim(1)?, q.dim(3)?);
    // (KV heads, heads a KV head · rows, D).
    let last = q.narrow(2, context - rows, rows)?.to_dtype(DType::F32)?.contiguous()?;
    let last = last.reshape((kv_heads, heads / kv_heads * rows, head_dim))?;
    let mut logits = (last.matmul(&keys.t()?)? * call.options.scale(head_dim))?.reshape((heads, rows, context))?;
    if let Some(cap) = call.options.softcap {
        logits = capped(&logits, cap)?;
    }
    let seen = |row: usize| {
        (0..context).map(move |t| {
            if t <= context - rows + row {
                0f32
            } else {
                f32::NEG_INFINITY
            }
        })
    };
    let mask: Vec<f32> = (0..rows).flat_map(seen).collect();
    let mask = Tensor::from_vec(mask, (1, rows, context), q.device())?;
    let weights = softmax_last_dim(&logits.broadcast_add(&mask)?)?;
    let mean = weights.narrow(2, 0, before)?.mean(1)?;
    let padded = mean.pad_with_zeros(1, KERNEL / 2, KERNEL / 2)?;
    let mut pooled = padded.narrow(1, 0, before)?;
    for shift in 1..KERNEL {
        pooled = (pooled + padded.narrow(1, shift, before)?)?;
    }
    let scores = group_mean(&(pooled / KERNEL as f64)?, kv_heads)?;
    Ok(Tensor::cat(&[&scores, &always(kv_heads, rows, q.device())?], 1)?)
}

fn expected(call: &LayerCall, context: usize) -> Result<Tensor> {
    const SINKS: usize = 4;
    const POSITIONS: usize = 512;
    let [q, k, v] = call.qkv;
    let (heads, kv_heads, head_dim) = (q.dim(1)?, k.dim(1)?, q.dim(3)?);
    let (sinks, scale) = (SINKS.min(context - 1), call.options.scale(head_dim));
    let count = context - sinks;
    let past_sinks = |xs: &Tensor| -> Result<Tensor> { Ok(first(xs, context)?.narrow(1, sinks, count)?.contiguous()?) };
    let queries = past_sinks(call.unrotated_query)?;
    // The average of rotations is linear, so that it may turn each query before their mean and covariance.
    let turned = call
        .rope
        .average(context, POSITIONS, count)?
        .apply(&queries.unsqueeze(0)?)?;
    let turned = turned.squeeze(0)?;
    let mean = turned.mean_keepdim(1)?;
    let centered = turned.broadcast_sub(&mean)?;
    let covariance = (centered.transpose(1, 2)?.contiguous()?.matmul(&centered)? / count as f64)?;
    let (keys, values) = (past_sinks(k)?, past_sinks(v)?);
    let repeated = keys
        .unsqueeze(1)?
        .broadcast_as((kv_heads, heads / kv_heads, count, head_dim))?;
    let repeated = repeated.reshape((heads, count, head_dim))?.contiguous()?;
    let of_mean = (repeated.broadcast_mul(&mean)?.sum(D::Minus1)? * scale)?;
    let spread = ((repeated.matmul(&covariance)? * &repeated)?.sum(D::Minus1)? * (scale * scale / 2.0))?;
    let weights = softmax_last_dim(&(of_mean + spread)?)?;
    let scores = (group_mean(&weights, kv_heads)? * norms(&values)?)?;
    Ok(Tensor::cat(&[&always(kv_heads, sinks, q.device())?, &scores], 1)?)
}

/// For each row of scores, whether each token is among the `keep` highest; of equal ones the later.
pub fn highest(scores: &Tensor, keep: usize) -> Result<Vec<Vec<bool>>> {
    let rows = scores.to_vec2::<f32>()?;
    let chosen = |row: Vec<f32>| {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a]).then(b.cmp(a)));
        let mut kept = vec![false; row.len()];
        order.iter().take(keep).for_each(|token| kept[*token] = true);
        kept
    };
    Ok(rows.into_iter().map(chosen).collect())
}

/// The attention of one layer `(1, heads, N, D)`, where rows past the context see `keep` of its tokens. A layer that
/// slides stays as it is.
pub fn attended(call: &LayerCall, context: usize, ranking: Ranking, keep: usize) -> Result<Tensor> {
    let [q, k, v] = call.qkv;
    let (heads, kv_heads, tokens) = (q.dim(1)?, k.dim(1)?, q.dim(2)?);
    if call.options.sliding_window.is_some() {
        return Ok(attend(q, k, v, &nothing(heads, tokens, q.device())?, call.options)?);
    }
    ensure!(
        0 < context && context < tokens && keep > 0,
        "pruning: expected a context, a question and at least 1 kept token, got {context} of {tokens} tokens and {keep}"
    );
    let part = |xs: &Tensor, from: usize, n: usize| xs.narrow(2, from, n)?.contiguous();
    let [q0, k0, v0] = [q, k, v].map(|xs| part(xs, 0, context));
    let before = attend(&q0?, &k0?, &v0?, &nothing(heads, context, q.device())?, call.options)?;
    let mut bias = vec![0f32; heads * tokens];
    for (kv_head, kept) in highest(&ranking.scores(call, context)?, keep)?.iter().enumerate() {
        let group = heads / kv_heads;
        for head in kv_head * group..(kv_head + 1) * group {
            for (token, _) in kept.iter().enumerate().filter(|(_, kept)| !**kept) {
                bias[head * tokens + token] = f32::NEG_INFINITY;
            }
        }
    }
    let options = AttentionOptions {
        bias: Some(Tensor::from_vec(bias, (1, heads, 1, tokens), q.device())?),
        ..call.options.clone()
    };
    let last = part(q, context, tokens - context)?;
    let after = attend(&last, k, v, &nothing(heads, tokens, q.device())?, &options)?;
    Ok(Tensor::cat(&[&before, &after], 2)?)
}

/// A plan that hides nothing.
fn nothing(heads: usize, tokens: usize, device: &Device) -> Result<MergePlan> {
    let bits = Tensor::zeros((1, heads, tokens - 1), DType::U8, device)?;
    Ok(MergePlan::from_indicators(&bits, &CompressionConfig::default())?)
}
