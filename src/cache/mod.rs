//! [`CompressedKvCache`]: decoding with a KV cache that really shrinks, per head.

use crate::config::{AttentionOptions, CompressionConfig, HeadStrategies, ListBudget, Storage};
#[cfg(doc)]
use crate::config::{Fold, MergeRule};
use crate::problem::Problem;
use crate::storage::not_on_cpu;
use call::TokenCall;
use candle_core::{bail, DType, Result, Tensor};
use journal::Journal;
use state::{select, CacheSizes, Lists, ListsOf, State};
use std::sync::Arc;
use step::{step, step_in_parts, WithoutGradient};

/// The storage of a cache.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CacheOptions {
    /// What keys and values are stored in: 32 or 16 bits, or f64 for f64 inputs. Keys and values are rounded to it
    /// when they are appended, and folded ones once more when their chain is closed; sums stay in f32. `None` is the
    /// dtype of the first keys.
    ///
    /// f16 holds numbers up to 65504, and bf16 up to 3.39e38. A larger finite key or value, or a larger sum of two that
    /// [`Fold::PairSum`] folds, is an error that names the largest one, and the cache is unchanged: store it in bf16 or
    /// f32. On CUDA detecting it would mean waiting for the device: there it is stored as infinite, and the rows that
    /// see it are NaN. Choose bf16 or f32 there where numbers may be large.
    ///
    /// [`Storage::I8`] and [`Storage::F8E4M3`] store closed chains in 8 bits a number, and a scale for each key and
    /// value in bf16. The window and the open chain keep the dtype of the keys, and decisions and folds read them: a
    /// number is rounded once, when its chain closes. Heads that are off have no window: all but the newest token is in
    /// 8 bits.
    ///
    /// On CUDA f16 and bf16 decode straight from the codes, where keys and values have one size of at most 128 that is
    /// a multiple of 16; other calls do so in two launches. A head that is off beside heads that merge has their window
    /// there, and such a cache does not come from the CPU or a file: its codes would be rounded twice.
    pub storage: Option<Storage>,
    /// The most entries that one list may keep; a call that would exceed it is refused and changes nothing. On a GPU a
    /// call that comes near the limit works on a copy of the cache first, and waits for the device.
    pub max_entries: Option<usize>,
    /// The most entries of a list, for ever: a stream of any length runs in constant memory. When a list is full, the
    /// closed chains with the lowest scores are dropped: under [`Criterion::ObservedMass`](crate::Criterion) and
    /// `Given` the scores that decided, else how far the pair was from merging, by its threshold. Lists that never
    /// merge drop their oldest tokens. The first [`CompressionConfig::sinks`] tokens and the window stay.
    ///
    /// A list drops entries at fixed numbers of its tokens: with b the budget, every `clamp((b - window - sinks - 1) /
    /// 8, 1, 64)` tokens, so that it has no more than b until the next time. So any chunking gives the same rows, and
    /// those of [`crate::reference::attention_under_budget`]. A chunk is attended to in parts of that length. Not on
    /// CUDA.
    pub budget: Option<usize>,
    /// How many of the last tokens [`CompressedKvCache::truncate`] can take back, whatever the criterion and the fold:
    /// for speculative decoding. 0 keeps no journal. With n, the cache holds the last n tokens once more, up to twice
    /// n, with their queries, and up to six copies of each list's window and open chain; on CUDA, under a sliding
    /// window or segments, up to six copies of all. A call of more than n tokens is made as two.
    ///
    /// The journal is no part of a saved cache, and it begins anew after [`CompressedKvCache::load`], `to_device`,
    /// `index_select`, `split`, `cat`, `split_heads` and `cat_heads`.
    pub rollback: usize,
}

