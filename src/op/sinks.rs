//! The gradient of sink logits: an op after attention, since an op of candle has at most three arguments.
//!
//! A sink is a term exp(s) in the denominator of each row's softmax, with no value. Its weight in row i is
//! p = exp(s - log-sum-exp), and its gradient -p · (output · grad_output) there: the logit's gradient is
//! p · (a - Σ w a), where a, the gradient of the weight, is 0 without a value.

use crate::cpu::attend::sinks::{sink_gradients, SinkInput};
use crate::cpu::number::bias::sinks_in_base_2;
use crate::cpu::number::element::Element;
use crate::cpu::number::rows::RowGrid;
use crate::problem::{Problem, RowLayout};
use crate::storage::{cpu_slice, not_on_cpu};
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor};
use std::sync::{Arc, OnceLock};

/// The tensors that a forward pass keeps for its gradients; they have no graph.
pub(super) type KeptTensors = Arc<OnceLock<Vec<Tensor>>>;

/// The output of attention, unchanged, with a gradient for the sink logits (H).
pub(super) struct SinkGradient {
    pub problem: Problem,
    pub sinks: Vec<f64>,
    pub kept: KeptTensors,
}

impl SinkGradient {
    /// The gradient of each query head's sink.
    fn gradients<T: Element>(&self, output: &Tensor, grad_output: &Tensor) -> Result<Vec<f64>> {
        let Some([log_sum_exp, ..]) = self.kept.get().map(Vec::as_slice) else {
            bail!(
                "sink_logits: expected the forward pass's log-sum-exp, got none; this is a defect of the crate, \
                 please report it"
            )
        };
        let held = [output, grad_output, log_sum_exp].map(Tensor::storage_and_layout);
        let rows = |index: usize| -> Result<RowGrid<T>> {
            let (storage, layout) = &held[index];
            Ok(RowGrid::new(cpu_slice(storage)?, RowLayout::new(layout)))
        };
        Ok(sink_gradients(&SinkInput {
            problem: self.problem,
            output: rows(0)?,
            grad_output: rows(1)?,
            log_sum_exp: cpu_slice::<T::Acc>(&held[2].0)?.as_chunks().0,
            sinks: &sinks_in_base_2(&self.sinks),
        }))
    }
}

impl CustomOp2 for SinkGradient {
    fn name(&self) -> &'static str {
        "compressed-attention-sinks"
    }

    fn cpu_fwd(&self, output: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        // The output is new: contiguous from its start on.
        Ok((output.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        output: &Tensor,
        sink_logits: &Tensor,
        _: &Tensor,
        grad_output: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let through = output.track_op().then(|| grad_output.clone());
        if !output.device().is_cpu() {
            return not_on_cpu(output.device());
        }
        let grad_output = grad_output.contiguous()?;
        let gradients = match self.problem.dtype {
            DType::F64 => self.gradients::<f64>(output, &grad_output),
            DType::F16 => self.gradients::<half::f16>(output, &grad_output),
            DType::BF16 => self.gradients::<half::bf16>(output, &grad_output),
            _ => self.gradients::<f32>(output, &grad_output),
        }?;
        let gradients = Tensor::from_vec(gradients, self.problem.heads, &Device::Cpu)?;
        Ok((through, Some(gradients.to_dtype(sink_logits.dtype())?)))
    }
}
