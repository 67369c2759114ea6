//! [`CompressedKvCache::load`]: the reader of `save`'s files, which checks every number that later code indexes by.

use super::checksum::{checksum, FORMAT, VERSION};
use super::save::{open_width, Header, SavedList, SavedState, SavedTest, Storable};
use super::{CacheOptions, CacheSizes, CompressedKvCache, Lists, ListsOf, State};
use crate::config::{CompressionConfig, HeadTest};
use crate::cpu::cache::list::{List, Run};
use crate::cpu::cache::settings::ListSettings;
use crate::cpu::columns::chain::ChainFold;
use crate::cpu::decide::heads::ListHeads;
use crate::cpu::decide::observe::Observed;
use crate::cpu::number::element::{Accumulator, Element};
use crate::storage::not_on_cpu;
use candle_core::{bail, DType, Device, Error, Result};
use safetensors::{Dtype, SafeTensors};
use std::path::Path;

const DAMAGED: &str = "the file is damaged, save the cache again";

impl CompressedKvCache {
    /// Reads a file of [`Self::save`]: a cache with the same settings, options and tokens. On the same kind of device
    /// it continues bit for bit like the saved cache. On another kind it continues as if it had always been there.
    ///
    /// # Errors
    /// A device without kernels. A file that cannot be read, is no saved cache, has another version of the format, is
    /// cut short or otherwise damaged (its checksum shows that), or whose parts do not fit together. On a GPU also a
    /// dtype, head size or window that it does not support.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        if !(device.is_cpu() || cfg!(feature = "cuda") && device.is_cuda()) {
            return not_on_cpu(device);
        }
        let path = path.as_ref();
        let at_path = |error: &dyn std::fmt::Display| Error::msg(format!("load {}: {error}", path.display()));
        let bytes = std::fs::read(path)
            .map_err(|error| at_path(&format!("expected a readable file, got {error}; check the path")))?;
        let cache = read(&bytes).map_err(|error| at_path(&error))?;
        if device.is_cpu() {
            return Ok(cache);
        }
        cache.to_device(device).map_err(|error| at_path(&error))
    }

    /// A copy on another device, or on its own. A device counts as this cache's once it holds tokens. Waits for a GPU.
    ///
    /// # Errors
    /// A device without kernels, a dtype, head size or window that it does not support, or an error that it reports.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        return self.to_any_device(device);
        #[cfg(not(feature = "cuda"))]
        match device.is_cpu() {
            true => Ok(self.clone()),
            false => not_on_cpu(device),
        }
    }
}

fn read(bytes: &[u8]) -> Result<CompressedKvCache> {
    let (file, header) = match (SafeTensors::deserialize(bytes), SafeTensors::read_metadata(bytes)) {
        (Ok(file), Ok((_, header))) => (file, header),
        (Err(error), _) | (_, Err(error)) => bail!(
            "expected a safetensors file that CompressedKvCache::save wrote, got {error}; it is another kind of file \
             or was cut short, save the cache again"
        ),
    };
    let metadata = |name: &str| header.metadata().as_ref().and_then(|map| map.get(name));
    if metadata("format").is_none_or(|format| format != FORMAT) {
        bail!(
            "expected a safetensors file of format {FORMAT:?}, got format {:?}; only files that \
             CompressedKvCache::save wrote can be loaded",
            metadata("format")
        )
    }
    if metadata("version").is_none_or(|version| version != VERSION) {
        bail!(
            "expected format version {VERSION:?}, got {:?}; load it with the crate version that wrote it, or append \
             the tokens to a new cache and save that",
            metadata("version")
        )
    }
    let text = metadata("cache").map_or("", String::as_str);
    check_checksum(metadata("checksum"), &checksum(text, &mut file.tensors()))?;
    let header: Header = match serde_json::from_str(text) {
        Ok(header) => header,
        Err(error) => bail!("header: expected what version {VERSION} writes, got {error}; {DAMAGED}"),
    };
    let options = CacheOptions {
        storage: header.storage.as_deref().map(dtype_of).transpose()?,
        max_entries: header.max_entries,
    };
    let mut cache = CompressedKvCache::new(header.strategies, header.config, options)?;
    if let Some(saved) = &header.state {
        cache.state = Some(restore_state(&cache, saved, &file)?);
    }
    Ok(cache)
}

