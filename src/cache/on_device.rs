//! A cache on a CUDA device: the calls of [`CompressedKvCache`] that reach it.

use super::between_devices::{state_of, Both};
use super::device_rows::DeviceRows;
use super::segments::{joined_places, RowPlace};
use super::{CacheSizes, CompressedKvCache, State};
use crate::config::{AttentionOptions, CompressionConfig, Storage};
use crate::cuda::device::Cuda;
use crate::problem::Problem;
use crate::storage::not_on_cpu;
use candle_core::{bail, DType, Device, Result, Tensor};
use std::sync::Arc;

/// All lists, by dtype.
pub(super) enum ListsByDtype {
    F32(DeviceRows<Cuda, f32>),
    F16(DeviceRows<Cuda, half::f16>),
    BF16(DeviceRows<Cuda, half::bf16>),
}

/// Runs one expression on the lists of any dtype.
macro_rules! each {
    ($lists:expr, $name:ident => $body:expr) => {
        match $lists {
            ListsByDtype::F32($name) => $body,
            ListsByDtype::F16($name) => $body,
            ListsByDtype::BF16($name) => $body,
        }
    };
}

/// The lists and shapes of a cache on a device. A clone shares them until one of the two changes.
#[derive(Clone)]
pub(super) struct GpuState {
    pub device: Device,
    sizes: CacheSizes,
    /// The storage dtype; in 8 bits that of the window and the open chain.
    pub dtype: DType,
    lists: Arc<ListsByDtype>,
}

/// The state of a cache on a device at a length.
#[derive(Clone)]
pub(super) struct GpuMark {
    state: GpuState,
    /// Whether it holds the closed chains too, and not only how many there were.
    whole: bool,
}

impl GpuMark {
    /// Takes hold of the closed chains, which `live` still has.
    ///
    /// # Errors
    /// An error of the device.
    pub fn make_whole(&mut self, live: &GpuState) -> Result<()> {
        if !self.whole {
            let gpu = cuda(&live.device)?;
            let lists = live.lists.copy(&gpu)?.at_mark(&gpu, &self.state.lists)?;
            (self.state.lists, self.whole) = (Arc::new(lists), true);
        }
        Ok(())
    }

    pub fn bytes(&self) -> usize {
        self.state.bytes_allocated()
    }
}

fn brought<T: Both>(gpu: &Cuda, cache: &CompressedKvCache) -> Result<Option<DeviceRows<Cuda, T>>> {
    let Some((problem, held)) = cache.for_device::<T>()? else {
        return Ok(None);
    };
    DeviceRows::from_host(gpu, &problem, (&cache.strategies, &cache.config), &held).map(Some)
}

pub(super) fn cuda(device: &Device) -> Result<Cuda> {
    Ok(Cuda::new(device.as_cuda_device()?))
}

impl ListsByDtype {
    fn copy(&self, gpu: &Cuda) -> Result<Self> {
        Ok(match self {
            Self::F32(lists) => Self::F32(lists.copy(gpu)?),
            Self::F16(lists) => Self::F16(lists.copy(gpu)?),
            Self::BF16(lists) => Self::BF16(lists.copy(gpu)?),
        })
    }

    fn mark(&self, gpu: &Cuda) -> Result<Self> {
        Ok(match self {
            Self::F32(lists) => Self::F32(lists.mark(gpu)?),
            Self::F16(lists) => Self::F16(lists.mark(gpu)?),
            Self::BF16(lists) => Self::BF16(lists.mark(gpu)?),
        })
    }

    fn at_mark(self, gpu: &Cuda, mark: &Self) -> Result<Self> {
        Ok(match (self, mark) {
            (Self::F32(lists), Self::F32(mark)) => Self::F32(lists.at_mark(gpu, mark)?),
            (Self::F16(lists), Self::F16(mark)) => Self::F16(lists.at_mark(gpu, mark)?),
            (Self::BF16(lists), Self::BF16(mark)) => Self::BF16(lists.at_mark(gpu, mark)?),
            _ => bail!("cache: expected a mark of its own dtype; this is a defect of the crate, please report it"),
        })
    }

