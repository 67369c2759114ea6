//! Sequences of different lengths, packed one after the other: query (total, H, D), key and value (total, Hk, D).
//!
//! `seqlens_q` and `seqlens_k`, (B + 1) in u32, are where each sequence starts, and the totals. They are read on the
//! host, which on a GPU waits for the device. Each sequence is one call. `max_seqlen_q` and `max_seqlen_k` are not
//! needed and not read. Inside a session's scope these functions are refused.

use crate::call::Call;
use crate::right;
use candle_core::{bail, DType, Result, Tensor};
use candle_sfattention::session;

/// Attention of packed sequences, causal or not.
///
/// # Errors
/// Lengths that do not fit the tensors, a call inside a session's scope, or as [`crate::flash_attn`].
#[allow(clippy::too_many_arguments)]
pub fn flash_attn_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    _max_seqlen_q: usize,
    _max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let call = Call {
        scale: softmax_scale,
        right: right(causal),
        ..Default::default()
    };
    packed(call, [q, k, v], [seqlens_q, seqlens_k])
}

/// Attention of packed sequences with windows.
///
/// # Errors
/// As [`flash_attn_varlen`].
#[allow(clippy::too_many_arguments)]
pub fn flash_attn_varlen_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    _max_seqlen_q: usize,
    _max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let call = Call {
        scale: softmax_scale,
        left: window_size_left,
        right: window_size_right,
        ..Default::default()
    };
    packed(call, [q, k, v], [seqlens_q, seqlens_k])
}

/// Refused: a session's cache holds keys and values in lists of its own, and a dense one in pages is not computed here.
///
/// # Errors
/// Always.
#[allow(clippy::too_many_arguments)]
pub fn flash_attn_varlen_paged_windowed(
    _q: &Tensor,
    _k: &Tensor,
    _v: &Tensor,
    _seqlens_q: &Tensor,
    _seqlens_k: &Tensor,
    _block_table: &Tensor,
    _mm_prefix_ranges: Option<&Tensor>,
    _max_seqlen_q: usize,
    _max_seqlen_k: usize,
    _softmax_scale: f32,
    _window_size_left: Option<usize>,
    _window_size_right: Option<usize>,
    _page_block_size: usize,
    _softcap: Option<f32>,
) -> Result<Tensor> {
    bail!(
        "flash_attn_varlen_paged_windowed: expected keys and values without pages, got a block table; gather the pages \
         and call flash_attn_varlen_windowed"
    )
}

/// Attention of packed sequences with ALiBi slopes, (H) or (B, H).
///
/// # Errors
/// As [`flash_attn_varlen`], or slopes of another shape.
#[allow(clippy::too_many_arguments)]
pub fn flash_attn_varlen_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    _max_seqlen_q: usize,
    _max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let call = Call {
        scale: softmax_scale,
        slopes: Some(alibi_slopes),
        right: right(causal),
        ..Default::default()
    };
    packed(call, [q, k, v], [seqlens_q, seqlens_k])
}

/// Attention of packed sequences with ALiBi slopes, (H) or (B, H), and windows.
///
/// # Errors
/// As [`flash_attn_varlen_alibi`].
#[allow(clippy::too_many_arguments)]
pub fn flash_attn_varlen_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    _max_seqlen_q: usize,
    _max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let call = Call {
        scale: softmax_scale,
        slopes: Some(alibi_slopes),
        left: window_size_left,
        right: window_size_right,
        softcap: None,
    };
    packed(call, [q, k, v], [seqlens_q, seqlens_k])
}

/// Attention of packed sequences with windows, perhaps ALiBi slopes, and a softcap; 0 is none.
///
/// # Errors
/// As [`flash_attn_varlen_alibi`], or a softcap that is negative or not finite.
#[allow(clippy::too_many_arguments)]
pub fn flash_attn_varlen_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    _max_seqlen_q: usize,
    _max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let call = Call {
        scale: softmax_scale,
        slopes: alibi_slopes,
        left: window_size_left,
        right: window_size_right,
        softcap: Some(softcap),
    };
    packed(call, [q, k, v], [seqlens_q, seqlens_k])
}

/// One call a sequence.
fn packed(call: Call, qkv: [&Tensor; 3], starts: [&Tensor; 2]) -> Result<Tensor> {
    if session::is_running() {
        bail!(
            "flash_attn_varlen: expected no session's scope, got a call inside one; a session's layers take \
             flash_attn with rows of one length"
        )
    }
    let [q, k, _] = qkv;
    let (q_starts, k_starts) = (read("seqlens_q", starts[0], q)?, read("seqlens_k", starts[1], k)?);
    if q_starts.len() != k_starts.len() {
        bail!(
            "seqlens_k: expected {} numbers, as seqlens_q has, got {}; give both for every sequence",
            q_starts.len(),
            k_starts.len()
        )
    }
    let mut rows = Vec::new();
    for (index, (q_at, k_at)) in q_starts.windows(2).zip(k_starts.windows(2)).enumerate() {
        let (queries, keys) = (q_at[1] - q_at[0], k_at[1] - k_at[0]);
        if queries == 0 {
            continue;
        }
        let row = |x: &Tensor, start, len| x.narrow(0, start, len)?.unsqueeze(0);
        let query = row(qkv[0], q_at[0], queries)?;
        if keys == 0 {
            rows.push(query.zeros_like()?.squeeze(0)?);
            continue;
        }
        let slopes = match call.slopes {
            Some(slopes) if slopes.rank() == 2 => Some(slopes.narrow(0, index, 1)?),
            other => other.cloned(),
        };
        let call = Call {
            slopes: slopes.as_ref(),
            ..call
        };
        let output = call.run(&query, &row(qkv[1], k_at[0], keys)?, &row(qkv[2], k_at[0], keys)?)?;
        rows.push(output.squeeze(0)?);
    }
    match rows.is_empty() {
        true => q.zeros_like(),
        false => Tensor::cat(&rows, 0),
    }
}

/// The starts of all sequences and the total, checked against the packed tensor.
fn read(name: &str, starts: &Tensor, packed: &Tensor) -> Result<Vec<usize>> {
    let total = packed.dim(0)?;
    if starts.rank() != 1 || !matches!(starts.dtype(), DType::U32 | DType::I64) {
        bail!(
            "{name}: expected a u32 tensor of shape (sequences + 1), got {:?} of shape {:?}",
            starts.dtype(),
            starts.dims()
        )
    }
    let numbers: Vec<usize> = starts
        .to_dtype(DType::U32)?
        .to_vec1::<u32>()?
        .iter()
        .map(|at| *at as usize)
        .collect();
    let sorted = numbers.is_sorted() && numbers.first() == Some(&0) && numbers.last() == Some(&total);
    if !sorted {
        bail!(
            "{name}: expected numbers that rise from 0 to the {total} packed tokens, got {numbers:?}; give the \
             cumulative lengths"
        )
    }
    Ok(numbers)
}
