//! The CUDA path on candle's tensors. Nothing here waits for the device.

use super::attention::{lists, Attention};
use super::decide::{indicators, reads_bias, DecideCall, ScoreCall};
use super::device::Cuda;
use super::fold::FoldCall;
use super::on_gpu::{row_layout, Gpu, GpuElement, Number};
use super::sizes::padded;
use super::{loss, observe};
use crate::config::{AttentionOptions, CompressionConfig, Criterion, HeadStrategies};
use crate::cuda::forward::Saved;
use crate::cuda::operands::{BiasBuffer, Part};
use crate::plan::{without_scores, MergePlan};
use crate::problem::{bias_as, Problem, RowLayout};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::op::BackpropOp;
use candle_core::{bail, CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};

/// A storage and its tensor's layout.
pub(crate) type Stored<'a> = (&'a CudaStorage, &'a Layout);

/// Calls `$function::<T>` for a dtype that the kernels take.
macro_rules! for_dtype {
    ($dtype:expr, $function:ident($($arg:expr),* $(,)?)) => {
        match $dtype {
            DType::F16 => $function::<half::f16>($($arg),*),
            DType::BF16 => $function::<half::bf16>($($arg),*),
            DType::F32 => $function::<f32>($($arg),*),
            other => bail!(
                "query: expected dtype f32, f16 or bf16 on CUDA, got {other:?}; convert it with to_dtype or move it \
                 with to_device(&Device::Cpu)"
            ),
        }
    };
}

pub(crate) fn source<T: GpuElement>((storage, layout): Stored<'_>) -> Result<(&CudaSlice<T>, RowLayout)> {
    Ok((storage.as_cuda_slice::<T>()?, row_layout(layout)))
}

