//! A KV cache's lists under the emulator, on CPU tensors: for tests.

use super::device::Emulator;
use super::{borrow, held, held_sinks, HeldBias};
use crate::cache::{joined_places, Both, CacheOptions, CompressedKvCache, DeviceRows, RowsCall};
use crate::config::{AttentionOptions, CompressionConfig, HeadStrategies, Storage};
use crate::cpu::number::element::Element;
use crate::cuda::extras::{ExtraBuffers, ScoreBuffer};
use crate::cuda::on_gpu::{Gpu, GpuElement};
use crate::problem::Problem;
use candle_core::{bail, DType, Device, Result, Tensor};

enum EmulatedLists {
    F32(DeviceRows<Emulator, f32>),
    F16(DeviceRows<Emulator, half::f16>),
    BF16(DeviceRows<Emulator, half::bf16>),
}

/// The lists that [`crate::CompressedKvCache`] keeps on a CUDA device.
pub struct EmulatedCache {
    lists: EmulatedLists,
    problem: Problem,
    strategies: HeadStrategies,
    config: CompressionConfig,
    options: CacheOptions,
}

macro_rules! each {
    ($cache:expr, $lists:ident => $body:expr) => {
        match $cache {
            EmulatedLists::F32($lists) => $body,
            EmulatedLists::F16($lists) => $body,
            EmulatedLists::BF16($lists) => $body,
        }
    };
}

impl EmulatedCache {
    /// An empty cache for tensors like these.
    ///
    /// # Errors
    /// As on a device.
    pub fn new(
        qkv: &[Tensor; 3],
        strategies: &HeadStrategies,
        config: &CompressionConfig,
        options: &CacheOptions,
    ) -> Result<Self> {
        let problem = Problem::new(&qkv[0], &qkv[1], &qkv[2])?;
        let (settings, code) = ((strategies, config), options.storage.and_then(Storage::code));
        let lists = match options.storage.and_then(Storage::dtype).unwrap_or(problem.dtype) {
            DType::F32 => EmulatedLists::F32(DeviceRows::new(&Emulator, &problem, settings, code)?),
            DType::F16 => EmulatedLists::F16(DeviceRows::new(&Emulator, &problem, settings, code)?),
            DType::BF16 => EmulatedLists::BF16(DeviceRows::new(&Emulator, &problem, settings, code)?),
            other => return no_kernels(other),
        };
        Ok(Self::of(lists, problem, (strategies, config, options)))
    }

    fn of(
        lists: EmulatedLists,
        problem: Problem,
        (strategies, config, options): (&HeadStrategies, &CompressionConfig, &CacheOptions),
    ) -> Self {
        Self {
            lists,
            problem,
            strategies: strategies.clone(),
            config: config.clone(),
            options: options.clone(),
        }
    }

    /// The same cache on the CPU.
    ///
    /// # Errors
    /// An error that the emulator detects.
    pub fn to_cpu(&self) -> Result<CompressedKvCache> {
        let settings = (&self.strategies, &self.config, &self.options);
        each!(&self.lists, lists => CompressedKvCache::from_device(settings, &self.problem, &lists.to_host(&Emulator)?))
    }

    /// A cache of the CPU, stored in this dtype.
    ///
    /// # Errors
    /// As on a device, or an error that the emulator detects.
    pub fn from_cpu(cache: &CompressedKvCache, options: &CacheOptions, dtype: DType) -> Result<Self> {
        let (strategies, config) = (cache.strategies(), cache.config());
        let (problem, lists) = match dtype {
            DType::F32 => brought(cache).map(|(problem, lists)| (problem, EmulatedLists::F32(lists)))?,
            DType::F16 => brought(cache).map(|(problem, lists)| (problem, EmulatedLists::F16(lists)))?,
            DType::BF16 => brought(cache).map(|(problem, lists)| (problem, EmulatedLists::BF16(lists)))?,
            other => return no_kernels(other),
        };
        Ok(Self::of(lists, problem, (strategies, config, options)))
    }

    /// Cuts the cache back to the first `tokens` tokens; returns false where the lists merge, or where a sliding window
    /// has passed columns of the next row.
    ///
    /// # Errors
    /// An error that the emulator detects.
    pub fn truncate(&mut self, tokens: usize) -> Result<bool> {
        each!(&mut self.lists, lists => {
            let exact = lists.never_merges() && lists.can_truncate(&Emulator, tokens)?;
            if exact {
                lists.truncate(&Emulator, tokens)?;
            }
            Ok(exact)
        })
    }

