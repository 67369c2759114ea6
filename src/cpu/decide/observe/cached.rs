//! Deciding by observed mass as tokens arrive.

use crate::cpu::decide::heads::ListHeads;
use crate::cpu::decide::observe::keys::Keys;
use crate::cpu::decide::observe::masses::{MassScratch, Observation};
use crate::cpu::decide::observe::{weigh, Local};
use crate::cpu::number::bias::Apart;
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::rows::HeadRows;

/// The state that a cache's list keeps to go on observing.
#[derive(Clone)]
pub(crate) struct Observed<S: Element> {
    /// The masses so far of the last min(window, seq_len) tokens.
    pub masses: Vec<S::Acc>,
    /// The keys of the first min(sinks, seq_len) tokens.
    pub sink_keys: Vec<S>,
}

/// The new tokens of one list.
#[derive(Clone, Copy)]
pub(crate) struct Chunk<'a, Q: Element, S: Element> {
    /// The queries of each head that shares the list.
    pub queries: &'a [HeadRows<'a, Q>],
    pub keys: HeadRows<'a, S>,
    pub values: HeadRows<'a, S>,
    /// New tokens, at least 1.
    pub count: usize,
    /// The factor on `query . key`.
    pub scale: f64,
    /// The scores that the caller gives, a row of one number a token; only read where they decide.
    pub scores: Option<HeadRows<'a, f32>>,
    /// The call's bias, and the batch row and query heads that the list serves.
    pub apart: Option<(Apart<'a, S::Acc>, &'a ListHeads)>,
}

impl<Q: Element<Acc = S::Acc>, S: Element> Chunk<'_, Q, S> {
    /// Whether the call's bias lets the tokens `t` and `t + 1` merge; `t + 1` is a new token.
    pub fn pair_is_seen(&self, t: usize) -> bool {
        let apart = self.apart.as_ref();
        apart.is_none_or(|(apart, at)| apart.pair_is_seen(at.batch, at.heads.clone(), t))
    }
}

/// The last raw tokens before a chunk: the newest ones, in order.
#[derive(Clone, Copy)]
pub(crate) struct Recent<'a, S> {
    pub keys: HeadRows<'a, S>,
    pub values: HeadRows<'a, S>,
    pub rows: usize,
}

impl<S: Element> Observed<S> {
    pub fn new() -> Self {
        Self {
            masses: Vec::new(),
            sink_keys: Vec::new(),
        }
    }

    pub fn bytes(&self) -> usize {
        self.masses.len() * size_of::<S::Acc>() + self.sink_keys.len() * size_of::<S>()
    }

    /// The state after `chunk`, which begins at token `first`. Calls `settle(t, score)` for each token whose window is
    /// complete after the chunk.
    pub fn after<Q: Element<Acc = S::Acc>>(
        &self,
        local: Local,
        (first, recent): (usize, Recent<S>),
        chunk: &Chunk<Q, S>,
        mut settle: impl FnMut(usize, S::Acc),
    ) -> Self {
        let (dim, end) = (chunk.keys.dim, first + chunk.count);
        let base = first - self.masses.len();
        let stale = recent.rows - self.masses.len();
        // A sink outside of a row's window came with this chunk or before.
        let mut sink_keys = self.sink_keys.clone();
        for row in first..end.min(local.sinks) {
            sink_keys.extend_from_slice(chunk.keys.row(row - first));
        }
        let (mut keys, mut sinks) = (Keys::default(), Keys::default());
        keys.fill(local.first_panel(first), base..end, |token| {
            match token.checked_sub(first) {
                Some(row) => chunk.keys.row(row),
                None => recent.keys.row(token - base + stale),
            }
        });
        sinks.fill(0, 0..sink_keys.len() / dim, |token| &sink_keys[token * dim..][..dim]);
        let mut masses = self.masses.clone();
        masses.resize(end - base, S::Acc::ZERO);
        let observation = Observation {
            local,
            queries: chunk.queries,
            first_query: first,
            keys: &keys,
            sink_keys: &sinks,
        };
        observation.add(first..end, base, &mut masses, &mut MassScratch::default());
        let complete = local.start(first)..(end + 1).saturating_sub(local.window);
        let mut scores: Vec<_> = complete.clone().map(|token| masses[token - base]).collect();
        let values = complete.clone().map(|token| match token.checked_sub(first) {
            Some(row) => chunk.values.row(row),
            None => recent.values.row(token - base + stale),
        });
        weigh(&mut scores, values);
        complete.zip(scores).for_each(|(token, score)| settle(token, score));
        masses.drain(..(end - base).saturating_sub(local.window));
        Self { masses, sink_keys }
    }
}
