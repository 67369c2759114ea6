//! [`CompressedKvCache::truncate`]: cutting a cache back to its first tokens.

use super::{CompressedKvCache, Lists};
use candle_core::{bail, Result};
use std::sync::Arc;

impl CompressedKvCache {
    /// Cuts the cache back to its first `tokens` tokens: what it holds is, bit for bit, what it would hold if the calls
    /// had ended there. Possible for the last [`CacheOptions::rollback`](super::CacheOptions::rollback) tokens, counted
    /// from the longest length that the cache has had; for all tokens and for none; and where every list has a head
    /// that is [`MergeStrategy::Off`](crate::MergeStrategy).
    ///
    /// # Errors
    /// More tokens than the cache has, or fewer than the journal of a cache that merges covers: folded tokens cannot be
    /// taken apart.
    pub fn truncate(&mut self, tokens: usize) -> Result<()> {
        self.check_truncate(tokens)?;
        if tokens == 0 {
            self.reset();
        }
        if self.in_journal(tokens) {
            return self.go_back(tokens);
        }
        self.journal.cut(tokens)?;
        #[cfg(feature = "cuda")]
        if let Some(state) = &mut self.on_gpu {
            return state.truncate(tokens);
        }
        let Some(state) = &mut self.state else { return Ok(()) };
        let state = Arc::make_mut(state);
        each!(&mut state.lists, lists => lists.iter_mut().for_each(|(_, list)| list.truncate(tokens)));
        state.seq_len = tokens;
        Ok(())
    }

    /// Whether [`Self::truncate`] would succeed.
    pub(crate) fn check_truncate(&self, tokens: usize) -> Result<()> {
        let seq_len = self.seq_len();
        if tokens > seq_len {
            bail!("truncate: expected at most the {seq_len} tokens seen, got {tokens}; append the missing ones")
        }
        if tokens == 0 || tokens == seq_len || self.in_journal(tokens) {
            return Ok(());
        }
        let recorded = match self.journal.oldest() {
            Some(oldest) => format!("{oldest} to {seq_len}"),
            None => format!("0 or all {seq_len}"),
        };
        if self.has_segments() {
            bail!(
                "truncate: expected {recorded} tokens for a cache with segments, got {tokens}; reset() and \
                 append again, keep a fork() from before, or raise CacheOptions::rollback"
            )
        }
        if !self.never_merges() {
            bail!(
                "truncate: expected {recorded} tokens for a cache that merges, got {tokens}; folded tokens \
                 cannot be taken apart, keep a fork() from before, or raise CacheOptions::rollback"
            )
        }
        if let Some(storage) = self.options.storage.filter(|storage| storage.dtype().is_none()) {
            bail!(
                "truncate: expected {recorded} tokens for a cache that stores {storage}, got {tokens}; the newest \
                 token's own numbers are gone, keep a fork() from before, or raise CacheOptions::rollback"
            )
        }
        if !self.keeps_columns_at(tokens)? {
            bail!(
                "truncate: expected all {seq_len} tokens, got {tokens}; tokens that the next row would see have left \
                 the sliding window, keep a fork() from before, or raise CacheOptions::rollback"
            )
        }
        Ok(())
    }

    /// Whether the journal covers a shorter length.
    fn in_journal(&self, tokens: usize) -> bool {
        tokens < self.seq_len() && self.journal.oldest().is_some_and(|oldest| oldest <= tokens)
    }

    pub(super) fn has_segments(&self) -> bool {
        #[cfg(feature = "cuda")]
        if let Some(state) = &self.on_gpu {
            return state.has_segments();
        }
        self.state.as_ref().is_some_and(|state| state.places.is_some())
    }

    /// Whether the columns of the row after the first `tokens` tokens are kept: a sliding window may have passed them.
    fn keeps_columns_at(&self, tokens: usize) -> Result<bool> {
        #[cfg(feature = "cuda")]
        if let Some(state) = &self.on_gpu {
            return state.can_truncate(tokens);
        }
        let Some(state) = &self.state else { return Ok(true) };
        Ok(each!(&state.lists, lists => lists.iter().all(|(_, list)| list.can_truncate(tokens))))
    }

    pub(super) fn never_merges(&self) -> bool {
        #[cfg(feature = "cuda")]
        if let Some(state) = &self.on_gpu {
            return state.never_merges();
        }
        let Some(state) = &self.state else { return true };
        each!(&state.lists, lists => lists.iter().all(|(_, list)| !list.settings.merges()))
    }
}
