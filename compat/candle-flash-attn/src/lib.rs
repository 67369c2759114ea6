//! The functions of candle-flash-attn 0.11, computed by candle-sfattention: on the CPU and on CUDA, in f32, f16 and
//! bf16 (f64 too on the CPU), and with gradients.
//!
//! Inside [`Session::scope`](candle_sfattention::Session::scope) call number n is layer n of the session: it appends
//! the new tokens to that layer's compressed cache and attends over it. Outside a scope each function is exact dense
//! attention.
//!
//! Query (B, Nq, H, D), key and value (B, Nk, Hk, D), output (B, Nq, H, D); H is a multiple of Hk. `softmax_scale` is
//! the factor on `query . key`. A causal mask and windows are aligned to the end: query row i stands at token
//! Nk - Nq + i. A row that sees nothing is zeros.
//!
//! Windows count tokens beside a row's own: it sees tokens from `window_size_left` before it to `window_size_right`
//! after it, and all on a side that is `None`.

mod call;
mod varlen;

use call::Call;
use candle_core::{Result, Tensor};
pub use varlen::{
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_paged_windowed, flash_attn_varlen_windowed,
};

/// The right window of a causal mask, or of none.
fn right(causal: bool) -> Option<usize> {
    causal.then_some(0)
}

/// Attention, causal or not.
///
/// # Errors
/// As [`candle_sfattention::attend`], or inside a scope as [`candle_sfattention::session::attend_next_layer`].
pub fn flash_attn(q: &Tensor, k: &Tensor, v: &Tensor, softmax_scale: f32, causal: bool) -> Result<Tensor> {
    flash_attn_windowed(q, k, v, softmax_scale, None, right(causal))
}

/// Attention with windows.
///
/// # Errors
/// As [`flash_attn`].
pub fn flash_attn_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    Call {
        scale: softmax_scale,
        left: window_size_left,
        right: window_size_right,
        ..Default::default()
    }
    .run(q, k, v)
}

/// Attention with ALiBi slopes (H) or (B, H): `-slope · |distance|` is added to each logit.
///
/// # Errors
/// Slopes of another shape, or as [`flash_attn`].
pub fn flash_attn_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    flash_attn_alibi_windowed(q, k, v, alibi_slopes, softmax_scale, None, right(causal))
}

/// Attention with ALiBi slopes and windows.
///
/// # Errors
/// As [`flash_attn_alibi`].
pub fn flash_attn_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    Call {
        scale: softmax_scale,
        slopes: Some(alibi_slopes),
        left: window_size_left,
        right: window_size_right,
        softcap: None,
    }
    .run(q, k, v)
}

/// Attention with windows, perhaps ALiBi slopes, and a softcap: a logit z becomes `softcap · tanh(z / softcap)`. A
/// softcap of 0 is none.
///
/// # Errors
/// A softcap that is negative or not finite, or as [`flash_attn_alibi`].
#[allow(clippy::too_many_arguments)]
pub fn flash_attn_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    Call {
        scale: softmax_scale,
        slopes: alibi_slopes,
        left: window_size_left,
        right: window_size_right,
        softcap: Some(softcap),
    }
    .run(q, k, v)
}
