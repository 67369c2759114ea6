//! Lists between the CPU and a CUDA device, for [`CompressedKvCache::save`], `load` and `to_device`. A list that never
//! merges has no window on the CPU: each token is a closed chain at once. On a device it has the other lists' window.

use super::device_rows::HostRows;
use super::{CacheOptions, CacheSizes, CompressedKvCache, Lists, ListsOf, State};
use crate::config::{CompressionConfig, HeadStrategies, HeadTest, Storage};
use crate::cpu::cache::entries::Entries;
use crate::cpu::cache::list::{List, Run};
use crate::cpu::cache::piece::EntryPiece;
use crate::cpu::cache::settings::ListSettings;
use crate::cpu::columns::chain::{log2_size, ChainFold};
use crate::cpu::decide::heads::ListHeads;
use crate::cpu::decide::observe::Observed;
use crate::cpu::number::element::Element;
use crate::cpu::number::finite::{all_finite, quarantine};
use crate::cpu::number::rows::{narrowed, widened};
use crate::cuda::attention;
use crate::cuda::cache::{device_config, ClosedRows, HostList, HostLists};
use crate::cuda::on_gpu::GpuElement;
use crate::problem::Problem;
use candle_core::{bail, DType, Result};
use std::ops::Range;
use std::sync::Arc;

/// A dtype in which caches store on the CPU and on a device.
pub(crate) trait Both: GpuElement + Element<Acc = f32> {
    fn wrap(lists: ListsOf<Self>) -> Lists;
    fn unwrap(lists: &Lists) -> Option<&ListsOf<Self>>;
}

macro_rules! both {
    ($($dtype:ty: $variant:ident),*) => {$(
        impl Both for $dtype {
            fn wrap(lists: ListsOf<Self>) -> Lists {
                Lists::$variant(lists)
            }

            fn unwrap(lists: &Lists) -> Option<&ListsOf<Self>> {
                match lists {
                    Lists::$variant(lists) => Some(lists),
                    _ => None,
                }
            }
        }
    )*};
}

both!(f32: F32, half::f16: F16, half::bf16: BF16);

impl CacheSizes {
    /// The shapes as a call of one token.
    pub fn problem(&self, dtype: DType) -> Problem {
        Problem {
            batch: self.batch,
            heads: self.heads,
            kv_heads: self.kv_heads,
            tokens: 1,
            queries: 1,
            head_dim: self.head_dim,
            value_dim: self.values(),
            dtype,
        }
    }
}

impl CompressedKvCache {
    /// A cache on the CPU with the lists of a device.
    #[cfg_attr(not(feature = "cuda-emu"), allow(dead_code))]
    pub(crate) fn from_device<T: Both>(
        settings: (&HeadStrategies, &CompressionConfig, &CacheOptions),
        problem: &Problem,
        held: &HostRows<T>,
    ) -> Result<Self> {
        let (strategies, config, options) = settings;
        let mut cache = Self::new(strategies.clone(), config.clone(), options.clone())?;
        if held.seq_len > 0 {
            cache.state = Some(Arc::new(state_of(CacheSizes::of(problem), config, held)));
        }
        Ok(cache)
    }

    /// The lists for a device of a cache on the CPU that has tokens, and the shapes; None of an empty cache.
    ///
    /// # Errors
    /// Another dtype than T, or 8 bits of lists that merge beside lists that do not.
    pub(crate) fn for_device<T: Both>(&self) -> Result<Option<(Problem, HostRows<T>)>> {
        let Some(state) = &self.state else { return Ok(None) };
        let dtype = state.lists.dtype();
        let Some(lists) = T::unwrap(&state.lists) else {
            bail!(
                "storage: expected {:?}, got {dtype:?}; this is a defect of the crate, please report it",
                T::DTYPE
            )
        };
        let problem = state.sizes.problem(dtype);
        let agree = self.config.group_rule.heads_agree();
        let per_row = attention::lists(&problem, self.strategies.all_off(), agree);
        let code = self.options.storage.and_then(Storage::code);
        let config = device_config(&self.strategies, &self.config, code);
        let off = lists.iter().any(|(_, list)| !list.settings.merges());
        if let (Some(storage), Some(_), true, true) = (self.options.storage, code, off, config.window > 0) {
            bail!(
                "storage: expected heads that all merge, or MergeStrategy::Off for all of them, in a cache of \
                 {storage} that goes to CUDA, got some of each; there the window of a head that is off holds its own \
                 numbers, which {storage} does not give back: append the tokens to a new cache on the GPU, or store \
                 bf16"
            )
        }
        Ok(Some((problem, rows_of(state, lists, &config, per_row))))
    }
}

