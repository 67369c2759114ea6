//! KV heads of caches: taken apart for the ranks of a model that is split by heads, and put together.

use super::journal::Journal;
use super::state::{CacheSizes, Lists, ListsOf, State};
use super::CompressedKvCache;
use crate::config::shard::kv_heads_of;
use crate::config::HeadStrategies;
use crate::cpu::decide::heads::ListHeads;
use crate::cpu::number::element::Element;
use candle_core::{bail, Result};
use std::ops::Range;
use std::sync::Arc;

impl CompressedKvCache {
    /// One cache for each of `world` ranks. Each goes on with its heads as this one does with all: rank r takes the
    /// query (B, H / world, n, D) from head r·H / world on, and keys and values (B, Hk / world, n, D) from KV head
    /// r·Hk / world on. Nothing that is stored is copied. The strategies are those of [`HeadStrategies::shard`]. On the
    /// CPU only.
    ///
    /// Saved caches of N ranks load on M ranks: [`Self::load`] each, [`Self::cat_heads`], then this.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_sfattention::{CompressedKvCache, CompressionConfig, HeadStrategies, MergeStrategy};
    /// # let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    /// # let mut cache = CompressedKvCache::new(strategies, CompressionConfig::pretrained(), Default::default())?;
    /// let random = |heads, tokens| Tensor::randn(0f32, 1., (1, heads, tokens, 64), &Device::Cpu);
    /// let (q, kv) = (random(9, 100)?, random(3, 100)?);
    /// cache.append_and_attend(&q, &kv, &kv, &Default::default())?;
    /// let mut ranks = cache.split_heads(3)?;
    /// let (q, kv) = (random(3, 1)?, random(1, 1)?); // of the last rank
    /// assert_eq!(ranks[2].append_and_attend(&q, &kv, &kv, &Default::default())?.dims(), [1, 3, 1, 64]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// An empty cache, one on a GPU, no rank, more ranks than KV heads, or KV heads that are no multiple of the ranks.
    pub fn split_heads(&self, world: usize) -> Result<Vec<Self>> {
        let state = self.state_on_cpu("split_heads", || "the cache".into())?;
        let sizes = state.sizes;
        if world == 0 {
            bail!("world: expected at least 1 rank, got 0; 1 gives the whole cache")
        }
        let group = sizes.heads / sizes.kv_heads;
        let part = |rank: usize| -> Result<Self> {
            let own = kv_heads_of(rank, world, sizes.kv_heads)?;
            let lists = match &state.lists {
                Lists::F64(lists) => Lists::F64(only(lists, &own, group)),
                Lists::F32(lists) => Lists::F32(only(lists, &own, group)),
                Lists::F16(lists) => Lists::F16(only(lists, &own, group)),
                Lists::BF16(lists) => Lists::BF16(only(lists, &own, group)),
            };
            let sizes = CacheSizes {
                heads: own.len() * group,
                kv_heads: own.len(),
                ..sizes
            };
            let strategies = self.strategies.shard(rank, world, state.sizes.kv_heads)?;
            Ok(self.with(
                strategies,
                State {
                    sizes,
                    lists,
                    places: state.places.clone(),
                    ..*state
                },
            ))
        };
        (0..world).map(part).collect()
    }

