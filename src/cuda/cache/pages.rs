//! Pages of closed chains: `cuda/cache/pages.cuh`. A list has pages for its own entries, not for those of the longest
//! list; clones of a cache share pages, and copy one before they write to it.

use crate::config::ByteCode;
use crate::cuda::on_gpu::{Gpu, GpuElement};
use crate::problem::Problem;
use candle_core::Result;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Entries of a page: as in cuda/cache/pages.cuh.
pub(crate) const PAGE: usize = 64;
/// A pool grows by this part of its pages, or by the pages that are needed.
const GROWTH: usize = 16;

/// Bytes of a page: keys, values, in 8 bits two scales, tokens and, where chains have sizes, their logarithms.
pub(crate) fn page_bytes<T: GpuElement>(problem: &Problem, sized: bool, code: Option<ByteCode>) -> usize {
    let numbers = problem.head_dim + problem.value_dim;
    let row = match code {
        None => numbers * size_of::<T>(),
        Some(_) => numbers + 4,
    };
    PAGE * (row + if sized { 8 } else { 4 })
}

/// Pages of one size, of one stream.
pub(crate) struct PagePool<G: Gpu> {
    page_bytes: usize,
    slabs: Mutex<Slabs<G>>,
}

struct Slabs<G: Gpu> {
    /// By number. A slab with no page in use is freed.
    slabs: BTreeMap<usize, Slab<G>>,
    next: usize,
    /// Pages of all slabs.
    pages: usize,
}

/// Memory of several pages.
struct Slab<G: Gpu> {
    address: u64,
    pages: usize,
    free: Vec<usize>,
    /// Frees the memory when it is dropped.
    _memory: G::Memory,
}

/// A page in use. It goes back to its pool when it is dropped.
pub(crate) struct Page<G: Gpu> {
    pool: Arc<PagePool<G>>,
    slab: usize,
    index: usize,
    address: u64,
}

impl<G: Gpu> Drop for Page<G> {
    fn drop(&mut self) {
        self.pool.take_back(self.slab, self.index);
    }
}