/// The state of a cache on the CPU from the lists of a device.
pub(super) fn state_of<T: Both>(sizes: CacheSizes, config: &CompressionConfig, held: &HostRows<T>) -> State {
    let (rows, mut lists) = (sizes.batch / held.parts.len(), Vec::new());
    for (part, held) in held.parts.iter().enumerate() {
        let sizes = CacheSizes { batch: rows, ..sizes };
        lists.extend(lists_of(sizes, config, held).map(|(at, list)| {
            let batch = part * rows + at.batch;
            (ListHeads { batch, ..at }, list)
        }));
    }
    State {
        sizes,
        seq_len: held.seq_len,
        sliding_window: held.parts.first().and_then(|part| part.sliding_window),
        places: held.places.clone(),
        lists: T::wrap(lists),
    }
}

/// The lists on the CPU of a part of the batch rows.
fn lists_of<'a, T: Both>(
    sizes: CacheSizes,
    config: &'a CompressionConfig,
    held: &'a HostLists<T>,
) -> impl Iterator<Item = (ListHeads, List<T>)> + 'a {
    let CacheSizes {
        batch, heads, kv_heads, ..
    } = sizes;
    let dims = [sizes.head_dim, sizes.values()];
    let per_row = held.lists.len() / batch;
    let width = heads / per_row;
    held.lists.iter().enumerate().map(move |(index, list)| {
        let (row, first) = (index / per_row, index % per_row * width);
        let at = ListHeads {
            batch: row,
            kv_head: first / (heads / kv_heads),
            heads: first..first + width,
        };
        let tests = held.tests[row * heads + first..][..width].to_vec();
        let queries = held.last_queries.as_ref();
        let queries = queries.map(|all| &all[(row * heads + first) * sizes.head_dim..][..width * sizes.head_dim]);
        let settings = ListSettings {
            sliding_window: held.sliding_window.flatten().unwrap_or(usize::MAX),
            code: held.code,
            ..ListSettings::new(tests, config)
        };
        let list = match settings.merges() {
            _ if held.seq_len == 0 => List::new(settings, dims),
            true => merging_list(settings, list, queries.unwrap_or_default(), (held.seq_len, dims)),
            false => plain_list(settings, list, (held.seq_len, dims)),
        };
        (at, list)
    })
}

fn merging_list<T: Both>(
    settings: ListSettings,
    held: &HostList<T>,
    last_queries: &[T],
    (seq_len, [dim, value_dim]): (usize, [usize; 2]),
) -> List<T> {
    let mut list = List::<T>::new(settings, [dim, value_dim]);
    let fold = list.settings.fold;
    list.seq_len = seq_len;
    if list.settings.folds() {
        list.kept_from = held.kept_from;
        list.entries = entries_of(&list, held);
        let chain = held.chain.clone();
        list.open = chain.map(|rows| ChainFold::from_rows(fold, held.chain_size as usize, rows));
    }
    // Raw tokens of a window that is longer than the sliding one are seen by no later row.
    let unseen = held.recent_k.len() / dim - list.settings.kept_raw().min(seq_len);
    list.recent_keys = held.recent_k[unseen * dim..].to_vec();
    list.recent_values = held.recent_v[unseen * value_dim..].to_vec();
    list.bits = match list.settings.decides() {
        true => held.bits.clone(),
        false => vec![0; held.bits.len()],
    };
    if list.settings.compares() {
        list.run = Run {
            start: held.run.as_ref().map(|(token, key)| (*token, widened(key))),
            last_key: widened(&held.last_key),
        };
    }
    list.last_hidden = list.settings.takes_scores() && held.last_hidden;
    if list.settings.observes() {
        list.observed = Observed {
            masses: held.masses.clone(),
            sink_keys: held.sink_keys.clone(),
        };
    }
    if fold.folds_queries() {
        list.last_queries = widened(last_queries);
    }
    let rows = list
        .recent_keys
        .chunks_exact(dim)
        .zip(list.recent_values.chunks_exact(value_dim));
    let bad = rows
        .rev()
        .position(|(key, value)| !(all_finite(&widened(key)) && all_finite(&widened(value))));
    list.last_bad = bad.map(|back| seq_len - 1 - back);
    list
}