/// The KV cache of one layer. Each (batch row, KV head) keeps a list of its own length: closed chains as one key, one
/// value and their size, the open chain at the window's edge, and the last `window` tokens raw. A hidden token's memory
/// is really freed.
///
/// One call appends one token or a chunk of any length. Any chunking gives the result of [`crate::attend`] on the whole
/// sequence, to f32 rounding (with f16 or bf16 storage, folded keys and values are rounded once more when stored). A
/// cache decides by its stored keys: where storage is narrower than the keys, a pair near its threshold can be decided
/// otherwise than by [`crate::attend`] on the keys as they came.
///
/// Lists are kept per KV head where a group decides as one: under [`GroupRule::Unanimous`](crate::GroupRule), with as
/// many KV heads as query heads, or for a group whose heads are all off. Otherwise every query head keeps a list of its
/// own, and [`Self::bytes`] says so: such a cache can be larger than a dense one.
///
/// The first call's tensors decide the device. On CUDA a cache accepts f32, f16 and bf16 and computes in the storage
/// dtype; queries and results are rounded to it too. Only the device knows the lengths of its lists. Each has pages of
/// 64 entries; the host waits for the device when a list may have filled its own, and in a chunk. A chunk of seven
/// tokens or more is attended to at once. Batch rows that hold different
/// numbers of tokens step in one launch, where each takes one token or none.
///
/// [`Self::save`] writes the cache to a file. [`Self::load`] reads it, to continue bit for bit, or on another kind of
/// device as if it had always been there. [`Self::to_device`] does the same without a file.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sfattention::{AttentionOptions, CompressedKvCache, CompressionConfig, HeadStrategies, MergeStrategy};
/// let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
/// let mut cache = CompressedKvCache::new(strategies, CompressionConfig::pretrained(), Default::default())?;
/// let options = AttentionOptions::default();
/// let random = |heads, tokens| Tensor::randn(0f32, 1., (1, heads, tokens, 64), &Device::Cpu);
/// let (prompt_q, prompt_kv) = (random(8, 100)?, random(2, 100)?);
/// cache.append_and_attend(&prompt_q, &prompt_kv, &prompt_kv, &options)?; // (1, 8, 100, 64)
/// let (q, kv) = (random(8, 1)?, random(2, 1)?);
/// assert_eq!(cache.append_and_attend(&q, &kv, &kv, &options)?.dims(), [1, 8, 1, 64]);
/// assert_eq!(cache.seq_len(), 101);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct CompressedKvCache {
    strategies: HeadStrategies,
    config: CompressionConfig,
    options: CacheOptions,
    /// A clone shares it until one of the two changes.
    state: Option<Arc<State>>,
    /// In place of `state` once CUDA tensors were appended.
    #[cfg(feature = "cuda")]
    on_gpu: Option<on_device::GpuState>,
    journal: Journal,
}

/// Runs one expression on the lists of any dtype.
macro_rules! each {
    ($lists:expr, $name:ident => $body:expr) => {
        match $lists {
            Lists::F64($name) => $body,
            Lists::F32($name) => $body,
            Lists::F16($name) => $body,
            Lists::BF16($name) => $body,
        }
    };
}

mod append;
#[cfg(any(feature = "cuda", feature = "cuda-emu"))]
mod between_devices;
mod call;
mod checksum;
#[cfg(feature = "cuda")]
mod device_call;
#[cfg(any(feature = "cuda", feature = "cuda-emu"))]
mod device_groups;
#[cfg(any(feature = "cuda", feature = "cuda-emu"))]
mod device_rows;
mod fork;
mod heads;
mod journal;
mod load;
#[cfg(feature = "cuda")]
mod on_device;
mod prefix;
mod ragged;
mod reader;
mod rows;
mod save;
mod segments;
mod state;
mod step;
mod truncate;
mod usage;

pub use prefix::PrefixKey;

#[cfg(feature = "cuda-emu")]
pub(crate) use between_devices::Both;
#[cfg(feature = "cuda-emu")]
pub(crate) use device_groups::RowsCall;
#[cfg(feature = "cuda-emu")]
pub(crate) use device_rows::DeviceRows;
#[cfg(feature = "cuda-emu")]
pub(crate) use segments::joined_places;

