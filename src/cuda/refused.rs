//! What a cache on a device does not compute.

use crate::config::AttentionOptions;
use candle_core::{bail, Result};

/// Refuses segments.
///
/// # Errors
/// As above.
pub(crate) fn refuse_in_cache(options: Option<&AttentionOptions>) -> Result<()> {
    if options.is_some_and(|options| options.segments.is_some()) {
        bail!(
            "segments: expected None for a cache on CUDA, got some; give each batch row a cache of its own, or move \
             the cache with to_device(&Device::Cpu)"
        )
    }
    Ok(())
}
