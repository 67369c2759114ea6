//! Tensors, indicators and plans that do not fit together, and a gradient that does not exist.

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_sfattention::{attend, compressed_attention, compression_loss, MergePlan};

use crate::{config, options, plan, refused, similarity, zeros, Shape, CPU, SHAPE};

/// Asserts that every function that takes q, k and v refuses these.
#[track_caller]
fn refused_tensors(q: &Tensor, k: &Tensor, v: &Tensor, pattern: &str) {
    let (config, options) = (config(|_| ()), options(|_| ()));
    let any_plan = plan(SHAPE, &config).unwrap();
    refused(MergePlan::new(q, k, v, &similarity(), &config, &options), pattern);
    refused(attend(q, k, v, &any_plan, &options), pattern);
    refused(compressed_attention(q, k, v, &similarity(), &config, &options), pattern);
}

/// The same for a wrong query and key alone: the loss refuses them too.
#[track_caller]
fn refused_pair(q: &Tensor, k: &Tensor, pattern: &str) {
    refused_tensors(q, k, k, pattern);
    refused(compression_loss(q, k, &similarity(), &config(|_| ())), pattern);
}

#[test]
fn wrong_ranks() {
    refused_pair(
        &zeros(&[2, 6, 32]),
        &zeros(&[2, 2, 6, 8]),
        "query: expected 4 axes (batch, heads, tokens, head_dim), got shape [2, 6, 32]; split the heads with reshape",
    );
    refused_pair(
        &zeros(&[2, 4, 6, 8]),
        &zeros(&[1, 2, 2, 6, 8]),
        "key: expected 4 axes (batch, kv_heads, tokens…, got shape [1, 2, 2, 6, 8]; split the heads with reshape",
    );
}

#[test]
fn keys_that_do_not_match_the_query() {
    let query = [2, 4, 6, 8];
    for dims in [[1, 2, 6, 8], [2, 2, 5, 8], [2, 2, 6, 4]] {
        let pattern = format!(
            "key: expected shape (2, kv_heads, 6, 8) to match query {query:?}, got {dims:?}; …must cover the same \
             tokens"
        );
        refused_pair(&zeros(&query), &zeros(&dims), &pattern);
    }
}

#[test]
fn values_that_do_not_match_the_key() {
    for dims in [&[2, 4, 6, 8][..], &[2, 2, 5, 8], &[2, 2, 6, 0], &[2, 6, 8]] {
        let pattern = format!(
            "value: expected the shape of key [2, 2, 6, 8] but for the last axis, got {dims:?}; key and value need one \
             row per token and KV head"
        );
        refused_tensors(&zeros(&[2, 4, 6, 8]), &zeros(&[2, 2, 6, 8]), &zeros(dims), &pattern);
    }
}

#[test]
fn heads_that_are_no_multiple_of_the_kv_heads() {
    for (heads, kv_heads) in [(4, 3), (2, 4)] {
        let pattern = format!(
            "heads: expected a multiple of the {kv_heads} KV heads, got {heads} query heads; repeat or regroup the \
             heads"
        );
        refused_pair(&zeros(&[2, heads, 6, 8]), &zeros(&[2, kv_heads, 6, 8]), &pattern);
    }
}

#[test]
fn nothing_to_attend() {
    for (q, k) in [
        ([0, 4, 6, 8], [0, 2, 6, 8]),
        ([2, 0, 6, 8], [2, 2, 6, 8]),
        ([2, 4, 6, 8], [2, 0, 6, 8]),
        ([2, 4, 0, 8], [2, 2, 0, 8]),
        ([2, 4, 6, 0], [2, 2, 6, 0]),
    ] {
        let pattern = format!(
            "query: expected at least one batch row, head, token and dimension, got query {q:?} and key {k:?}; skip \
             the call"
        );
        refused_pair(&zeros(&q), &zeros(&k), &pattern);
    }
}

