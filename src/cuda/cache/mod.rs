//! Launches of `cuda/cache/cache.cu`, and a KV cache's lists on the device.
//!
//! Only the device knows the length of a list; the host keeps a bound that every token raises by one. When the bound
//! passes a list's pages, and after a long chunk, the host reads the lengths back, which waits for the device. No other
//! step of appending waits.

use crate::config::{ByteCode, CompressionConfig, Criterion, HeadStrategies, HeadTest};
use crate::cuda::attention::lists;
use crate::cuda::decide;
use crate::cuda::decode::Scratch;
use crate::cuda::extras::ExtraBuffers;
use crate::cuda::fold::fold_code;
use crate::cuda::on_gpu::{Gpu, GpuElement, Launch, Source};
use crate::cuda::params::{BiasEntries, CacheParams, Rows, Sizes, NO_SLIDE};
use crate::problem::Problem;
use candle_core::{bail, Result};
pub(crate) use copy::paste;
pub(crate) use host::{ClosedRows, HostList, HostLists};
use pages::{page_bytes, PagePool};
use ragged::Ragged;
use state::ListBuffers;
use std::sync::Arc;

mod append;
mod attend;
mod chunk;
mod chunk_attend;
mod copy;
mod first_chunk;
mod host;
mod join;
pub(crate) mod pages;
mod ragged;
mod state;
mod transfer;
mod upload;

/// The widest window: a list holds this many raw tokens from the start.
const WIDEST: usize = 1 << 16;
/// As in cuda/cache/cache_list.cuh.
const NO_RUN: u32 = u32::MAX;
/// As in cuda/cache/pages.cuh.
const SITS_OUT: u32 = u32::MAX;

/// Settings that never change.
#[derive(Clone)]
struct CacheSettings {
    /// The shapes of the first call; its number of tokens is not used.
    problem: Problem,
    /// Lists per batch row.
    lists: usize,
    /// Whether nothing can ever be hidden.
    dense: bool,
    config: CompressionConfig,
    /// The code of closed chains in 8 bits.
    code: Option<ByteCode>,
}

/// A code as `PageCode` in cuda/lib/params.cuh.
pub(crate) fn page_code(code: Option<ByteCode>) -> u32 {
    match code {
        None => 0,
        Some(ByteCode::I8) => 1,
        Some(ByteCode::F8E4M3) => 2,
    }
}

/// The settings by which a device holds a cache's lists. In 8 bits a cache whose heads are all off has no window, as on
/// the CPU: each token is a closed chain at once, so that its code comes and goes as it is.
pub(crate) fn device_config(
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    code: Option<ByteCode>,
) -> CompressionConfig {
    if code.is_none() || !strategies.all_off() {
        return config.clone();
    }
    // There is nothing to observe.
    let criterion = match config.criterion {
        Criterion::ObservedMass => Criterion::KeyKey,
        Criterion::QueryKey | Criterion::KeyKey | Criterion::Given => config.criterion,
    };
    CompressionConfig {
        window: 0,
        criterion,
        ..config.clone()
    }
}

impl CacheSettings {
    /// Raw keys that a list with observed mass keeps: the keys of the sinks and of the window.
    fn seen_keys(&self) -> usize {
        self.config.sinks + self.config.window
    }

    /// The size of keys and values in a first chunk's columns, which are padded to one.
    fn column_dim(&self) -> usize {
        self.problem.head_dim.max(self.problem.value_dim)
    }
}

/// The lists of one layer.
pub(crate) struct DeviceLists<G: Gpu, T: GpuElement> {
    settings: CacheSettings,
    batch: usize,
    /// Tokens of every batch row; the most of them, where rows differ.
    seq_len: usize,
    /// Where rows differ: see `ragged`.
    ragged: Option<Ragged>,
    /// The sliding window of the calls that attended; None before the first of them.
    sliding_window: Option<Option<usize>>,
    /// The tests of every query head of every batch row, and their copy on the device.
    head_tests: Vec<HeadTest>,
    tests: G::Slice<f32>,
    state: ListBuffers<G, T>,
    /// Scratch buffers of decoding; a copy of the lists has none.
    scratch: Option<Scratch<G>>,
}

impl<G: Gpu, T: GpuElement> DeviceLists<G, T> {
    /// Empty lists for calls like `problem`.
    ///
    /// # Errors
    /// A criterion, window or head size that the kernels do not accept, or an error of the device.
    pub fn new(
        gpu: &G,
        problem: &Problem,
        (strategies, config): (&HeadStrategies, &CompressionConfig),
        code: Option<ByteCode>,
    ) -> Result<Self> {
        let head_tests = decide::head_tests([problem.batch, problem.heads], strategies, config);
        Self::with_tests(gpu, problem, (strategies, config), code, head_tests)
    }

