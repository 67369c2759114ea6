//! [`CompressedKvCache::load`]: the reader of `save`'s files, which checks every number that later code indexes by.

use super::checksum::{checksum, FORMAT, VERSION};
use super::prefix::PrefixKey;
use super::reader::{Reader, DAMAGED};
use super::save::{Header, SavedState};
use super::{CacheOptions, CacheSizes, CompressedKvCache, Lists, State};
use crate::config::{CompressionConfig, Storage};
use crate::cpu::decide::heads::ListHeads;
use crate::storage::not_on_cpu;
use candle_core::{bail, DType, Device, Error, Result};
use safetensors::SafeTensors;
use std::path::Path;
use std::sync::Arc;

impl CompressedKvCache {
    /// Reads a file of [`Self::save`]: a cache with the same settings, options and tokens. On the same kind of device
    /// it continues bit for bit like the saved cache. On another kind it continues as if it had always been there.
    ///
    /// # Errors
    /// A device without kernels. A file that cannot be read, is no saved cache, has another version of the format, is
    /// cut short or otherwise damaged (its checksum shows that), or whose parts do not fit together. On a GPU also a
    /// dtype, head size or window that it does not support.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        Self::load_as(path.as_ref(), None, device)
    }

    /// [`Self::load`], of a file that was saved under `prefix` if there is one.
    pub(super) fn load_as(path: &Path, prefix: Option<&PrefixKey>, device: &Device) -> Result<Self> {
        if !(device.is_cpu() || cfg!(feature = "cuda") && device.is_cuda()) {
            return not_on_cpu(device);
        }
        let at_path = |error: &dyn std::fmt::Display| Error::msg(format!("load {}: {error}", path.display()));
        let bytes = std::fs::read(path)
            .map_err(|error| at_path(&format!("expected a readable file, got {error}; check the path")))?;
        let cache = read(&bytes, prefix).map_err(|error| at_path(&error))?;
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

fn read(bytes: &[u8], prefix: Option<&PrefixKey>) -> Result<CompressedKvCache> {
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
    if let Some(prefix) = prefix {
        prefix.check_saved(header.prefix.as_ref())?;
    }
    let options = CacheOptions {
        storage: header.storage,
        max_entries: header.max_entries,
        rollback: header.rollback,
        budget: header.budget,
    };
    let mut cache = CompressedKvCache::new(header.strategies, header.config, options)?;
    if let Some(saved) = &header.state {
        cache.state = Some(Arc::new(restore_state(&cache, saved, &file)?));
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
    let stored = cache.options.storage.and_then(Storage::dtype);
    if stored.is_some_and(|storage| storage != dtype) {
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
        budget: cache.options.budget,
        storage: cache.options.storage,
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