impl<G: Gpu> PagePool<G> {
    pub fn new(page_bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            page_bytes,
            slabs: Mutex::new(Slabs {
                slabs: BTreeMap::new(),
                next: 0,
                pages: 0,
            }),
        })
    }

    /// Bytes of the pages that no list has.
    pub fn free_bytes(&self) -> usize {
        let free = self.locked(|slabs| slabs.slabs.values().map(|slab| slab.free.len()).sum::<usize>());
        free * self.page_bytes
    }

    fn locked<R>(&self, run: impl FnOnce(&mut Slabs<G>) -> R) -> R {
        // No code panics while it holds the lock.
        run(&mut self.slabs.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Hands out `count` pages.
    ///
    /// # Errors
    /// An error of the device, such as too little memory; then no page is handed out.
    fn take(self: &Arc<Self>, gpu: &G, count: usize) -> Result<Vec<Arc<Page<G>>>> {
        let places = self.locked(|slabs| {
            let free: usize = slabs.slabs.values().map(|slab| slab.free.len()).sum();
            if free < count {
                let pages = (count - free).max(slabs.pages / GROWTH);
                let memory = gpu.memory(pages * self.page_bytes)?;
                let slab = Slab {
                    address: gpu.address(&memory),
                    pages,
                    free: (0..pages).rev().collect(),
                    _memory: memory,
                };
                slabs.slabs.insert(slabs.next, slab);
                (slabs.next, slabs.pages) = (slabs.next + 1, slabs.pages + pages);
            }
            let mut places = Vec::with_capacity(count);
            for (number, slab) in &mut slabs.slabs {
                let some = slab.free.len().min(count - places.len());
                let taken = slab.free.drain(slab.free.len() - some..).rev();
                places.extend(taken.map(|index| (*number, index, slab.address)));
            }
            Ok::<_, candle_core::Error>(places)
        })?;
        let page = |(slab, index, first)| {
            Arc::new(Page {
                pool: self.clone(),
                slab,
                index,
                address: first + (index * self.page_bytes) as u64,
            })
        };
        Ok(places.into_iter().map(page).collect())
    }

    fn take_back(&self, number: usize, index: usize) {
        let freed = self.locked(|slabs| {
            let slab = slabs.slabs.get_mut(&number)?;
            slab.free.push(index);
            if slab.free.len() < slab.pages {
                return None;
            }
            slabs.pages -= slab.pages;
            slabs.slabs.remove(&number)
        });
        drop(freed);
    }
}

/// The pages of all lists of a layer.
pub(super) struct ListPages<G: Gpu> {
    pool: Arc<PagePool<G>>,
    lists: Vec<PagesOfList<G>>,
    /// The addresses of all pages, (lists, `stride`).
    table: G::Slice<i64>,
    stride: usize,
    /// Tokens that came since the host read the lengths.
    since: usize,
}

/// The pages of one list, and the host's last word about its entries.
pub(super) struct PagesOfList<G: Gpu> {
    pages: Vec<Arc<Page<G>>>,
    /// Entries, and those of them at the front that no later row sees.
    length: usize,
    left: usize,
}

impl<G: Gpu> Clone for PagesOfList<G> {
    fn clone(&self) -> Self {
        Self {
            pages: self.pages.clone(),
            ..*self
        }
    }
}

impl<G: Gpu> ListPages<G> {
    /// No pages for `lists` lists.
    ///
    /// # Errors
    /// An error of the device.
    pub fn new(gpu: &G, pool: Arc<PagePool<G>>, lists: usize) -> Result<Self> {
        let empty = PagesOfList {
            pages: Vec::new(),
            length: 0,
            left: 0,
        };
        Self::of(gpu, pool, vec![empty; lists], 0)
    }

    fn of(gpu: &G, pool: Arc<PagePool<G>>, lists: Vec<PagesOfList<G>>, since: usize) -> Result<Self> {
        let stride = stride_of(&lists);
        Ok(Self {
            table: table(gpu, &lists, stride)?,
            pool,
            lists,
            stride,
            since,
        })
    }

    /// The pages of these lists, shared.
    ///
    /// # Errors
    /// An error of the device.
    pub fn select(&self, gpu: &G, lists: impl Iterator<Item = usize>) -> Result<Self> {
        let lists = lists.map(|list| self.lists[list].clone()).collect();
        Self::of(gpu, self.pool.clone(), lists, self.since)
    }

    /// The pages of several layers' lists, in order and shared.
    ///
    /// # Errors
    /// An error of the device.
    pub fn cat<'a>(gpu: &G, parts: impl Iterator<Item = &'a Self> + Clone) -> Result<Self>
    where
        G: 'a,
    {
        let lists = parts.clone().flat_map(|part| part.lists.iter().cloned()).collect();
        let since = parts.clone().map(|part| part.since).max().unwrap_or(0);
        let Some(first) = parts.clone().next() else {
            candle_core::bail!("cat: expected at least one cache, got none")
        };
        Self::of(gpu, first.pool.clone(), lists, since)
    }

    /// As many lists without pages, with the same lengths.
    ///
    /// # Errors
    /// An error of the device.
    pub fn lengths_alone(&self, gpu: &G) -> Result<Self> {
        let bare = |list: &PagesOfList<G>| PagesOfList {
            pages: Vec::new(),
            ..*list
        };
        let lists = self.lists.iter().map(bare).collect();
        Self::of(gpu, self.pool.clone(), lists, self.since)
    }

    /// Takes the pages of lists that hold the entries of these and later ones.
    pub fn take_pages(&mut self, later: Self) {
        for (list, later) in self.lists.iter_mut().zip(later.lists) {
            list.pages = later.pages;
        }
        (self.table, self.stride) = (later.table, later.stride);
    }

    pub fn pool(&self) -> &Arc<PagePool<G>> {
        &self.pool
    }

    pub fn table(&self) -> &G::Slice<i64> {
        &self.table
    }

    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Bytes of all pages.
    pub fn bytes(&self) -> usize {
        let held: usize = self.lists.iter().map(|list| list.pages.len()).sum();
        held * self.pool.page_bytes
    }

    /// Bytes of the pages that other caches hold, too.
    pub fn bytes_shared(&self) -> usize {
        let shared = |page: &&Arc<Page<G>>| Arc::strong_count(page) > 1;
        let pages = self.lists.iter().flat_map(|list| &list.pages).filter(shared);
        pages.count() * self.pool.page_bytes
    }

    /// The most entries that a later row may see in a list.
    pub fn most_seen(&self) -> usize {
        let seen = |list: &PagesOfList<G>| list.length - list.left;
        self.lists.iter().map(seen).max().unwrap_or(0) + self.since
    }

    /// Counts tokens. Each may close a chain in every list.
    pub fn count(&mut self, tokens: usize) {
        self.since += tokens;
    }

    /// Whether every list has room for `count` more entries, in pages of its own.
    pub fn has_room(&self, count: usize) -> bool {
        let needed = self.since + count;
        let fits = |list: &PagesOfList<G>| {
            list.length + needed <= list.pages.len() * PAGE
                && list.pages[list.length / PAGE..]
                    .iter()
                    .all(|page| Arc::strong_count(page) == 1)
        };
        self.lists.iter().all(fits)
    }

    /// Takes note of all lengths, and of the entries at the front that no later row sees.
    pub fn learn(&mut self, lengths: &[u32], starts: Option<&[u32]>) {
        self.since = 0;
        for (at, list) in self.lists.iter_mut().enumerate() {
            list.length = lengths[at] as usize;
            list.left = starts.map_or(0, |starts| starts[at] as usize);
        }
    }

    /// Takes note of entries that a chunk added to each list, whose lengths were learnt just before it.
    pub fn added(&mut self, entries: &[u32]) {
        self.since = 0;
        for (list, entries) in self.lists.iter_mut().zip(entries) {
            list.length += *entries as usize;
        }
    }

    /// Gives list l room for `counts(l)` more entries, and for a page of them, in pages of its own. Pages beyond go
    /// back to the pool, and so do pages at the front that no later row sees. The lengths were just learnt.
    ///
    /// # Errors
    /// An error of the device; the pages are then as before.
    pub fn fit(&mut self, gpu: &G, counts: impl Fn(usize) -> usize) -> Result<Refit<G>> {
        let lists = self.lists.iter().enumerate();
        let plans: Vec<Plan> = lists.map(|(at, list)| list.plan(counts(at))).collect();
        let missing = plans.iter().map(|plan| plan.new).sum();
        let mut new = self.pool.take(gpu, missing)?.into_iter();
        let fitted = self.lists.iter().zip(&plans).map(|(list, plan)| PagesOfList {
            pages: (list.pages[plan.keep.clone()].iter().cloned())
                .chain(new.by_ref().take(plan.new))
                .collect(),
            length: list.length - plan.gone(),
            left: list.left - plan.gone(),
        });
        let fitted: Vec<_> = fitted.collect();
        let stride = stride_of(&fitted);
        self.table = table(gpu, &fitted, stride)?;
        self.stride = stride;
        let copies = self.lists.iter().zip(&fitted).zip(&plans);
        let copies = copies
            .filter(|(_, plan)| plan.copies > 0)
            .map(|((old, new), plan)| PageCopy {
                from: old.pages[plan.keep.end].clone(),
                to: new.pages[plan.keep.len()].clone(),
                used: plan.copies,
            });
        let refit = Refit {
            copies: copies.collect(),
            gone: plans.iter().map(Plan::gone).collect(),
        };
        self.lists = fitted;
        Ok(refit)
    }

    /// Gives every list pages of its own. The lengths were just learnt. Returns the pages to be copied.
    ///
    /// # Errors
    /// An error of the device; the pages are then as before.
    pub fn unshare(&mut self, gpu: &G) -> Result<Refit<G>> {
        // Of each page, by its address, the holders that have not let it go: the last one keeps it.
        let (mut holders, mut places) = (BTreeMap::new(), Vec::new());
        for (at, list) in self.lists.iter().enumerate() {
            for (number, page) in list.pages.iter().enumerate() {
                let left = holders.entry(page.address).or_insert(Arc::strong_count(page));
                if *left > 1 {
                    *left -= 1;
                    places.push((at, number));
                }
            }
        }
        let new = self.pool.take(gpu, places.len())?;
        let (mut lists, mut copies) = (self.lists.clone(), Vec::new());
        for ((at, number), page) in places.into_iter().zip(new) {
            let used = lists[at].length.saturating_sub(number * PAGE).min(PAGE);
            let from = std::mem::replace(&mut lists[at].pages[number], page.clone());
            if used > 0 {
                copies.push(PageCopy { from, to: page, used });
            }
        }
        self.table = table(gpu, &lists, self.stride)?;
        self.lists = lists;
        Ok(Refit {
            copies,
            gone: vec![0; self.lists.len()],
        })
    }
}