    /// [`Self::new`] with the tests of batch rows that are no longer in the order of the strategies.
    fn with_tests(
        gpu: &G,
        problem: &Problem,
        (strategies, config): (&HeadStrategies, &CompressionConfig),
        code: Option<ByteCode>,
        head_tests: Vec<HeadTest>,
    ) -> Result<Self> {
        let config = device_config(strategies, config, code);
        let window = config.window;
        if config.criterion.observes() && config.sinks > WIDEST {
            bail!(
                "sinks: expected at most {WIDEST} for a KV cache on CUDA that decides by ObservedMass, got {}; use \
                 HeadStrategies of MergeStrategy::Off where nothing shall merge",
                config.sinks
            )
        }
        if window > WIDEST {
            bail!(
                "window: expected at most {WIDEST} for a KV cache on CUDA, got {window}; use HeadStrategies of \
                 MergeStrategy::Off where nothing shall merge"
            )
        }
        for (name, dim) in [("query", problem.head_dim), ("value", problem.value_dim)] {
            if dim % 8 != 0 || dim > 256 {
                bail!(
                    "{name}: expected a head_dim that is a multiple of 8 and at most 256 on CUDA, got {dim}; pad the \
                     head or move the tensors with to_device(&Device::Cpu)"
                )
            }
        }
        let dense = strategies.all_off();
        let settings = CacheSettings {
            problem: *problem,
            lists: lists(problem, dense, config.group_rule.heads_agree()),
            dense,
            config,
            code,
        };
        let pool = PagePool::new(page_bytes::<T>(problem, settings.config.fold.has_sizes(), code));
        Self::empty(gpu, settings, head_tests, pool)
    }

    /// Lists without a token; `head_tests` are those of all batch rows.
    fn empty(gpu: &G, settings: CacheSettings, head_tests: Vec<HeadTest>, pool: Arc<PagePool<G>>) -> Result<Self> {
        let batch = head_tests.len() / settings.problem.heads;
        Ok(Self {
            batch,
            seq_len: 0,
            ragged: None,
            sliding_window: None,
            tests: gpu.upload(&decide::table(&head_tests))?,
            head_tests,
            state: ListBuffers::new(gpu, &settings, batch, pool)?,
            settings,
            scratch: None,
        })
    }

    pub fn batch(&self) -> usize {
        self.batch
    }

    pub fn sliding_window(&self) -> Option<Option<usize>> {
        self.sliding_window
    }

    /// The number of lists over all batch rows.
    fn all(&self) -> usize {
        self.batch * self.settings.lists
    }

    /// A warp per list.
    fn per_list(&self) -> Launch {
        Launch {
            grid: [self.all(), 1, 1],
            threads: 32,
            shared_bytes: 0,
        }
    }

    /// L of the sliding window, for a kernel.
    fn slide(&self) -> u32 {
        let length = self.sliding_window.flatten().map(u32::try_from);
        length.map_or(NO_SLIDE, |length| length.unwrap_or(NO_SLIDE))
    }

    /// Closed chains of each list, without those that have left the sliding window. Waits for the device.
    fn closed(&self, gpu: &G) -> Result<Vec<usize>> {
        let (lengths, starts) = (gpu.download(&self.state.lengths)?, gpu.download(&self.state.starts)?);
        let slides = self.slide() != NO_SLIDE;
        let left = |start: u32| if slides { start } else { 0 };
        let closed = lengths.iter().zip(starts);
        Ok(closed.map(|(length, start)| (*length - left(start)) as usize).collect())
    }

    /// Entries of each list, (batch, lists): closed chains, the open one, raw tokens; under a sliding window those that
    /// a later row sees. Waits for the device.
    ///
    /// # Errors
    /// An error of the device.
    pub fn entries(&self, gpu: &G) -> Result<Vec<Vec<usize>>> {
        let (window, slide, tokens) = (self.settings.config.window, self.slide(), self.row_lens());
        let entries = self.closed(gpu)?.into_iter().enumerate().map(|(list, closed)| {
            let (most, tokens) = (slide as usize - 1, tokens[list / self.settings.lists]);
            match (slide != NO_SLIDE && self.is_off(list), most < window) {
                // As on the CPU, where a list that never merges has no window.
                (true, _) => tokens.min(most.max(1)),
                // Rows see raw tokens only.
                (false, true) => tokens.min(most),
                (false, false) => closed + tokens.min(window) + usize::from(tokens > window),
            }
        });
        let entries: Vec<usize> = entries.collect();
        Ok(entries.chunks(self.settings.lists).map(<[usize]>::to_vec).collect())
    }

