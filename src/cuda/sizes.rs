//! Keys and values of two sizes, which the kernels take padded to one.

use crate::config::AttentionOptions;
use candle_core::{Result, Tensor};

/// Sizes that the kernels take are multiples of this.
const STEP: usize = 8;

/// Query, key and value, whose last axes are D, D and Dv, padded with zeros to one size: the larger of the two, and a
/// multiple of 8. Zeros change no product of a query and a key, and no norm. The options get the scale of the unpadded
/// keys.
///
/// # Errors
/// An error of the device.
pub(crate) fn padded([q, k, v]: [&Tensor; 3], options: &AttentionOptions) -> Result<([Tensor; 3], AttentionOptions)> {
    let (head_dim, value_dim) = (k.dim(3)?, v.dim(3)?);
    let size = head_dim.max(value_dim).next_multiple_of(STEP);
    let pad = |x: &Tensor| x.pad_with_zeros(3, 0, size - x.dim(3)?);
    let options = AttentionOptions {
        softmax_scale: Some(options.scale(head_dim)),
        ..options.clone()
    };
    Ok(([pad(q)?, pad(k)?, pad(v)?], options))
}
