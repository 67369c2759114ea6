//! Segments in a cache: where each batch row stands, and the runs that one call adds to it.

use super::{CompressedKvCache, Lists, ListsOf, State};
use crate::config::{AttentionOptions, Segment};
use crate::cpu::cache::list::{Decided, List};
use crate::cpu::cache::step::Step;
use crate::cpu::decide::heads::ListHeads;
use crate::cpu::number::element::Element;
use crate::problem::Problem;
use candle_core::{bail, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ops::Range;

/// The segment that a batch row's lists hold.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RowPlace {
    /// Its number; 1 before any number came.
    pub number: u32,
    /// Its first token, counted in all tokens that were appended.
    pub start: usize,
}

impl RowPlace {
    /// The place of a batch row before its first token.
    pub const FIRST: Self = Self { number: 1, start: 0 };
}

/// New tokens of one segment in one batch row.
#[derive(Clone, Debug)]
pub(super) struct RowRun {
    /// In the tokens of the call.
    pub tokens: Range<usize>,
    /// Whether the lists start anew.
    pub fresh: bool,
    /// See [`RowPlace::start`].
    pub start: usize,
}

/// The runs of one call, by batch row, and the places after it.
pub(super) struct CallRuns {
    pub runs: Vec<Vec<RowRun>>,
    pub places: Vec<RowPlace>,
    /// Whether every batch row goes on in its segment with all tokens of the call, at the same token index.
    pub alike: bool,
}

impl CallRuns {
    /// Whether the call says no more than one without segments, if no call before it did.
    pub fn one_segment(&self) -> bool {
        self.alike && self.places.iter().all(|place| *place == RowPlace::FIRST)
    }
}

/// What a cache holds before a call.
pub(super) struct BeforeCall<'a> {
    pub seq_len: usize,
    /// Where each batch row stands, once segments were given.
    pub places: Option<&'a [RowPlace]>,
    /// The number of tokens that each batch row's lists hold.
    pub tokens: Vec<usize>,
}

impl CompressedKvCache {
    /// Where each batch row stands, once segments were given.
    pub(super) fn places(&self) -> Option<Vec<RowPlace>> {
        #[cfg(feature = "cuda")]
        if let Some(state) = &self.on_gpu {
            return state.places();
        }
        self.state.as_ref().and_then(|state| state.places.clone())
    }
}

impl State {
    /// As [`BeforeCall::runs`].
    ///
    /// # Errors
    /// As [`BeforeCall::runs`].
    pub(super) fn runs(&self, problem: &Problem, options: Option<&AttentionOptions>) -> Result<Option<CallRuns>> {
        let before = BeforeCall {
            seq_len: self.seq_len,
            places: self.places.as_deref(),
            tokens: each!(&self.lists, lists => held(lists, problem.batch)),
        };
        before.runs(problem, options)
    }
}

impl State {
    /// The ends of a call's parts, in its tokens: each part ends where some list drops entries by its budget, or with
    /// the call.
    ///
    /// # Errors
    /// As [`BeforeCall::runs`].
    pub(super) fn turns(&self, problem: &Problem, options: Option<&AttentionOptions>) -> Result<BTreeSet<usize>> {
        let mut ends = BTreeSet::from([problem.tokens]);
        if problem.tokens == 1 {
            return Ok(ends);
        }
        let runs = self.runs(problem, options)?;
        let whole = RowRun {
            tokens: 0..problem.tokens,
            fresh: false,
            start: 0,
        };
        each!(&self.lists, lists => for (at, list) in lists {
            let Some(budget) = list.settings.budget else { continue };
            let own = match &runs {
                Some(runs) => &runs.runs[at.batch][..],
                None => std::slice::from_ref(&whole),
            };
            for run in own {
                let held = if run.fresh { 0 } else { list.seq_len };
                let due = |end: &usize| budget.is_due(held + end - run.tokens.start);
                ends.extend((run.tokens.start + 1..=run.tokens.end).filter(due));
            }
        });
        Ok(ends)
    }
}

impl BeforeCall<'_> {
    /// The runs of a call; None where segments were never given.
    ///
    /// # Errors
    /// Segments of another shape, or whose numbers come back; a bias beside a segment with padding in its midst.
    pub fn runs(self, problem: &Problem, options: Option<&AttentionOptions>) -> Result<Option<CallRuns>> {
        let given = options.map_or(Ok(None), |options| problem.segments(options))?;
        if given.is_none() && self.places.is_none() {
            return Ok(None);
        }
        let whole = |batch| Segment {
            batch,
            number: 0,
            tokens: 0..problem.tokens,
        };
        let segments = given.unwrap_or_else(|| (0..problem.batch).map(whole).collect());
        let first = vec![RowPlace::FIRST; problem.batch];
        let mut places = self.places.map_or(first, <[RowPlace]>::to_vec);
        let mut held = self.tokens;
        let (biased, drops) = options.map_or((false, false), |o| (o.bias.is_some(), o.dropout.is_some()));
        let mut runs = vec![Vec::new(); problem.batch];
        for Segment { batch, number, tokens } in segments {
            let (place, held) = (&mut places[batch], &mut held[batch]);
            let at = self.seq_len + tokens.start;
            let fresh = number != 0 && number != place.number && *held > 0;
            if fresh {
                *held = 0;
            }
            if *held == 0 {
                *place = RowPlace {
                    number: if number == 0 { place.number } else { number },
                    start: at,
                };
            }
            if (biased || drops) && place.start + *held != at {
                bail!(
                    "segments: expected the tokens of a segment to follow each other where there is a bias or dropout, \
                     got padding before token {at} of batch row {batch}; leave both out, or pad on the left"
                )
            }
            *held += tokens.len();
            runs[batch].push(RowRun {
                tokens,
                fresh,
                start: place.start,
            });
        }
        let alike = |runs: &Vec<RowRun>| match &runs[..] {
            [run] => !run.fresh && run.tokens.len() == problem.tokens && (run.start == 0 || !biased && !drops),
            _ => false,
        };
        Ok(Some(CallRuns {
            alike: runs.iter().all(alike),
            runs,
            places,
        }))
    }
}