    /// Bytes of `entries` closed chains over all lists, and of all buffers of fixed size.
    fn bytes_of(&self, entries: usize) -> usize {
        let Problem {
            heads,
            head_dim: dim,
            value_dim,
            ..
        } = self.settings.problem;
        let (both, all, window) = (dim + value_dim, self.all(), self.settings.config.window);
        let ln = if self.settings.config.fold.has_sizes() { 4 } else { 0 };
        let (row, local) = (both * size_of::<T>() + ln + 4, all * (window + 1));
        let closed = match self.settings.code {
            None => row,
            // Two scales.
            Some(_) => both + 4 + ln + 4,
        };
        let pair_sums = match &self.state.last_queries {
            Some(_) => (all * both + self.batch * heads * dim) * size_of::<T>(),
            None => 0,
        };
        let observed = match &self.state.observed {
            Some(_) => all * (self.settings.seen_keys() * (dim * size_of::<T>() + 4) + 8 * window),
            None => 0,
        };
        // A key and a value in f32, two keys in T, and six words per list. A local row's fifth word is its bit.
        entries * closed + local * row + all * (both * 4 + 2 * dim * size_of::<T>() + 24) + pair_sums + observed
    }

    /// Bytes in use. Waits for the device.
    ///
    /// # Errors
    /// An error of the device.
    pub fn bytes(&self, gpu: &G) -> Result<usize> {
        Ok(self.bytes_of(self.closed(gpu)?.into_iter().sum()))
    }

    /// Bytes of all buffers, and of the lists' pages.
    pub fn bytes_held(&self) -> usize {
        self.bytes_of(0) + self.state.pages.bytes()
    }

    pub fn pool(&self) -> &Arc<PagePool<G>> {
        self.state.pages.pool()
    }

    /// Bytes of the pages that other lists hold, too.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn bytes_shared(&self) -> usize {
        self.state.pages.bytes_shared()
    }

    /// The arguments of kernels that read no tokens: the cache has `seen` tokens, and `count` is the kernel's own.
    fn bare_params(&self, seen: usize, count: usize) -> Result<CacheParams> {
        let nowhere = Rows {
            offset: 0,
            batch_stride: 0,
            head_stride: 0,
            token_stride: 0,
        };
        let params = self.params_at([nowhere; 3], ExtraBuffers::none(), count, 0.0)?;
        Ok(CacheParams {
            first: u32::try_from(seen).unwrap_or(u32::MAX),
            ..params
        })
    }

    /// The arguments of the kernels for `count` new tokens; only observed mass reads the softmax scale.
    fn params(&self, qkv: &[Source<'_, G, T>; 3], count: usize, scale: f64) -> Result<CacheParams> {
        self.params_under(qkv, ExtraBuffers::none(), count, scale)
    }

    /// [`Self::params`] with a bias of the new rows and scores of the new tokens.
    fn params_under(
        &self,
        qkv: &[Source<'_, G, T>; 3],
        extras: ExtraBuffers<'_, G>,
        count: usize,
        scale: f64,
    ) -> Result<CacheParams> {
        self.params_at([0, 1, 2].map(|i| Rows::new(&qkv[i].1)), extras, count, scale)
    }

    fn params_at(
        &self,
        [q, k, v]: [Rows; 3],
        extras: ExtraBuffers<'_, G>,
        count: usize,
        scale: f64,
    ) -> Result<CacheParams> {
        let config = &self.settings.config;
        let limited = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let sizes = Problem {
            tokens: count,
            queries: count,
            batch: self.batch,
            ..self.settings.problem
        };
        Ok(CacheParams {
            q,
            k,
            v,
            bias: BiasEntries::new(extras.bias),
            sizes: Sizes::new(&sizes, self.settings.lists)?,
            key_key: decide::key_key(config.criterion),
            max_merge_level: limited(config.max_merge_level),
            sinks: limited(config.sinks),
            window: config.window as u32,
            fold: fold_code(config.fold),
            pages: limited(self.state.pages.stride()),
            first: limited(self.seq_len),
            observes: u32::from(self.state.observed.is_some()),
            scale: scale as f32,
            slide: self.slide(),
            scores_first: extras.scores.map_or(0, |scores| limited(scores.first)),
            scores_stride: extras.scores.map_or(0, |scores| limited(scores.stride)),
            value_dim: self.settings.problem.value_dim as u32,
            column_dim: self.settings.column_dim() as u32,
            code: page_code(self.settings.code),
            unused: 0,
        })
    }
}
