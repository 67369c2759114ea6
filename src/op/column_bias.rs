//! The gradient of a column bias: an op after attention, since an op of candle has at most three arguments.
//!
//! The gradients of query, key, value and bias come from one pass. It runs here, where the output's gradient arrives
//! first, and leaves those of query, key and value for the op of attention ([`FoundGradients`]).

use super::CompressedAttentionOp;
use candle_core::{bail, CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use std::sync::{Arc, Mutex, PoisonError};

/// The gradients of query, key and value for the op of attention, once they are known.
pub(super) type FoundGradients = Arc<Mutex<Option<[Tensor; 3]>>>;

/// The output of attention, unchanged, with a gradient for the column bias (B, Hk, N).
pub(super) struct ColumnBiasGradient {
    op: CompressedAttentionOp,
    /// Query, key and value, without a graph.
    qkv: [Tensor; 3],
    /// Whether the op of attention will ask for its gradients.
    found: Option<FoundGradients>,
}

impl ColumnBiasGradient {
    pub fn new(op: &CompressedAttentionOp, qkv: [&Tensor; 3]) -> Self {
        Self {
            op: op.clone(),
            qkv: qkv.map(Tensor::detach),
            found: qkv.iter().any(|x| x.track_op()).then(|| Arc::clone(&op.found)),
        }
    }
}

impl CustomOp2 for ColumnBiasGradient {
    fn name(&self) -> &'static str {
        "compressed-attention-column-bias"
    }

    fn cpu_fwd(&self, output: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        // The output is new: contiguous from its start on.
        Ok((output.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        output: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad_output: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [q, k, v] = &self.qkv;
        let (gradients, column_bias) =
            self.op
                .cpu_gradients([q, k, v], &output.detach(), &grad_output.contiguous()?)?;
        if column_bias.is_none() {
            bail!("column_bias: expected a gradient, got none; this is a defect of the crate, please report it")
        }
        let through = match &self.found {
            Some(found) => {
                *found.lock().unwrap_or_else(PoisonError::into_inner) = Some(gradients);
                Some(grad_output.clone())
            }
            None => None,
        };
        Ok((through, column_bias))
    }
}