/// Strides of 0 give one row any size.
#[test]
fn sizes_beyond_the_address_space() -> Result<()> {
    for dims in [[1 << 31, 1 << 31, 1 << 31, 8], [1 << 20, 1 << 20, 1 << 17, 8]] {
        let absurd = zeros(&[1, 1, 1, 8]).broadcast_as(dims.as_slice())?;
        let pattern =
            format!("query: expected sizes whose product is below 2^60, got {dims:?}; a broadcast axis is too long");
        refused_pair(&absurd, &absurd, &pattern);
    }
    Ok(())
}

#[test]
fn unsupported_and_mixed_dtypes() -> Result<()> {
    let [q, k, v] = SHAPE.qkv(0, DType::F32)?;
    for dtype in [DType::U32, DType::I64, DType::F8E4M3] {
        let pattern = format!("query: expected dtype f64, f32, f16 or bf16, got {dtype:?}; …to_dtype");
        refused_pair(&q.to_dtype(dtype)?, &k.to_dtype(dtype)?, &pattern);
    }
    for other in [DType::BF16, DType::F64] {
        let pattern = |name| format!("{name}: expected the query's dtype F32, got {other:?}; …to_dtype");
        refused_pair(&q, &k.to_dtype(other)?, &pattern("key"));
        refused_tensors(&q, &k, &v.to_dtype(other)?, &pattern("value"));
    }
    Ok(())
}

#[test]
fn a_last_axis_that_is_not_contiguous() -> Result<()> {
    let [q, k, v] = SHAPE.qkv(0, DType::F32)?;
    let scattered = |x: &Tensor| x.transpose(2, 3)?.contiguous()?.transpose(2, 3);
    let pattern = |name, heads: usize| {
        let strides = [heads * 48, 48, 1, 6];
        format!("{name}: expected a contiguous last axis (stride 1), got strides {strides:?}; call contiguous()")
    };
    refused_pair(&scattered(&q)?, &k, &pattern("query", 4));
    refused_pair(&q, &scattered(&k)?, &pattern("key", 2));
    refused_tensors(&q, &k, &scattered(&v)?, &pattern("value", 2));
    refused_pair(
        &zeros(&[2, 4, 6, 1]).broadcast_as((2, 4, 6, 8))?,
        &k,
        "query: expected a contiguous last axis (stride 1), got strides [24, 6, 1, 0]; call contiguous()",
    );
    Ok(())
}

#[test]
fn indicators_that_are_no_bits() -> Result<()> {
    let from = |bits: Tensor| MergePlan::from_indicators(&bits, &config(|_| ()));
    refused(
        from(Tensor::zeros((2, 4, 5), DType::U32, CPU)?),
        "indicators: expected dtype u8, got U32; convert them with to_dtype",
    );
    for dims in [&[4, 5][..], &[1, 2, 4, 5]] {
        let pattern = format!(
            "indicators: expected shape (batch, heads, tokens - 1), got {dims:?}; give one bit per pair of neighbours"
        );
        refused(from(Tensor::zeros(dims, DType::U8, CPU)?), &pattern);
    }
    refused(
        from(Tensor::new(&[[[0u8, 1, 7, 0]]], CPU)?),
        "indicators: expected 0 or 1, got 7; write 1 where a token is folded into the next one",
    );
    Ok(())
}

#[test]
fn a_plan_for_another_shape() -> Result<()> {
    let [q, k, v] = SHAPE.qkv(0, DType::F32)?;
    let Shape(batch, heads, kv_heads, tokens, dim) = SHAPE;
    for other in [
        Shape(1, heads, kv_heads, tokens, dim),
        Shape(heads, batch, kv_heads, tokens, dim),
        Shape(batch, kv_heads, kv_heads, tokens, dim),
        Shape(batch, heads, kv_heads, tokens + 1, dim),
    ] {
        let plan = plan(other, &config(|_| ()))?;
        let got = plan.indicators().dims();
        let pattern = format!(
            "plan: expected indicators of shape [2, 4, 5] (batch, heads, tokens - 1) for this query, got {got:?}; \
             make a plan for these tensors"
        );
        refused(attend(&q, &k, &v, &plan, &options(|_| ())), &pattern);
    }
    Ok(())
}
