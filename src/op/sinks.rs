//! The gradient of sink logits: an op after attention, since an op of candle has at most three arguments.
//!
//! A sink is a term exp(s) in the denominator of each row's softmax, with no value. Its weight in row i is
//! p = exp(s - log-sum-exp), and its gradient -p · (output · grad_output) there: the logit's gradient is
//! p · (a - Σ w a), where a, the gradient of the weight, is 0 without a value.

use crate::config::AttentionOptions;
use crate::cpu::attend::sinks::{sink_gradients, SinkInput};
use crate::cpu::number::bias::sinks_in_base_2;
use crate::cpu::number::element::Element;
use crate::cpu::number::rows::RowGrid;
use crate::problem::{bias_as, Problem, RowLayout};
use crate::storage::{cpu_slice, not_on_cpu};
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, D};
use std::sync::{Arc, OnceLock};

/// The tensors that a forward pass keeps for its gradients; they have no graph.
pub(super) type KeptTensors = Arc<OnceLock<Vec<Tensor>>>;

/// The output of attention, unchanged, with a gradient for the sink logits (H).
pub(super) struct SinkGradient {
    pub problem: Problem,
    /// Empty on a GPU.
    pub sinks: Vec<f64>,
    pub kept: KeptTensors,
}

impl SinkGradient {
    /// The output, with this gradient where the sink logits ask for one.
    pub fn over(self, output: Tensor, options: &AttentionOptions) -> Result<Tensor> {
        match options.sink_logits.as_ref().filter(|sinks| sinks.track_op()) {
            Some(logits) => output.apply_op2(logits, self),
            None => Ok(output),
        }
    }

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

/// The gradient of the sinks (H), in their dtype, by candle's operations on any device, in f32. `log_sum_exp`
/// (2, B, H, N) is that of CUDA's forward pass: in base 2, with its rounding error; the output has its last rows.
fn gradients_by_ops(sinks: &Tensor, log_sum_exp: &Tensor, output: &Tensor, grad_output: &Tensor) -> Result<Tensor> {
    let dtype = sinks.dtype();
    let sinks = (bias_as(&sinks.detach(), DType::F32)? * std::f64::consts::LOG2_E)?.reshape((1, (), 1))?;
    let rows = output.dim(2)?;
    let log_sum_exp = log_sum_exp.narrow(3, log_sum_exp.dim(3)? - rows, rows)?;
    let exponent = (sinks.broadcast_sub(&log_sum_exp.get(0)?)? - log_sum_exp.get(1)?)?;
    let weights = (exponent * std::f64::consts::LN_2)?.exp()?;
    let products = (output.detach().to_dtype(DType::F32)? * grad_output.to_dtype(DType::F32)?)?.sum(D::Minus1)?;
    (weights * products)?.sum((0, 2))?.neg()?.to_dtype(dtype)
}

impl CustomOp2 for SinkGradient {
    fn name(&self) -> &'static str {
        "compressed-attention-sinks"
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
        sink_logits: &Tensor,
        _: &Tensor,
        grad_output: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let through = output.track_op().then(|| grad_output.clone());
        if !output.device().is_cpu() {
            let Some([log_sum_exp, ..]) = self.kept.get().map(Vec::as_slice) else {
                return not_on_cpu(output.device());
            };
            let gradients = gradients_by_ops(sink_logits, log_sum_exp, output, grad_output)?;
            return Ok((through, Some(gradients)));
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The gradient by candle's operations is that of the CPU's loop.
    #[test]
    fn operations_agree_with_the_loop() -> Result<()> {
        let (batch, heads, rows, dim) = (2, 3, 50, 8);
        let numbers = |seed: usize, count: usize| (0..count).map(move |i| ((i * seed) % 101) as f32 / 40.0 - 1.2);
        let array = |seed: usize| Tensor::from_iter(numbers(seed, batch * heads * rows * dim), &Device::Cpu);
        let shape = (batch, heads, rows, dim);
        let (output, grad) = (array(37)?.reshape(shape)?, array(53)?.reshape(shape)?);
        let sums = Tensor::from_iter(numbers(29, batch * heads * rows), &Device::Cpu)?.reshape((batch, heads, rows))?;
        let sinks = Tensor::new(&[0.5f32, f32::NEG_INFINITY, -2.0], &Device::Cpu)?;
        let got = gradients_by_ops(
            &sinks,
            &Tensor::stack(&[&sums, &sums.zeros_like()?], 0)?,
            &output,
            &grad,
        )?;
        let op = SinkGradient {
            problem: Problem::new(&output, &output, &output)?,
            sinks: vec![0.5, f64::NEG_INFINITY, -2.0],
            kept: KeptTensors::default(),
        };
        op.kept
            .get_or_init(|| vec![Tensor::stack(&[&sums, &sums.zeros_like().unwrap()], 3).unwrap()]);
        let expected = op.gradients::<f32>(&output, &grad)?;
        for (got, expected) in got.to_vec1::<f32>()?.into_iter().zip(expected) {
            let error = (f64::from(got) - expected).abs();
            assert!(error <= 1e-4 * (1.0 + expected.abs()), "{got} for {expected}");
        }
        Ok(())
    }
}
