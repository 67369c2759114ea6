//! Forks: caches that share what they store.

use super::{CompressedKvCache, Lists};
use candle_core::Result;
use std::sync::Arc;

impl CompressedKvCache {
    /// Another cache of the same tokens, as [`Clone`] gives. The two share what is stored, and each continues alone: a
    /// thousand forks of a prompt hold it once. A fork that appends has a window, an open chain and entries of its own
    /// from then on; the entries stay shared, but for those of a list with fewer than 256 of them. What a fork computes
    /// equals, bit for bit, what a cache computes that was given the same calls.
    ///
    /// On CUDA entries are shared page by page: a fork that appends copies the page that it writes to.
    pub fn fork(&self) -> Self {
        self.clone()
    }

    /// Copies what forks, or other batch rows of this cache, hold too, so that [`Self::bytes_shared`] is 0. For
    /// measurements, and before a cache goes to another thread's memory budget.
    ///
    /// # Errors
    /// Too little memory on a GPU.
    pub fn unshare(&mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(state) = &mut self.on_gpu {
            return state.unshare();
        }
        if let Some(state) = &mut self.state {
            let state = Arc::make_mut(state);
            each!(&mut state.lists, lists => lists.iter_mut().for_each(|(_, list)| list.entries.unshare()));
        }
        Ok(())
    }

    /// The bytes of [`Self::bytes_allocated`] that forks hold too: those of a thousand forks of a prompt are in memory
    /// once. Without the journal of [`CacheOptions::rollback`](super::CacheOptions::rollback).
    pub fn bytes_shared(&self) -> usize {
        #[cfg(feature = "cuda")]
        if let Some(state) = &self.on_gpu {
            return state.bytes_shared();
        }
        let Some(state) = &self.state else { return 0 };
        let whole = Arc::strong_count(state) > 1;
        let of_list = |shared: usize, all: usize| if whole { all } else { shared };
        each!(&state.lists, lists => lists.iter().map(|(_, list)| {
            of_list(list.entries.bytes_shared(), list.bytes_allocated())
        }).sum())
    }
}
