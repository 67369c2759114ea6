//! Launches of `cuda/cache.cu`, and a KV cache's lists on the device.
//!
//! How long a list is, only the device knows; the host keeps a bound that every token raises by one. When the bound
//! reaches the room there is, and after a long chunk, the lengths are read back, which waits for the device; nothing else
//! does.

use crate::config::{AttentionOptions, CompressionConfig, Criterion, Fold, GroupRule, HeadStrategies};
use crate::cuda::attention::lists;
use crate::cuda::decide;
use crate::cuda::decode::{decode, DecodeCall, Store};
use crate::cuda::fold::fold_code;
use crate::cuda::gpu::{Gpu, GpuElement, Kernel, Launch, Source};
use crate::cuda::params::{CacheParams, CopyParams, Rows, Sizes};
use crate::problem::{Problem, RowLayout};
use candle_core::{bail, Result};
use moves::{copy, Mover};

mod chunk;
mod moves;

const MODULE: &str = "cache";
/// The widest window: a list holds so many raw tokens from the start.
const WIDEST: usize = 1 << 16;
/// Room for this many entries at least, and for an eighth more than there are.
const GROWTH: usize = 64;
/// As `NO_RUN` in cuda/cache.cu.
const NO_RUN: u32 = u32::MAX;

/// What never changes.
#[derive(Clone)]
struct Settings {
    /// Of the first call; its tokens mean nothing.
    problem: Problem,
    /// Per batch row.
    lists: usize,
    /// Nothing can ever be hidden.
    dense: bool,
    config: CompressionConfig,
    strategies: HeadStrategies,
}

/// The lists of one layer.
pub(crate) struct DeviceLists<G: Gpu, T: GpuElement> {
    settings: Settings,
    batch: usize,
    seq_len: usize,
    /// Far columns that a list has room for, and may have.
    capacity: usize,
    bound: usize,
    tests: G::Slice<f32>,
    state: State<G, T>,
}

/// The lists themselves: `CacheState` in cuda/cache.cu.
struct State<G: Gpu, T: GpuElement> {
    far_k: G::Slice<T>,
    far_v: G::Slice<T>,
    far_ln: Option<G::Slice<f32>>,
    lengths: G::Slice<u32>,
    local_k: G::Slice<T>,
    local_v: G::Slice<T>,
    local_ln: Option<G::Slice<f32>>,
    local_lengths: G::Slice<u32>,
    chain_k: G::Slice<f32>,
    chain_v: G::Slice<f32>,
    chain_sizes: G::Slice<u32>,
    /// `previous` and `last_queries` under [`Fold::PairSum`] alone.
    previous_k: Option<G::Slice<T>>,
    previous_v: Option<G::Slice<T>>,
    bits: G::Slice<u32>,
    run_starts: G::Slice<u32>,
    run_keys: G::Slice<T>,
    last_keys: G::Slice<T>,
    last_queries: Option<G::Slice<T>>,
}

impl<G: Gpu, T: GpuElement> State<G, T> {
    /// `CACHE_STATE` in cuda/cache.cu.
    fn args<'a>(&'a mut self, gpu: &'a G) -> Vec<G::Arg<'a>> {
        vec![
            gpu.write(&mut self.far_k),
            gpu.write(&mut self.far_v),
            gpu.write_some(self.far_ln.as_mut()),
            gpu.write(&mut self.lengths),
            gpu.write(&mut self.local_k),
            gpu.write(&mut self.local_v),
            gpu.write_some(self.local_ln.as_mut()),
            gpu.write(&mut self.local_lengths),
            gpu.write(&mut self.chain_k),
            gpu.write(&mut self.chain_v),
            gpu.write(&mut self.chain_sizes),
            gpu.write_some(self.previous_k.as_mut()),
            gpu.write_some(self.previous_v.as_mut()),
            gpu.write(&mut self.bits),
            gpu.write(&mut self.run_starts),
            gpu.write(&mut self.run_keys),
            gpu.write(&mut self.last_keys),
            gpu.write_some(self.last_queries.as_mut()),
        ]
    }
}

fn room(entries: usize) -> usize {
    entries + GROWTH.max(entries / 8)
}