fn check_checksum(saved: Option<&String>, of_content: &str) -> Result<()> {
    match saved {
        Some(saved) if saved == of_content => Ok(()),
        Some(saved) => {
            bail!("checksum: expected the file's own, {saved:?}, got {of_content:?} of what it holds; {DAMAGED}")
        }
        None => bail!(
            "checksum: expected one, got none; a version of this crate before its first release wrote the file, append \
             the tokens to a new cache and save that"
        ),
    }
}

fn dtype_of(name: &str) -> Result<DType> {
    match name.parse() {
        Ok(dtype) => Ok(dtype),
        Err(_) => bail!("storage: expected f64, f32, f16 or bf16, got {name:?}; {DAMAGED}"),
    }
}

fn restore_state(cache: &CompressedKvCache, saved: &SavedState, file: &SafeTensors) -> Result<State> {
    let dtype = dtype_of(&saved.dtype)?;
    if cache.options.storage.is_some_and(|storage| storage != dtype) {
        bail!(
            "dtype: expected the storage {:?}, got {dtype:?}; {DAMAGED}",
            cache.options.storage
        )
    }
    check_sizes(&saved.sizes)?;
    cache.strategies.check_heads(saved.sizes.heads)?;
    check_heads(saved, &cache.config)?;
    // Token indices are u32.
    if !(1..=u32::MAX as usize).contains(&saved.seq_len) {
        bail!("seq_len: expected 1 to 2^32 - 1, got {}; {DAMAGED}", saved.seq_len)
    }
    let reader = Reader {
        file,
        config: &cache.config,
        dim: saved.sizes.head_dim,
        value_dim: saved.sizes.values(),
        sliding_window: saved.sliding_window.unwrap_or(usize::MAX),
    };
    if saved.sliding_window == Some(0) {
        bail!(
            "sliding_window: expected None or at least 1, got {:?}; {DAMAGED}",
            saved.sliding_window
        )
    }
    check_places(saved)?;
    Ok(State {
        sizes: saved.sizes,
        seq_len: saved.seq_len,
        places: saved.places.clone(),
        sliding_window: saved.sliding_window.map(Some),
        lists: match dtype {
            DType::F64 => Lists::F64(reader.lists(saved)?),
            DType::F32 => Lists::F32(reader.lists(saved)?),
            DType::F16 => Lists::F16(reader.lists(saved)?),
            DType::BF16 => Lists::BF16(reader.lists(saved)?),
            _ => bail!("dtype: expected f64, f32, f16 or bf16, got {dtype:?}; {DAMAGED}"),
        },
    })
}

/// Checks that each batch row has a place, and that the lists of a row have as many tokens as came since its start.
fn check_places(saved: &SavedState) -> Result<()> {
    let (batch, seq_len) = (saved.sizes.batch, saved.seq_len);
    let Some(places) = &saved.places else {
        if let Some(list) = saved.lists.iter().find(|list| list.seq_len.is_some()) {
            bail!(
                "lists: expected no seq_len without places, got {:?}; {DAMAGED}",
                list.seq_len
            )
        }
        return Ok(());
    };
    let bad = places.iter().find(|place| place.number == 0 || place.start > seq_len);
    if places.len() != batch || bad.is_some() {
        bail!(
            "places: expected {batch} of numbers from 1 and starts up to {seq_len}, got {} with {bad:?}; {DAMAGED}",
            places.len()
        )
    }
    let of_row = |batch: usize| saved.lists.iter().filter(move |list| list.at.batch == batch);
    for (batch, place) in places.iter().enumerate() {
        let mut lengths = of_row(batch).map(|list| list.seq_len.unwrap_or(seq_len));
        let first = lengths.next().unwrap_or(0);
        if first > seq_len - place.start || lengths.any(|length| length != first) {
            bail!(
                "lists: expected as many tokens in each list of batch row {batch}, at most {}, got {first} in its \
                 first; {DAMAGED}",
                seq_len - place.start
            )
        }
    }
    Ok(())
}

