//! What a cache holds: entries of each list, and bytes.

#[cfg(feature = "cuda")]
use super::on_device;
#[cfg(doc)]
use super::CacheOptions;
use super::{CacheSizes, CompressedKvCache, Lists};
use candle_core::DType;

impl CompressedKvCache {
    /// Entries kept, per batch row and list: closed chains, the open one, and raw tokens of the window; those of the
    /// current segment, where there are segments. On a GPU this waits for the device, and is empty if that fails.
    pub fn lens(&self) -> Vec<Vec<usize>> {
        #[cfg(feature = "cuda")]
        if let Some(state) = &self.on_gpu {
            return state.lens().unwrap_or_default();
        }
        let Some(state) = &self.state else { return Vec::new() };
        let mut lens = vec![Vec::new(); state.sizes.batch];
        each!(&state.lists, lists => {
            lists.iter().for_each(|(at, list)| lens[at.batch].push(list.kept()))
        });
        lens
    }

    /// Bytes in use: keys, values, token indices, sizes, open chains, raw tokens and run state of all lists. On a GPU
    /// this waits for the device; [`Self::bytes_allocated`] does not.
    pub fn bytes(&self) -> usize {
        #[cfg(feature = "cuda")]
        if let Some(state) = &self.on_gpu {
            return state.bytes().unwrap_or_else(|_| state.bytes_allocated());
        }
        let Some(state) = &self.state else { return 0 };
        each!(&state.lists, lists => lists.iter().map(|(_, list)| list.bytes()).sum())
    }

    /// Bytes allocated: [`Self::bytes`] and the reserve for growth. Folded entries have room for an eighth of a list or
    /// 64 entries more at most. Raw tokens of the window are moved to the front once per window of tokens, so their
    /// buffers have room for up to four windows of rows. The journal of [`CacheOptions::rollback`] is counted. On a GPU
    /// every list has pages of 64 entries, and one or two of them to spare.
    pub fn bytes_allocated(&self) -> usize {
        #[cfg(feature = "cuda")]
        if let Some(state) = &self.on_gpu {
            return state.bytes_allocated() + self.journal.bytes();
        }
        let journal = self.journal.bytes();
        let Some(state) = &self.state else { return journal };
        journal + each!(&state.lists, lists => lists.iter().map(|(_, list)| list.bytes_allocated()).sum::<usize>())
    }

    /// Bytes that keys and values of all tokens would take in the same dtype, once per KV head.
    pub fn bytes_dense(&self) -> usize {
        let Some((sizes, dtype)) = self.sizes() else { return 0 };
        let numbers = sizes.head_dim + sizes.values();
        sizes.batch * sizes.kv_heads * self.seq_len() * numbers * dtype.size_in_bytes()
    }

    /// The sizes that the first call fixed, and the storage.
    pub(super) fn sizes(&self) -> Option<(CacheSizes, DType)> {
        let sizes = self.state.as_ref().map(|state| (state.sizes, state.lists.dtype()));
        #[cfg(feature = "cuda")]
        let sizes = sizes.or_else(|| self.on_gpu.as_ref().map(on_device::GpuState::sizes));
        sizes
    }
}
