//! Groups of batch rows in one call on a device: rows that step together, and rows that take several tokens alone.

use super::segments::RowRun;
use crate::config::AttentionOptions;
use crate::cuda::cache::{paste, DeviceLists};
use crate::cuda::extras::{ExtraBuffers, ScoreBuffer};
use crate::cuda::on_gpu::{Gpu, GpuElement, Source};
use crate::cuda::operands::BiasBuffer;
use crate::problem::{Problem, RowLayout};
use candle_core::Result;
use std::ops::Range;

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

/// Whether a row can step beside others: it takes the call's first token, or none.
fn steps<G: Gpu, T: GpuElement>(call: &RowsCall<'_, G, T>, runs: &[RowRun]) -> bool {
    let plain = |options: &AttentionOptions| options.bias.is_none() && options.dropout.is_none();
    let one = match runs {
        [] => true,
        [run] => !run.fresh && run.tokens == (0..1),
        _ => false,
    };
    one && call.options.is_none_or(plain)
}

/// The groups of a call: rows beside each other that step, and every other row alone.
pub(super) fn groups_for<G: Gpu, T: GpuElement>(call: &RowsCall<'_, G, T>, runs: &[Vec<RowRun>]) -> Vec<Range<usize>> {
    let mut groups: Vec<(Range<usize>, bool)> = Vec::new();
    for (row, runs) in runs.iter().enumerate() {
        let step = steps(call, runs);
        match groups.last_mut() {
            Some((group, true)) if step => group.end = row + 1,
            _ => groups.push((row..row + 1, step)),
        }
    }
    groups.into_iter().map(|(group, _)| group).collect()
}

/// Runs a call group by group: `parts` are those of [`groups_for`].
pub(super) fn groups_apart<G: Gpu, T: GpuElement>(
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
    let mut row = 0;
    for lists in parts {
        let group = row..row + lists.batch();
        row = group.end;
        let mut put = |found: Option<G::Slice<T>>, run: &RowRun| {
            let (Some(from), Some(to)) = (&found, &mut output) else {
                return Ok(());
            };
            let first = (group.start * heads * tokens + run.tokens.start) * value_dim;
            let (count, stride) = (run.tokens.len() * value_dim, tokens * value_dim);
            paste(gpu, (from, count), (to, stride), group.len() * heads, first)
        };
        if group.len() > 1 {
            let takes: Vec<bool> = runs[group.clone()].iter().map(|runs| !runs.is_empty()).collect();
            let one = RowRun {
                tokens: 0..1,
                fresh: false,
                start: 0,
            };
            if takes.contains(&true) {
                let part = call.part(group.start, &one);
                put(lists.step(gpu, &takes, |lists| take(gpu, lists, &part, 1))?, &one)?;
            }
        } else {
            for run in &runs[group.start] {
                if run.fresh {
                    *lists = lists.anew(gpu)?;
                }
                put(take(gpu, lists, &call.part(group.start, run), run.tokens.len())?, run)?;
            }
        }
        if let Some(options) = call.options {
            lists.attend_under(gpu, options)?;
        }
    }
    Ok(output)
}

/// Appends `count` tokens to some batch rows' lists.
pub(super) fn take<G: Gpu, T: GpuElement>(
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
