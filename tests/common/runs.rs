//! One call of attention, its bits, and inputs that differ in their future.

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_sfattention::{compressed_attention, CompressionConfig, HeadStrategies};

use super::inputs::Shape;

/// The output's bits: equality of floats, NaN included.
pub fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    Ok(tensor
        .flatten_all()?
        .to_vec1::<f32>()?
        .into_iter()
        .map(f32::to_bits)
        .collect())
}

/// The output of one call.
pub fn run(qkv: &[Tensor; 3], strategies: &HeadStrategies, config: &CompressionConfig) -> Result<Tensor> {
    let [q, k, v] = qkv;
    Ok(compressed_attention(q, k, v, strategies, config, &Default::default())?.output)
}

/// Replaces all tokens from `from` on by others, with values `magnitude` times as large: even a weight of a millionth
/// on a later token would show in an earlier row.
pub fn other_future(qkv: &[Tensor; 3], shape: &Shape, from: usize, magnitude: f64) -> Result<[Tensor; 3]> {
    let other = shape.qkv(999, DType::F32)?;
    let splice = |a: &Tensor, b: &Tensor, factor: f64| {
        let tokens = shape.3;
        Tensor::cat(
            &[a.narrow(2, 0, from)?, (b.narrow(2, from, tokens - from)? * factor)?],
            2,
        )
    };
    Ok([
        splice(&qkv[0], &other[0], 3.0)?,
        splice(&qkv[1], &other[1], 3.0)?,
        splice(&qkv[2], &other[2], magnitude)?,
    ])
}
