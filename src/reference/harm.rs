//! The harm of hiding a token, from dense causal attention.

use super::observe::local_weights;
use super::{dot, Array4, Axes};
use candle_core::{bail, Result};

/// What a layer does with its attention's output.
#[derive(Clone, Debug)]
pub struct HarmLayer {
    /// The output projection's weight, a row of H·D numbers for each output.
    pub projection: Vec<Vec<f64>>,
    /// The stream at the layer's input, a row for each token.
    pub stream: Vec<Vec<f64>>,
    /// The factor on `q · k`.
    pub scale: f64,
}

/// `H[t]` of each KV head's tokens that can be hidden, t + window + 1 <= N - 1, for q (1, H, N, D), k and v
/// (1, Hk, N, D) and dense causal attention: the sum over the group's query heads h and the rows i > t + window of
/// `((a / max(1 - a, 1e-3)) / ‖x[i]‖)² · ‖W_h (o[i] - v[t])‖²`, with a = a_h[i, t].
///
/// # Errors
/// Shapes that do not fit together, or more than one batch row.
pub fn harm(q: &Array4, k: &Array4, v: &Array4, layer: &HarmLayer, window: usize) -> Result<Vec<Vec<f64>>> {
    let sizes = Axes::new(q, k)?;
    let (dim, tokens) = (q.dims[3], sizes.tokens);
    let columns = layer.projection.iter().all(|row| row.len() == sizes.heads * dim);
    if sizes.batch != 1 || v.dims != k.dims || layer.stream.len() != tokens || !columns {
        bail!(
            "harm: expected one batch row, values of the keys' shape, a stream of {tokens} rows and a projection of {} \
             columns, got {:?}, {:?}, {} rows; give one window",
            sizes.heads * dim,
            q.dims,
            v.dims,
            layer.stream.len()
        )
    }
    let decided = sizes.pairs().saturating_sub(window);
    let mut harms = vec![vec![0.0; decided]; sizes.kv_heads];
    for (_, head) in sizes.batch_heads() {
        let kv_head = sizes.kv_head(head);
        for row in 0..tokens {
            let keys: Vec<&[f64]> = (0..=row).map(|t| k.row(0, kv_head, t)).collect();
            let weights = local_weights(q.row(0, head, row), &keys, layer.scale);
            let output: Vec<f64> = (0..dim)
                .map(|d| (0..=row).map(|t| weights[t] * v.row(0, kv_head, t)[d]).sum())
                .collect();
            let x = dot(&layer.stream[row], &layer.stream[row]).sqrt();
            for t in (0..decided).filter(|t| row > t + window) {
                let difference: Vec<f64> = output.iter().zip(v.row(0, kv_head, t)).map(|(o, v)| o - v).collect();
                let through = layer
                    .projection
                    .iter()
                    .map(|w| dot(&w[head * dim..][..dim], &difference).powi(2));
                let share = weights[t] / (1.0 - weights[t]).max(1e-3) / x;
                harms[kv_head][t] += share * share * through.sum::<f64>();
            }
        }
    }
    Ok(harms)
}
