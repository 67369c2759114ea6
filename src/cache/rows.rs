//! Batch rows of caches: taken apart, put together; and the last token's row once more.

use super::journal::Journal;
use super::segments::{joined_places, RowPlace};
use super::state::{CacheSizes, Lists, ListsOf, State};
use super::step::attend_again;
use super::CompressedKvCache;
use crate::config::AttentionOptions;
use crate::cpu::decide::heads::ListHeads;
use crate::cpu::number::element::Element;
use crate::problem::Problem;
use crate::storage::not_on_cpu;
use candle_core::{bail, Result, Tensor};
use std::sync::Arc;

impl CompressedKvCache {
    /// One cache for each batch row, without a copy of what is stored on the CPU. An empty cache has no rows.
    ///
    /// # Errors
    /// An error of a GPU.
    pub fn split(self) -> Result<Vec<Self>> {
        #[cfg(feature = "cuda")]
        if let Some(state) = &self.on_gpu {
            let batch = state.sizes().0.batch as u32;
            let row = |row: u32| {
                let mut part = self.clone();
                part.index_select(&Tensor::new(&[row], &candle_core::Device::Cpu)?)?;
                Ok(part)
            };
            return (0..batch).map(row).collect();
        }
        let Some(state) = self.state.map(Arc::unwrap_or_clone) else {
            return Ok(Vec::new());
        };
        let (batch, places) = (state.sizes.batch, state.places);
        let rows: Vec<Lists> = match state.lists {
            Lists::F64(lists) => apart(lists, batch).into_iter().map(Lists::F64).collect(),
            Lists::F32(lists) => apart(lists, batch).into_iter().map(Lists::F32).collect(),
            Lists::F16(lists) => apart(lists, batch).into_iter().map(Lists::F16).collect(),
            Lists::BF16(lists) => apart(lists, batch).into_iter().map(Lists::BF16).collect(),
        };
        let part = |(row, lists)| Self {
            strategies: self.strategies.clone(),
            config: self.config.clone(),
            options: self.options.clone(),
            state: Some(Arc::new(State {
                sizes: CacheSizes {
                    batch: 1,
                    ..state.sizes
                },
                places: places.as_ref().map(|places: &Vec<RowPlace>| vec![places[row]]),
                lists,
                ..state
            })),
            #[cfg(feature = "cuda")]
            on_gpu: None,
            journal: Journal::default(),
        };
        Ok(rows.into_iter().enumerate().map(part).collect())
    }

    /// One cache of all batch rows of `caches`, in order. Rows may hold different numbers of tokens, as rows of
    /// [`AttentionOptions::segments`] do; then [`Self::seq_len`] is the largest, and calls have no bias and no dropout.
    /// Closed chains are not copied, on the CPU or on CUDA.
    ///
    /// # Errors
    /// No cache, an empty one, or caches of other settings, shapes, dtypes or devices than the first one's.
    pub fn cat(caches: &[Self]) -> Result<Self> {
        let Some(first) = caches.first() else {
            bail!("cat: expected at least one cache, got none")
        };
        for (index, cache) in caches.iter().enumerate() {
            if (&cache.strategies, &cache.config, &cache.options) != (&first.strategies, &first.config, &first.options)
            {
                bail!(
                    "cat: expected caches of equal strategies, parameters and options, got others in cache {index}; \
                     make all with the same settings"
                )
            }
        }
        #[cfg(feature = "cuda")]
        if first.on_gpu.is_some() {
            return Self::cat_on_gpu(caches);
        }
        let mut states = Vec::with_capacity(caches.len());
        for (index, cache) in caches.iter().enumerate() {
            let Some(state) = &cache.state else {
                bail!("cat: expected caches that hold tokens on the CPU, got cache {index} without; leave it out")
            };
            states.push(&**state);
        }
        let shape = |state: &State| {
            (
                CacheSizes {
                    batch: 0,
                    ..state.sizes
                },
                state.lists.dtype(),
                state.sliding_window,
            )
        };
        if let Some(other) = states.iter().find(|state| shape(state) != shape(states[0])) {
            bail!(
                "cat: expected caches of equal heads, sizes, storage and sliding window, got {:?} and {:?}; they are \
                 of different models",
                shape(states[0]),
                shape(other)
            )
        }
        let rows = |state: &&State| (state.seq_len, state.sizes.batch, state.places.clone());
        let (seq_len, places) = joined_places(states.iter().map(rows).collect());
        let mut lists = states[0].lists.clone();
        let mut batch = states[0].sizes.batch;
        for state in &states[1..] {
            match (&mut lists, &state.lists) {
                (Lists::F64(all), Lists::F64(more)) => extend(all, more, batch),
                (Lists::F32(all), Lists::F32(more)) => extend(all, more, batch),
                (Lists::F16(all), Lists::F16(more)) => extend(all, more, batch),
                (Lists::BF16(all), Lists::BF16(more)) => extend(all, more, batch),
                // Their dtypes are equal.
                _ => {}
            }
            batch += state.sizes.batch;
        }
        Ok(Self {
            strategies: first.strategies.clone(),
            config: first.config.clone(),
            options: first.options.clone(),
            state: Some(Arc::new(State {
                sizes: CacheSizes {
                    batch,
                    ..states[0].sizes
                },
                seq_len,
                sliding_window: states[0].sliding_window,
                places,
                lists,
            })),
            #[cfg(feature = "cuda")]
            on_gpu: None,
            journal: Journal::default(),
        })
    }

