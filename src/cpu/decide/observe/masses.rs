//! The mass that rows give the tokens of their windows: logits by panels of tokens, a softmax per row, and sums per
//! token.
//!
//! A token's lane is its index modulo [`PANEL`] everywhere. So a logit, the sum of a row's weights and the sum of a
//! token's mass each add the same numbers in the same order, for any set of rows that is computed together.

// Loops go over lanes by index: the compiler vectorises these.
#![allow(clippy::needless_range_loop)]

use crate::cpu::decide::observe::keys::Keys;
use crate::cpu::decide::observe::Local;
use crate::cpu::number::aligned::Aligned;
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::panels::{keep_lanes, panel_dots, raise, PANEL};
use crate::cpu::number::rows::HeadRows;
use crate::cpu::tile::softmax::add_weights;
use crate::instructions::arch;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Pairs of a row and a head that are computed together: each register of keys is read once for all of them.
const TOGETHER: usize = 4;

/// One number per token of a panel.
type PanelLanes<A> = [A; PANEL];

/// The queries of one group and the keys that they read.
pub(crate) struct Observation<'a, Q: Element> {
    pub local: Local,
    /// The queries of each head of the group, from token `first_query` on.
    pub queries: &'a [HeadRows<'a, Q>],
    pub first_query: usize,
    /// The keys from panel [`Local::first_panel`] of the first row on.
    pub keys: &'a Keys<Q::Acc>,
    /// The keys from token 0 on: at least the sinks that lie before a row's window.
    pub sink_keys: &'a Keys<Q::Acc>,
}

/// Buffers of [`Observation::add`].
#[derive(Default)]
pub(crate) struct MassScratch<A: Accumulator> {
    queries: Vec<A>,
    /// Logits, then weights, of the rows that are computed together: the sinks' panels, then the windows' panels.
    weights: Aligned<A>,
    /// Masses by panels.
    masses: Aligned<A>,
}

/// The panels that the rows of one panel read.
struct Panels {
    /// The number of panels of sinks, from panel 0 on.
    sinks: usize,
    /// The panels of the windows. A window reaches into one panel more than it fills where its last panel holds the
    /// lanes that its first panel does not use. The weights of these two panels are kept as one panel.
    window: Range<usize>,
    filled: usize,
}

impl Panels {
    fn all(&self) -> usize {
        self.sinks + self.window.len()
    }

    /// The place of the weights of panel `panel` of a window.
    fn at(&self, panel: usize) -> usize {
        self.sinks + (panel - self.window.start) % self.filled
    }
}

