//! A cache's lists on a device, in groups of batch rows. A group has one set of buffers and one launch. All rows are
//! one group until a call treats them unlike; then rows that take one token, or none, stay together, and a row that
//! takes several has lists of its own until it steps with the others again.

use super::device_groups::{groups_apart, groups_for, take, RowsCall};
use super::segments::{BeforeCall, RowPlace, RowRun};
use crate::config::{ByteCode, CompressionConfig, HeadStrategies};
use crate::cuda::cache::{DeviceLists, HostLists};
use crate::cuda::on_gpu::{Gpu, GpuElement};
use crate::problem::Problem;
use candle_core::{bail, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// The lists of one layer, and where its batch rows stand.
pub(crate) struct DeviceRows<G: Gpu, T: GpuElement> {
    /// Groups of batch rows, in order.
    parts: Vec<DeviceLists<G, T>>,
    seq_len: usize,
    /// Where each batch row stands, once segments were given.
    places: Option<Vec<RowPlace>>,
}

/// [`DeviceRows`] on the host.
pub(crate) struct HostRows<T> {
    pub seq_len: usize,
    pub places: Option<Vec<RowPlace>>,
    /// The lists of all batch rows, or of one each.
    pub parts: Vec<HostLists<T>>,
}

impl<G: Gpu, T: GpuElement> DeviceRows<G, T> {
    /// Empty lists for calls like `problem`.
    ///
    /// # Errors
    /// As [`DeviceLists::new`].
    pub fn new(
        gpu: &G,
        problem: &Problem,
        settings: (&HeadStrategies, &CompressionConfig),
        code: Option<ByteCode>,
    ) -> Result<Self> {
        Ok(Self {
            parts: vec![DeviceLists::new(gpu, problem, settings, code)?],
            seq_len: 0,
            places: None,
        })
    }

    /// The number of tokens of each batch row, padding and earlier segments among them.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Whether a sliding window is in force.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn slides(&self) -> bool {
        self.parts.iter().any(|part| part.sliding_window().flatten().is_some())
    }

    /// The sliding window of the calls that attended; None before the first of them.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn sliding_window(&self) -> Option<Option<usize>> {
        self.parts.first().and_then(DeviceLists::sliding_window)
    }

    /// Where each batch row stands, once segments were given.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn places(&self) -> Option<&[RowPlace]> {
        self.places.as_deref()
    }

    /// Whether segments were given.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn has_segments(&self) -> bool {
        self.places.is_some()
    }

    fn batch(&self) -> usize {
        self.parts.iter().map(DeviceLists::batch).sum()
    }

    /// Entries per batch row and list. Waits for the device.
    ///
    /// # Errors
    /// An error of the device.
    pub fn entries(&self, gpu: &G) -> Result<Vec<Vec<usize>>> {
        let parts: Vec<_> = self.parts.iter().map(|part| part.entries(gpu)).collect::<Result<_>>()?;
        Ok(parts.concat())
    }

    /// Bytes in use. Waits for the device.
    ///
    /// # Errors
    /// An error of the device.
    pub fn bytes(&self, gpu: &G) -> Result<usize> {
        self.parts.iter().map(|part| part.bytes(gpu)).sum()
    }

    /// Bytes of all groups, and of pages that wait for their next entries.
    pub fn bytes_allocated(&self) -> usize {
        let held: usize = self.parts.iter().map(DeviceLists::bytes_held).sum();
        let pools = self
            .parts
            .iter()
            .map(|part| (Arc::as_ptr(part.pool()), part.pool().free_bytes()));
        held + pools.collect::<BTreeMap<_, _>>().into_values().sum::<usize>()
    }

    /// Bytes of pages that other rows hold, too.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn bytes_shared(&self) -> usize {
        self.parts.iter().map(DeviceLists::bytes_shared).sum()
    }

    /// Copies the pages that other rows hold, too.
    ///
    /// # Errors
    /// An error of the device.
    pub fn unshare(&mut self, gpu: &G) -> Result<()> {
        self.parts.iter_mut().try_for_each(|part| part.unshare(gpu))
    }

    pub fn never_merges(&self) -> bool {
        self.parts.iter().all(DeviceLists::never_merges)
    }

    /// Whether [`Self::truncate`] to this many tokens is exact, in a cache without segments.
    ///
    /// # Errors
    /// An error of the device.
    pub fn can_truncate(&self, gpu: &G, tokens: usize) -> Result<bool> {
        let mut exact = true;
        for part in &self.parts {
            exact = exact && part.can_truncate(gpu, tokens)?;
        }
        Ok(exact)
    }

    /// Cuts lists that never merge, and were given no segments, back to the first `tokens` tokens.
    ///
    /// # Errors
    /// An error of the device.
    pub fn truncate(&mut self, gpu: &G, tokens: usize) -> Result<()> {
        if tokens >= self.seq_len {
            return Ok(());
        }
        self.parts.iter_mut().try_for_each(|part| part.truncate(gpu, tokens))?;
        self.seq_len = tokens;
        Ok(())
    }

    /// Lists whose batch row i is the old row `rows[i]`.
    ///
    /// # Errors
    /// An error of the device.
    pub fn select(&self, gpu: &G, rows: &[usize]) -> Result<Self> {
        Ok(Self {
            parts: match &self.parts[..] {
                [all] => vec![all.select(gpu, rows)?],
                _ => rows.iter().map(|row| self.row(gpu, *row)).collect::<Result<_>>()?,
            },
            seq_len: self.seq_len,
            places: (self.places.as_ref()).map(|places| rows.iter().map(|row| places[*row]).collect()),
        })
    }

    /// A copy of all lists.
    ///
    /// # Errors
    /// An error of the device.
    pub fn copy(&self, gpu: &G) -> Result<Self> {
        self.with_parts(self.parts.iter().map(|part| part.copy(gpu)))
    }

    /// The lists of one batch row, as lists of their own.
    fn row(&self, gpu: &G, row: usize) -> Result<DeviceLists<G, T>> {
        let mut first = 0;
        for part in &self.parts {
            if row < first + part.batch() {
                return part.row(gpu, row - first);
            }
            first += part.batch();
        }
        bail!("cache: expected a batch row below {first}, got {row}; this is a defect of the crate, please report it")
    }

    /// The batch rows of each group.
    fn groups(&self) -> Vec<Range<usize>> {
        let mut end = 0;
        let group = |part: &DeviceLists<G, T>| {
            end += part.batch();
            end - part.batch()..end
        };
        self.parts.iter().map(group).collect()
    }

    /// Puts the rows in other groups.
    ///
    /// # Errors
    /// An error of the device; the groups are then as before.
    fn regroup(&mut self, gpu: &G, wanted: &[Range<usize>]) -> Result<()> {
        let old = self.groups();
        if old == wanted {
            return Ok(());
        }
        let mut new = Vec::with_capacity(wanted.len());
        for group in wanted {
            // Old groups that overlap the new one, whole or in part.
            let mut parts = Vec::new();
            for (part, rows) in self.parts.iter().zip(&old) {
                let common = rows.start.max(group.start)..rows.end.min(group.end);
                if !common.is_empty() {
                    let rows: Vec<usize> = common.map(|row| row - rows.start).collect();
                    parts.push(part.select(gpu, &rows)?);
                }
            }
            let parts: Vec<&DeviceLists<G, T>> = parts.iter().collect();
            new.push(DeviceLists::cat(gpu, &parts)?);
        }
        self.parts = new;
        Ok(())
    }

    /// One cache of all batch rows of `caches`, in order. All have lists of equal settings.
    ///
    /// # Errors
    /// An error of the device.
    pub fn cat(gpu: &G, caches: &[&Self], places: Option<Vec<RowPlace>>) -> Result<Self> {
        let parts: Vec<&DeviceLists<G, T>> = caches.iter().flat_map(|cache| &cache.parts).collect();
        Ok(Self {
            parts: vec![DeviceLists::cat(gpu, &parts)?],
            seq_len: caches.iter().map(|cache| cache.seq_len).max().unwrap_or(0),
            places,
        })
    }

    /// A mark of the present: a copy of all but the closed chains, which are only added to until a sliding window or
    /// segments take some away.
    ///
    /// # Errors
    /// An error of the device.
    pub fn mark(&self, gpu: &G) -> Result<Self> {
        self.with_parts(self.parts.iter().map(|part| part.without_chains(gpu)))
    }

    /// The rows as they were when they gave a mark.
    ///
    /// # Errors
    /// An error of the device.
    pub fn at_mark(mut self, gpu: &G, mark: &Self) -> Result<Self> {
        self.regroup(gpu, &mark.groups())?;
        let parts = mark.parts.iter().zip(self.parts).map(|(marked, later)| {
            let mut part = marked.without_chains(gpu)?;
            part.take_chains(later);
            Ok(part)
        });
        mark.with_parts(parts)
    }

    fn with_parts(&self, parts: impl Iterator<Item = Result<DeviceLists<G, T>>>) -> Result<Self> {
        Ok(Self {
            parts: parts.collect::<Result<_>>()?,
            seq_len: self.seq_len,
            places: self.places.clone(),
        })
    }

    /// Downloads all lists. Waits for the device.
    ///
    /// # Errors
    /// An error of the device.
    pub fn to_host(&self, gpu: &G) -> Result<HostRows<T>> {
        let apart = (0..self.batch()).map(|row| self.row(gpu, row)?.to_host(gpu));
        Ok(HostRows {
            seq_len: self.seq_len,
            places: self.places.clone(),
            parts: match &self.parts[..] {
                [all] if !all.is_ragged() => vec![all.to_host(gpu)?],
                _ => apart.collect::<Result<_>>()?,
            },
        })
    }

    /// Uploads all lists; `problem` has the sizes of all batch rows.
    ///
    /// # Errors
    /// As [`DeviceLists::from_host`].
    pub fn from_host(
        gpu: &G,
        problem: &Problem,
        (strategies, config): (&HeadStrategies, &CompressionConfig),
        host: &HostRows<T>,
    ) -> Result<Self> {
        let problem = Problem {
            batch: problem.batch / host.parts.len(),
            ..*problem
        };
        let part = |part| DeviceLists::from_host(gpu, &problem, strategies, config, part);
        Ok(Self {
            parts: host.parts.iter().map(part).collect::<Result<_>>()?,
            seq_len: host.seq_len,
            places: host.places.clone(),
        })
    }

    /// Appends the tokens of one call; returns their output rows (B, H, n, Dv) if there are options, zeros for padding.
    ///
    /// # Errors
    /// Segments that do not fit, more entries than the limit, or as [`DeviceLists::append_and_attend`]. Only an error
    /// of the device leaves the lists half changed.
    pub fn take_in(&mut self, gpu: &G, call: &RowsCall<'_, G, T>) -> Result<Option<G::Slice<T>>> {
        let before = BeforeCall {
            seq_len: self.seq_len,
            places: self.places.as_deref(),
            tokens: self.parts.iter().flat_map(DeviceLists::row_lens).collect(),
        };
        let runs = before.runs(call.problem, call.options)?;
        let unlike = self.parts.len() > 1 || self.parts[0].is_ragged();
        debug_assert!(!unlike || runs.is_some());
        let output = match runs.as_ref().filter(|runs| unlike || !runs.alike) {
            None => take(gpu, &mut self.parts[0], call, call.problem.tokens)?,
            Some(runs) => self.take_in_apart(gpu, call, &runs.runs)?,
        };
        self.seq_len += call.problem.tokens;
        if let Some(runs) = runs.filter(|runs| self.places.is_some() || !runs.one_segment()) {
            self.places = Some(runs.places);
        }
        Ok(output)
    }

    /// [`Self::take_in`] group by group, and in a group of one row run by run.
    fn take_in_apart(
        &mut self,
        gpu: &G,
        call: &RowsCall<'_, G, T>,
        runs: &[Vec<RowRun>],
    ) -> Result<Option<G::Slice<T>>> {
        if let Some(options) = call.options {
            options.sliding_window_after(self.parts[0].sliding_window())?;
        }
        self.regroup(gpu, &groups_for(call, runs))?;
        let nears = |limit| {
            let near = |part: &DeviceLists<G, T>| part.nears(limit, call.problem.tokens);
            self.parts.iter().any(near)
        };
        // Where a later group may be refused, earlier ones change copies.
        if !call.limit.is_some_and(nears) {
            return groups_apart(gpu, &mut self.parts, call, runs);
        }
        let mut apart = self.copy(gpu)?.parts;
        let output = groups_apart(gpu, &mut apart, call, runs)?;
        self.parts = apart;
        Ok(output)
    }
}
