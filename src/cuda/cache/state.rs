//! The buffers of a cache on the device: `CacheState` in cuda/cache/cache_list.cuh.

use super::pages::{ListPages, PagePool};
use super::{CacheSettings, NO_RUN};
use crate::config::Criterion;
use crate::cuda::decode::StateArgs;
use crate::cuda::on_gpu::{Gpu, GpuElement};
use candle_core::Result;
use std::sync::Arc;

/// The lists' buffers. Rows of values, in buffers `*_v`, have Dv numbers, other rows D.
pub(super) struct ListBuffers<G: Gpu, T: GpuElement> {
    /// Closed chains.
    pub pages: ListPages<G>,
    pub lengths: G::Slice<u32>,
    /// Tokens of each batch row before the next launch, or [`SITS_OUT`], where rows differ.
    pub seen: Option<G::Slice<u32>>,
    /// (2, lists)
    pub starts: G::Slice<u32>,
    pub local_k: G::Slice<T>,
    pub local_v: G::Slice<T>,
    pub local_ln: Option<G::Slice<f32>>,
    pub local_lengths: G::Slice<u32>,
    pub chain_k: G::Slice<f32>,
    pub chain_v: G::Slice<f32>,
    pub chain_sizes: G::Slice<u32>,
    /// `previous_k`, `previous_v` and `last_queries` under [`Fold::PairSum`](crate::Fold::PairSum) only.
    pub previous_k: Option<G::Slice<T>>,
    pub previous_v: Option<G::Slice<T>>,
    pub bits: G::Slice<u32>,
    pub run_starts: G::Slice<u32>,
    pub run_keys: G::Slice<T>,
    pub last_keys: G::Slice<T>,
    pub last_queries: Option<G::Slice<T>>,
    /// Under [`Criterion::ObservedMass`] only.
    pub observed: Option<ObservedBuffers<G, T>>,
}

/// `ObservedBuffers` in cuda/decide/observe_row.cuh.
pub(super) struct ObservedBuffers<G: Gpu, T: GpuElement> {
    pub keys: G::Slice<T>,
    pub masses: G::Slice<f32>,
    pub norms: G::Slice<f32>,
    /// Scratch: undefined between launches.
    pub logits: G::Slice<f32>,
}

impl<G: Gpu, T: GpuElement> ListBuffers<G, T> {
    /// Empty lists of `batch` rows.
    pub fn new(gpu: &G, settings: &CacheSettings, batch: usize, pool: Arc<PagePool<G>>) -> Result<Self> {
        let (all, config) = (batch * settings.lists, &settings.config);
        let (dim, value_dim) = (settings.problem.head_dim, settings.problem.value_dim);
        let local = all * (config.window + 1);
        let rows = |wanted: bool, len: usize| -> Result<Option<G::Slice<T>>> {
            match wanted {
                true => gpu.zeros(len).map(Some),
                false => Ok(None),
            }
        };
        let ln = |len: usize| match config.fold.has_sizes() {
            true => gpu.zeros(len).map(Some),
            false => Ok(None),
        };
        let observed = match config.criterion {
            Criterion::ObservedMass => Some(ObservedBuffers::new(gpu, settings, all)?),
            Criterion::QueryKey | Criterion::KeyKey | Criterion::Given => None,
        };
        Ok(Self {
            pages: ListPages::new(gpu, pool, all)?,
            lengths: gpu.zeros(all)?,
            seen: None,
            starts: gpu.zeros(2 * all)?,
            local_k: gpu.zeros(local * dim)?,
            local_v: gpu.zeros(local * value_dim)?,
            local_ln: ln(local)?,
            local_lengths: gpu.zeros(all)?,
            chain_k: gpu.zeros(all * dim)?,
            chain_v: gpu.zeros(all * value_dim)?,
            chain_sizes: gpu.zeros(all)?,
            previous_k: rows(config.fold.sums_pairs(), all * dim)?,
            previous_v: rows(config.fold.sums_pairs(), all * value_dim)?,
            bits: gpu.zeros(local)?,
            run_starts: gpu.upload(&vec![NO_RUN; all])?,
            run_keys: gpu.zeros(all * dim)?,
            last_keys: gpu.zeros(all * dim)?,
            last_queries: rows(config.fold.folds_queries(), batch * settings.problem.heads * dim)?,
            observed,
        })
    }
}

impl<G: Gpu, T: GpuElement> StateArgs<G> for ListBuffers<G, T> {
    fn args<'a>(&'a mut self, gpu: &'a G) -> Vec<G::Arg<'a>> {
        let mut args = vec![
            gpu.read(self.pages.table()),
            gpu.write(&mut self.lengths),
            gpu.read_some(self.seen.as_ref()),
            gpu.write(&mut self.starts),
            gpu.write(&mut self.local_k),
            gpu.write(&mut self.local_v),
            gpu.write_some(self.local_ln.as_mut()),
            gpu.write(&mut self.local_lengths),
            gpu.write(&mut self.chain_k),
            gpu.write(&mut self.chain_v),
            gpu.write(&mut self.chain_sizes),
            gpu.write_some(self.previous_k.as_mut()),
            gpu.write_some(self.previous_v.as_mut()),
            gpu.write(&mut self.bits),
            gpu.write(&mut self.run_starts),
            gpu.write(&mut self.run_keys),
            gpu.write(&mut self.last_keys),
            gpu.write_some(self.last_queries.as_mut()),
        ];
        match &mut self.observed {
            Some(observed) => args.extend([
                gpu.write(&mut observed.keys),
                gpu.write(&mut observed.masses),
                gpu.write(&mut observed.norms),
                gpu.write(&mut observed.logits),
            ]),
            None => args.extend([gpu.absent(), gpu.absent(), gpu.absent(), gpu.absent()]),
        }
        args
    }
}

impl<G: Gpu, T: GpuElement> ObservedBuffers<G, T> {
    fn new(gpu: &G, settings: &CacheSettings, all: usize) -> Result<Self> {
        let (window, seen) = (settings.config.window, settings.seen_keys());
        Ok(Self {
            keys: gpu.zeros(all * seen * settings.problem.head_dim)?,
            masses: gpu.zeros(all * window)?,
            norms: gpu.zeros(all * window)?,
            logits: gpu.zeros(all * seen)?,
        })
    }
}