/// The closed chains of a list on the CPU, as they are stored.
fn entries_of<T: Both>(list: &List<T>, held: &HostList<T>) -> Entries<T> {
    let (dims, sized) = ([list.dim, list.value_dim], list.settings.fold.has_sizes());
    let mut piece = EntryPiece::empty();
    match &held.far {
        ClosedRows::InDtype { keys, values } => {
            piece.keys.clone_from(keys);
            piece.values.clone_from(values);
        }
        ClosedRows::Coded { codes, scales } => {
            piece.codes.clone_from(codes);
            piece.scales.clone_from(scales);
        }
    }
    piece.tokens.clone_from(&held.tokens);
    if sized {
        let mut next = held.kept_from;
        let size = |token: &u32| {
            let size = *token as usize + 1 - next;
            next = *token as usize + 1;
            log2_size(size)
        };
        piece.log2_sizes = held.tokens.iter().map(size).collect();
    }
    Entries::from_piece(piece, dims, [sized, false], list.settings.code)
}

/// The closed chains of a list for a device, as they are stored.
fn closed_rows<T: Both>(entries: &Entries<T>) -> (ClosedRows<T>, Vec<u32>) {
    let piece = entries.copied();
    let rows = match entries.code() {
        None => ClosedRows::InDtype {
            keys: piece.keys,
            values: piece.values,
        },
        Some(_) => ClosedRows::Coded {
            codes: piece.codes,
            scales: piece.scales,
        },
    };
    (rows, piece.tokens)
}

fn plain_list<T: Both>(settings: ListSettings, held: &HostList<T>, (seq_len, dims): (usize, [usize; 2])) -> List<T> {
    let mut list = List::<T>::new(settings, dims);
    list.seq_len = seq_len;
    list.entries = entries_of(&list, held);
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let mut close = |key: &[f32], value: &[f32]| {
        let (mut key, mut value) = (key.to_vec(), value.to_vec());
        quarantine(&mut key, &mut value);
        keys.extend_from_slice(&narrowed::<T>(&key));
        values.extend_from_slice(&narrowed::<T>(&value));
    };
    if let Some([key, value, ..]) = &held.chain {
        close(key, value);
    }
    let rows = held
        .recent_k
        .chunks_exact(dims[0])
        .zip(held.recent_v.chunks_exact(dims[1]));
    rows.for_each(|(key, value)| close(&widened(key), &widened(value)));
    // Of all these tokens: the first, the first that is not closed, and the first that a later row sees.
    let oldest = held.kept_from.min(seq_len - 1);
    let next = held.tokens.last().map_or(oldest, |token| *token as usize + 1);
    list.kept_from = oldest.max(list.settings.first_seen(seq_len)).min(seq_len - 1);
    let rows = keys.chunks_exact(dims[0]).zip(values.chunks_exact(dims[1]));
    for (token, (key, value)) in (next..seq_len).zip(rows) {
        if token < seq_len - 1 {
            list.entries.push(key, value, token, 1, 0.0);
        } else {
            // The newest token is the open chain.
            let mut chain = ChainFold::new(list.settings.fold, dims);
            chain.step(false, key, value);
            list.open = Some(chain);
        }
    }
    list.entries.leave(list.kept_from - oldest);
    list
}

/// The lists for a device, `per_row` of them a batch row, from the state of a cache on the CPU. Batch rows stay
/// together where all hold all tokens.
fn rows_of<T: Both>(state: &State, lists: &ListsOf<T>, config: &CompressionConfig, per_row: usize) -> HostRows<T> {
    let batch = state.sizes.batch;
    let parts = match lists.iter().all(|(_, list)| list.seq_len == state.seq_len) {
        true => vec![held_of(state, 0..batch, lists, config, per_row)],
        false => (0..batch)
            .map(|row| held_of(state, row..row + 1, lists, config, per_row))
            .collect(),
    };
    HostRows {
        seq_len: state.seq_len,
        places: state.places.clone(),
        parts,
    }
}

/// The lists of some batch rows, which hold equal numbers of tokens.
fn held_of<T: Both>(
    state: &State,
    rows: Range<usize>,
    lists: &ListsOf<T>,
    config: &CompressionConfig,
    per_row: usize,
) -> HostLists<T> {
    let CacheSizes { heads, head_dim, .. } = state.sizes;
    let batch = rows.len();
    let of = |row: usize, head: usize| {
        let mine = |(at, _): &&(ListHeads, List<T>)| at.batch == rows.start + row && at.heads.contains(&head);
        // The loader and every call ensure that each head has its list.
        let (at, list) = lists.iter().find(mine).expect("a list of every head");
        (list, head - at.heads.start)
    };
    let each_head = || (0..batch * heads).map(|index| of(index / heads, index % heads));
    let tests: Vec<HeadTest> = each_head().map(|(list, head)| list.settings.tests[head]).collect();
    let last_queries = config.fold.folds_queries().then(|| {
        let mut queries = vec![T::zero(); batch * heads * head_dim];
        for ((list, head), to) in each_head().zip(queries.chunks_exact_mut(head_dim)) {
            // The last queries of a list that never merges are never read.
            if let Some(query) = list.last_queries.get(head * head_dim..(head + 1) * head_dim) {
                T::narrow(query, to);
            }
        }
        queries
    });
    let width = heads / per_row;
    let held = (0..batch * per_row).map(|index| {
        let (list, _) = of(index / per_row, index % per_row * width);
        match list.settings.merges() {
            _ if list.seq_len == 0 => HostList::default(),
            true => held_merging(list),
            false => held_plain(list, config),
        }
    });
    HostLists {
        seq_len: of(0, 0).0.seq_len,
        sliding_window: state.sliding_window,
        code: lists.first().and_then(|(_, list)| list.settings.code),
        lists: held.collect(),
        last_queries,
        tests,
    }
}

