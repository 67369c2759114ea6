//! What a cache on a device does not compute.

use crate::config::AttentionOptions;
use crate::problem::Problem;
use candle_core::{bail, Result};

/// Refuses values of another size than keys, and segments.
///
/// # Errors
/// As above.
pub(crate) fn refuse_in_cache(problem: &Problem, options: Option<&AttentionOptions>) -> Result<()> {
    let Problem {
        head_dim, value_dim, ..
    } = *problem;
    if value_dim != head_dim {
        bail!(
            "value: expected the key's head_dim {head_dim} for a cache on CUDA, got {value_dim}; pad the smaller one \
             with pad_with_zeros(3, 0, n), set softmax_scale to that of the keys, and narrow the output to {value_dim}"
        )
    }
    if options.is_some_and(|options| options.segments.is_some()) {
        bail!(
            "segments: expected None for a cache on CUDA, got some; give each batch row a cache of its own, or move \
             the cache with to_device(&Device::Cpu)"
        )
    }
    Ok(())
}
