//! One call of a cache on a CUDA device: tensors taken apart into buffers.

use super::call::TokenCall;
use super::device_groups::RowsCall;
use super::device_rows::DeviceRows;
use super::on_device::{cuda, GpuState, ListsByDtype};
use super::step::bias_view;
use super::CompressedKvCache;
use crate::config::AttentionOptions;
use crate::cuda::device::Cuda;
use crate::cuda::extras::{ExtraBuffers, ScoreBuffer};
use crate::cuda::on_gpu::GpuElement;
use crate::cuda::tensors::{self, source, stored, tensor};
use crate::problem::Problem;
use candle_core::{DType, Device, Result, Tensor};

impl CompressedKvCache {
    /// [`Self::take_in`] for tensors on a CUDA device, or a cache that is on one.
    pub(super) fn take_in_on_gpu(
        &mut self,
        problem: &Problem,
        call: &TokenCall,
        attend: bool,
    ) -> Result<Option<Tensor>> {
        let q = &call.qkv[0];
        self.check_for_gpu(problem, q, call.options.as_ref())?;
        let mut state = match self.on_gpu.take() {
            Some(state) => state,
            None => GpuState::new(self, problem, q.device())?,
        };
        let limit = self.options.max_entries;
        let result = step(&mut state, problem, call, attend, limit);
        if state.seq_len() > 0 {
            self.on_gpu = Some(state);
        }
        result
    }
}

/// Runs one call on checked tensors, in the storage dtype. Only an error of the device leaves `state` half changed.
fn step(
    state: &mut GpuState,
    problem: &Problem,
    call: &TokenCall,
    attend: bool,
    limit: Option<usize>,
) -> Result<Option<Tensor>> {
    let ([q, k, v], options) = (&call.qkv, call.options.as_ref());
    let (device, gpu, storage) = (state.device.clone(), cuda(&state.device)?, state.dtype);
    let full = [
        problem.batch,
        problem.heads,
        problem.tokens,
        state.seq_len() + problem.tokens,
    ];
    let bias = bias_view(options.and_then(|options| options.bias.as_ref()), full, DType::F32)?;
    let sinks = match options {
        Some(options) => problem.device_sinks(options, q)?,
        None => None,
    };
    let (q, k, v) = (q.to_dtype(storage)?, k.to_dtype(storage)?, v.to_dtype(storage)?);
    let call = DeviceCall {
        gpu: &gpu,
        device: &device,
        problem,
        tensors: [&q, &k, &v],
        options,
        attend,
        bias: bias.as_ref(),
        sinks: sinks.as_ref(),
        scores: call.scores.as_ref(),
        limit,
    };
    let output = match state.lists_mut(&gpu)? {
        ListsByDtype::F32(lists) => call.run(lists),
        ListsByDtype::F16(lists) => call.run(lists),
        ListsByDtype::BF16(lists) => call.run(lists),
    }?;
    output.map(|output| output.to_dtype(problem.dtype)).transpose()
}

/// One checked call, its tensors in the storage dtype.
struct DeviceCall<'a> {
    gpu: &'a Cuda,
    device: &'a Device,
    problem: &'a Problem,
    tensors: [&'a Tensor; 3],
    /// None to append the tokens without attending.
    options: Option<&'a AttentionOptions>,
    attend: bool,
    /// The bias in f32, as a (B, H, new tokens, all tokens) view.
    bias: Option<&'a Tensor>,
    /// Sink logits (H) in f32, at the start of their buffer.
    sinks: Option<&'a Tensor>,
    /// (B, Hk, new tokens, 1), f32, contiguous, where the caller gives them.
    scores: Option<&'a Tensor>,
    limit: Option<usize>,
}

impl DeviceCall<'_> {
    fn run<T: GpuElement>(&self, lists: &mut DeviceRows<Cuda, T>) -> Result<Option<Tensor>> {
        let Problem {
            batch,
            heads,
            tokens,
            value_dim,
            ..
        } = *self.problem;
        let held = self.tensors.map(Tensor::storage_and_layout);
        let [q, k, v] = [&held[0], &held[1], &held[2]].map(|(storage, layout)| source::<T>(stored(storage, layout)?));
        let held_scores = self.scores.map(Tensor::storage_and_layout);
        let scores = match &held_scores {
            Some((storage, layout)) => Some(ScoreBuffer {
                data: stored(storage, layout)?.0.as_cuda_slice::<f32>()?,
                first: layout.start_offset(),
                stride: tokens,
            }),
            None => None,
        };
        let held_bias = self.bias.map(Tensor::storage_and_layout);
        let bias = match &held_bias {
            Some((storage, layout)) => Some(tensors::bias_view(stored(storage, layout)?)?),
            None => None,
        };
        let held_sinks = self.sinks.map(Tensor::storage_and_layout);
        let sinks = match &held_sinks {
            Some((storage, layout)) => Some(stored(storage, layout)?.0.as_cuda_slice::<f32>()?),
            None => None,
        };
        let call = RowsCall {
            problem: self.problem,
            qkv: [q?, k?, v?],
            options: self.options,
            attend: self.attend,
            extras: ExtraBuffers {
                bias,
                sinks,
                scores,
                ..ExtraBuffers::none()
            },
            limit: self.limit,
        };
        let device = self.device.as_cuda_device()?;
        let shape = (batch, heads, tokens, value_dim);
        Ok(lists
            .take_in(self.gpu, &call)?
            .map(|output| tensor(output, shape, device)))
    }
}
