//! Compressed attention from candle's plain operations, in the tensors' own dtype: what a user without this crate would
//! write, and the yardstick for errors in half types.

use anyhow::Result;
use candle_core::{DType, Tensor, D};
use candle_sfattention::reference::{dropout_keeps, fold, visible_columns, Column, Indicators};
use candle_sfattention::{AttentionOptions, CompressionConfig, Fold};

/// Query (B, H, N, D), key and value (B, Hk, N, D); differentiable. Keys are the N folded tokens, then the N raw ones; a
/// mask says which a row sees. Folding sums in f32 and rounds once.
pub fn plain_attention(
    [q, k, v]: [&Tensor; 3],
    bits: &Indicators,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Tensor> {
    let (batch, heads, tokens, dim) = q.dims4()?;
    let (dtype, kv_heads) = (q.dtype(), k.dim(1)?);
    let repeated = |x: &Tensor| -> Result<Tensor> {
        let groups = x
            .unsqueeze(2)?
            .broadcast_as((batch, kv_heads, heads / kv_heads, tokens, dim))?;
        Ok(groups.reshape((batch, heads, tokens, dim))?)
    };
    let (k, v) = (repeated(k)?, repeated(v)?);
    let tables = Tables::new([batch, heads, tokens], bits, config, options)?;
    let folded = |x: &Tensor| -> Result<Tensor> { Ok(tables.fold.matmul(&x.to_dtype(DType::F32)?)?.to_dtype(dtype)?) };
    let queries = match config.fold {
        Fold::PairSum => folded(q)?,
        _ => q.clone(),
    };
    let keys = Tensor::cat(&[folded(&k)?, k], 2)?;
    let columns = Tensor::cat(&[folded(&v)?, v], 2)?;
    let scale = options.softmax_scale.unwrap_or(1.0 / (dim as f64).sqrt());
    let logits = (queries.matmul(&keys.t()?.contiguous()?)? * scale)?;
    let weights = candle_nn::ops::softmax(&(logits + tables.added.to_dtype(dtype)?)?, D::Minus1)?;
    let weights = match &tables.kept {
        Some(kept) => (weights * kept.to_dtype(dtype)?)?,
        None => weights,
    };
    Ok(weights.matmul(&columns)?)
}

/// What the host knows, f32: the fold as a matrix (B, H, N, N); what is added to logits, and what weights are multiplied
/// by, (B, H, N, 2N).
struct Tables {
    fold: Tensor,
    added: Tensor,
    kept: Option<Tensor>,
}

impl Tables {
    fn new(
        [batch, heads, tokens]: [usize; 3],
        bits: &Indicators,
        config: &CompressionConfig,
        options: &AttentionOptions,
    ) -> Result<Self> {
        let bias = match &options.bias {
            Some(bias) => Some(
                bias.to_dtype(DType::F32)?
                    .broadcast_as((batch, heads, tokens, tokens))?,
            ),
            None => None,
        };
        let bias = bias.map(|bias| bias.flatten_all()?.to_vec1::<f32>()).transpose()?;
        let unit = |t: usize| (0..tokens).map(|i| f64::from(u8::from(i == t))).collect::<Vec<f64>>();
        let identity: Vec<Vec<f64>> = (0..tokens).map(unit).collect();
        let (mut matrix, mut kept) = (Vec::new(), Vec::new());
        let mut added = vec![f32::NEG_INFINITY; batch * heads * tokens * 2 * tokens];
        for head in 0..batch * heads {
            let bits = bits.head(head / heads, head % heads);
            let (rows, sizes) = fold(config.fold, &identity, bits);
            matrix.extend(rows.iter().flatten().map(|x| *x as f32));
            for row in 0..tokens {
                let at = head * tokens + row;
                for column in visible_columns(bits, row, config.window, options.causal) {
                    let (index, ln) = match column {
                        Column::Near(t) => (tokens + t, 0.0),
                        Column::Far(t) | Column::Edge(t) => (t, sizes[t].ln()),
                    };
                    let bias = bias.as_ref().map_or(0.0, |bias| bias[at * tokens + column.token()]);
                    added[at * 2 * tokens + index] = ln as f32 + bias;
                }
                if let Some(dropout) = options.dropout {
                    let keep = |t: usize| {
                        if dropout_keeps(dropout, head, row, t % tokens) {
                            1.0 / (1.0 - dropout.p)
                        } else {
                            0.0
                        }
                    };
                    kept.extend((0..2 * tokens).map(|t| keep(t) as f32));
                }
            }
        }
        let tensor = |data: Vec<f32>, columns: usize| {
            Tensor::from_vec(data, (batch, heads, tokens, columns), &candle_core::Device::Cpu)
        };
        Ok(Self {
            fold: tensor(matrix, tokens)?,
            added: tensor(added, 2 * tokens)?,
            kept: if kept.is_empty() {
                None
            } else {
                Some(tensor(kept, 2 * tokens)?)
            },
        })
    }
}
