//! A cache on a CUDA device: the calls of [`CompressedKvCache`] that reach it.

use super::{CompressedKvCache, Sizes};
use crate::config::AttentionOptions;
use crate::cuda::cache::DeviceLists;
use crate::cuda::device::Cuda;
use crate::cuda::gpu::GpuElement;
use crate::cuda::tensors::{source, stored, tensor};
use crate::problem::Problem;
use candle_core::{bail, DType, Device, Result, Tensor};
use std::sync::Arc;

/// All lists, by dtype.
enum Lists {
    F32(DeviceLists<Cuda, f32>),
    F16(DeviceLists<Cuda, half::f16>),
    BF16(DeviceLists<Cuda, half::bf16>),
}

/// Runs one expression on the lists of any dtype.
macro_rules! each {
    ($lists:expr, $name:ident => $body:expr) => {
        match $lists {
            Lists::F32($name) => $body,
            Lists::F16($name) => $body,
            Lists::BF16($name) => $body,
        }
    };
}

/// What a cache holds on a device. A clone shares it until one of the two changes.
#[derive(Clone)]
pub(super) struct GpuState {
    device: Device,
    sizes: Sizes,
    dtype: DType,
    lists: Arc<Lists>,
}

fn cuda(device: &Device) -> Result<Cuda> {
    Ok(Cuda::new(device.as_cuda_device()?))
}

impl Lists {
    fn copy(&self, gpu: &Cuda) -> Result<Self> {
        Ok(match self {
            Self::F32(lists) => Self::F32(lists.copy(gpu)?),
            Self::F16(lists) => Self::F16(lists.copy(gpu)?),
            Self::BF16(lists) => Self::BF16(lists.copy(gpu)?),
        })
    }

    fn select(&self, gpu: &Cuda, rows: &[usize]) -> Result<Self> {
        Ok(match self {
            Self::F32(lists) => Self::F32(lists.select(gpu, rows)?),
            Self::F16(lists) => Self::F16(lists.select(gpu, rows)?),
            Self::BF16(lists) => Self::BF16(lists.select(gpu, rows)?),
        })
    }
}

impl GpuState {
    fn new(cache: &CompressedKvCache, problem: &Problem, device: &Device) -> Result<Self> {
        let (gpu, strategies, config) = (cuda(device)?, &cache.strategies, &cache.config);
        strategies.check(problem.batch, problem.heads)?;
        let lists = match problem.dtype {
            DType::F32 => Lists::F32(DeviceLists::new(&gpu, problem, strategies, config)?),
            DType::F16 => Lists::F16(DeviceLists::new(&gpu, problem, strategies, config)?),
            DType::BF16 => Lists::BF16(DeviceLists::new(&gpu, problem, strategies, config)?),
            other => bail!(
                "query: expected dtype f32, f16 or bf16 on CUDA, got {other:?}; convert it with to_dtype or move it with \
                 to_device(&Device::Cpu)"
            ),
        };
        Ok(Self {
            device: device.clone(),
            sizes: Sizes::of(problem),
            dtype: problem.dtype,
            lists: Arc::new(lists),
        })
    }

    pub fn seq_len(&self) -> usize {
        each!(&*self.lists, lists => lists.seq_len())
    }

    pub fn lens(&self) -> Result<Vec<Vec<usize>>> {
        let gpu = cuda(&self.device)?;
        each!(&*self.lists, lists => lists.entries(&gpu))
    }

    pub fn bytes(&self) -> Result<usize> {
        let gpu = cuda(&self.device)?;
        each!(&*self.lists, lists => lists.bytes(&gpu))
    }

    pub fn bytes_allocated(&self) -> usize {
        each!(&*self.lists, lists => lists.bytes_allocated())
    }

    pub fn sizes(&self) -> (Sizes, DType) {
        (self.sizes, self.dtype)
    }

    /// Row i becomes the old row `rows[i]`, all of which exist.
    pub fn select(&mut self, rows: &[usize]) -> Result<()> {
        self.lists = Arc::new(self.lists.select(&cuda(&self.device)?, rows)?);
        self.sizes.batch = rows.len();
        Ok(())
    }

    /// The lists, to change them; a clone's are copied first.
    fn lists_mut(&mut self, gpu: &Cuda) -> Result<&mut Lists> {
        if Arc::get_mut(&mut self.lists).is_none() {
            self.lists = Arc::new(self.lists.copy(gpu)?);
        }
        match Arc::get_mut(&mut self.lists) {
            Some(lists) => Ok(lists),
            None => bail!("cache: expected lists of its own; this is a defect of the crate, please report it"),
        }
    }
}