    /// Appends tokens and returns their output rows; None without options.
    ///
    /// # Errors
    /// As on a device, or an error that the emulator detects.
    pub fn append(&mut self, qkv: &[Tensor; 3], options: Option<&AttentionOptions>) -> Result<Option<Tensor>> {
        self.append_scored(qkv, None, options)
    }

    /// [`Self::append`] with the scores (B, Hk, new tokens) of the new tokens.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn append_scored(
        &mut self,
        qkv: &[Tensor; 3],
        scores: Option<&Tensor>,
        options: Option<&AttentionOptions>,
    ) -> Result<Option<Tensor>> {
        self.take_in((qkv, scores), options, true)
    }

    fn take_in(
        &mut self,
        tokens: (&[Tensor; 3], Option<&Tensor>),
        options: Option<&AttentionOptions>,
        attend: bool,
    ) -> Result<Option<Tensor>> {
        let limit = self.options.max_entries;
        match &mut self.lists {
            EmulatedLists::F32(lists) => append(lists, tokens, (options, attend), limit),
            EmulatedLists::F16(lists) => append(lists, tokens, (options, attend), limit),
            EmulatedLists::BF16(lists) => append(lists, tokens, (options, attend), limit),
        }
    }

    /// [`Self::append_scored`] without computing rows.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn append_again(
        &mut self,
        qkv: &[Tensor; 3],
        scores: Option<&Tensor>,
        options: &AttentionOptions,
    ) -> Result<()> {
        self.take_in((qkv, scores), Some(options), false).map(|_| ())
    }

    /// A mark of the present, for [`Self::at_mark`].
    ///
    /// # Errors
    /// An error that the emulator detects.
    pub fn mark(&self) -> Result<Self> {
        let lists = match &self.lists {
            EmulatedLists::F32(lists) => EmulatedLists::F32(lists.mark(&Emulator)?),
            EmulatedLists::F16(lists) => EmulatedLists::F16(lists.mark(&Emulator)?),
            EmulatedLists::BF16(lists) => EmulatedLists::BF16(lists.mark(&Emulator)?),
        };
        Ok(Self::of(
            lists,
            self.problem,
            (&self.strategies, &self.config, &self.options),
        ))
    }

    /// The cache as it was when it gave a mark.
    ///
    /// # Errors
    /// An error that the emulator detects, or a mark of another dtype.
    pub fn at_mark(self, mark: &Self) -> Result<Self> {
        let lists = match (self.lists, &mark.lists) {
            (EmulatedLists::F32(lists), EmulatedLists::F32(mark)) => {
                EmulatedLists::F32(lists.at_mark(&Emulator, mark)?)
            }
            (EmulatedLists::F16(lists), EmulatedLists::F16(mark)) => {
                EmulatedLists::F16(lists.at_mark(&Emulator, mark)?)
            }
            (EmulatedLists::BF16(lists), EmulatedLists::BF16(mark)) => {
                EmulatedLists::BF16(lists.at_mark(&Emulator, mark)?)
            }
            _ => bail!("mark: expected one of this cache, got one of another dtype; use its own"),
        };
        Ok(Self::of(
            lists,
            self.problem,
            (&self.strategies, &self.config, &self.options),
        ))
    }

    /// Entries per batch row and list.
    ///
    /// # Errors
    /// An error that the emulator detects.
    pub fn lens(&self) -> Result<Vec<Vec<usize>>> {
        each!(&self.lists, lists => lists.entries(&Emulator))
    }

    /// Bytes in use and allocated.
    ///
    /// # Errors
    /// An error that the emulator detects.
    pub fn bytes(&self) -> Result<(usize, usize)> {
        each!(&self.lists, lists => Ok((lists.bytes(&Emulator)?, lists.bytes_allocated())))
    }

    /// One cache of the batch rows of all of these, in order. All have equal settings and dtypes, and no segments.
    ///
    /// # Errors
    /// An error that the emulator detects.
    pub fn cat(caches: &[&Self]) -> Result<Self> {
        let first = caches[0];
        macro_rules! of {
            ($kind:path) => {{
                let lists = caches.iter().filter_map(|cache| match &cache.lists {
                    $kind(lists) => Some(lists),
                    _ => None,
                });
                let lists: Vec<_> = lists.collect();
                let rows = caches.iter().zip(&lists);
                let rows = rows
                    .map(|(cache, lists)| (lists.seq_len(), cache.problem.batch, None))
                    .collect();
                let (_, places) = joined_places(rows);
                $kind(DeviceRows::cat(&Emulator, &lists, places)?)
            }};
        }
        let lists = match &first.lists {
            EmulatedLists::F32(_) => of!(EmulatedLists::F32),
            EmulatedLists::F16(_) => of!(EmulatedLists::F16),
            EmulatedLists::BF16(_) => of!(EmulatedLists::BF16),
        };
        let problem = Problem {
            batch: caches.iter().map(|cache| cache.problem.batch).sum(),
            ..first.problem
        };
        Ok(Self::of(
            lists,
            problem,
            (&first.strategies, &first.config, &first.options),
        ))
    }

    /// Copies the pages that other caches, or other rows, hold too.
    ///
    /// # Errors
    /// An error that the emulator detects.
    pub fn unshare(&mut self) -> Result<()> {
        each!(&mut self.lists, lists => lists.unshare(&Emulator))
    }

    /// Bytes of pages that other caches hold, too.
    pub fn bytes_shared(&self) -> usize {
        each!(&self.lists, lists => lists.bytes_shared())
    }

    /// Selects batch rows: row i becomes the old row `rows[i]`.
    ///
    /// # Errors
    /// An error that the emulator detects.
    pub fn select(&self, rows: &[usize]) -> Result<Self> {
        Ok(Self {
            lists: match &self.lists {
                EmulatedLists::F32(lists) => EmulatedLists::F32(lists.select(&Emulator, rows)?),
                EmulatedLists::F16(lists) => EmulatedLists::F16(lists.select(&Emulator, rows)?),
                EmulatedLists::BF16(lists) => EmulatedLists::BF16(lists.select(&Emulator, rows)?),
            },
            problem: Problem {
                batch: rows.len(),
                ..self.problem
            },
            strategies: self.strategies.clone(),
            config: self.config.clone(),
            options: self.options.clone(),
        })
    }
}