/// A page to be copied: its entries in use.
pub(super) struct PageCopy<G: Gpu> {
    from: Arc<Page<G>>,
    to: Arc<Page<G>>,
    used: usize,
}

/// What follows from a change of pages: copies by a kernel, and entries of each list that went at its front.
pub(super) struct Refit<G: Gpu> {
    pub copies: Vec<PageCopy<G>>,
    pub gone: Vec<usize>,
}

impl<G: Gpu> Refit<G> {
    /// The addresses of the pages to copy from and to, and their entries in use.
    pub fn addresses(&self) -> ([Vec<i64>; 2], Vec<u32>) {
        let of = |page: fn(&PageCopy<G>) -> &Arc<Page<G>>| -> Vec<i64> {
            self.copies.iter().map(|copy| page(copy).address as i64).collect()
        };
        let used = self.copies.iter().map(|copy| copy.used as u32).collect();
        ([of(|copy| &copy.from), of(|copy| &copy.to)], used)
    }
}

/// A change of one list's pages.
struct Plan {
    /// The old pages that it keeps.
    keep: Range<usize>,
    /// New pages behind them.
    new: usize,
    /// Entries of the old page after these, to be copied into the first new one.
    copies: usize,
}

impl Plan {
    /// Entries in the pages that go at the front.
    fn gone(&self) -> usize {
        self.keep.start * PAGE
    }
}