/// An f32 bias of four axes.
pub(crate) fn bias_view((storage, layout): Stored<'_>) -> Result<BiasBuffer<'_, Cuda>> {
    Ok(BiasBuffer {
        data: storage.as_cuda_slice::<f32>()?,
        offset: layout.start_offset(),
        strides: [0, 1, 2, 3].map(|axis| layout.stride()[axis]),
    })
}

/// The storage behind a tensor on a CUDA device.
pub(crate) fn stored<'a>(storage: &'a Storage, layout: &'a Layout) -> Result<Stored<'a>> {
    match storage {
        Storage::Cuda(storage) => Ok((storage, layout)),
        other => bail!(
            "device: expected all tensors on one CUDA device, got {:?}; move them with to_device",
            other.device().location()
        ),
    }
}

/// A new tensor without a graph.
pub(crate) fn tensor<T: Number>(slice: CudaSlice<T>, shape: impl Into<Shape>, device: &CudaDevice) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// The merge indicators (B, H, N-1), u8, on the tensors' device.
///
/// # Errors
/// A dtype that the kernels do not accept, or an error of the device.
pub(crate) fn decide(
    problem: &Problem,
    qkv: [&Tensor; 3],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Tensor> {
    if problem.value_dim != problem.head_dim {
        let ([q, k, v], options) = padded(qkv, options)?;
        let problem = Problem::of_rows([&q, &k, &v], options.causal)?;
        return decide(&problem, [&q, &k, &v], strategies, config, &options);
    }
    if problem.pairs() == 0 {
        return Tensor::zeros((problem.batch, problem.heads, 0), DType::U8, qkv[0].device());
    }
    for_dtype!(problem.dtype, decide_as(problem, qkv, strategies, config, options))
}

fn decide_as<T: GpuElement>(
    problem: &Problem,
    qkv: [&Tensor; 3],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Tensor> {
    let held = qkv.map(Tensor::storage_and_layout);
    let [q, k, v] = [&held[0], &held[1], &held[2]].map(|(storage, layout)| stored(storage, layout));
    let (q, k, v) = (q?, k?, v?);
    let device = q.0.device().clone();
    let gpu = Cuda::new(&device);
    let bias = options.bias.as_ref().filter(|_| reads_bias(config));
    let bias = bias.map(|bias| bias_as(bias, DType::F32)?.broadcast_as(&problem.bias_dims()));
    let bias = bias.transpose()?;
    let bias_storage = bias.as_ref().map(Tensor::storage_and_layout);
    let call = DecideCall {
        problem: *problem,
        q: source::<T>(q)?,
        k: source::<T>(k)?,
        strategies,
        config,
        bias: match &bias_storage {
            Some((storage, layout)) => Some(bias_view(stored(storage, layout)?)?),
            None => None,
        },
    };
    let bits = match config.criterion {
        Criterion::ObservedMass => observe::indicators(&gpu, &call, source::<T>(v)?, options.scale(problem.head_dim))?,
        Criterion::QueryKey | Criterion::KeyKey => indicators(&gpu, &call)?,
        Criterion::Given => return without_scores(),
    };
    Ok(tensor(bits, (problem.batch, problem.heads, problem.pairs()), &device))
}

/// The merge indicators (B, H, N-1), u8, of contiguous f32 scores (B, Hk, N) on a CUDA device.
///
/// # Errors
/// An error of the device.
pub(crate) fn decide_given(scores: &Tensor, call: &ScoreCall) -> Result<Tensor> {
    let [batch, heads, _, tokens] = call.sizes;
    let shape = (batch, heads, tokens - 1);
    if tokens == 1 {
        return Tensor::zeros(shape, DType::U8, scores.device());
    }
    // The kernel reads from the start of the buffer.
    let scores = scores.force_contiguous()?;
    let (storage, layout) = scores.storage_and_layout();
    let (storage, _) = stored(&storage, layout)?;
    let device = storage.device();
    let bits = call.indicators(&Cuda::new(device), storage.as_cuda_slice::<f32>()?)?;
    Ok(tensor(bits, shape, device))
}

/// One attention call on candle's storages.
pub(crate) struct TensorCall<'a> {
    pub problem: Problem,
    pub plan: &'a MergePlan,
    pub options: &'a AttentionOptions,
    /// The bias in f32, as a (B, H, rows, N) view of the rows from `part.first_row` on.
    pub bias: Option<&'a Tensor>,
    /// Sink logits (H) in f32, at the start of their buffer.
    pub sinks: Option<&'a Tensor>,
    /// A column bias (B, Hk, N) in f32, contiguous from the start of its buffer.
    pub column_bias: Option<&'a Tensor>,
    pub part: Part,
}

impl TensorCall<'_> {
    /// The output (B, H, N, D). With `keep` also the tensors that the backward pass needs: the log-sum-exps
    /// (2, B, H, N), and the rounding error of the output if it is kept.
    ///
    /// # Errors
    /// A dtype, a size or strides that the kernels do not accept, or an error of the device.
    pub fn forward(&self, qkv: [Stored; 3], keep: bool) -> Result<(CudaStorage, Vec<Tensor>)> {
        for_dtype!(self.problem.dtype, forward_as(self, qkv, keep))
    }

    /// The gradients of query, key and value, and that of the column bias in f32, if there is one; `output` and `kept`
    /// are the forward's, `grad_output` is contiguous.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn backward(
        &self,
        qkv: [&Tensor; 3],
        output: &Tensor,
        kept: &[Tensor],
        grad_output: &Tensor,
    ) -> Result<([Tensor; 3], Option<Tensor>)> {
        for_dtype!(self.problem.dtype, backward_as(self, qkv, output, kept, grad_output))
    }

    /// Calls `body` with the checked parts of this call.
    fn with<T: GpuElement, R>(
        &self,
        [q, k, v]: [Stored; 3],
        body: impl FnOnce(&Cuda, &Attention<Cuda, T>) -> Result<R>,
    ) -> Result<R> {
        let bits = self.plan.indicators().storage_and_layout();
        let (bits, _) = stored(&bits.0, bits.1)?;
        let bias_storage = self.bias.map(Tensor::storage_and_layout);
        let bias = match &bias_storage {
            Some((storage, layout)) => Some(bias_view(stored(storage, layout)?)?),
            None => None,
        };
        let floats = [self.sinks, self.column_bias].map(|numbers| numbers.map(Tensor::storage_and_layout));
        let [sinks, column_bias] = floats.each_ref().map(|held| match held {
            Some((storage, layout)) => stored(storage, layout)?.0.as_cuda_slice::<f32>().map(Some),
            None => Ok(None),
        });
        let gpu = Cuda::new(q.0.device());
        // Without a pair the indicators are empty, and no index into them is valid.
        let none = match self.problem.pairs() {
            0 => Some(gpu.zeros::<u8>(1)?),
            _ => None,
        };
        let attention = Attention {
            fold: FoldCall {
                problem: self.problem,
                q: source::<T>(q)?,
                k: source::<T>(k)?,
                v: source::<T>(v)?,
                bits: match &none {
                    Some(none) => none,
                    None => bits.as_cuda_slice::<u8>()?,
                },
                fold: self.plan.config().fold,
                lists: lists(&self.problem, self.plan.hides_nothing(), self.plan.heads_agree()),
            },
            dense: self.plan.hides_nothing(),
            window: self.plan.config().window,
            bias,
            sinks: sinks?,
            column_bias: column_bias?,
            options: self.options,
            part: self.part,
        };
        body(&gpu, &attention)
    }
}

fn forward_as<T: GpuElement>(call: &TensorCall, qkv: [Stored; 3], keep: bool) -> Result<(CudaStorage, Vec<Tensor>)> {
    let device = qkv[0].0.device().clone();
    call.with::<T, _>(qkv, |gpu, attention| {
        let attended = attention.forward(gpu, keep)?;
        let Problem {
            batch,
            heads,
            tokens,
            head_dim,
            ..
        } = call.problem;
        let mut kept = Vec::new();
        if let Some(found) = attended.kept {
            kept.push(tensor(found.log_sum_exp, (2, batch, heads, tokens), &device));
            kept.extend(
                found
                    .rest
                    .map(|rest| tensor(rest, (batch, heads, tokens, head_dim), &device)),
            );
        }
        Ok((CudaStorage::wrap_cuda_slice(attended.output, device), kept))
    })
}