impl std::fmt::Debug for CompressedKvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("CompressedKvCache")
            .field("seq_len", &self.seq_len())
            .field("bytes", &self.bytes())
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl CompressedKvCache {
    /// An empty cache; the first call of [`Self::append_and_attend`] fixes its shapes.
    ///
    /// # Errors
    /// [`MergeRule::Reference`], whose rows see the future, `max_entries` of 0, a budget that leaves nothing to drop,
    /// and settings that have no meaning.
    pub fn new(strategies: HeadStrategies, config: CompressionConfig, options: CacheOptions) -> Result<Self> {
        config.check(true)?;
        config.check_strategies(&strategies)?;
        if !config.rule.is_causal() {
            bail!(
                "rule: expected MergeRule::Causal for a KV cache, got {:?}; its decisions look up to four tokens \
                 ahead, so what a row saw would change as tokens come in, use Causal",
                config.rule
            )
        }
        if options.max_entries == Some(0) {
            bail!("max_entries: expected at least 1, got 0; None sets no limit")
        }
        if let Some(budget) = options.budget {
            ListBudget::check(budget, config.sinks, config.window)?;
        }
        Ok(Self {
            strategies,
            config,
            options,
            state: None,
            #[cfg(feature = "cuda")]
            on_gpu: None,
            journal: Journal::default(),
        })
    }

    /// Appends n >= 1 new tokens, and returns their output rows over all tokens so far. Query (B, H, n, D), key and
    /// value (B, Hk, n, D), output (B, H, n, D), or with their axes in the order of [`AttentionOptions::layout`]. The
    /// bias of `options` broadcasts to (B, H, n, all tokens with the new ones), and dropout draws by absolute position.
    /// The result carries no gradient: differentiating it is an error. Values may have a size of their own,
    /// (B, Hk, n, Dv), with an output (B, H, n, Dv). Query and keys may have different dtypes of f32, f16 and bf16, as
    /// an f32 query over f16 keys: the call is computed in f32, and the result has the query's dtype.
    ///
    /// [`AttentionOptions::segments`] are (B, n), the numbers of the new tokens. A batch row's lists start anew where
    /// its number changes: no later row sees an earlier segment. Tokens of padding (0) are not stored, and their rows
    /// are zeros; padding between two calls does not end a segment. A call without segments goes on with each row's
    /// current one, which is number 1 at first. So rows of a batch may hold different numbers of tokens: pad a batch of
    /// prompts on the left or on the right, with a mask of zeros and ones as segments, and decode without. Beside a
    /// bias or dropout padding stands only before a segment. On CUDA such rows are launched one after another.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit together or the first call's, options that have no meaning or are not causal, a
    /// device without kernels or other than the first call's, numbers beyond the range of [`CacheOptions::storage`],
    /// more entries than [`CacheOptions::max_entries`], or (on the CPU) a bias of -inf at a column that a new row would
    /// see in a head that hides tokens. The cache is then unchanged.
    pub fn append_and_attend(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        options: &AttentionOptions,
    ) -> Result<Tensor> {
        self.take_in_and_attend([q, k, v], None, options)
    }

    /// [`Self::append_and_attend`] under [`Criterion::Given`](crate::Criterion), with the scores of the new tokens, f32
    /// (B, Hk, n) in either layout: a token is left out, once it has left the window, where its score is below the
    /// threshold of its KV head. Any chunking gives the result of [`crate::MergePlan::from_scores`].
    ///
    /// # Errors
    /// As [`Self::append_and_attend`], another criterion, or scores of another dtype, shape or device.
    pub fn append_and_attend_scored(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scores: &Tensor,
        options: &AttentionOptions,
    ) -> Result<Tensor> {
        self.take_in_and_attend([q, k, v], Some(scores), options)
    }

    fn take_in_and_attend(
        &mut self,
        [q, k, v]: [&Tensor; 3],
        scores: Option<&Tensor>,
        options: &AttentionOptions,
    ) -> Result<Tensor> {
        if !options.causal {
            bail!("causal: expected true for a KV cache, got false; a cached row cannot see tokens that come later")
        }
        if options.column_bias.is_some() {
            bail!(
                "column_bias: expected None for a KV cache, got some; a cache leaves tokens out, give thresholds and \
                 append_and_attend_scored"
            )
        }
        let layout = options.layout;
        let [q, k, v] = &layout.turned_all([q, k, v])?;
        let keys = k.dtype();
        let wide = wider(q, k, v)?;
        let [inner_q, inner_k, inner_v] = &wide;
        let problem = layout.explained(Problem::new(inner_q, inner_k, inner_v))?;
        let Some(output) = self.take_in(&problem, [inner_q, inner_k, inner_v], scores, keys, Some(options))? else {
            bail!("output: expected rows for the new tokens, got none; this is a defect of the crate, report it")
        };
        let output = output.to_dtype(q.dtype())?;
        let tracked = [q, k, v].into_iter().chain(&options.sink_logits);
        if let Some(x) = tracked.into_iter().find(|x| x.track_op()) {
            return layout.turned(&x.apply_op3(x, x, WithoutGradient(output))?);
        }
        layout.turned(&output)
    }

    /// Appends tokens, whose keys came in the dtype `keys`; returns their output rows if there are options to attend
    /// with.
    fn take_in(
        &mut self,
        problem: &Problem,
        [q, k, v]: [&Tensor; 3],
        scores: Option<&Tensor>,
        keys: DType,
        options: Option<&AttentionOptions>,
    ) -> Result<Option<Tensor>> {
        let call = TokenCall {
            start: self.seq_len(),
            qkv: [q.clone(), k.clone(), v.clone()],
            scores: self.checked_scores(problem, scores, k)?,
            keys,
            options: options.cloned(),
        };
        match self.options.rollback {
            0 => self.take_in_now(&call, true),
            _ => self.take_in_recorded(&call),
        }
    }

    /// Appends the tokens of a call; returns their output rows if it has options and `attend` is set.
    fn take_in_now(&mut self, call: &TokenCall, attend: bool) -> Result<Option<Tensor>> {
        let problem = &call.problem()?;
        let device = call.qkv[0].device();
        #[cfg(feature = "cuda")]
        if device.is_cuda() || self.on_gpu.is_some() {
            return self.take_in_on_gpu(problem, call, attend);
        }
        if !device.is_cpu() {
            return not_on_cpu(device);
        }
        let storage = self.storage_for(problem.dtype, call.keys)?;
        let mut state = match self.state.take() {
            Some(state) => state,
            None => Arc::new(self.first_state(problem, storage)?),
        };
        let limit = self.options.max_entries;
        let result = match self.options.budget {
            None => step(Arc::make_mut(&mut state), problem, call, attend, limit),
            Some(_) => step_in_parts(&mut state, problem, call, attend, limit),
        };
        if state.seq_len > 0 {
            self.state = Some(state);
        }
        result
    }

    /// The storage of a call of this dtype, whose keys came in the dtype `keys`.
    fn storage_for(&self, dtype: DType, keys: DType) -> Result<DType> {
        let held = self.state.as_ref().map(|state| state.lists.dtype());
        #[cfg(feature = "cuda")]
        let held = held.or_else(|| self.on_gpu.as_ref().map(|state| state.sizes().1));
        let storage = held.or(self.options.storage.and_then(Storage::dtype)).unwrap_or(keys);
        if (storage == DType::F64) != (dtype == DType::F64) {
            bail!(
                "storage: expected f64 for f64 inputs and f32, f16 or bf16 for others, got {storage:?} for {dtype:?}; \
                 convert the inputs with to_dtype or choose another storage"
            )
        }
        Ok(storage)
    }

    /// Each head's strategy.
    pub fn strategies(&self) -> &HeadStrategies {
        &self.strategies
    }

    /// The method's parameters.
    pub fn config(&self) -> &CompressionConfig {
        &self.config
    }

    /// The number of tokens appended so far to each batch row, padding and earlier segments among them.
    pub fn seq_len(&self) -> usize {
        #[cfg(feature = "cuda")]
        if let Some(state) = &self.on_gpu {
            return state.seq_len();
        }
        self.state.as_ref().map_or(0, |state| state.seq_len)
    }

    /// The batch rows of the first call; `None` of an empty cache.
    pub(crate) fn batch(&self) -> Option<usize> {
        self.sizes().map(|(sizes, _)| sizes.batch)
    }

    /// Forgets all tokens and the shapes, and frees the memory.
    pub fn reset(&mut self) {
        self.forget_tokens();
        self.journal.clear();
    }

    fn forget_tokens(&mut self) {
        self.state = None;
        #[cfg(feature = "cuda")]
        {
            self.on_gpu = None;
        }
    }

    /// Keeps, repeats or reorders batch rows: row i becomes the old row `rows[i]`. For beam search. `rows` is a u32, u8
    /// or i64 tensor of shape (new batch).
    ///
    /// # Errors
    /// Another dtype or rank, no row, or a row that does not exist. The cache is then unchanged.
    pub fn index_select(&mut self, rows: &Tensor) -> Result<()> {
        if rows.rank() != 1 || rows.elem_count() == 0 || !matches!(rows.dtype(), DType::U32 | DType::U8 | DType::I64) {
            bail!(
                "index_select: expected a u32, u8 or i64 tensor of shape (new batch), got {:?} of shape {:?}; give one \
                 old row's index per new row",
                rows.dtype(),
                rows.dims()
            )
        }
        let rows = rows.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let Some(batch) = self.batch() else {
            bail!("index_select: expected a cache that holds tokens, got an empty one; append first")
        };
        if let Some(bad) = rows.iter().find(|row| !(0..batch as i64).contains(*row)) {
            bail!("index_select: expected rows below the batch size {batch}, got {bad}; rows count from 0")
        }
        self.journal.clear();
        if let Some(state) = &mut self.state {
            let state = Arc::make_mut(state);
            each!(&mut state.lists, lists => *lists = select(lists, &rows));
            state.sizes.batch = rows.len();
            if let Some(places) = &mut state.places {
                *places = rows.iter().map(|row| places[*row as usize]).collect();
            }
        }
        #[cfg(feature = "cuda")]
        if let Some(state) = &mut self.on_gpu {
            state.select(&rows.iter().map(|row| *row as usize).collect::<Vec<_>>())?;
        }
        Ok(())
    }
}

/// Query, key and value in f32 where their dtypes, all of f32, f16 and bf16, differ; else as they are, for the checks
/// to refuse.
fn wider(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<[Tensor; 3]> {
    let dtypes = [q, k, v].map(Tensor::dtype);
    let known = |dtype: &DType| [DType::F32, DType::F16, DType::BF16].contains(dtype);
    match dtypes.iter().all(known) && (dtypes[0] != dtypes[1] || dtypes[1] != dtypes[2]) {
        true => Ok([
            q.to_dtype(DType::F32)?,
            k.to_dtype(DType::F32)?,
            v.to_dtype(DType::F32)?,
        ]),
        false => Ok([q.clone(), k.clone(), v.clone()]),
    }
}
