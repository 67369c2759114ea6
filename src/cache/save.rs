//! [`CompressedKvCache::save`] and the file format that it shares with [`CompressedKvCache::load`].
//!
//! A cache is one safetensors file. Its metadata hold `format` ([`FORMAT`]), `version` ([`VERSION`]), `cache`, a
//! [`Header`] as JSON, and `checksum` ([`checksum`]) over all of these and the tensors. List i of the header has all of
//! the tensors `i.NAME` below, with 0 rows where there is no data. S is the storage dtype, A the dtype of sums: f64 for
//! f64, else f32.
//!
//! | NAME | shape | dtype | |
//! |---|---|---|---|
//! | `keys`, `values` | (entries, D), (entries, Dv) | S | closed chains |
//! | `tokens` | (entries) | u32 | the last token of each; their distances are the chains' sizes |
//! | `log2_sizes` | (entries) | A | under [`Fold::Mean`](crate::Fold::Mean) |
//! | `open` | (4, D) | A | the open chain: key, value, raw key, raw value; once the window is full, if window < L |
//! | | (1, 2·D + 2·Dv) | | the same where Dv is not D |
//! | `recent_keys`, `recent_values` | (min(window, L - 1, seq_len), D or Dv) | S | raw tokens; L: sliding window |
//! | `bits` | (min(window, seq_len - 1)) | u8 | whether each raw token joins its left neighbour |
//! | `run_key` | (1, D) | A | the first key of the run that ends at the last token, where one does |
//! | `last_key` | (1, D) | A | where neighbours are compared |
//! | `last_queries` | (heads, D) | A | under [`Fold::PairSum`](crate::Fold::PairSum) |
//!
//! Two more, where the list merges under [`Criterion::ObservedMass`](crate::Criterion::ObservedMass):
//!
//! | NAME | shape | dtype | |
//! |---|---|---|---|
//! | `masses` | (min(window, seq_len)) | A | the mass of each raw token so far |
//! | `sink_keys` | (min(sinks, seq_len), D) | S | the keys of the first tokens |
//!
//! Four more in 8 bits; then `keys` and `values` have 0 rows:
//!
//! | NAME | shape | dtype | |
//! |---|---|---|---|
//! | `key_codes`, `value_codes` | (entries, D), (entries, Dv) | u8 | the bytes of the codes |
//! | `key_scales`, `value_scales` | (entries) | bf16 | the factor on each row |
//!
//! Three more under [`CacheOptions::budget`](super::CacheOptions::budget); then `tokens` may have gaps:
//!
//! | NAME | shape | dtype | |
//! |---|---|---|---|
//! | `scores` | (entries) | f32 | what the budget goes by |
//! | `bit_scores` | as `bits`, or 0 where no decision counts | f32 | the same of the raw tokens |
//! | `last_score` | (1) | f32 | the last token's, where the caller gives scores |

use super::checksum::{checksum, FORMAT, VERSION};
use super::prefix::PrefixKey;
use super::segments::RowPlace;
use super::{CacheSizes, CompressedKvCache, Lists, ListsOf, State};
use crate::config::whole::{present, WholeConfig, WholeStrategies};
use crate::config::{CompressionConfig, HeadStrategies, HeadTest, MergeStrategy, Storage};
use crate::cpu::cache::list::List;
use crate::cpu::decide::heads::ListHeads;
use crate::cpu::number::element::Element;
use crate::files::replace;
use candle_core::{Error, Result, WithDType};
use half::bf16;
use safetensors::{Dtype, SafeTensorError, View};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

