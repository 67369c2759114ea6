//! Lists copied into other buffers: when batch rows are reordered, and for a clone. Their pages are shared.

use super::state::{ListBuffers, ObservedBuffers};
use super::DeviceLists;
use crate::cuda::on_gpu::{Gpu, GpuElement, Kernel, Launch, Number};
use crate::cuda::params::{CopyParams, NO_SLIDE};
use candle_core::Result;

impl<G: Gpu, T: GpuElement> DeviceLists<G, T> {
    /// Lists whose batch row i is the old row `rows[i]`.
    ///
    /// # Errors
    /// An error of the device.
    pub fn select(&self, gpu: &G, rows: &[usize]) -> Result<Self> {
        self.selected(gpu, rows, true)
    }

    /// [`Self::select`], with the closed chains or without.
    fn selected(&self, gpu: &G, rows: &[usize], chains: bool) -> Result<Self> {
        let (lists, heads) = (self.settings.lists, self.settings.problem.heads);
        let (dim, window) = (self.settings.problem.head_dim, self.settings.config.window);
        let value_dim = self.settings.problem.value_dim;
        let of = |per_row: usize| -> Result<G::Slice<u32>> {
            let all = rows.iter().flat_map(|row| row * per_row..(row + 1) * per_row);
            gpu.upload(&all.map(|index| index as u32).collect::<Vec<_>>())
        };
        let (list_sources, head_sources) = (of(lists)?, of(heads)?);
        let copier = |per_row: usize, sources| Copier {
            gpu,
            lists: rows.len() * per_row,
            sources: Some(sources),
        };
        let (by_list, by_head) = (copier(lists, &list_sources), copier(heads, &head_sources));
        let suffix = T::SUFFIX;
        let pages = &self.state.pages;
        let local = |x, dim| by_list.all(suffix, x, (window + 1) * dim);
        let row = |x: &G::Slice<T>| by_list.all(suffix, x, dim);
        let words = |x| by_list.all("u32", x, 1);
        let some = |x: &Option<G::Slice<T>>, dim| x.as_ref().map(|x| by_list.all(suffix, x, dim)).transpose();
        let all_tokens = self.row_lens();
        let mut new = Self {
            settings: self.settings.clone(),
            batch: rows.len(),
            seq_len: 0,
            ragged: None,
            sliding_window: self.sliding_window,
            head_tests: rows
                .iter()
                .flat_map(|row| self.head_tests[row * heads..(row + 1) * heads].iter().copied())
                .collect(),
            tests: by_head.all("f32", &self.tests, 2)?,
            state: ListBuffers {
                pages: match chains {
                    true => pages.select(gpu, rows.iter().flat_map(|row| row * lists..(row + 1) * lists))?,
                    false => pages.lengths_alone(gpu)?,
                },
                lengths: words(&self.state.lengths)?,
                seen: None,
                starts: self.starts_of(gpu, rows)?,
                local_k: local(&self.state.local_k, dim)?,
                local_v: local(&self.state.local_v, value_dim)?,
                local_ln: match &self.state.local_ln {
                    Some(ln) => Some(by_list.all("f32", ln, window + 1)?),
                    None => None,
                },
                local_lengths: words(&self.state.local_lengths)?,
                chain_k: by_list.all("f32", &self.state.chain_k, dim)?,
                chain_v: by_list.all("f32", &self.state.chain_v, value_dim)?,
                chain_sizes: words(&self.state.chain_sizes)?,
                previous_k: some(&self.state.previous_k, dim)?,
                previous_v: some(&self.state.previous_v, value_dim)?,
                bits: by_list.all("u32", &self.state.bits, window + 1)?,
                run_starts: words(&self.state.run_starts)?,
                run_keys: row(&self.state.run_keys)?,
                last_keys: row(&self.state.last_keys)?,
                last_queries: match &self.state.last_queries {
                    Some(queries) => Some(by_head.all(suffix, queries, dim)?),
                    None => None,
                },
                observed: match &self.state.observed {
                    Some(observed) => Some(ObservedBuffers {
                        keys: by_list.all(suffix, &observed.keys, self.settings.seen_keys() * dim)?,
                        masses: by_list.all("f32", &observed.masses, window)?,
                        norms: by_list.all("f32", &observed.norms, window)?,
                        logits: gpu.zeros(rows.len() * lists * self.settings.seen_keys())?,
                    }),
                    None => None,
                },
            },
            scratch: None,
        };
        new.set_row_lens(rows.iter().map(|row| all_tokens[*row]).collect());
        Ok(new)
    }