impl<Q: Element> Observation<'_, Q> {
    /// Adds the weights of `rows` to the masses of the tokens from `base` on, where they count: row by row, and head by
    /// head within a row.
    pub fn add(&self, rows: Range<usize>, base: usize, masses: &mut [Q::Acc], scratch: &mut MassScratch<Q::Acc>) {
        let tokens = base..base + masses.len();
        let window = self.local.window;
        // No other rows count for these tokens.
        let rows = rows.start.max(tokens.start + window / 2)..rows.end.min(tokens.end + window - 1);
        let (first, lead) = (base / PANEL, base % PANEL);
        scratch.masses.make_room((tokens.end.div_ceil(PANEL) - first) * PANEL);
        scratch.masses.fill(Q::Acc::ZERO);
        scratch.masses[lead..][..masses.len()].copy_from_slice(masses);
        arch().dispatch(Add {
            observation: self,
            rows,
            tokens,
            scratch,
        });
        masses.copy_from_slice(&scratch.masses[lead..][..masses.len()]);
    }

    /// Adds the weights of G pairs of a row and a head, the rows of one panel in order.
    #[inline(always)]
    fn add_pairs<S: Simd, const G: usize>(
        &self,
        simd: S,
        pairs: [(usize, usize); G],
        tokens: &Range<usize>,
        scratch: &mut MassScratch<Q::Acc>,
    ) {
        let mut rows = [0; G];
        let mut counted = [const { 0..0 }; G];
        for g in 0..G {
            rows[g] = pairs[g].0;
            counted[g] = self.counted(rows[g], tokens);
        }
        let panels = self.panels(rows[0], rows[G - 1]);
        let all = panels.all();
        scratch.weights.make_room(G * all * PANEL);
        self.dots::<S, G>(simd, pairs, &panels, scratch);
        let weights = scratch.weights.as_chunks_mut::<PANEL>().0;
        let masses = scratch.masses.as_chunks_mut::<PANEL>().0;

        // Each step is done for all rows, so that its latency is hidden behind the other rows' work.
        let mut most = [[Q::Acc::NEG_INFINITY; PANEL]; G];
        for g in 0..G {
            most[g] = self.hide(simd, rows[g], &panels, &mut weights[g * all..][..all]);
        }
        let mut top = [Q::Acc::ZERO; G];
        for g in 0..G {
            top[g] = across(most[g], Q::Acc::larger);
        }
        let mut sums = [[Q::Acc::ZERO; PANEL]; G];
        for panel in 0..all.min(panels.sinks + panels.filled) {
            for g in 0..G {
                let weights = &mut weights[g * all + panel];
                add_weights(simd, weights, top[g], &mut sums[g]);
            }
        }
        let mut inverses = [Q::Acc::ZERO; G];
        for g in 0..G {
            inverses[g] = Q::Acc::ONE / across(sums[g], |x, y| x + y);
        }

        for panel in counted[0].start / PANEL..counted[G - 1].end.div_ceil(PANEL) {
            let mass = &mut masses[panel - tokens.start / PANEL];
            for g in 0..G {
                let mut weights = weights[g * all + panels.at(panel)].map(|weight| weight * inverses[g]);
                keep_lanes(simd, lanes(panel, &counted[g]), &mut weights, &[Q::Acc::ZERO; PANEL]);
                for lane in 0..PANEL {
                    mass[lane] += weights[lane];
                }
            }
        }
    }

    /// The panels that the rows of one panel, from `low` to `high`, read. The place of a token's weights depends on its
    /// row alone.
    #[inline(always)]
    fn panels(&self, low: usize, high: usize) -> Panels {
        let Local { window, sinks, .. } = self.local;
        Panels {
            sinks: sinks.min(self.local.start(high)).div_ceil(PANEL),
            window: self.local.first_panel(low)..high / PANEL + 1,
            filled: window.div_ceil(PANEL),
        }
    }

    /// Logits of G queries, in base 2.
    #[inline(always)]
    fn dots<S: Simd, const G: usize>(
        &self,
        simd: S,
        pairs: [(usize, usize); G],
        panels: &Panels,
        scratch: &mut MassScratch<Q::Acc>,
    ) {
        let MassScratch { queries, weights, .. } = scratch;
        let queries = (
            self.queries(pairs, queries),
            Q::Acc::of(self.local.scale * std::f64::consts::LOG2_E),
        );
        let panel = |index: usize| match index.checked_sub(panels.sinks) {
            Some(index) => self.keys.panel(panels.window.start + index),
            None => self.sink_keys.panel(index),
        };
        let (panels, stride) = ((panels.all(), panel), panels.all() * PANEL);
        // G * C sums, C registers of keys and one register of a query must fit into the registers.
        if S::REGISTER_COUNT >= 32 {
            panel_dots::<Q::Acc, S, G, 4>(simd, queries, panels, weights, stride);
        } else {
            panel_dots::<Q::Acc, S, G, 2>(simd, queries, panels, weights, stride);
        }
    }

    /// Sets the logits of one row to minus infinity where it does not look. Moves the logits of its window's last panel
    /// to the unused lanes of the first panel. Returns the largest logit of each lane.
    #[inline(always)]
    fn hide<S: Simd>(
        &self,
        simd: S,
        row: usize,
        panels: &Panels,
        logits: &mut [PanelLanes<Q::Acc>],
    ) -> PanelLanes<Q::Acc> {
        let start = self.local.start(row);
        let (sinks, window) = logits.split_at_mut(panels.sinks);
        let hidden = [Q::Acc::NEG_INFINITY; PANEL];
        let mut most = hidden;
        for (panel, logits) in sinks.iter_mut().enumerate() {
            let lanes = lanes(panel, &(0..self.local.sinks.min(start)));
            keep_lanes(simd, lanes, logits, &hidden);
            raise(simd, &mut most, logits);
        }
        let end = (row % PANEL + 1) as u32;
        // The row reads every lane of its window's panels once its window is full.
        let whole = self.local.window.is_multiple_of(PANEL) && row + 1 >= self.local.window;
        if !whole {
            for (panel, logits) in panels.window.clone().zip(window.iter_mut()) {
                let lanes = lanes(panel, &(start..row + 1));
                keep_lanes(simd, lanes, logits, &hidden);
            }
        }
        if let (true, [first, .., last]) = (panels.window.len() > panels.filled, &mut *window) {
            keep_lanes(simd, (end, PANEL as u32), first, last);
        }
        for logits in window.iter().take(panels.filled) {
            raise(simd, &mut most, logits);
        }
        most
    }

    /// The subrange of `tokens` that row `row` counts for: it counts for t from t + window / 2 on.
    #[inline(always)]
    fn counted(&self, row: usize, tokens: &Range<usize>) -> Range<usize> {
        self.local.start(row).max(tokens.start)..(row + 1).saturating_sub(self.local.window / 2).min(tokens.end)
    }

    /// Rows of queries: in place, or widened in `buffer`.
    #[inline(always)]
    fn queries<'r, const G: usize>(
        &'r self,
        pairs: [(usize, usize); G],
        buffer: &'r mut Vec<Q::Acc>,
    ) -> [&'r [Q::Acc]; G] {
        let dim = self.queries[0].dim;
        if Q::as_acc(&[]).is_none() {
            buffer.resize(G * dim, Q::Acc::ZERO);
        }
        let mut buffers = buffer.chunks_exact_mut(dim);
        let mut rows: [&[Q::Acc]; G] = [&[]; G];
        for (target, (row, head)) in rows.iter_mut().zip(pairs) {
            self.queries[head].prefetch(row - self.first_query);
            let query = self.queries[head].row(row - self.first_query);
            *target = match (Q::as_acc(query), buffers.next()) {
                (Some(query), _) => query,
                (None, Some(buffer)) => {
                    Q::widen(query, buffer);
                    buffer
                }
                (None, None) => &[],
            };
        }
        rows
    }
}

