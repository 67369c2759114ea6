//! The calls that the CUDA path puts together, on CPU tensors under the emulator, with their gradients: for tests.

use super::{borrow, held, held_column_bias, held_sinks, HeldBias, HeldCall};
use crate::config::AttentionOptions;
use crate::cpu::number::element::Element;
use crate::cuda::attention::{lists, Attention};
use crate::cuda::emulator::device::{EmuSlice, Emulator};
use crate::cuda::on_gpu::{Gpu, GpuElement};
use crate::cuda::operands::Part;
use crate::op::column_bias::{self, found_or, Differentiable, FoundGradients, OpGradients};
use crate::op::composed::{self, PlainCall};
use crate::plan::MergePlan;
use crate::problem::Problem;
use candle_core::{bail, CpuStorage, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor};

/// [`crate::attend`] as on a CUDA device, of tensors in the order (B, H, N, D): segments, values of another size than
/// keys, and fewer queries than keys. Differentiable in query, key, value and column bias.
///
/// # Errors
/// As on a device, or an error that the emulator detects.
pub fn composed(qkv: [&Tensor; 3], plan: &MergePlan, options: &AttentionOptions) -> Result<Tensor> {
    composed::attend(qkv, plan, options, &|call| {
        let first_row = call.part.first_row;
        let output = column_bias::apply(call.qkv, EmulatedOp::new(call)?, call.options)?;
        output.narrow(2, first_row, output.dim(2)? - first_row)
    })
}

/// One call for the kernels, run beforehand.
#[derive(Clone)]
struct EmulatedOp {
    plan: MergePlan,
    options: AttentionOptions,
    bias: Option<Tensor>,
    part: Part,
    output: Option<Tensor>,
    found: FoundGradients,
}

impl EmulatedOp {
    fn new(call: &PlainCall) -> Result<Self> {
        let mut op = Self {
            plan: call.plan.clone(),
            options: call.options.clone(),
            bias: call.bias.cloned(),
            part: call.part,
            output: None,
            found: FoundGradients::default(),
        };
        op.output = Some(op.run(call.qkv, None)?[0].clone());
        Ok(op)
    }

    /// The output, or with its gradient those of query, key and value, and of the column bias if there is one.
    fn run(&self, qkv: [&Tensor; 3], grad_output: Option<&Tensor>) -> Result<Vec<Tensor>> {
        match qkv[0].dtype() {
            DType::F16 => self.run_as::<half::f16>(qkv, grad_output),
            DType::BF16 => self.run_as::<half::bf16>(qkv, grad_output),
            _ => self.run_as::<f32>(qkv, grad_output),
        }
    }

    fn run_as<T: GpuElement + Element>(&self, [q, k, v]: [&Tensor; 3], grad: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let problem = Problem::new(q, k, v)?;
        let bias = |bias: &Tensor| HeldBias::new(bias, bias.dims());
        // Without a pair the indicators are empty, and no index into them is valid.
        let mut bits = self.plan.indicators().flatten_all()?.to_vec1::<u8>()?;
        bits.push(0);
        let call = HeldCall::<T> {
            problem,
            q: held(q)?,
            k: held(k)?,
            v: held(v)?,
            bits: Emulator.upload(&bits)?,
            bias: self.bias.as_ref().map(bias).transpose()?,
            sinks: held_sinks(&self.options)?,
            column_bias: held_column_bias(&self.options)?,
        };
        let dense = self.plan.hides_nothing();
        let mut fold = call.fold(self.plan.config(), self.plan.heads_agree());
        fold.lists = lists(&problem, dense, self.plan.heads_agree());
        let attention = Attention {
            fold,
            dense,
            window: self.plan.config().window,
            bias: call.bias.as_ref().map(HeldBias::view),
            sinks: call.sinks.as_ref(),
            column_bias: call.column_bias.as_ref(),
            options: &self.options,
            part: self.part,
        };
        let attended = attention.forward(&Emulator, true)?;
        let like =
            |slice: &EmuSlice<T>, x: &Tensor| Tensor::from_vec(slice.download()?, x.dims(), &candle_core::Device::Cpu);
        let Some(grad) = grad else {
            return Ok(vec![like(&attended.output, q)?]);
        };
        let grad = held::<T>(&grad.force_contiguous()?)?;
        let found = attention.backward(&Emulator, &attended.saved()?, borrow(&grad).0)?;
        let mut all = vec![like(&found.dq, q)?, like(&found.dk, k)?, like(&found.dv, v)?];
        if let (Some(found), Some(bias)) = (&found.column_bias, &self.options.column_bias) {
            let gradient = Tensor::from_vec(found.download()?, bias.dims(), &candle_core::Device::Cpu)?;
            all.push(gradient.to_dtype(bias.dtype())?);
        }
        Ok(all)
    }
}

impl CustomOp3 for EmulatedOp {
    fn name(&self) -> &'static str {
        "emulated-attention"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let Some(output) = &self.output else {
            bail!("emulated-attention: expected an output, got none; this is a defect of the crate")
        };
        match &*output.storage_and_layout().0 {
            Storage::Cpu(storage) => Ok((storage.clone(), output.shape().clone())),
            other => crate::storage::not_on_cpu(&other.device()),
        }
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        output: &Tensor,
        grad_output: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] = found_or(&self.found, || self.gradients([q, k, v], output, grad_output))?;
        Ok((Some(dq), Some(dk), Some(dv)))
    }
}

impl Differentiable for EmulatedOp {
    fn found(&self) -> &FoundGradients {
        &self.found
    }

    fn gradients(&self, qkv: [&Tensor; 3], _: &Tensor, grad_output: &Tensor) -> Result<OpGradients> {
        let found = self.run(qkv, Some(grad_output))?;
        let [dq, dk, dv, column_bias @ ..] = &found[..] else {
            bail!("emulated-attention: expected three gradients; this is a defect of the crate")
        };
        Ok(([dq.clone(), dk.clone(), dv.clone()], column_bias.first().cloned()))
    }
}