fn no_kernels<R>(dtype: DType) -> Result<R> {
    bail!("dtype: expected f32, f16 or bf16 on CUDA, got {dtype:?}; convert with to_dtype")
}

fn brought<T: Both>(cache: &CompressedKvCache) -> Result<(Problem, DeviceRows<Emulator, T>)> {
    let Some((problem, held)) = cache.for_device::<T>()? else {
        bail!("cache: expected one that holds tokens, got an empty one; append first")
    };
    let lists = DeviceRows::from_host(&Emulator, &problem, (cache.strategies(), cache.config()), &held)?;
    Ok((problem, lists))
}

fn append<T: GpuElement + Element>(
    lists: &mut DeviceRows<Emulator, T>,
    (qkv, scores): (&[Tensor; 3], Option<&Tensor>),
    (options, attend): (Option<&AttentionOptions>, bool),
    limit: Option<usize>,
) -> Result<Option<Tensor>> {
    let problem = Problem::new(&qkv[0], &qkv[1], &qkv[2])?;
    let Problem {
        batch, heads, tokens, ..
    } = problem;
    let held = |x: &Tensor| held::<T>(&x.to_dtype(T::DTYPE)?);
    let (q, k, v) = (held(&qkv[0])?, held(&qkv[1])?, held(&qkv[2])?);
    let scores = scores.map(|scores| Emulator.upload(&scores.flatten_all()?.to_vec1::<f32>()?));
    let scores = scores.transpose()?;
    let full = (batch, heads, tokens, lists.seq_len() + tokens);
    let bias = options.and_then(|options| options.bias.as_ref());
    let bias = bias.map(|bias| HeldBias::new(bias, full)).transpose()?;
    let sinks = match options {
        Some(options) => held_sinks(options)?,
        None => None,
    };
    let call = RowsCall {
        problem: &problem,
        qkv: [borrow(&q), borrow(&k), borrow(&v)],
        options,
        attend,
        extras: ExtraBuffers {
            bias: bias.as_ref().map(HeldBias::view),
            sinks: sinks.as_ref(),
            scores: scores.as_ref().map(|data| ScoreBuffer {
                data,
                first: 0,
                stride: tokens,
            }),
            ..ExtraBuffers::none()
        },
        limit,
    };
    let Some(output) = lists.take_in(&Emulator, &call)? else {
        return Ok(None);
    };
    let output = Tensor::from_vec(
        output.download()?,
        (batch, heads, tokens, problem.value_dim),
        &Device::Cpu,
    )?;
    output.to_dtype(qkv[0].dtype()).map(Some)
}