/// The number of tokens of caches put together, and where their batch rows then stand, if that has to be said. Of each
/// cache: its tokens, batch rows, and places. All rows end at the last token.
pub(crate) fn joined_places(caches: Vec<(usize, usize, Option<Vec<RowPlace>>)>) -> (usize, Option<Vec<RowPlace>>) {
    let seq_len = caches.iter().map(|(tokens, ..)| *tokens).max().unwrap_or(0);
    if caches
        .iter()
        .all(|(tokens, _, places)| *tokens == seq_len && places.is_none())
    {
        return (seq_len, None);
    }
    let places = caches.into_iter().flat_map(|(tokens, batch, places)| {
        let places = places.unwrap_or_else(|| vec![RowPlace::FIRST; batch]);
        places.into_iter().map(move |place| RowPlace {
            start: place.start + seq_len - tokens,
            ..place
        })
    });
    (seq_len, Some(places.collect()))
}

/// The number of tokens that each batch row's lists hold.
fn held<S: Element>(lists: &ListsOf<S>, batch: usize) -> Vec<usize> {
    let mut held = vec![0; batch];
    lists.iter().for_each(|(at, list)| held[at.batch] = list.seq_len);
    held
}

/// A batch row's lists, once every check has passed.
enum Ready<'a, Q: Element, S: Element> {
    /// One run goes on in the lists as they are.
    GoesOn(Box<Step<'a, Q, S>>, Vec<Decided<S>>, Segment),
    /// Lists that took the runs in.
    Replaced(ListsOf<S>),
}

/// Runs a call row by row and run by run; an error changes nothing. Returns the output rows (B, H, n, Dv), zeros for
/// padding. `step` is that of the whole call, `check` refuses a run's decisions.
pub(super) fn run_apart<Q: Element<Acc = S::Acc>, S: Element>(
    step: &Step<Q, S>,
    lists: &mut ListsOf<S>,
    runs: &[Vec<RowRun>],
    check: impl Fn(&Step<Q, S>, &[(ListHeads, List<S>)], &[Decided<S>]) -> Result<()>,
) -> Result<Vec<Q>> {
    let sizes = [step.heads, step.count, step.value_dim];
    let mut output = vec![Q::zero(); runs.len() * sizes.iter().product::<usize>()];
    let mut ready = Vec::with_capacity(runs.len());
    let mut rest = &lists[..];
    for (batch, runs) in runs.iter().enumerate() {
        let count = rest.iter().take_while(|(at, _)| at.batch == batch).count();
        let (mine, others) = rest.split_at(count);
        rest = others;
        let segment = |run: &RowRun| Segment {
            batch,
            number: 0,
            tokens: run.tokens.clone(),
        };
        if let [run] = &runs[..] {
            if !run.fresh {
                let step = step.part(&run.tokens, run.start);
                let decided = step.decide(mine);
                check(&step, mine, &decided)?;
                ready.push(Ready::GoesOn(Box::new(step), decided, segment(run)));
                continue;
            }
        }
        let mut new = match runs.first() {
            None => {
                ready.push(Ready::Replaced(Vec::new()));
                continue;
            }
            Some(run) if run.fresh => empty(mine),
            Some(_) => mine.to_vec(),
        };
        for (index, run) in runs.iter().enumerate() {
            if run.fresh && index > 0 {
                new = empty(mine);
            }
            let step = step.part(&run.tokens, run.start);
            let decided = step.decide(&new);
            check(&step, &new, &decided)?;
            segment(run).paste(&step.run(&mut new, decided, true), &mut output, sizes);
        }
        ready.push(Ready::Replaced(new));
    }
    let mut rest = &mut lists[..];
    for (batch, ready) in ready.into_iter().enumerate() {
        let count = rest.iter().take_while(|(at, _)| at.batch == batch).count();
        let (mine, others) = rest.split_at_mut(count);
        rest = others;
        match ready {
            Ready::GoesOn(step, decided, segment) => {
                segment.paste(&step.run(mine, decided, true), &mut output, sizes);
            }
            Ready::Replaced(new) => mine.iter_mut().zip(new).for_each(|(mine, new)| *mine = new),
        }
    }
    Ok(output)
}

/// The same lists without a token.
fn empty<S: Element>(lists: &[(ListHeads, List<S>)]) -> ListsOf<S> {
    let lists = lists.iter();
    lists
        .map(|(at, list)| (at.clone(), List::new(list.settings.clone(), [list.dim, list.value_dim])))
        .collect()
}