fn check_sizes(sizes: &CacheSizes) -> Result<()> {
    let CacheSizes {
        batch,
        heads,
        kv_heads,
        head_dim,
        value_dim,
    } = *sizes;
    if [batch, heads, kv_heads, head_dim, value_dim.unwrap_or(1)].contains(&0) || heads % kv_heads != 0 {
        bail!("sizes: expected none to be 0 and KV heads that divide the heads, got {sizes:?}; {DAMAGED}")
    }
    Ok(())
}

/// Checks the order of the lists: batch-major, and each head of each batch row in one list. A list serves a KV head's
/// whole group where the group decides as one, else one head.
fn check_heads(saved: &SavedState, config: &CompressionConfig) -> Result<()> {
    let CacheSizes {
        batch, heads, kv_heads, ..
    } = saved.sizes;
    let group = heads / kv_heads;
    let (mut row, mut head) = (0, 0);
    for (index, list) in saved.lists.iter().enumerate() {
        let width = list.tests.len();
        let agree = config.group_rule.heads_agree();
        let off = list.tests.iter().all(|test| test.strategy.is_off());
        let whole = width == group && head % group == 0 && (agree || off || group == 1);
        let alone = width == 1 && !agree;
        let expected = ListHeads {
            batch: row,
            kv_head: head / group,
            heads: head..head.saturating_add(width),
        };
        if !(whole || alone) || list.at != expected {
            bail!(
                "list {index}: expected batch row {row} and heads from {head} on, alone or all {group} of a KV head, \
                 got {:?} with {width} tests; {DAMAGED}",
                list.at
            )
        }
        head += width;
        if head == heads {
            (row, head) = (row + 1, 0);
        }
    }
    if (row, head) != (batch, 0) {
        bail!(
            "lists: expected all {heads} heads of {batch} batch rows, got {} lists that end at row {row}, head {head}; \
             {DAMAGED}",
            saved.lists.len()
        )
    }
    Ok(())
}

fn head_test(saved: &SavedTest) -> Result<HeadTest> {
    let threshold = match saved.threshold {
        Some(threshold) if threshold.is_finite() => threshold,
        None if saved.strategy.is_off() => f64::INFINITY,
        got => bail!("tests: expected a finite threshold, got {got:?}; {DAMAGED}"),
    };
    Ok(HeadTest {
        strategy: saved.strategy,
        threshold,
    })
}

struct Reader<'a> {
    file: &'a SafeTensors<'a>,
    config: &'a CompressionConfig,
    dim: usize,
    value_dim: usize,
    sliding_window: usize,
}

