//! Lists of several caches put together, batch row after batch row. Their pages stay where they are.

use super::copy::copy;
use super::pages::ListPages;
use super::state::{ListBuffers, ObservedBuffers};
use super::DeviceLists;
use crate::cuda::on_gpu::{Gpu, GpuElement, Number};
use crate::cuda::params::{CopyParams, NO_SLIDE};
use candle_core::{bail, Result};

impl<G: Gpu, T: GpuElement> DeviceLists<G, T> {
    /// The batch rows of `parts`, in order: at least one part, and all of equal settings and sliding window.
    ///
    /// # Errors
    /// An error of the device.
    pub fn cat(gpu: &G, parts: &[&Self]) -> Result<Self> {
        let Some(first) = parts.first() else {
            bail!("cat: expected at least one cache, got none")
        };
        let (settings, join) = (&first.settings, Join { gpu, parts });
        let (lists, heads) = (settings.lists, settings.problem.heads);
        let (dim, value_dim, window) = (
            settings.problem.head_dim,
            settings.problem.value_dim,
            settings.config.window,
        );
        let rows = |of: fn(&ListBuffers<G, T>) -> &G::Slice<T>, count| {
            join.all(T::SUFFIX, lists, count, |part| of(&part.state))
        };
        let words =
            |of: fn(&ListBuffers<G, T>) -> &G::Slice<u32>, count| join.all("u32", lists, count, |part| of(&part.state));
        let floats =
            |of: fn(&ListBuffers<G, T>) -> &G::Slice<f32>, count| join.all("f32", lists, count, |part| of(&part.state));
        let local = window + 1;
        let mut joined = Self {
            settings: settings.clone(),
            batch: parts.iter().map(|part| part.batch).sum(),
            seq_len: 0,
            ragged: None,
            sliding_window: first.sliding_window,
            head_tests: parts.iter().flat_map(|part| part.head_tests.iter().copied()).collect(),
            tests: join.all("f32", heads, 2, |part| &part.tests)?,
            state: ListBuffers {
                pages: ListPages::cat(gpu, parts.iter().map(|part| &part.state.pages))?,
                lengths: words(|state| &state.lengths, 1)?,
                seen: None,
                starts: join.starts()?,
                local_k: rows(|state| &state.local_k, local * dim)?,
                local_v: rows(|state| &state.local_v, local * value_dim)?,
                local_ln: join.some("f32", lists, local, |part| part.state.local_ln.as_ref())?,
                local_lengths: words(|state| &state.local_lengths, 1)?,
                chain_k: floats(|state| &state.chain_k, dim)?,
                chain_v: floats(|state| &state.chain_v, value_dim)?,
                chain_sizes: words(|state| &state.chain_sizes, 1)?,
                previous_k: join.some(T::SUFFIX, lists, dim, |part| part.state.previous_k.as_ref())?,
                previous_v: join.some(T::SUFFIX, lists, value_dim, |part| part.state.previous_v.as_ref())?,
                bits: words(|state| &state.bits, local)?,
                run_starts: words(|state| &state.run_starts, 1)?,
                run_keys: rows(|state| &state.run_keys, dim)?,
                last_keys: rows(|state| &state.last_keys, dim)?,
                last_queries: join.some(T::SUFFIX, heads, dim, |part| part.state.last_queries.as_ref())?,
                observed: join.observed()?,
            },
            scratch: None,
        };
        joined.set_row_lens(parts.iter().flat_map(|part| part.row_lens()).collect());
        Ok(joined)
    }
}

struct Join<'a, G: Gpu, T: GpuElement> {
    gpu: &'a G,
    parts: &'a [&'a DeviceLists<G, T>],
}

impl<'a, G: Gpu, T: GpuElement> Join<'a, G, T> {
    /// One buffer of all parts: `count` numbers for each of `per_row` lists or heads of a batch row.
    fn all<N: Number>(
        &self,
        suffix: &str,
        per_row: usize,
        count: usize,
        of: impl Fn(&'a DeviceLists<G, T>) -> &'a G::Slice<N>,
    ) -> Result<G::Slice<N>> {
        let batch: usize = self.parts.iter().map(|part| part.batch).sum();
        let (mut to, mut first) = (self.gpu.alloc::<N>(batch * per_row * count)?, 0);
        for part in self.parts {
            let params = CopyParams {
                to_offset: first as u64,
                from_offset: 0,
                from_stride: count as u32,
                to_stride: count as u32,
                count: count as u32,
                unused: 0,
            };
            copy(
                self.gpu,
                suffix,
                (of(part), None),
                &mut to,
                part.batch * per_row,
                &params,
            )?;
            first += part.batch * per_row * count;
        }
        Ok(to)
    }

    /// [`Self::all`] of a buffer that every part has, or none.
    fn some<N: Number>(
        &self,
        suffix: &str,
        per_row: usize,
        count: usize,
        of: impl Fn(&'a DeviceLists<G, T>) -> Option<&'a G::Slice<N>>,
    ) -> Result<Option<G::Slice<N>>> {
        if self.parts.iter().any(|part| of(part).is_none()) {
            return Ok(None);
        }
        // Every part has one: the first stands for none.
        let Some(stand_in) = of(self.parts[0]) else {
            return Ok(None);
        };
        let of = |part| of(part).unwrap_or(stand_in);
        self.all(suffix, per_row, count, of).map(Some)
    }

    fn starts(&self) -> Result<G::Slice<u32>> {
        let lists = |part: &&DeviceLists<G, T>| part.all();
        // Without a sliding window all are 0, and the device is not waited for.
        if self.parts.iter().all(|part| part.slide() == NO_SLIDE) {
            return self.gpu.zeros(2 * self.parts.iter().map(lists).sum::<usize>());
        }
        let (mut starts, mut kept_from) = (Vec::new(), Vec::new());
        for part in self.parts {
            let both = self.gpu.download(&part.state.starts)?;
            let (first, second) = both.split_at(part.all());
            starts.extend_from_slice(first);
            kept_from.extend_from_slice(second);
        }
        starts.append(&mut kept_from);
        self.gpu.upload(&starts)
    }

    fn observed(&self) -> Result<Option<ObservedBuffers<G, T>>> {
        let settings = &self.parts[0].settings;
        let (lists, seen, window) = (settings.lists, settings.seen_keys(), settings.config.window);
        let keys = self.some(T::SUFFIX, lists, seen * settings.problem.head_dim, |part| {
            part.state.observed.as_ref().map(|observed| &observed.keys)
        })?;
        let masses = self.some("f32", lists, window, |part| {
            part.state.observed.as_ref().map(|observed| &observed.masses)
        })?;
        let norms = self.some("f32", lists, window, |part| {
            part.state.observed.as_ref().map(|observed| &observed.norms)
        })?;
        let all: usize = self.parts.iter().map(|part| part.all()).sum();
        let (Some(keys), Some(masses), Some(norms)) = (keys, masses, norms) else {
            return Ok(None);
        };
        Ok(Some(ObservedBuffers {
            keys,
            masses,
            norms,
            logits: self.gpu.zeros(all * seen)?,
        }))
    }
}