    /// The row of the last token once more, or of another query at its place, without appending: query (B, H, 1, D),
    /// output (B, H, 1, Dv), or in the order of [`AttentionOptions::layout`]. For engines that append first and attend
    /// then. The row is that of [`Self::append_and_attend`]: bit for bit after a single token, to rounding after a
    /// chunk.
    ///
    /// A prompt takes one call of [`Self::append_and_attend`]: tokens that its earlier rows see are gone afterwards.
    ///
    /// # Errors
    /// An empty cache, another shape or device than the cache's, more than one query, a bias, dropout, segments or a
    /// sliding window, or [`Fold::PairSum`](crate::Fold), whose rows read the query before. On CUDA, always.
    pub fn attend(&self, q: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
        let layout = options.layout;
        let q = layout.turned(q)?;
        if !q.device().is_cpu() {
            return not_on_cpu(q.device());
        }
        let Some(state) = &self.state else {
            bail!("attend: expected a cache that holds tokens on the CPU, got an empty one; append first")
        };
        let sizes = state.sizes;
        let expected = [sizes.batch, sizes.heads, 1, sizes.head_dim];
        if q.dims() != expected {
            bail!(
                "query: expected {expected:?}, the last token's, got {:?}; append_and_attend takes several tokens",
                q.dims()
            )
        }
        if options.bias.is_some() || options.dropout.is_some() || options.segments.is_some() {
            bail!("attend: expected no bias, no dropout and no segments, got one of them; use append_and_attend")
        }
        if options.sliding_window.is_some() {
            bail!(
                "attend: expected no sliding window, got one: the oldest token that the last row saw is gone; use \
                 append_and_attend"
            )
        }
        if self.config.fold.folds_queries() && !self.strategies.all_off() {
            bail!(
                "attend: expected the fold Mean or Drop, or heads that are off, got {:?}, whose rows read the query \
                 before the last; use append_and_attend",
                self.config.fold
            )
        }
        let row = Tensor::zeros((1, 1, 1, sizes.head_dim), q.dtype(), q.device())?;
        let keys = row.broadcast_as((sizes.batch, sizes.kv_heads, 1, sizes.head_dim))?;
        let problem = Problem {
            value_dim: sizes.values(),
            ..Problem::new(&q, &keys, &keys)?
        };
        layout.turned(&attend_again(state, &problem, &q, options)?)
    }
}

fn apart<S: Element>(lists: ListsOf<S>, batch: usize) -> Vec<ListsOf<S>> {
    let mut rows: Vec<ListsOf<S>> = (0..batch).map(|_| Vec::new()).collect();
    for (at, list) in lists {
        let row = at.batch;
        rows[row].push((ListHeads { batch: 0, ..at }, list));
    }
    rows
}

/// Adds lists whose batch rows follow `first` others.
fn extend<S: Element>(all: &mut ListsOf<S>, more: &ListsOf<S>, first: usize) {
    all.extend(more.iter().map(|(at, list)| {
        let at = ListHeads {
            batch: first + at.batch,
            ..at.clone()
        };
        (at, list.clone())
    }));
}
