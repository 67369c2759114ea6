//! The calls that the CUDA path puts together, on CPU tensors under the emulator, with their gradients: for tests.

use super::{borrow, held, held_sinks, HeldBias, HeldCall};
use crate::config::AttentionOptions;
use crate::cpu::number::element::Element;
use crate::cuda::attention::{lists, Attention};
use crate::cuda::emulator::device::{EmuSlice, Emulator};
use crate::cuda::on_gpu::{Gpu, GpuElement};
use crate::cuda::operands::Part;
use crate::op::composed::{self, PlainCall};
use crate::plan::MergePlan;
use crate::problem::Problem;
use candle_core::{bail, CpuStorage, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor};

/// [`crate::attend`] as on a CUDA device, of tensors in the order (B, H, N, D): segments, values of another size than
/// keys, and fewer queries than keys. Differentiable in query, key and value.
///
/// # Errors
/// As on a device, or an error that the emulator detects.
pub fn composed(qkv: [&Tensor; 3], plan: &MergePlan, options: &AttentionOptions) -> Result<Tensor> {
    composed::attend(qkv, plan, options, &|call| {
        let ([q, k, v], first_row) = (call.qkv, call.part.first_row);
        let output = q.apply_op3(k, v, EmulatedOp::new(call)?)?;
        output.narrow(2, first_row, output.dim(2)? - first_row)
    })
}

/// One call for the kernels, run beforehand.
struct EmulatedOp {
    plan: MergePlan,
    options: AttentionOptions,
    bias: Option<Tensor>,
    part: Part,
    output: Option<Tensor>,
}

impl EmulatedOp {
    fn new(call: &PlainCall) -> Result<Self> {
        let mut op = Self {
            plan: call.plan.clone(),
            options: call.options.clone(),
            bias: call.bias.cloned(),
            part: call.part,
            output: None,
        };
        op.output = Some(op.run(call.qkv, None)?[0].clone());
        Ok(op)
    }

    /// The output, or with its gradient those of query, key and value.
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
        Ok(vec![like(&found.dq, q)?, like(&found.dk, k)?, like(&found.dv, v)?])
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
        _: &Tensor,
        grad_output: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let found = self.run([q, k, v], Some(grad_output))?;
        let [dq, dk, dv] = &found[..] else {
            bail!("emulated-attention: expected three gradients; this is a defect of the crate")
        };
        Ok((Some(dq.clone()), Some(dk.clone()), Some(dv.clone())))
    }
}