impl<G: Gpu> PagesOfList<G> {
    fn plan(&self, count: usize) -> Plan {
        let (first, full) = (self.left / PAGE, self.length / PAGE);
        let end = (self.length + count.max(PAGE)).div_ceil(PAGE);
        // Entries are written from `length` on: a page there must be its own.
        let own = |page: &&Arc<Page<G>>| Arc::strong_count(page) == 1;
        let after = self.pages.iter().skip(full).take_while(own).count();
        // A first chunk has entries, but no pages yet.
        let kept = (full + after).min(end).min(self.pages.len());
        let copies = match kept == full && full < self.pages.len() {
            true => self.length % PAGE,
            false => 0,
        };
        Plan {
            keep: first..kept,
            new: end - kept,
            copies,
        }
    }
}

/// Room for pages in a list's row of the table.
fn stride_of<G: Gpu>(lists: &[PagesOfList<G>]) -> usize {
    lists.iter().map(|list| list.pages.len()).max().unwrap_or(0).max(1)
}

/// The addresses of all pages, (lists, `stride`).
fn table<G: Gpu>(gpu: &G, lists: &[PagesOfList<G>], stride: usize) -> Result<G::Slice<i64>> {
    let mut addresses = vec![0; lists.len() * stride];
    for (list, row) in lists.iter().zip(addresses.chunks_exact_mut(stride)) {
        for (page, address) in list.pages.iter().zip(row) {
            *address = page.address as i64;
        }
    }
    gpu.upload(&addresses)
}
