//! Options and shapes that the kernels do not compute.

use crate::config::AttentionOptions;
use crate::problem::Problem;
use candle_core::{bail, Result};

/// Refuses options that change logits in a way that no kernel knows.
///
/// # Errors
/// A softcap or sink logits.
pub(crate) fn refuse_options(options: &AttentionOptions) -> Result<()> {
    if let Some(softcap) = options.softcap {
        bail!(
            "softcap: expected None on CUDA, got {softcap}; its kernels do not compute it in this version, move the \
             tensors with to_device(&Device::Cpu)"
        )
    }
    if options.sink_logits.is_some() {
        bail!(
            "sink_logits: expected None on CUDA, got a tensor; its kernels do not compute them in this version, move \
             the tensors with to_device(&Device::Cpu)"
        )
    }
    Ok(())
}

/// Refuses fewer queries than keys, and values of another size than keys.
///
/// # Errors
/// As above.
pub(crate) fn refuse_shapes(problem: &Problem) -> Result<()> {
    let Problem {
        queries,
        tokens,
        head_dim,
        value_dim,
        ..
    } = *problem;
    if queries != tokens {
        bail!(
            "query: expected as many queries as keys on CUDA, got {queries} and {tokens}; give the queries of all \
             tokens, or move the tensors with to_device(&Device::Cpu)"
        )
    }
    if value_dim != head_dim {
        bail!(
            "value: expected the key's head_dim {head_dim} on CUDA, got {value_dim}; pad the smaller one with \
             pad_with_zeros(3, 0, n), set softmax_scale to that of the keys, and narrow the output to {value_dim}"
        )
    }
    Ok(())
}