fn backward_as<T: GpuElement>(
    call: &TensorCall,
    qkv: [&Tensor; 3],
    output: &Tensor,
    kept: &[Tensor],
    grad_output: &Tensor,
) -> Result<([Tensor; 3], Option<Tensor>)> {
    let held = [qkv[0], qkv[1], qkv[2], output, &kept[0], grad_output].map(Tensor::storage_and_layout);
    let rest = kept.get(1).map(Tensor::storage_and_layout);
    let mut all = Vec::with_capacity(held.len());
    for (storage, layout) in &held {
        all.push(stored(storage, layout)?);
    }
    let [q, k, v, output, log_sum_exp, grad_output] = all[..] else {
        bail!("compressed-attention: expected 6 tensors; this is a defect of the crate, please report it")
    };
    let device = q.0.device().clone();
    call.with::<T, _>([q, k, v], |gpu, attention| {
        let rest = match &rest {
            Some((storage, layout)) => Some(stored(storage, layout)?.0.as_cuda_slice::<T>()?),
            None => None,
        };
        let saved = Saved {
            output: output.0.as_cuda_slice::<T>()?,
            rest,
            log_sum_exp: log_sum_exp.0.as_cuda_slice::<f32>()?,
        };
        let gradients = attention.backward(gpu, &saved, grad_output.0.as_cuda_slice::<T>()?)?;
        let Problem {
            batch,
            kv_heads,
            tokens,
            ..
        } = call.problem;
        let column_bias = gradients.column_bias;
        Ok((
            [
                tensor(gradients.dq, qkv[0].dims(), &device),
                tensor(gradients.dk, qkv[1].dims(), &device),
                tensor(gradients.dv, qkv[2].dims(), &device),
            ],
            column_bias.map(|found| tensor(found, (batch, kv_heads, tokens), &device)),
        ))
    })
}

/// The inputs of the compression loss.
pub(crate) struct LossCall<'a> {
    pub problem: Problem,
    pub strategies: &'a HeadStrategies,
    pub config: &'a CompressionConfig,
}

impl LossCall<'_> {
    /// [S, M], f32.
    ///
    /// # Errors
    /// A dtype that the kernels do not accept, or an error of the device.
    pub fn sums(&self, q: Stored, k: Stored) -> Result<CudaStorage> {
        for_dtype!(self.problem.dtype, loss_sums_as(self, q, k))
    }

    /// The gradients of query and key from the gradient of [S, M], f32 on the device.
    ///
    /// # Errors
    /// As [`Self::sums`].
    pub fn gradients(&self, q: &Tensor, k: &Tensor, upstream: &Tensor) -> Result<[Tensor; 2]> {
        for_dtype!(self.problem.dtype, loss_gradients_as(self, q, k, upstream))
    }

    fn decide<'a, T: GpuElement>(&'a self, q: Stored<'a>, k: Stored<'a>) -> Result<DecideCall<'a, Cuda, T>> {
        Ok(DecideCall {
            problem: self.problem,
            q: source(q)?,
            k: source(k)?,
            strategies: self.strategies,
            config: self.config,
            bias: None,
        })
    }
}

fn loss_sums_as<T: GpuElement>(call: &LossCall, q: Stored, k: Stored) -> Result<CudaStorage> {
    let device = q.0.device().clone();
    let sums = loss::sums(&Cuda::new(&device), &call.decide::<T>(q, k)?)?;
    Ok(CudaStorage::wrap_cuda_slice(sums, device))
}

fn loss_gradients_as<T: GpuElement>(call: &LossCall, q: &Tensor, k: &Tensor, upstream: &Tensor) -> Result<[Tensor; 2]> {
    let (dims, upstream) = ([q.dims(), k.dims()], upstream.to_dtype(DType::F32)?.contiguous()?);
    let held = [q, k, &upstream].map(Tensor::storage_and_layout);
    let [q, k, upstream] = [&held[0], &held[1], &held[2]].map(|(storage, layout)| stored(storage, layout));
    let (q, k, (upstream, layout)) = (q?, k?, upstream?);
    if layout.start_offset() != 0 {
        bail!("compression-loss: expected a gradient at the start of its buffer; call copy() on it first")
    }
    let device = q.0.device().clone();
    let [dq, dk] = loss::gradients(
        &Cuda::new(&device),
        &call.decide::<T>(q, k)?,
        upstream.as_cuda_slice::<f32>()?,
    )?;
    Ok([tensor(dq, dims[0], &device), tensor(dk, dims[1], &device)])
}