/// All of the cache but the tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Header {
    #[serde(with = "WholeConfig")]
    pub config: CompressionConfig,
    #[serde(deserialize_with = "WholeStrategies::read")]
    pub strategies: HeadStrategies,
    /// The options' storage.
    #[serde(deserialize_with = "present")]
    pub storage: Option<Storage>,
    #[serde(deserialize_with = "present")]
    pub max_entries: Option<usize>,
    /// See [`CacheOptions::rollback`](super::CacheOptions::rollback).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub rollback: usize,
    /// See [`CacheOptions::budget`](super::CacheOptions::budget).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<usize>,
    /// The key of a saved prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<PrefixKey>,
    /// None for an empty cache.
    #[serde(deserialize_with = "present")]
    pub state: Option<SavedState>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedState {
    pub sizes: CacheSizes,
    pub seq_len: usize,
    /// The sliding window of the calls that attended. Without one nothing has left, and later calls may still have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<usize>,
    /// Where each batch row stands, once segments were given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub places: Option<Vec<RowPlace>>,
    /// The storage dtype in use.
    pub dtype: String,
    /// Batch-major, then by head.
    pub lists: Vec<SavedList>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedList {
    pub at: ListHeads,
    /// The tests, one per query head. They differ from the strategies once `index_select` has moved batch rows.
    pub tests: Vec<SavedTest>,
    /// The token of `run_key`.
    #[serde(deserialize_with = "present")]
    pub run_start: Option<usize>,
    #[serde(deserialize_with = "present")]
    pub last_bad: Option<usize>,
    /// See [`List::last_hidden`].
    #[serde(default, skip_serializing_if = "is_false")]
    pub last_hidden: bool,
    /// See [`List::kept_from`].
    #[serde(default, skip_serializing_if = "is_zero")]
    pub kept_from: usize,
    /// The number of its tokens, where segments or padding make it another than the cache's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq_len: Option<usize>,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// A [`HeadTest`]. JSON has no infinity, which is the threshold of an off head that has none of its own.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedTest {
    pub strategy: MergeStrategy,
    #[serde(deserialize_with = "present")]
    pub threshold: Option<f64>,
}

impl From<&HeadTest> for SavedTest {
    fn from(test: &HeadTest) -> Self {
        Self {
            strategy: test.strategy,
            threshold: test.threshold.is_finite().then_some(test.threshold),
        }
    }
}

/// Numbers as safetensors stores them, little-endian.
pub(super) trait Storable: WithDType {
    fn to_bytes(data: &[Self]) -> Vec<u8>;
    fn from_bytes(bytes: &[u8]) -> Vec<Self>;
}

macro_rules! stored {
    ($($number:ty),*) => {$(
        impl Storable for $number {
            fn to_bytes(data: &[Self]) -> Vec<u8> {
                let mut bytes = vec![0; size_of_val(data)];
                for (target, x) in bytes.as_chunks_mut().0.iter_mut().zip(data) {
                    *target = x.to_le_bytes();
                }
                bytes
            }

            fn from_bytes(bytes: &[u8]) -> Vec<Self> {
                bytes.as_chunks().0.iter().map(|x| Self::from_le_bytes(*x)).collect()
            }
        }
    )*};
}

stored!(u8, u32, half::f16, half::bf16, f32, f64);

/// One tensor to write; its bytes are made only when it is written.
struct Piece<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Box<dyn Fn() -> Vec<u8> + 'a>,
}

impl<'a> Piece<'a> {
    fn new<T: Storable>(data: impl Into<Cow<'a, [T]>>, shape: Vec<usize>) -> Self {
        let data = data.into();
        Self::later::<T>(shape, move || T::to_bytes(&data))
    }

    /// Numbers of type T, whose bytes a function makes.
    fn later<T: Storable>(shape: Vec<usize>, bytes: impl Fn() -> Vec<u8> + 'a) -> Self {
        Self {
            dtype: T::DTYPE.into(),
            shape,
            bytes: Box::new(bytes),
        }
    }

    /// Numbers as rows of `dim`.
    fn rows<T: Storable>(data: impl Into<Cow<'a, [T]>>, dim: usize) -> Self {
        let data = data.into();
        let rows = data.len() / dim;
        Self::new(data, vec![rows, dim])
    }

    fn flat<T: Storable>(data: &'a [T]) -> Self {
        Self::new(data, vec![data.len()])
    }
}

impl View for Piece<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned((self.bytes)())
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

