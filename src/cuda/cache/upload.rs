//! Lists of the host, in the order of a device's buffers.

use super::host::{HostList, HostLists};
use super::state::{ListBuffers, ObservedBuffers};
use super::NO_RUN;
use crate::cuda::on_gpu::{Gpu, GpuElement, Number};
use candle_core::Result;

/// Lists of the host, uploaded to a device.
pub(super) struct Upload<'a, G: Gpu, T: GpuElement> {
    pub gpu: &'a G,
    pub host: &'a HostLists<T>,
    pub dim: usize,
    pub value_dim: usize,
    pub window: usize,
}

impl<G: Gpu, T: GpuElement> Upload<'_, G, T> {
    /// Uploads `room` rows of `dim` numbers for each list; `put` fills some of them.
    pub fn rows(&self, room: usize, dim: usize, put: impl Fn(&HostList<T>, &mut [T])) -> Result<G::Slice<T>> {
        let mut data = vec![T::zero(); self.host.lists.len() * room * dim];
        for (list, data) in self.host.lists.iter().zip(data.chunks_exact_mut(room * dim)) {
            put(list, data);
        }
        self.gpu.upload(&data)
    }

    /// Uploads the numbers of all lists, one after another.
    pub fn entries<N: Number>(&self, of: impl Fn(&HostList<T>) -> Vec<N>) -> Result<G::Slice<N>> {
        let mut all: Vec<N> = self.host.lists.iter().flat_map(of).collect();
        // A buffer is never empty.
        if all.is_empty() {
            all.push(N::default());
        }
        self.gpu.upload(&all)
    }

    pub fn words(&self, word: impl FnMut(&HostList<T>) -> u32) -> Result<G::Slice<u32>> {
        let words: Vec<u32> = self.host.lists.iter().map(word).collect();
        self.gpu.upload(&words)
    }

    /// The token of the oldest raw row.
    pub fn oldest(&self) -> usize {
        self.host.seq_len.saturating_sub(self.window)
    }

    /// Writes raw rows to their tokens' places in the ring.
    pub fn ring(&self, rows: &[T], to: &mut [T], dim: usize) {
        for (row, t) in rows.chunks_exact(dim).zip(self.oldest()..) {
            to[t % self.window * dim..][..dim].copy_from_slice(row);
        }
    }

    /// Uploads open chains and the number of local columns.
    pub fn chains(&self, state: &mut ListBuffers<G, T>) -> Result<()> {
        let (seen, window, dims) = (self.host.seq_len, self.window, [self.dim, self.value_dim]);
        state.local_lengths = self.words(|_| (seen.min(window) + usize::from(seen > window)) as u32)?;
        state.chain_sizes = self.words(|list| list.chain_size)?;
        let sums = |which: usize| -> Vec<f32> {
            let row = |list: &HostList<T>| {
                let rows = list.chain.as_ref();
                rows.map_or_else(|| vec![0.0; dims[which % 2]], |rows| rows[which].clone())
            };
            self.host.lists.iter().flat_map(row).collect()
        };
        (state.chain_k, state.chain_v) = (self.gpu.upload(&sums(0))?, self.gpu.upload(&sums(1))?);
        if state.previous_k.is_some() {
            let raw = |which: usize| -> Vec<T> { sums(which).into_iter().map(|x| T::from_f64(x.into())).collect() };
            state.previous_k = Some(self.gpu.upload(&raw(2))?);
            state.previous_v = Some(self.gpu.upload(&raw(3))?);
        }
        Ok(())
    }

    /// Uploads the state of decisions and folds.
    pub fn decisions(&self, state: &mut ListBuffers<G, T>) -> Result<()> {
        state.run_starts = self.words(|list| list.run.as_ref().map_or(NO_RUN, |run| run.0 as u32))?;
        state.run_keys = self.rows(1, self.dim, |list, to| {
            if let Some((_, key)) = &list.run {
                to.copy_from_slice(key);
            }
        })?;
        let last_key = |list: &HostList<T>, to: &mut [T]| to[..list.last_key.len()].copy_from_slice(&list.last_key);
        state.last_keys = self.rows(1, self.dim, last_key)?;
        let slots = self.window + 1;
        let mut bits = vec![0u32; self.host.lists.len() * slots];
        for (list, ring) in self.host.lists.iter().zip(bits.chunks_exact_mut(slots)) {
            let first = self.host.seq_len - 1 - list.bits.len();
            ring[(self.host.seq_len - 1) % slots] = u32::from(list.last_hidden);
            for (bit, t) in list.bits.iter().zip(first..) {
                ring[t % slots] = u32::from(*bit);
            }
        }
        state.bits = self.gpu.upload(&bits)?;
        if let (Some(to), Some(queries)) = (&mut state.last_queries, &self.host.last_queries) {
            *to = self.gpu.upload(queries)?;
        }
        Ok(())
    }

    /// Uploads the state of observed mass, without the norms of values.
    pub fn observed(&self, observed: &mut ObservedBuffers<G, T>, sinks: usize) -> Result<()> {
        observed.keys = self.rows(sinks + self.window, self.dim, |list, to| {
            to[..list.sink_keys.len()].copy_from_slice(&list.sink_keys);
            self.ring(&list.recent_k, &mut to[sinks * self.dim..], self.dim);
        })?;
        let mut masses = vec![0f32; self.host.lists.len() * self.window];
        for (list, to) in self.host.lists.iter().zip(masses.chunks_exact_mut(self.window)) {
            for (mass, t) in list.masses.iter().zip(self.oldest()..) {
                to[t % self.window] = *mass;
            }
        }
        observed.masses = self.gpu.upload(&masses)?;
        Ok(())
    }
}