impl Reader<'_> {
    fn lists<S: Element + Storable>(&self, saved: &SavedState) -> Result<ListsOf<S>>
    where
        S::Acc: Storable,
    {
        let lists = saved.lists.iter().enumerate();
        lists
            .map(|(index, list)| {
                let seq_len = list.seq_len.unwrap_or(saved.seq_len);
                Ok((list.at.clone(), self.list(index, list, seq_len)?))
            })
            .collect()
    }

    fn list<S: Element + Storable>(&self, index: usize, saved: &SavedList, seq_len: usize) -> Result<List<S>>
    where
        S::Acc: Storable,
    {
        let (dim, value_dim, some) = (self.dim, self.value_dim, seq_len > 0);
        let tests = saved.tests.iter().map(head_test).collect::<Result<_>>()?;
        let settings = ListSettings {
            sliding_window: self.sliding_window,
            ..ListSettings::new(tests, self.config)
        };
        let window = settings.window;
        let name = |name: &str| format!("{index}.{name}");
        let rows = |tensor: &str, count: usize| self.tensor::<S>(&name(tensor), &[count, dim]);
        let values = |tensor: &str, count: usize| self.tensor::<S>(&name(tensor), &[count, value_dim]);
        let sums = |tensor: &str, count: usize| self.tensor::<S::Acc>(&name(tensor), &[count, dim]);
        // This tensor alone gives the number of entries.
        let entries = self.view(&name("tokens"))?.1.first().copied().unwrap_or(0);
        let tokens = self.tensor::<u32>(&name("tokens"), &[entries])?;
        let sizes = self.chain_sizes(&name("tokens"), &tokens, (saved.kept_from, seq_len), &settings)?;
        let sized = settings.fold.has_sizes();
        let log2_sizes: Vec<S::Acc> = self.tensor(&name("log2_sizes"), &[if sized { entries } else { 0 }])?;
        check_log2_sizes::<S::Acc>(&name("log2_sizes"), &log2_sizes, &sizes)?;
        let size = *sizes.last().filter(|_| sized).unwrap_or(&1);
        let (recent, full) = (seq_len.min(settings.kept_raw()), seq_len > window && settings.folds());
        let bits = self.tensor::<u8>(&name("bits"), &[window.min(seq_len.saturating_sub(1))])?;
        if let Some(bad) = bits.iter().find(|bit| **bit > 1) {
            bail!("{}: expected 0 and 1, got {bad}; {DAMAGED}", name("bits"))
        }
        let runs = usize::from(saved.run_start.is_some());
        let folds_queries = settings.fold.folds_queries() && some;
        let last_queries = sums("last_queries", if folds_queries { settings.tests.len() } else { 0 })?;
        // All of the open chain, in rows of `open_width`.
        let (all, width) = (2 * (dim + value_dim), open_width(dim, value_dim));
        let open = self.tensor::<S::Acc>(&name("open"), &[if full { all / width } else { 0 }, width])?;
        let list = List {
            dim,
            value_dim,
            seq_len,
            keys: rows("keys", entries)?.into(),
            values: values("values", entries)?.into(),
            tokens: tokens.into(),
            log2_sizes: log2_sizes.into(),
            kept_from: saved.kept_from,
            open: full.then(|| {
                let mut rest = &open[..];
                let rows = [dim, value_dim, dim, value_dim].map(|dim| {
                    let (row, after) = rest.split_at(dim);
                    rest = after;
                    row.to_vec()
                });
                ChainFold::from_rows(settings.fold, size, rows)
            }),
            recent_keys: rows("recent_keys", recent)?,
            recent_values: values("recent_values", recent)?,
            bits,
            run: Run {
                start: saved.run_start.zip(Some(sums("run_key", runs)?)),
                last_key: sums("last_key", usize::from(settings.compares() && some))?,
            },
            observed: self.observed(&name, &settings, seq_len)?,
            last_hidden: saved.last_hidden,
            last_queries,
            last_bad: saved.last_bad,
            settings,
        };
        self.check_tokens(index, &list)?;
        Ok(list)
    }

    fn observed<S: Element + Storable>(
        &self,
        name: &dyn Fn(&str) -> String,
        settings: &ListSettings,
        seq_len: usize,
    ) -> Result<Observed<S>>
    where
        S::Acc: Storable,
    {
        if !settings.observes() {
            return Ok(Observed::new());
        }
        let dim = self.dim;
        Ok(Observed {
            masses: self.tensor(&name("masses"), &[seq_len.min(settings.window)])?,
            sink_keys: self.tensor(&name("sink_keys"), &[seq_len.min(settings.sinks), dim])?,
        })
    }

    fn view(&self, name: &str) -> Result<(Dtype, Vec<usize>, &[u8])> {
        match self.file.tensor(name) {
            Ok(view) => Ok((view.dtype(), view.shape().to_vec(), view.data())),
            Err(error) => bail!("{name}: expected a tensor of this name, got {error}; {DAMAGED}"),
        }
    }

    fn tensor<T: Storable>(&self, name: &str, shape: &[usize]) -> Result<Vec<T>> {
        let (dtype, got, bytes) = self.view(name)?;
        if dtype != Dtype::from(T::DTYPE) || got != shape {
            bail!(
                "{name}: expected {:?} of shape {shape:?}, got {dtype:?} of shape {got:?}; {DAMAGED}",
                Dtype::from(T::DTYPE)
            )
        }
        Ok(T::from_bytes(bytes))
    }

    /// The number of tokens in each chain, the open one last. Chains end at `tokens` and at the window's edge, and
    /// cover all tokens from `kept_from` up to the edge.
    fn chain_sizes(
        &self,
        name: &str,
        tokens: &[u32],
        (kept_from, seq_len): (usize, usize),
        settings: &ListSettings,
    ) -> Result<Vec<usize>> {
        let edge = seq_len.checked_sub(settings.window.saturating_add(1));
        let edge = edge.filter(|_| settings.folds());
        let first = settings.first_seen(seq_len);
        let left = tokens.first().is_some_and(|oldest| (*oldest as usize) < first);
        if left || kept_from > first.min(edge.unwrap_or(0)) {
            bail!(
                "{name}: expected chains that end at token {first} or later, the oldest from there or before, got \
                 {:?} from {kept_from} on; {DAMAGED}",
                tokens.first()
            )
        }
        if edge.is_none() && !tokens.is_empty() {
            bail!(
                "{name}: expected none while the window is not full, got {}; {DAMAGED}",
                tokens.len()
            )
        }
        let longest = settings.longest_run().saturating_add(1);
        let mut next = kept_from;
        let ends = tokens.iter().map(|token| *token as usize).chain(edge);
        ends.map(|end| {
            let size = (end + 1).saturating_sub(next);
            if !(1..=longest).contains(&size) {
                bail!(
                    "{name}: expected increasing tokens before {edge:?} with at most {longest} to a chain, got {end} \
                     as the end of one that begins at {next}; {DAMAGED}"
                )
            }
            next = end + 1;
            Ok(size)
        })
        .collect()
    }

    fn check_tokens<S: Element>(&self, index: usize, list: &List<S>) -> Result<()> {
        let seq_len = list.seq_len;
        let start = list.run.start.as_ref().map(|(token, _)| *token);
        // A run has two tokens at least.
        if start.is_some_and(|token| token + 1 >= seq_len || !list.settings.compares()) {
            bail!(
                "{index}: expected a run that begins before token {}, got {start:?}; {DAMAGED}",
                seq_len.saturating_sub(1)
            )
        }
        if list.last_hidden && !list.settings.takes_scores() {
            bail!(
                "{index}: expected last_hidden only where given scores decide, got it under {:?}; {DAMAGED}",
                list.settings.criterion
            )
        }
        if list.last_bad.is_some_and(|token| token >= seq_len) {
            bail!(
                "{index}: expected last_bad below {seq_len}, got {:?}; {DAMAGED}",
                list.last_bad
            )
        }
        Ok(())
    }
}

/// Compares to rounding: another machine's logarithm may differ in the last bit.
fn check_log2_sizes<A: Accumulator>(name: &str, log2_sizes: &[A], sizes: &[usize]) -> Result<()> {
    for (got, size) in log2_sizes.iter().zip(sizes) {
        let (got, expected) = (got.double(), (*size as f64).log2());
        let close = (got - expected).abs() <= 1e-6 * (1.0 + expected);
        if !close {
            bail!("{name}: expected {expected} for a chain of {size} tokens, got {got}; {DAMAGED}")
        }
    }
    Ok(())
}