impl<G: Gpu, T: GpuElement> DeviceLists<G, T> {
    /// Empty lists for calls like `problem`.
    ///
    /// # Errors
    /// A criterion, window or head size that the kernels do not take, or what the device reports.
    pub fn new(gpu: &G, problem: &Problem, strategies: &HeadStrategies, config: &CompressionConfig) -> Result<Self> {
        let (dim, batch, window) = (problem.head_dim, problem.batch, config.window);
        if config.criterion == Criterion::ObservedMass {
            bail!(
                "criterion: expected QueryKey or KeyKey for a KV cache on CUDA, got ObservedMass; keep this cache on the \
                 CPU, with to_device(&Device::Cpu)"
            )
        }
        if window > WIDEST {
            bail!(
                "window: expected at most {WIDEST} for a KV cache on CUDA, got {window}; use HeadStrategies of \
                 MergeStrategy::Off where nothing shall merge"
            )
        }
        if dim % 8 != 0 || dim > 256 {
            bail!(
                "query: expected a head_dim that is a multiple of 8 and at most 256 on CUDA, got {dim}; pad the head or \
                 move the tensors with to_device(&Device::Cpu)"
            )
        }
        let dense = strategies.all_off();
        let per_row = lists(problem, dense, config.group_rule == GroupRule::Unanimous);
        let (all, local) = (batch * per_row, batch * per_row * (window + 1));
        let (mean, pair_sum) = (config.fold == Fold::Mean, config.fold == Fold::PairSum);
        let row = || gpu.zeros::<T>(all * dim);
        let some = |wanted: bool, len: usize| -> Result<Option<G::Slice<T>>> {
            if wanted {
                gpu.zeros(len).map(Some)
            } else {
                Ok(None)
            }
        };
        let ln = |len: usize| if mean { gpu.zeros(len).map(Some) } else { Ok(None) };
        Ok(Self {
            settings: Settings {
                problem: *problem,
                lists: per_row,
                dense,
                config: config.clone(),
                strategies: strategies.clone(),
            },
            batch,
            seq_len: 0,
            capacity: GROWTH,
            bound: 0,
            tests: decide::tests(gpu, problem, strategies, config)?,
            state: State {
                far_k: gpu.zeros(all * GROWTH * dim)?,
                far_v: gpu.zeros(all * GROWTH * dim)?,
                far_ln: ln(all * GROWTH)?,
                lengths: gpu.zeros(all)?,
                local_k: gpu.zeros(local * dim)?,
                local_v: gpu.zeros(local * dim)?,
                local_ln: ln(local)?,
                local_lengths: gpu.zeros(all)?,
                chain_k: gpu.zeros(all * dim)?,
                chain_v: gpu.zeros(all * dim)?,
                chain_sizes: gpu.zeros(all)?,
                previous_k: some(pair_sum, all * dim)?,
                previous_v: some(pair_sum, all * dim)?,
                bits: gpu.zeros(local)?,
                run_starts: gpu.upload(&vec![NO_RUN; all])?,
                run_keys: row()?,
                last_keys: row()?,
                last_queries: some(pair_sum, batch * problem.heads * dim)?,
            },
        })
    }

    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Lists over all batch rows.
    fn all(&self) -> usize {
        self.batch * self.settings.lists
    }