fn held_merging<T: Both>(list: &List<T>) -> HostList<T> {
    let (settings, dims) = (&list.settings, [list.dim, list.value_dim]);
    // A list may still hold raw tokens that have left the window, and lacks those that have left a sliding window
    // inside it.
    let (kept, slots) = (list.seq_len.min(settings.kept_raw()), list.seq_len.min(settings.window));
    let stale = list.recent_keys.len() / list.dim - kept;
    let recent = |rows: &[T], dim: usize| [&vec![T::zero(); (slots - kept) * dim][..], &rows[stale * dim..]].concat();
    let edge = list.seq_len.checked_sub(settings.window + 1);
    let (far, tokens) = closed_rows(&list.entries);
    HostList {
        kept_from: if settings.folds() {
            list.kept_from
        } else {
            edge.unwrap_or(0)
        },
        far,
        tokens,
        chain: match &list.open {
            Some(chain) => Some(chain.rows().map(<[f32]>::to_vec)),
            None => edge.map(|_| std::array::from_fn(|row| vec![0.0; dims[row % 2]])),
        },
        chain_size: list.open.as_ref().map_or(0, |chain| chain.size as u32),
        recent_k: recent(&list.recent_keys, dims[0]),
        recent_v: recent(&list.recent_values, dims[1]),
        bits: list.bits.clone(),
        run: list.run.start.as_ref().map(|(token, key)| (*token, narrowed(key))),
        last_key: narrowed(&list.run.last_key),
        last_hidden: list.last_hidden,
        masses: list.observed.masses.clone(),
        sink_keys: list.observed.sink_keys.clone(),
    }
}

fn held_plain<T: Both>(list: &List<T>, config: &CompressionConfig) -> HostList<T> {
    let (seq_len, window) = (list.seq_len, config.window);
    let (open, stored) = (list.open.as_ref().map(ChainFold::rows), list.entries.copied());
    // The rows of these tokens; zeros for those that have left the sliding window.
    let rows = |closed: &[T], index: usize, tokens: Range<usize>| -> Vec<T> {
        let dim = [list.dim, list.value_dim][index];
        let last = open.map_or_else(Vec::new, |rows| narrowed(rows[index]));
        let row = |token: usize| match token.checked_sub(list.kept_from) {
            None => vec![T::zero(); dim],
            Some(at) => closed.chunks_exact(dim).nth(at).map_or(last.clone(), <[T]>::to_vec),
        };
        tokens.flat_map(row).collect()
    };
    let (keys, values) = (
        |tokens| rows(&stored.keys, 0, tokens),
        |tokens| rows(&stored.values, 1, tokens),
    );
    let (edge, oldest) = (seq_len.saturating_sub(window + 1), seq_len.saturating_sub(window));
    let far = list.kept_from.min(edge)..edge;
    HostList {
        kept_from: far.start,
        far: match list.entries.code() {
            None => ClosedRows::InDtype {
                keys: keys(far.clone()),
                values: values(far.clone()),
            },
            // There is no window: all but the newest token.
            Some(_) => closed_rows(&list.entries).0,
        },
        tokens: far.map(|token| token as u32).collect(),
        chain: (seq_len > window).then(|| {
            let (key, value) = (widened(&keys(edge..edge + 1)), widened(&values(edge..edge + 1)));
            [key.clone(), value.clone(), key, value]
        }),
        chain_size: u32::from(seq_len > window),
        recent_k: keys(oldest..seq_len),
        recent_v: values(oldest..seq_len),
        bits: vec![0; window.min(seq_len - 1)],
        run: None,
        last_hidden: false,
        last_key: keys(seq_len - 1..seq_len),
        masses: vec![0.0; window.min(seq_len)],
        sink_keys: match list.entries.code() {
            None => keys(0..config.sinks.min(seq_len)),
            // There is nothing to observe.
            Some(_) => Vec::new(),
        },
    }
}