/// The lanes of `panel` whose tokens lie in `tokens`: first lane, and the lane after the last.
#[inline(always)]
fn lanes(panel: usize, tokens: &Range<usize>) -> (u32, u32) {
    let lane = |token: usize| token.saturating_sub(panel * PANEL).min(PANEL) as u32;
    (lane(tokens.start), lane(tokens.end))
}

/// Joins all lanes into one number, by halves.
#[inline(always)]
fn across<A: Accumulator>(mut lanes: PanelLanes<A>, both: impl Fn(A, A) -> A) -> A {
    let mut half = PANEL / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] = both(lanes[lane], lanes[lane + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// [`Observation::add`] as code for one instruction set.
struct Add<'s, 'o, Q: Element> {
    observation: &'s Observation<'o, Q>,
    rows: Range<usize>,
    tokens: Range<usize>,
    scratch: &'s mut MassScratch<Q::Acc>,
}

impl<Q: Element> WithSimd for Add<'_, '_, Q> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (observation, heads) = (self.observation, self.observation.queries.len());
        let mut row = self.rows.start;
        while row < self.rows.end {
            let end = self.rows.end.min((row / PANEL + 1) * PANEL);
            let pair = |index: usize| (row + index / heads, index % heads);
            let count = (end - row) * heads;
            let whole = count / TOGETHER * TOGETHER;
            for index in (0..whole).step_by(TOGETHER) {
                let mut pairs = [(0, 0); TOGETHER];
                for g in 0..TOGETHER {
                    pairs[g] = pair(index + g);
                }
                observation.add_pairs::<S, TOGETHER>(simd, pairs, &self.tokens, self.scratch);
            }
            for index in whole..count {
                observation.add_pairs::<S, 1>(simd, [pair(index)], &self.tokens, self.scratch);
            }
            row = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Masses of all tokens, in chunks of rows; the keys of each chunk are filled anew.
    fn masses(local: Local, heads: &[HeadRows<f32>], keys: HeadRows<f32>, count: usize, chunk: usize) -> Vec<u32> {
        let mut masses = vec![0f32; count];
        for first in (0..count).step_by(chunk) {
            let end = count.min(first + chunk);
            let (mut all, mut sinks) = (Keys::default(), Keys::default());
            let row = |token| keys.row(token);
            all.fill(local.first_panel(first), local.start(first)..end, row);
            sinks.fill(0, 0..local.sinks.min(end), row);
            let observation = Observation {
                local,
                queries: heads,
                first_query: 0,
                keys: &all,
                sink_keys: &sinks,
            };
            let base = local.start(first);
            observation.add(first..end, base, &mut masses[base..end], &mut MassScratch::default());
        }
        masses.into_iter().map(f32::to_bits).collect()
    }

    /// Equal to the last bit, with one head and with three heads that share their keys.
    #[test]
    fn no_split_changes_a_mass() {
        let (count, dim) = (100, 20);
        let numbers: Vec<f32> = (0..4 * count * dim).map(|i| (i as f32 * 0.7).sin() * 2.0).collect();
        let rows: Vec<_> = numbers
            .chunks(count * dim)
            .map(|rows| HeadRows::compact(rows, dim))
            .collect();
        for (window, sinks) in [(2, 0), (5, 3), (16, 4), (20, 17), (32, 4), (33, 1), (64, 20)] {
            let local = Local {
                window,
                sinks,
                scale: 0.3,
            };
            for heads in [&rows[..1], &rows[..3]] {
                let whole = masses(local, heads, rows[3], count, count);
                for chunk in [1, 3, 16, 50] {
                    let split = masses(local, heads, rows[3], count, chunk);
                    assert_eq!(
                        split,
                        whole,
                        "window {window}, {} heads, {chunk} at a time",
                        heads.len()
                    );
                }
            }
        }
    }
}