    /// One cache of the heads of all ranks, in their order: the inverse of [`Self::split_heads`]. On the CPU only.
    ///
    /// # Errors
    /// No cache, an empty one, one on a GPU, or caches of other settings, shapes, dtypes or numbers of tokens than the
    /// first one's.
    pub fn cat_heads(caches: &[Self]) -> Result<Self> {
        let Some(first) = caches.first() else {
            bail!("cat_heads: expected at least one cache, got none")
        };
        let mut states = Vec::with_capacity(caches.len());
        for (index, cache) in caches.iter().enumerate() {
            if (&cache.config, &cache.options) != (&first.config, &first.options) {
                bail!(
                    "cat_heads: expected caches of equal parameters and options, got others in cache {index}; make all \
                     with the same settings"
                )
            }
            states.push(cache.state_on_cpu("cat_heads", || format!("cache {index}"))?);
        }
        let shape = |state: &State| (state.sizes, state.lists.dtype(), state.sliding_window);
        if let Some(other) = states.iter().find(|state| shape(state) != shape(states[0])) {
            bail!(
                "cat_heads: expected caches of equal batch, heads, sizes, storage and sliding window, got {:?} and \
                 {:?}; join those of all ranks of one model",
                shape(states[0]),
                shape(other)
            )
        }
        let tokens = |state: &State| (state.seq_len, state.places.clone());
        if let Some(index) = states.iter().position(|state| tokens(state) != tokens(states[0])) {
            bail!(
                "cat_heads: expected caches of the same {} tokens, got {} or other segments in cache {index}; append \
                 the same tokens on all ranks",
                states[0].seq_len,
                states[index].seq_len
            )
        }
        let sizes = states[0].sizes;
        let mut lists = states[0].lists.clone();
        for (index, state) in states.iter().enumerate().skip(1) {
            let before = [index * sizes.kv_heads, index * sizes.heads];
            match (&mut lists, &state.lists) {
                (Lists::F64(all), Lists::F64(more)) => extend(all, more, before),
                (Lists::F32(all), Lists::F32(more)) => extend(all, more, before),
                (Lists::F16(all), Lists::F16(more)) => extend(all, more, before),
                (Lists::BF16(all), Lists::BF16(more)) => extend(all, more, before),
                // Their dtypes are equal.
                _ => {}
            }
        }
        each!(&mut lists, lists => lists.sort_by_key(|(at, _)| (at.batch, at.heads.start)));
        let strategies: Vec<_> = caches.iter().map(|cache| &cache.strategies).collect();
        let joined = State {
            sizes: CacheSizes {
                heads: sizes.heads * caches.len(),
                kv_heads: sizes.kv_heads * caches.len(),
                ..sizes
            },
            lists,
            places: states[0].places.clone(),
            ..*states[0]
        };
        Ok(first.with(HeadStrategies::joined(&strategies, sizes.heads)?, joined))
    }

    fn state_on_cpu(&self, call: &str, name: impl Fn() -> String) -> Result<&State> {
        #[cfg(feature = "cuda")]
        if self.on_gpu.is_some() {
            bail!(
                "{call}: expected caches on the CPU, got {} on a GPU; move it with to_device first",
                name()
            )
        }
        match &self.state {
            Some(state) => Ok(state),
            None => bail!(
                "{call}: expected caches that hold tokens on the CPU, got {} without; make empty ones with \
                 HeadStrategies::shard",
                name()
            ),
        }
    }

    /// A cache of these settings with another state.
    fn with(&self, strategies: HeadStrategies, state: State) -> Self {
        Self {
            strategies,
            config: self.config.clone(),
            options: self.options.clone(),
            state: Some(Arc::new(state)),
            #[cfg(feature = "cuda")]
            on_gpu: None,
            journal: Journal::default(),
        }
    }
}

/// The lists of some KV heads, counted from the first of them; `group` query heads read a KV head.
fn only<S: Element>(lists: &ListsOf<S>, own: &Range<usize>, group: usize) -> ListsOf<S> {
    let mine = lists.iter().filter(|(at, _)| own.contains(&at.kv_head));
    let moved = mine.map(|(at, list)| {
        let first = own.start * group;
        let at = ListHeads {
            batch: at.batch,
            kv_head: at.kv_head - own.start,
            heads: at.heads.start - first..at.heads.end - first,
        };
        (at, list.clone())
    });
    moved.collect()
}

/// Adds lists whose heads follow these numbers of KV heads and query heads.
fn extend<S: Element>(all: &mut ListsOf<S>, more: &ListsOf<S>, [kv_heads, heads]: [usize; 2]) {
    all.extend(more.iter().map(|(at, list)| {
        let at = ListHeads {
            batch: at.batch,
            kv_head: at.kv_head + kv_heads,
            heads: at.heads.start + heads..at.heads.end + heads,
        };
        (at, list.clone())
    }));
}
