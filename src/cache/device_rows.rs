//! A cache's lists on a device, batch row by batch row. Rows that hold equal numbers of tokens have one set of buffers
//! and one launch. Once segments or padding make them differ, each row has lists of its own.

use super::segments::{BeforeCall, RowPlace, RowRun};
use crate::config::{AttentionOptions, CompressionConfig, HeadStrategies};
use crate::cuda::cache::{paste, DeviceLists, HostLists};
use crate::cuda::extras::{ExtraBuffers, ScoreBuffer};
use crate::cuda::on_gpu::{Gpu, GpuElement, Source};
use crate::cuda::operands::BiasBuffer;
use crate::problem::{Problem, RowLayout};
use candle_core::Result;

/// The lists of one layer, and where its batch rows stand.
pub(crate) struct DeviceRows<G: Gpu, T: GpuElement> {
    /// The lists of all batch rows, or of one each.
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

/// One checked call.
pub(crate) struct RowsCall<'a, G: Gpu, T: GpuElement> {
    pub problem: &'a Problem,
    pub qkv: [Source<'a, G, T>; 3],
    /// None to append the tokens without attending.
    pub options: Option<&'a AttentionOptions>,
    /// Whether rows are computed, where there are options.
    pub attend: bool,
    /// The bias is a view of (B, H, new tokens, all tokens), scores are (B, Hk, new tokens).
    pub extras: ExtraBuffers<'a, G>,
    /// The most entries of a list.
    pub limit: Option<usize>,
}

impl<G: Gpu, T: GpuElement> DeviceRows<G, T> {
    /// Empty lists for calls like `problem`.
    ///
    /// # Errors
    /// As [`DeviceLists::new`].
    pub fn new(gpu: &G, problem: &Problem, strategies: &HeadStrategies, config: &CompressionConfig) -> Result<Self> {
        Ok(Self {
            parts: vec![DeviceLists::new(gpu, problem, strategies, config)?],
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

    pub fn bytes_allocated(&self) -> usize {
        self.parts.iter().map(DeviceLists::bytes_allocated).sum()
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
                each => rows.iter().map(|row| each[*row].copy(gpu)).collect::<Result<_>>()?,
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
        self.select(gpu, &(0..self.batch()).collect::<Vec<_>>())
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
    pub fn at_mark(self, gpu: &G, mark: &Self) -> Result<Self> {
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
        Ok(HostRows {
            seq_len: self.seq_len,
            places: self.places.clone(),
            parts: self.parts.iter().map(|part| part.to_host(gpu)).collect::<Result<_>>()?,
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
        let tokens = |part: &DeviceLists<G, T>| vec![part.seq_len(); part.batch()];
        let before = BeforeCall {
            seq_len: self.seq_len,
            places: self.places.as_deref(),
            tokens: self.parts.iter().flat_map(tokens).collect(),
        };
        let runs = before.runs(call.problem, call.options)?;
        debug_assert!(self.parts.len() == 1 || runs.is_some());
        let output = match runs.as_ref().filter(|runs| self.parts.len() > 1 || !runs.alike) {
            None => take(gpu, &mut self.parts[0], call, call.problem.tokens)?,
            Some(runs) => self.take_in_apart(gpu, call, &runs.runs)?,
        };
        self.seq_len += call.problem.tokens;
        if let Some(runs) = runs.filter(|runs| self.places.is_some() || !runs.one_segment()) {
            self.places = Some(runs.places);
        }
        Ok(output)
    }

    /// [`Self::take_in`] row by row and run by run.
    fn take_in_apart(
        &mut self,
        gpu: &G,
        call: &RowsCall<'_, G, T>,
        runs: &[Vec<RowRun>],
    ) -> Result<Option<G::Slice<T>>> {
        if let Some(options) = call.options {
            options.sliding_window_after(self.parts[0].sliding_window())?;
        }
        let nears = |limit| {
            let near = |part: &DeviceLists<G, T>| part.nears(limit, call.problem.tokens);
            self.parts.iter().any(near)
        };
        let mut apart = match &self.parts[..] {
            [all] if all.batch() > 1 => {
                let rows = 0..all.batch();
                rows.map(|row| all.row(gpu, row)).collect::<Result<Vec<_>>>()?
            }
            // Where a later row may be refused, earlier rows change copies.
            _ if call.limit.is_some_and(nears) => self.copy(gpu)?.parts,
            _ => return rows_apart(gpu, &mut self.parts, call, runs),
        };
        let output = rows_apart(gpu, &mut apart, call, runs)?;
        self.parts = apart;
        Ok(output)
    }
}

/// Runs a call row by row and run by run; `parts` are the lists of one batch row each.
fn rows_apart<G: Gpu, T: GpuElement>(
    gpu: &G,
    parts: &mut [DeviceLists<G, T>],
    call: &RowsCall<'_, G, T>,
    runs: &[Vec<RowRun>],
) -> Result<Option<G::Slice<T>>> {
    let Problem {
        batch,
        heads,
        tokens,
        value_dim,
        ..
    } = *call.problem;
    let rows = |_| gpu.zeros::<T>(batch * heads * tokens * value_dim);
    let mut output = call.options.filter(|_| call.attend).map(rows).transpose()?;
    for (row, (lists, runs)) in parts.iter_mut().zip(runs).enumerate() {
        for run in runs {
            if run.fresh {
                *lists = lists.anew(gpu)?;
            }
            let found = take(gpu, lists, &call.part(row, run), run.tokens.len())?;
            if let (Some(from), Some(to)) = (&found, &mut output) {
                let first = (row * heads * tokens + run.tokens.start) * value_dim;
                paste(
                    gpu,
                    (from, run.tokens.len() * value_dim),
                    (to, tokens * value_dim),
                    heads,
                    first,
                )?;
            }
        }
        if let Some(options) = call.options {
            lists.attend_under(gpu, options)?;
        }
    }
    Ok(output)
}

/// Appends `count` tokens to some batch rows' lists.
fn take<G: Gpu, T: GpuElement>(
    gpu: &G,
    lists: &mut DeviceLists<G, T>,
    call: &RowsCall<'_, G, T>,
    count: usize,
) -> Result<Option<G::Slice<T>>> {
    let (qkv, extras) = (call.qkv, call.extras);
    lists.within(gpu, count, call.limit, |lists| match call.options {
        Some(options) if call.attend => lists.append_and_attend(gpu, qkv, count, options, extras).map(Some),
        options => lists.append(gpu, qkv, count, options, extras).map(|()| None),
    })
}

impl<'a, G: Gpu, T: GpuElement> RowsCall<'a, G, T> {
    /// The call on a run of one batch row.
    fn part(&self, row: usize, run: &RowRun) -> RowsCall<'a, G, T> {
        let Problem { heads, kv_heads, .. } = *self.problem;
        let first = run.tokens.start;
        let rows = |(data, layout): Source<'a, G, T>| {
            let offset = layout.offset + row * layout.strides[0] + first * layout.strides[2];
            (data, RowLayout { offset, ..layout })
        };
        // A bias and dropout count the tokens of all segments.
        let bias = self.extras.bias.map(|bias| BiasBuffer {
            offset: bias.offset + row * bias.strides[0] + first * bias.strides[2] + run.start * bias.strides[3],
            ..bias
        });
        let scores = self.extras.scores.map(|scores| ScoreBuffer {
            first: scores.first + row * kv_heads * scores.stride + first,
            ..scores
        });
        RowsCall {
            qkv: self.qkv.map(rows),
            extras: ExtraBuffers {
                bias,
                scores,
                drawn_from: [(row * heads) as u32, run.start as u32, run.start as u32],
                ..self.extras
            },
            ..*self
        }
    }
}