    /// The `starts` of the lists of these old rows.
    fn starts_of(&self, gpu: &G, rows: &[usize]) -> Result<G::Slice<u32>> {
        // Without a sliding window all are 0, and the device is not waited for.
        if self.slide() == NO_SLIDE {
            return gpu.zeros(2 * rows.len() * self.settings.lists);
        }
        let (old, lists) = (gpu.download(&self.state.starts)?, self.settings.lists);
        let of = |half: &[u32]| -> Vec<u32> {
            let lists = rows.iter().flat_map(|row| row * lists..(row + 1) * lists);
            lists.map(|list| half[list]).collect()
        };
        let (starts, kept_from) = old.split_at(self.all());
        gpu.upload(&[of(starts), of(kept_from)].concat())
    }

    /// Lists of one batch row alone.
    ///
    /// # Errors
    /// An error of the device.
    pub fn row(&self, gpu: &G, row: usize) -> Result<Self> {
        self.select(gpu, &[row])
    }

    /// The same lists without a token.
    ///
    /// # Errors
    /// An error of the device.
    pub fn anew(&self, gpu: &G) -> Result<Self> {
        let pool = self.state.pages.pool().clone();
        let mut lists = Self::empty(gpu, self.settings.clone(), self.head_tests.clone(), pool)?;
        lists.sliding_window = self.sliding_window;
        Ok(lists)
    }

    /// A copy of all lists.
    ///
    /// # Errors
    /// An error of the device.
    pub fn copy(&self, gpu: &G) -> Result<Self> {
        self.selected(gpu, &(0..self.batch).collect::<Vec<_>>(), true)
    }

    /// A copy of all but the closed chains: these are only added to, so that the lengths are enough to find them again.
    ///
    /// # Errors
    /// An error of the device.
    pub fn without_chains(&self, gpu: &G) -> Result<Self> {
        self.selected(gpu, &(0..self.batch).collect::<Vec<_>>(), false)
    }

    /// Takes the closed chains, and scratch buffers, of lists that hold these chains and later ones.
    pub fn take_chains(&mut self, later: Self) {
        self.state.pages.take_pages(later.state.pages);
        self.scratch = later.scratch;
    }
}

/// Copies lists into new buffers.
pub(super) struct Copier<'a, G: Gpu> {
    pub gpu: &'a G,
    /// Lists in the new buffer.
    pub lists: usize,
    /// The old list of each new list; None copies each list to its own place.
    pub sources: Option<&'a G::Slice<u32>>,
}

impl<G: Gpu> Copier<'_, G> {
    /// Copies `count` numbers of each list.
    pub fn all<T: Number>(&self, suffix: &str, from: &G::Slice<T>, count: usize) -> Result<G::Slice<T>> {
        let mut to = self.gpu.alloc::<T>(self.lists * count)?;
        let params = CopyParams {
            to_offset: 0,
            from_offset: 0,
            from_stride: count as u32,
            to_stride: count as u32,
            count: count as u32,
            unused: 0,
        };
        copy(self.gpu, suffix, (from, self.sources), &mut to, self.lists, &params)?;
        Ok(to)
    }
}

/// Copies `heads` blocks of `count` numbers to places `stride` apart, from `first` on.
///
/// # Errors
/// An error of the device.
pub(crate) fn paste<G: Gpu, T: GpuElement>(
    gpu: &G,
    (from, count): (&G::Slice<T>, usize),
    (to, stride): (&mut G::Slice<T>, usize),
    heads: usize,
    first: usize,
) -> Result<()> {
    let params = CopyParams {
        to_offset: first as u64,
        from_offset: 0,
        from_stride: count as u32,
        to_stride: stride as u32,
        count: count as u32,
        unused: 0,
    };
    copy(gpu, T::SUFFIX, (from, None), to, heads, &params)
}

/// Launches `cache_copy`: list i becomes the old list `sources[i]`, or i.
pub(super) fn copy<G: Gpu, T: Number>(
    gpu: &G,
    suffix: &str,
    (from, sources): (&G::Slice<T>, Option<&G::Slice<u32>>),
    to: &mut G::Slice<T>,
    lists: usize,
    params: &CopyParams,
) -> Result<()> {
    let launch = Launch {
        grid: [lists, (params.count as usize).div_ceil(256), 1],
        threads: 256,
        shared_bytes: 0,
    };
    let args = [gpu.read(from), gpu.read_some(sources), gpu.write(to), gpu.value(params)];
    gpu.launch(&Kernel::plain(&format!("cache_copy_{suffix}")), launch, &args)
}
