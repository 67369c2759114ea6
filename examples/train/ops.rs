//! The network's operations, whose derivatives stand here: candle's fused kernels run forwards, and the backward pass
//! writes fewer tensors than candle's own steps of the same operations.

use std::collections::HashMap;

use candle_core::{DType, Error, Result, Tensor, D};
use candle_nn::ops;

use crate::known::known;
use crate::rope::Rotation;

/// xs (n, columns) times the transpose of a matrix (rows, columns), which is cast to the dtype of `xs`.
pub fn linear(xs: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let args = [xs, weight];
    let (xs, weight) = (xs.detach(), weight.detach());
    let result = xs.matmul(&weight.to_dtype(xs.dtype())?.t()?)?;
    known("linear", args, result, move |gradient| {
        let of_xs = gradient.matmul(&weight.to_dtype(xs.dtype())?)?;
        let of_weight = gradient.t()?.matmul(&xs)?.to_dtype(weight.dtype())?;
        Ok([Some(of_xs), Some(of_weight)])
    })
}

/// Rows (n, width) over their root mean square, times a weight (width), in `dtype`.
pub fn rms_norm(xs: &Tensor, weight: &Tensor, eps: f64, dtype: DType) -> Result<Tensor> {
    let args = [xs, weight];
    let (xs, weight) = (xs.detach(), weight.detach());
    let result = ops::rms_norm(&xs, &weight, eps as f32)?.to_dtype(dtype)?;
    known("rms-norm", args, result, move |gradient| {
        let (rows, width) = xs.dims2()?;
        let gradient = gradient.to_dtype(xs.dtype())?;
        let squares = (xs.sqr()?.sum_keepdim(D::Minus1)? / width as f64)?;
        let inverse = (squares + eps)?.sqrt()?.recip()?;
        let normed = xs.broadcast_mul(&inverse)?;
        let products = (&gradient * &normed)?;
        // Sums by products with a vector: candle's sums over the first axis read one number of a row at a time.
        let ones = Tensor::ones((1, rows), xs.dtype(), xs.device())?;
        let of_weight = ones.matmul(&products)?.squeeze(0)?;
        let along = (products.matmul(&weight.unsqueeze(1)?)? / width as f64)?;
        let of_normed = (gradient.broadcast_mul(&weight)? - normed.broadcast_mul(&along)?)?;
        Ok([Some(of_normed.broadcast_mul(&inverse)?), Some(of_weight)])
    })
}

/// silu(gate) · up, of equal shapes.
pub fn silu_times(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let args = [gate, up];
    let (gate, up) = (gate.detach(), up.detach());
    let result = (gate.silu()? * &up)?;
    known("silu-times", args, result, move |gradient| {
        let sigmoid = ops::sigmoid(&gate)?;
        let silu = (&gate * &sigmoid)?;
        let of_up = (gradient * &silu)?;
        // silu' = sigmoid + silu (1 - sigmoid)
        let slope = ((&sigmoid + &silu)? - (silu * &sigmoid)?)?;
        Ok([Some(((gradient * &up)? * slope)?), Some(of_up)])
    })
}

/// Heads (B, N, heads, D) rotated by their positions.
pub fn rotate(xs: &Tensor, rotation: &Rotation) -> anyhow::Result<Tensor> {
    let back = rotation.back()?;
    let result = rotation.apply_to_tokens(&xs.detach())?;
    known("rotate", [xs, xs], result, move |gradient| {
        let gradient = back
            .apply_to_tokens(gradient)
            .map_err(|error| Error::Msg(format!("{error:#}")))?;
        Ok([Some(gradient), None])
    })
    .map_err(Into::into)
}

/// The rows `ids` (n) of a table (vocabulary, width).
pub fn embed(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let result = table.detach().index_select(ids, 0)?;
    if !table.track_op() {
        return Ok(result);
    }
    let (vocabulary, ids) = (table.dim(0)?, ids.clone());
    // Read now, while nothing waits on the device.
    let on_host = match table.device().is_cpu() {
        true => Vec::new(),
        false => ids.to_vec1::<u32>()?,
    };
    known("embed", [table, table], result, move |gradient| {
        let of_table = match gradient.device().is_cpu() {
            true => Tensor::zeros((vocabulary, gradient.dim(1)?), gradient.dtype(), gradient.device())?
                .index_add(&ids, gradient, 0)?,
            false => sums_by_id(gradient, &ids, &on_host, vocabulary)?,
        };
        Ok([Some(of_table), None])
    })
}

/// The sums of the rows (n, width) of each id, (vocabulary, width), by a product with a matrix of ones and zeros:
/// candle's `index_add` on a GPU adds one row after the other.
pub fn sums_by_id(rows: &Tensor, ids: &Tensor, on_host: &[u32], vocabulary: usize) -> Result<Tensor> {
    let device = rows.device();
    let mut places = HashMap::new();
    let mut met = Vec::new();
    for &id in on_host {
        places.entry(id).or_insert_with(|| {
            met.push(id);
            met.len() as u32 - 1
        });
    }
    let none = met.len() as u32;
    let place_of: Vec<u32> = (0..vocabulary as u32)
        .map(|id| places.get(&id).copied().unwrap_or(none))
        .collect();
    let met = Tensor::new(met, device)?.unsqueeze(1)?;
    let is_it = met.broadcast_eq(&ids.unsqueeze(0)?)?.to_dtype(rows.dtype())?;
    let nothing = Tensor::zeros((1, rows.dim(1)?), rows.dtype(), device)?;
    let sums = Tensor::cat(&[&is_it.matmul(rows)?, &nothing], 0)?;
    sums.index_select(&Tensor::new(place_of, device)?, 0)
}
