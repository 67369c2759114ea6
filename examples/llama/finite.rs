//! Checks that a model's output is finite before it is used.

use anyhow::{ensure, Result};
use candle_core::{DType, Tensor};

/// Refuses rows `(n, width)` with a NaN or an infinite number. Row i belongs to token `position + i` of its sequence;
/// `what` names the rows.
pub fn check(what: &str, rows: &Tensor, position: usize) -> Result<()> {
    let (n, width) = rows.dims2()?;
    let values = rows.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    for (row, values) in values.chunks_exact(width).enumerate().take(n) {
        let bad = values.iter().position(|value| !value.is_finite());
        ensure!(
            bad.is_none(),
            "{what}: expected finite numbers, got {} at token position {}, entry {}; the weights are damaged, or too \
             large for this dtype: fetch the checkpoint again, or use --dtype f32",
            values[bad.unwrap_or(0)],
            position + row,
            bad.unwrap_or(0)
        );
    }
    Ok(())
}