    /// The rows of all of these, in order.
    fn cat(gpu: &Cuda, lists: &[&Self], places: Option<Vec<RowPlace>>) -> Result<Self> {
        macro_rules! of {
            ($kind:path) => {{
                let same = lists.iter().filter_map(|lists| match lists {
                    $kind(lists) => Some(lists),
                    _ => None,
                });
                DeviceRows::cat(gpu, &same.collect::<Vec<_>>(), places).map($kind)
            }};
        }
        match lists.first() {
            Some(Self::F16(_)) => of!(Self::F16),
            Some(Self::BF16(_)) => of!(Self::BF16),
            _ => of!(Self::F32),
        }
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
    pub fn new(cache: &CompressedKvCache, problem: &Problem, device: &Device) -> Result<Self> {
        let (gpu, settings) = (cuda(device)?, (&cache.strategies, &cache.config));
        let code = cache.options.storage.and_then(Storage::code);
        cache.strategies.check(problem.batch, problem.heads)?;
        let dtype = cache.options.storage.and_then(Storage::dtype).unwrap_or(problem.dtype);
        let lists = match dtype {
            DType::F32 => ListsByDtype::F32(DeviceRows::new(&gpu, problem, settings, code)?),
            DType::F16 => ListsByDtype::F16(DeviceRows::new(&gpu, problem, settings, code)?),
            DType::BF16 => ListsByDtype::BF16(DeviceRows::new(&gpu, problem, settings, code)?),
            other => bail!(
                "query: expected dtype f32, f16 or bf16 on CUDA, got {other:?}; convert it with to_dtype or move it \
                 with to_device(&Device::Cpu)"
            ),
        };
        Ok(Self {
            device: device.clone(),
            sizes: CacheSizes::of(problem),
            dtype,
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

    /// Bytes that forks hold, too: all of them until one of the two changes, then those of common pages.
    pub fn bytes_shared(&self) -> usize {
        match Arc::strong_count(&self.lists) {
            1 => each!(&*self.lists, lists => lists.bytes_shared()),
            _ => self.bytes_allocated(),
        }
    }

    /// Copies what other caches, or other rows, hold too.
    ///
    /// # Errors
    /// An error of the device.
    pub fn unshare(&mut self) -> Result<()> {
        let gpu = cuda(&self.device)?;
        each!(self.lists_mut(&gpu)?, lists => lists.unshare(&gpu))
    }

    /// A mark of the present; a whole one shares the closed chains too, until the lists change.
    ///
    /// # Errors
    /// An error of the device.
    pub fn mark(&self, whole: bool) -> Result<GpuMark> {
        let mut state = self.clone();
        if !whole {
            state.lists = Arc::new(self.lists.mark(&cuda(&self.device)?)?);
        }
        Ok(GpuMark { state, whole })
    }

    /// Goes back to a mark.
    ///
    /// # Errors
    /// An error of the device.
    pub fn go_back(&mut self, mark: &GpuMark) -> Result<()> {
        if mark.whole {
            *self = mark.state.clone();
            return Ok(());
        }
        let gpu = cuda(&self.device)?;
        self.lists_mut(&gpu)?;
        // The lists are this cache's own now: nothing is copied.
        let lists = std::mem::replace(&mut self.lists, mark.state.lists.clone());
        let Some(lists) = Arc::into_inner(lists) else {
            bail!("cache: expected lists of its own; this is a defect of the crate, please report it")
        };
        self.lists = Arc::new(lists.at_mark(&gpu, &mark.state.lists)?);
        Ok(())
    }

    /// Whether a sliding window is in force, so that closed chains may leave.
    pub fn slides(&self) -> bool {
        each!(&*self.lists, lists => lists.slides())
    }

    /// Where each batch row stands, once segments were given.
    pub fn places(&self) -> Option<Vec<RowPlace>> {
        each!(&*self.lists, lists => lists.places().map(<[RowPlace]>::to_vec))
    }

    pub fn has_segments(&self) -> bool {
        each!(&*self.lists, lists => lists.has_segments())
    }

    pub fn never_merges(&self) -> bool {
        each!(&*self.lists, lists => lists.never_merges())
    }

    /// Whether the columns of the row after the first `tokens` tokens are kept. Waits for the device under a sliding
    /// window.
    pub fn can_truncate(&self, tokens: usize) -> Result<bool> {
        let gpu = cuda(&self.device)?;
        each!(&*self.lists, lists => lists.can_truncate(&gpu, tokens))
    }

    /// Cuts lists that never merge back to the first `tokens` tokens.
    pub fn truncate(&mut self, tokens: usize) -> Result<()> {
        let gpu = cuda(&self.device)?;
        each!(self.lists_mut(&gpu)?, lists => lists.truncate(&gpu, tokens))
    }

    /// The same state on the CPU. Waits for the device.
    pub fn to_cpu(&self, config: &CompressionConfig) -> Result<State> {
        let gpu = cuda(&self.device)?;
        each!(&*self.lists, lists => Ok(state_of(self.sizes, config, &lists.to_host(&gpu)?)))
    }

    /// The device's state from a cache on the CPU; None from an empty one.
    pub fn from_cpu(cache: &CompressedKvCache, device: &Device) -> Result<Option<Self>> {
        let Some(state) = &cache.state else { return Ok(None) };
        let (gpu, dtype) = (cuda(device)?, state.lists.dtype());
        let lists = match dtype {
            DType::F32 => brought(&gpu, cache)?.map(ListsByDtype::F32),
            DType::F16 => brought(&gpu, cache)?.map(ListsByDtype::F16),
            DType::BF16 => brought(&gpu, cache)?.map(ListsByDtype::BF16),
            other => bail!(
                "storage: expected f32, f16 or bf16 for a cache on CUDA, got {other:?}; keep it on Device::Cpu, or \
                 append the tokens in another dtype to a new cache"
            ),
        };
        Ok(lists.map(|lists| Self {
            device: device.clone(),
            sizes: state.sizes,
            dtype,
            lists: Arc::new(lists),
        }))
    }

    pub fn sizes(&self) -> (CacheSizes, DType) {
        (self.sizes, self.dtype)
    }

    /// Row i becomes the old row `rows[i]`; all of these exist.
    pub fn select(&mut self, rows: &[usize]) -> Result<()> {
        self.lists = Arc::new(self.lists.select(&cuda(&self.device)?, rows)?);
        self.sizes.batch = rows.len();
        Ok(())
    }

    /// The lists, to change them; shared lists are copied first.
    pub fn lists_mut(&mut self, gpu: &Cuda) -> Result<&mut ListsByDtype> {
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
    /// [`Self::to_device`] in a build with other devices than the CPU.
    pub(super) fn to_any_device(&self, device: &Device) -> Result<Self> {
        let mut moved = self.clone();
        if let Some(state) = self
            .on_gpu
            .as_ref()
            .filter(|state| state.device.location() != device.location())
        {
            (moved.state, moved.on_gpu) = (Some(Arc::new(state.to_cpu(&self.config)?)), None);
        }
        if device.is_cuda() && moved.state.is_some() {
            self.check_options_for_gpu()?;
            (moved.on_gpu, moved.state) = (GpuState::from_cpu(&moved, device)?, None);
        }
        if !(device.is_cpu() || device.is_cuda()) {
            return not_on_cpu(device);
        }
        moved.journal.clear();
        Ok(moved)
    }

    /// [`Self::cat`] of caches of equal settings; the first one is on a GPU.
    pub(super) fn cat_on_gpu(caches: &[Self]) -> Result<Self> {
        let mut states = Vec::with_capacity(caches.len());
        for (index, cache) in caches.iter().enumerate() {
            let Some(state) = &cache.on_gpu else {
                bail!("cat: expected caches that hold tokens on one GPU, got cache {index} without; leave it out")
            };
            states.push(state);
        }
        let first = states[0];
        let shape = |state: &GpuState| {
            let sizes = CacheSizes {
                batch: 0,
                ..state.sizes
            };
            let window = each!(&*state.lists, lists => lists.sliding_window());
            (state.device.location(), sizes, state.dtype, window)
        };
        if let Some(other) = states.iter().find(|state| shape(state) != shape(first)) {
            bail!(
                "cat: expected caches of equal device, heads, sizes, storage and sliding window, got {:?} and {:?}; \
                 they are of different models",
                shape(first),
                shape(other)
            )
        }
        let rows = |state: &&GpuState| (state.seq_len(), state.sizes.batch, state.places());
        let (_, places) = joined_places(states.iter().map(rows).collect());
        let lists: Vec<&ListsByDtype> = states.iter().map(|state| &*state.lists).collect();
        let mut joined = caches[0].clone();
        joined.journal.clear();
        joined.on_gpu = Some(GpuState {
            lists: Arc::new(ListsByDtype::cat(&cuda(&first.device)?, &lists, places)?),
            sizes: CacheSizes {
                batch: states.iter().map(|state| state.sizes.batch).sum(),
                ..first.sizes
            },
            ..first.clone()
        });
        Ok(joined)
    }

    fn check_options_for_gpu(&self) -> Result<()> {
        match self.options.budget {
            Some(budget) => bail!(
                "budget: expected None for a cache on CUDA, got {budget}; keep the cache on Device::Cpu, or bound it \
                 by a sliding window"
            ),
            None => Ok(()),
        }
    }

    pub(super) fn check_for_gpu(
        &self,
        problem: &Problem,
        q: &Tensor,
        options: Option<&AttentionOptions>,
    ) -> Result<()> {
        let held = match (&self.state, &self.on_gpu) {
            (Some(_), _) => Some(&Device::Cpu),
            (_, Some(state)) => Some(&state.device),
            _ => None,
        };
        if let Some(held) = held.filter(|held| held.location() != q.device().location()) {
            bail!(
                "device: expected the cache's {:?}, got {:?}; move the tensors with to_device, or reset() the cache",
                held.location(),
                q.device().location()
            )
        }
        self.check_options_for_gpu()?;
        self.storage_for(problem.dtype, problem.dtype)?;
        if let Some(state) = &self.on_gpu {
            if state.sizes != CacheSizes::of(problem) {
                bail!(
                    "query and key: expected the cache's batch, heads, KV heads and head_dim {:?}, got {:?}; reset() \
                     the cache for other shapes",
                    state.sizes,
                    CacheSizes::of(problem)
                )
            }
        }
        match options {
            Some(options) => options.check().and_then(|()| problem.check_sinks(options)),
            None => Ok(()),
        }
    }
}