fn pieces<S: Element + Storable>(lists: &ListsOf<S>) -> Vec<(String, Piece<'_>)>
where
    S::Acc: Storable,
{
    let mut pieces = Vec::new();
    for (index, (_, list)) in lists.iter().enumerate() {
        pieces.extend(
            list_pieces(list)
                .into_iter()
                .map(|(name, piece)| (format!("{index}.{name}"), piece)),
        );
    }
    pieces
}

fn list_pieces<S: Element + Storable>(list: &List<S>) -> Vec<(&'static str, Piece<'_>)>
where
    S::Acc: Storable,
{
    let (dim, value_dim) = (list.dim, list.value_dim);
    // A list may still hold raw tokens that have left the window.
    let stale = list.recent_keys.len() / dim - list.seq_len.min(list.settings.kept_raw());
    let open = list.open.as_ref().map_or(Vec::new(), |chain| chain.rows().concat());
    let run_key = list.run.start.as_ref().map_or(&[][..], |(_, key)| key);
    let [keys, values, tokens, log2_sizes, scores] = entry_pieces(list);
    let mut pieces = vec![
        ("keys", keys),
        ("values", values),
        ("tokens", tokens),
        ("log2_sizes", log2_sizes),
        ("open", Piece::rows(open, open_width(dim, value_dim))),
        ("recent_keys", Piece::rows(&list.recent_keys[stale * dim..], dim)),
        (
            "recent_values",
            Piece::rows(&list.recent_values[stale * value_dim..], value_dim),
        ),
        ("bits", Piece::flat(&list.bits)),
        ("run_key", Piece::rows(run_key, dim)),
        ("last_key", Piece::rows(&list.run.last_key, dim)),
        ("last_queries", Piece::rows(&list.last_queries, dim)),
    ];
    if list.entries.code().is_some() {
        let names = [
            ("key_codes", "key_scales", dim),
            ("value_codes", "value_scales", value_dim),
        ];
        for (which, (codes, scales, dim)) in names.into_iter().enumerate() {
            let (entries, count) = (&list.entries, list.entries.len());
            let bytes = move || u8::to_bytes(&entries.copied().codes[which]);
            pieces.push((codes, Piece::later::<u8>(vec![count, dim], bytes)));
            let bytes = move || bf16::to_bytes(&entries.copied().scales[which]);
            pieces.push((scales, Piece::later::<bf16>(vec![count], bytes)));
        }
    }
    if list.settings.budget.is_some() {
        pieces.push(("scores", scores));
        pieces.push(("bit_scores", Piece::flat(&list.scores)));
        pieces.push(("last_score", Piece::flat(std::slice::from_ref(&list.last_score))));
    }
    if list.settings.observes() {
        pieces.push(("masses", Piece::flat(&list.observed.masses)));
        pieces.push(("sink_keys", Piece::rows(&list.observed.sink_keys, dim)));
    }
    pieces
}

/// Keys, values, tokens, sizes and scores of the closed chains: where they are, if one piece holds them, else copied
/// when they are written.
fn entry_pieces<S: Element + Storable>(list: &List<S>) -> [Piece<'_>; 5]
where
    S::Acc: Storable,
{
    let (dim, value_dim, entries) = (list.dim, list.value_dim, &list.entries);
    if let Some(columns) = entries.whole() {
        return [
            Piece::rows(columns.keys.data, dim),
            Piece::rows(columns.values.data, value_dim),
            Piece::flat(columns.tokens),
            Piece::flat(columns.log2_sizes),
            Piece::flat(columns.scores),
        ];
    }
    let (count, raw) = (entries.len(), if entries.code().is_some() { 0 } else { entries.len() });
    let sizes = if list.settings.fold.has_sizes() { count } else { 0 };
    [
        Piece::later::<S>(vec![raw, dim], move || S::to_bytes(&entries.copied().keys)),
        Piece::later::<S>(vec![raw, value_dim], move || S::to_bytes(&entries.copied().values)),
        Piece::later::<u32>(vec![count], move || u32::to_bytes(&entries.copied().tokens)),
        Piece::later::<S::Acc>(vec![sizes], move || S::Acc::to_bytes(&entries.copied().log2_sizes)),
        Piece::later::<f32>(vec![count], move || f32::to_bytes(&entries.copied().scores)),
    ]
}

/// The length of a row of `open`: one row holds all of the chain where keys and values have different sizes.
pub(super) fn open_width(dim: usize, value_dim: usize) -> usize {
    if dim == value_dim {
        dim
    } else {
        2 * (dim + value_dim)
    }
}

fn saved_lists<S: Element>(lists: &ListsOf<S>, seq_len: usize) -> Vec<SavedList> {
    let saved = |(at, list): &(ListHeads, List<S>)| SavedList {
        at: at.clone(),
        tests: list.settings.tests.iter().map(SavedTest::from).collect(),
        run_start: list.run.start.as_ref().map(|(token, _)| *token),
        last_bad: list.last_bad,
        last_hidden: list.last_hidden,
        kept_from: list.kept_from,
        seq_len: Some(list.seq_len).filter(|own| *own != seq_len),
    };
    lists.iter().map(saved).collect()
}

impl CompressedKvCache {
    /// Writes the cache to one safetensors file; [`Self::load`] reads it back bit for bit. The file appears whole or
    /// not at all: it is written beside `path` and then renamed to replace `path`. On Unix only its owner may read it,
    /// unless it replaces a file with other permissions. Its size is about [`Self::bytes`], and 2 kB per list. A link
    /// stays a link, and its file is replaced.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_sfattention::{CompressedKvCache, CompressionConfig, HeadStrategies, MergeStrategy};
    /// # let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    /// # let mut cache = CompressedKvCache::new(strategies, CompressionConfig::pretrained(), Default::default())?;
    /// # let x = Tensor::randn(0f32, 1., (1, 2, 100, 64), &Device::Cpu)?;
    /// # cache.append_and_attend(&x, &x, &x, &Default::default())?;
    /// # let path = std::env::temp_dir().join(format!("prompt-{}.safetensors", std::process::id()));
    /// cache.save(&path)?;
    /// let again = CompressedKvCache::load(&path, &Device::Cpu)?;
    /// assert_eq!((again.seq_len(), again.bytes()), (cache.seq_len(), cache.bytes()));
    /// # std::fs::remove_file(&path)?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// A file that cannot be written, or an error of a GPU, which is waited for.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_as(path.as_ref(), None)
    }

    pub(super) fn save_as(&self, path: &Path, prefix: Option<&PrefixKey>) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(state) = &self.on_gpu {
            return self.save_state(Some(&state.to_cpu(&self.config)?), path, prefix);
        }
        self.save_state(self.state.as_deref(), path, prefix)
    }

    /// The settings that decide what the cache holds, as text.
    pub(super) fn settings_text(&self) -> Result<String> {
        let settings = Header {
            max_entries: None,
            rollback: 0,
            ..self.header(None)
        };
        serde_json::to_string(&settings).map_err(Error::wrap)
    }

    fn save_state(&self, state: Option<&State>, path: &Path, prefix: Option<&PrefixKey>) -> Result<()> {
        let header = Header {
            prefix: prefix.cloned(),
            ..self.header(state)
        };
        let header = serde_json::to_string(&header).map_err(Error::wrap)?;
        let mut tensors = match state {
            Some(state) => each!(&state.lists, lists => pieces(lists)),
            None => Vec::new(),
        };
        let checksum = checksum(&header, &mut tensors);
        let metadata = [
            ("format", FORMAT),
            ("version", VERSION),
            ("cache", &header),
            ("checksum", &checksum),
        ];
        let metadata: HashMap<_, _> = metadata.map(|(name, value)| (name.into(), value.into())).into();
        let fill = |file: &Path| {
            safetensors::serialize_to_file(tensors, Some(metadata), file).map_err(|error| match error {
                SafeTensorError::IoError(error) => error,
                error => std::io::Error::other(error),
            })
        };
        replace(path, fill).map_err(|error| {
            Error::msg(format!(
                "save {}: expected to write the file, got {error}; choose a folder that exists, may be written to and \
                 has room",
                path.display()
            ))
        })
    }

    fn header(&self, state: Option<&State>) -> Header {
        Header {
            config: self.config.clone(),
            strategies: self.strategies.clone(),
            storage: self.options.storage,
            max_entries: self.options.max_entries,
            rollback: self.options.rollback,
            budget: self.options.budget,
            prefix: None,
            state: state.map(|state| SavedState {
                sizes: state.sizes,
                seq_len: state.seq_len,
                sliding_window: state.sliding_window.flatten(),
                places: state.places.clone(),
                dtype: state.lists.dtype().as_str().to_string(),
                lists: each!(&state.lists, lists => saved_lists(lists, state.seq_len)),
            }),
        }
    }
}