    /// Entries of each list, (batch, lists): closed chains, the open one, raw tokens. Waits for the device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn entries(&self, gpu: &G) -> Result<Vec<Vec<usize>>> {
        let window = self.settings.config.window;
        let local = self.seq_len.min(window) + usize::from(self.seq_len > window);
        let lengths = gpu.download(&self.state.lengths)?;
        let entries: Vec<usize> = lengths.iter().map(|length| *length as usize + local).collect();
        Ok(entries.chunks(self.settings.lists).map(<[usize]>::to_vec).collect())
    }

    /// Bytes of `entries` closed chains over all lists, and of all that does not grow.
    fn bytes_of(&self, entries: usize) -> usize {
        let (dim, all, window) = (self.settings.problem.head_dim, self.all(), self.settings.config.window);
        let ln = if self.state.far_ln.is_some() { 4 } else { 0 };
        let (row, local) = (2 * dim * size_of::<T>() + ln, all * (window + 1));
        let pair_sums = match &self.state.last_queries {
            Some(_) => (2 * all + self.batch * self.settings.problem.heads) * dim * size_of::<T>(),
            None => 0,
        };
        // Two rows of f32, two of T, and four words per list.
        (entries + local) * row + local * 4 + all * (2 * dim * (4 + size_of::<T>()) + 16) + pair_sums
    }

    /// Bytes in use. Waits for the device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn bytes(&self, gpu: &G) -> Result<usize> {
        let lengths = gpu.download(&self.state.lengths)?;
        Ok(self.bytes_of(lengths.iter().map(|length| *length as usize).sum()))
    }

    pub fn bytes_allocated(&self) -> usize {
        self.bytes_of(self.all() * self.capacity)
    }

    /// The most entries that a list may have after `count` more tokens of which none merges. Waits for the device only if
    /// that matters for `limit`.
    ///
    /// # Errors
    /// What the device reports.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn most_entries(&mut self, gpu: &G, count: usize, limit: usize) -> Result<usize> {
        let most = |bound: usize| bound + count + self.settings.config.window + 1;
        if most(self.bound) > limit {
            let longest = self.entries(gpu)?.into_iter().flatten().max().unwrap_or(0);
            return Ok(longest + count);
        }
        Ok(most(self.bound))
    }

    /// What the kernels are told of `count` new tokens.
    fn params(&self, [q, k, v]: &[Source<'_, G, T>; 3], count: usize) -> Result<CacheParams> {
        let config = &self.settings.config;
        let limited = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let sizes = Problem {
            tokens: count,
            batch: self.batch,
            ..self.settings.problem
        };
        Ok(CacheParams {
            q: Rows::new(&q.1),
            k: Rows::new(&k.1),
            v: Rows::new(&v.1),
            sizes: Sizes::new(&sizes, self.settings.lists)?,
            key_key: u32::from(config.criterion == Criterion::KeyKey),
            max_merge_level: limited(config.max_merge_level),
            sinks: limited(config.sinks),
            window: config.window as u32,
            fold: fold_code(config.fold),
            capacity: limited(self.capacity),
            first: limited(self.seq_len),
            reserved: 0,
        })
    }

    /// Takes in `count` tokens without their rows.
    ///
    /// # Errors
    /// What the device reports.
    pub fn append(&mut self, gpu: &G, qkv: [Source<'_, G, T>; 3], count: usize) -> Result<()> {
        if self.seq_len == 0 && count > 1 {
            return self.first_chunk(gpu, qkv, count, None).map(|_| ());
        }
        self.stream(gpu, qkv, count, None)
    }

    /// Takes in `count` tokens, one after another; `queries` receives those of the last one as attention reads them,
    /// where `count` is 1.
    fn stream(
        &mut self,
        gpu: &G,
        qkv: [Source<'_, G, T>; 3],
        count: usize,
        queries: Option<&mut G::Slice<T>>,
    ) -> Result<()> {
        self.reserve(gpu, count)?;
        let params = self.params(&qkv, count)?;
        let launch = Launch {
            grid: [self.all(), 1, 1],
            threads: 32,
            shared_bytes: 0,
        };
        let [q, k, v] = qkv;
        let mut args = vec![
            gpu.read(q.0),
            gpu.read(k.0),
            gpu.read(v.0),
            gpu.read(&self.tests),
            gpu.write_some(queries),
        ];
        args.extend(self.state.args(gpu));
        args.push(gpu.value(&params));
        gpu.launch(&Kernel::of::<T>(MODULE, "cache_append"), launch, &args)?;
        drop(args);
        self.seq_len += count;
        self.bound += count;
        // A long chunk that merged well leaves more room than is needed.
        if count >= GROWTH {
            self.fit(gpu)?;
        }
        Ok(())
    }

    /// Takes in `count` tokens and returns their output rows (B, H, count, D).
    ///
    /// # Errors
    /// Strides that the kernels do not take, or what the device reports.
    pub fn append_and_attend<'a>(
        &mut self,
        gpu: &G,
        qkv: [Source<'a, G, T>; 3],
        count: usize,
        options: &AttentionOptions,
    ) -> Result<G::Slice<T>> {
        if self.seq_len == 0 && count > 1 {
            if let Some(output) = self.first_chunk(gpu, qkv, count, Some(options))? {
                return Ok(output);
            }
        }
        if count == 1 {
            return self.one(gpu, qkv, options);
        }
        let Problem { heads, head_dim, .. } = self.settings.problem;
        let rows = self.batch * heads;
        let mut output = gpu.zeros::<T>(rows * count * head_dim)?;
        for token in 0..count {
            let at = |(slice, layout): Source<'a, G, T>| {
                let offset = layout.offset + token * layout.strides[2];
                (slice, RowLayout { offset, ..layout })
            };
            let row = self.one(gpu, qkv.map(at), options)?;
            let params = CopyParams {
                from_stride: head_dim as u32,
                to_stride: (count * head_dim) as u32,
                to_offset: (token * head_dim) as u32,
                count: head_dim as u32,
                unit: 0,
            };
            copy(gpu, T::SUFFIX, &row, [None, None], &mut output, rows, &params)?;
        }
        Ok(output)
    }

    fn one(&mut self, gpu: &G, qkv: [Source<'_, G, T>; 3], options: &AttentionOptions) -> Result<G::Slice<T>> {
        let Problem { heads, head_dim, .. } = self.settings.problem;
        let mut queries = gpu.alloc::<T>(self.batch * heads * head_dim)?;
        self.stream(gpu, qkv, 1, Some(&mut queries))?;
        let call = DecodeCall {
            lists: self.all(),
            group: heads / self.settings.lists,
            head_dim,
            queries: &queries,
            far: Store {
                keys: &self.state.far_k,
                values: &self.state.far_v,
                ln: self.state.far_ln.as_ref(),
                lengths: &self.state.lengths,
                capacity: self.capacity,
            },
            local: Some(Store {
                keys: &self.state.local_k,
                values: &self.state.local_v,
                ln: self.state.local_ln.as_ref(),
                lengths: &self.state.local_lengths,
                capacity: self.settings.config.window + 1,
            }),
            scale: options.scale(head_dim),
        };
        decode(gpu, &call)
    }

    /// Room for `count` more closed chains in every list.
    fn reserve(&mut self, gpu: &G, count: usize) -> Result<()> {
        let most = self.seq_len + count;
        if u32::try_from(most).is_err() {
            bail!("cache: expected at most 2^32 - 1 tokens, got {most}; reset() it")
        }
        if self.bound + count <= self.capacity {
            return Ok(());
        }
        self.read_bound(gpu)?;
        if self.bound + count > self.capacity {
            self.resize(gpu, room(self.bound + count))?;
        }
        Ok(())
    }

    fn read_bound(&mut self, gpu: &G) -> Result<()> {
        let lengths = gpu.download(&self.state.lengths)?;
        self.bound = lengths.into_iter().max().unwrap_or(0) as usize;
        Ok(())
    }

    /// Gives back what a chunk needed at most and did not use.
    fn fit(&mut self, gpu: &G) -> Result<()> {
        self.read_bound(gpu)?;
        if self.capacity > room(self.bound) {
            self.resize(gpu, room(self.bound))?;
        }
        Ok(())
    }

    fn resize(&mut self, gpu: &G, capacity: usize) -> Result<()> {
        let (all, dim, old) = (self.all(), self.settings.problem.head_dim, self.capacity);
        let mover = Mover {
            gpu,
            lists: all,
            sources: None,
        };
        let lengths = Some(&self.state.lengths);
        self.state.far_k = mover.rows(T::SUFFIX, &self.state.far_k, lengths, [old, capacity], dim)?;
        self.state.far_v = mover.rows(T::SUFFIX, &self.state.far_v, lengths, [old, capacity], dim)?;
        if let Some(ln) = &self.state.far_ln {
            self.state.far_ln = Some(mover.rows("f32", ln, lengths, [old, capacity], 1)?);
        }
        self.capacity = capacity;
        Ok(())
    }
}
