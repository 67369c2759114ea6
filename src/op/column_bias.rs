//! The gradient of a column bias: an op after attention, since an op of candle has at most three arguments.
//!
//! The gradients of query, key, value and bias come from one pass. It runs here, where the output's gradient arrives
//! first, and leaves those of query, key and value for the op of attention ([`FoundGradients`]).

use crate::config::AttentionOptions;
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use std::sync::{Arc, Mutex, PoisonError};

/// The gradients of query, key and value for the op of attention, once they are known.
pub(crate) type FoundGradients = Arc<Mutex<Option<[Tensor; 3]>>>;

/// The gradients of query, key and value, and that of the column bias, if there is one.
pub(crate) type OpGradients = ([Tensor; 3], Option<Tensor>);

/// An op of attention whose gradients come from one pass.
pub(crate) trait Differentiable: CustomOp3 + Clone + Send + Sync + 'static {
    /// Where this op looks for gradients before it computes them.
    fn found(&self) -> &FoundGradients;

    /// The gradients, for any layout of `grad_output`.
    fn gradients(&self, qkv: [&Tensor; 3], output: &Tensor, grad_output: &Tensor) -> Result<OpGradients>;
}

/// The output of the op, with a gradient for the column bias where it asks for one.
pub(crate) fn apply<A: Differentiable>(
    [q, k, v]: [&Tensor; 3],
    attention: A,
    options: &AttentionOptions,
) -> Result<Tensor> {
    let Some(bias) = options.column_bias.as_ref().filter(|bias| bias.track_op()) else {
        return q.apply_op3(k, v, attention);
    };
    let gradient = ColumnBiasGradient {
        attention: attention.clone(),
        qkv: [q, k, v].map(Tensor::detach),
        asks: [q, k, v].into_iter().any(Tensor::track_op),
    };
    q.apply_op3(k, v, attention)?.apply_op2(bias, gradient)
}

/// The gradients of query, key and value that the op of a column bias has found, or else those of `compute`.
pub(crate) fn found_or(found: &FoundGradients, compute: impl FnOnce() -> Result<OpGradients>) -> Result<[Tensor; 3]> {
    let found = found.lock().unwrap_or_else(PoisonError::into_inner).take();
    match found {
        Some(gradients) => Ok(gradients),
        None => Ok(compute()?.0),
    }
}

/// The output of attention, unchanged, with a gradient for the column bias (B, Hk, N).
struct ColumnBiasGradient<A> {
    attention: A,
    /// Query, key and value, without a graph.
    qkv: [Tensor; 3],
    /// Whether the op of attention will ask for its gradients.
    asks: bool,
}

impl<A: Differentiable> CustomOp2 for ColumnBiasGradient<A> {
    fn name(&self) -> &'static str {
        "compressed-attention-column-bias"
    }

    fn cpu_fwd(&self, output: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        // The output is new: contiguous from its start on.
        Ok((output.try_clone(layout)?, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        output: &candle_core::CudaStorage,
        layout: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
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
        let (gradients, column_bias) = self.attention.gradients([q, k, v], &output.detach(), grad_output)?;
        if column_bias.is_none() {
            bail!("column_bias: expected a gradient, got none; this is a defect of the crate, please report it")
        }
        let through = self.asks.then(|| {
            *self.attention.found().lock().unwrap_or_else(PoisonError::into_inner) = Some(gradients);
            grad_output.clone()
        });
        Ok((through, column_bias))
    }
}
