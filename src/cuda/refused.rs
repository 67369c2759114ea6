//! Shapes that the kernels do not compute.

use crate::problem::Problem;
use candle_core::{bail, Result};

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