impl CompressedKvCache {
    /// [`Self::take_in`] for tensors on a CUDA device, or a cache that is on one.
    pub(super) fn take_in_on_gpu(
        &mut self,
        problem: &Problem,
        qkv: [&Tensor; 3],
        options: Option<&AttentionOptions>,
    ) -> Result<Option<Tensor>> {
        self.check_for_gpu(problem, qkv[0], options)?;
        let mut state = match self.on_gpu.take() {
            Some(state) => state,
            None => GpuState::new(self, problem, qkv[0].device())?,
        };
        let limit = self.options.max_entries;
        let result = step(&mut state, problem, qkv, options, limit);
        if state.seq_len() > 0 {
            self.on_gpu = Some(state);
        }
        result
    }

    fn check_for_gpu(&self, problem: &Problem, q: &Tensor, options: Option<&AttentionOptions>) -> Result<()> {
        let held = match (&self.state, &self.on_gpu) {
            (Some(_), _) => Some(&Device::Cpu),
            (_, Some(state)) => Some(&state.device),
            _ => None,
        };
        if let Some(held) = held.filter(|held| !held.same_device(q.device())) {
            bail!(
                "device: expected the cache's {:?}, got {:?}; move the tensors with to_device, or reset() the cache",
                held.location(),
                q.device().location()
            )
        }
        if let Some(storage) = self.options.storage.filter(|storage| *storage != problem.dtype) {
            bail!(
                "storage: expected the dtype of the keys for a cache on CUDA, {:?}, got {storage:?}; leave it None, or \
                 convert the inputs with to_dtype",
                problem.dtype
            )
        }
        if let Some(state) = &self.on_gpu {
            if state.sizes() != (Sizes::of(problem), problem.dtype) {
                bail!(
                    "query and key: expected the cache's batch, heads, KV heads, head_dim and dtype {:?}, got {:?}; \
                     reset() the cache for others",
                    state.sizes(),
                    (Sizes::of(problem), problem.dtype)
                )
            }
        }
        let Some(options) = options else { return Ok(()) };
        options.check()?;
        if options.bias.is_some() || options.dropout.is_some() {
            bail!(
                "options: expected no bias and no dropout for a cache on CUDA, got {}; leave it out, or move cache and \
                 tensors to the CPU",
                if options.bias.is_some() { "a bias" } else { "dropout" }
            )
        }
        Ok(())
    }
}

/// One call on checked tensors; only a device's own failure leaves `state` half changed.
fn step(
    state: &mut GpuState,
    problem: &Problem,
    qkv: [&Tensor; 3],
    options: Option<&AttentionOptions>,
    limit: Option<usize>,
) -> Result<Option<Tensor>> {
    let (device, gpu) = (state.device.clone(), cuda(&state.device)?);
    match state.lists_mut(&gpu)? {
        Lists::F32(lists) => step_as(lists, &gpu, problem, qkv, &device, options, limit),
        Lists::F16(lists) => step_as(lists, &gpu, problem, qkv, &device, options, limit),
        Lists::BF16(lists) => step_as(lists, &gpu, problem, qkv, &device, options, limit),
    }
}

fn step_as<T: GpuElement>(
    lists: &mut DeviceLists<Cuda, T>,
    gpu: &Cuda,
    problem: &Problem,
    qkv: [&Tensor; 3],
    device: &Device,
    options: Option<&AttentionOptions>,
    limit: Option<usize>,
) -> Result<Option<Tensor>> {
    if let Some(limit) = limit {
        let needed = lists.most_entries(gpu, problem.tokens, limit)?;
        if needed > limit {
            bail!(
                "max_entries: expected at most {limit} entries in a list, got up to {needed} with the {} new tokens; \
                 raise the limit, append fewer at once, or reset()",
                problem.tokens
            )
        }
    }
    let held = qkv.map(Tensor::storage_and_layout);
    let [q, k, v] = [&held[0], &held[1], &held[2]].map(|(storage, layout)| source::<T>(stored(storage, layout)?));
    let sources = [q?, k?, v?];
    let Some(options) = options else {
        return lists.append(gpu, sources, problem.tokens).map(|()| None);
    };
    let output = lists.append_and_attend(gpu, sources, problem.tokens, options)?;
    Ok(Some(tensor(output, qkv[0].dims(), device.as_cuda_device()?)))
}
