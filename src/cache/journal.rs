//! The journal of a cache with [`CacheOptions::rollback`](super::CacheOptions::rollback): what it needs to go back to
//! any of its last lengths.
//!
//! A [`Journal`] owns marks and calls. A mark is the state before a call, without the entries: these are only added to,
//! so their numbers suffice. A call is the tokens of one call. To go back to a length, the cache takes the last mark at
//! or before it, and appends the tokens from there on again, without attending. A list's state does not depend on how
//! its tokens were divided into calls that are cut at the same places.
//!
//! The tricks:
//! 1. Marks are a quarter of the rollback apart, and not one a token: each holds the raw tokens of every window.
//! 2. A call of more tokens than the rollback is made as two, so that a mark stands before the last ones.
//! 3. Entries that leave a sliding window stay in memory until no mark needs them.
//! 4. Segments put new lists in the place of old ones, and a budget takes entries out of the midst. Beside them marks
//!    hold the entries too; clones share these.

use super::call::TokenCall;
#[cfg(feature = "cuda")]
use super::on_device::{GpuMark, GpuState};
use super::state::State;
use super::{CompressedKvCache, Lists, ListsOf};
use crate::cpu::number::element::Element;
use candle_core::{bail, Result, Tensor};
use std::sync::Arc;

/// Marks and calls, oldest first. Calls cover all tokens from the first mark on.
#[derive(Clone, Default)]
pub(super) struct Journal {
    marks: Vec<Mark>,
    calls: Vec<TokenCall>,
}

/// A cache's state at a length.
#[derive(Clone)]
struct Mark {
    tokens: usize,
    state: MarkedState,
}

#[derive(Clone)]
enum MarkedState {
    Empty,
    Cpu(Arc<MarkedLists>),
    #[cfg(feature = "cuda")]
    Gpu(GpuMark),
}

/// The state of a cache on the CPU.
#[derive(Clone)]
struct MarkedLists {
    state: State,
    /// Whether lists hold their entries, and not only the numbers.
    whole: bool,
}

impl Journal {
    /// The shortest length that the cache can go back to; None of an empty journal.
    pub fn oldest(&self) -> Option<usize> {
        self.marks.first().map(|mark| mark.tokens)
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Forgets marks and tokens past a length.
    pub fn cut(&mut self, tokens: usize) -> Result<()> {
        self.marks.retain(|mark| mark.tokens <= tokens);
        self.calls.retain(|call| call.start < tokens);
        if let Some(last) = self.calls.last_mut() {
            if last.start + last.count() > tokens {
                *last = last.part(0..tokens - last.start)?.owned()?;
            }
        }
        Ok(())
    }

    /// Forgets marks and calls that no length of the last `rollback` tokens needs.
    fn prune(&mut self, tokens: usize, rollback: usize) {
        let needed = tokens.saturating_sub(rollback);
        let last = self.marks.iter().rposition(|mark| mark.tokens <= needed).unwrap_or(0);
        self.marks.drain(..last);
        if let Some(oldest) = self.oldest() {
            self.calls.retain(|call| call.start >= oldest);
        }
    }

    /// Bytes of the marks and calls.
    pub fn bytes(&self) -> usize {
        let marks = self.marks.iter().map(|mark| match &mark.state {
            MarkedState::Empty => 0,
            MarkedState::Cpu(marked) => marked.bytes(),
            #[cfg(feature = "cuda")]
            MarkedState::Gpu(mark) => mark.bytes(),
        });
        marks.sum::<usize>() + self.calls.iter().map(TokenCall::bytes).sum::<usize>()
    }
}

impl MarkedLists {
    fn of(state: &State, whole: bool) -> Self {
        let mut state = state.clone();
        if !whole {
            each!(&mut state.lists, lists => lists.iter_mut().for_each(|(_, list)| list.entries.forget()));
        }
        Self { state, whole }
    }

    /// Takes hold of the entries, which `live` still has.
    fn make_whole(&mut self, live: &State) {
        fn take<S: Element>(lists: &mut ListsOf<S>, live: &ListsOf<S>) {
            for ((_, list), (_, live)) in lists.iter_mut().zip(live) {
                list.entries = live.entries.at(list.entries.numbers());
            }
        }
        if self.whole {
            return;
        }
        match (&mut self.state.lists, &live.lists) {
            (Lists::F64(lists), Lists::F64(live)) => take(lists, live),
            (Lists::F32(lists), Lists::F32(live)) => take(lists, live),
            (Lists::F16(lists), Lists::F16(live)) => take(lists, live),
            (Lists::BF16(lists), Lists::BF16(live)) => take(lists, live),
            // A cache's dtype does not change.
            _ => {}
        }
        self.whole = true;
    }

    /// The state, with the entries of the present one.
    fn restored(&self, live: &State) -> State {
        let mut marked = self.clone();
        marked.make_whole(live);
        marked.state
    }

    fn bytes(&self) -> usize {
        let state = &self.state;
        each!(&state.lists, lists => lists.iter().map(|(_, list)| list.bytes() - list.entries.bytes()).sum())
    }
}

impl CompressedKvCache {
    /// Appends the tokens of one call, and records it.
    pub(super) fn take_in_recorded(&mut self, call: &TokenCall) -> Result<Option<Tensor>> {
        let rollback = self.options.rollback;
        let (count, marks) = (call.count(), self.journal.marks.len());
        let whole = self.needs_whole_marks(call);
        if count <= rollback {
            let last = self.journal.marks.last().map(|mark| mark.tokens);
            if last.is_none_or(|last| call.start - last >= rollback.div_ceil(4)) {
                self.mark(whole)?;
            } else if whole {
                self.make_marks_whole()?;
            }
            let output = match self.take_in_now(call, true) {
                Ok(output) => output,
                Err(error) => {
                    self.journal.marks.truncate(marks);
                    return Err(error);
                }
            };
            self.journal.calls.push(call.owned()?);
            self.journal.prune(call.start + count, rollback);
            self.hold_entries();
            return Ok(output);
        }
        // For the case that the second part is refused, as well.
        self.mark(whole)?;
        let first = count - rollback;
        let in_two = |cache: &mut Self| {
            let before = cache.take_in_now(&call.part(0..first)?, true)?;
            cache.mark(whole)?;
            let call = call.part(first..count)?;
            let after = cache.take_in_now(&call, true)?;
            cache.journal.calls.push(call.owned()?);
            before.zip(after).map(|(a, b)| Tensor::cat(&[a, b], 2)).transpose()
        };
        match in_two(self) {
            Ok(output) => {
                self.journal.prune(call.start + count, rollback);
                self.hold_entries();
                Ok(output)
            }
            Err(error) => {
                self.journal.marks.truncate(marks + 1);
                if self.seq_len() > call.start {
                    self.go_back_to_last_mark()?;
                }
                self.journal.marks.truncate(marks);
                Err(error)
            }
        }
    }

    /// Whether a call may take entries away that marks count on.
    fn needs_whole_marks(&self, call: &TokenCall) -> bool {
        #[cfg(feature = "cuda")]
        if call.qkv[0].device().is_cuda() {
            let slides = call
                .options
                .as_ref()
                .is_some_and(|options| options.sliding_window.is_some());
            if slides || self.on_gpu.as_ref().is_some_and(GpuState::slides) {
                return true;
            }
        }
        call.has_segments() || self.has_segments() || self.options.budget.is_some()
    }

    /// Marks the present state.
    fn mark(&mut self, whole: bool) -> Result<()> {
        if whole {
            self.make_marks_whole()?;
        }
        let state = match &self.state {
            Some(state) => MarkedState::Cpu(Arc::new(MarkedLists::of(state, whole))),
            #[cfg(feature = "cuda")]
            None if self.on_gpu.is_some() => match &self.on_gpu {
                Some(state) => MarkedState::Gpu(state.mark(whole)?),
                None => MarkedState::Empty,
            },
            None => MarkedState::Empty,
        };
        let tokens = self.seq_len();
        self.journal.marks.push(Mark { tokens, state });
        self.hold_entries();
        Ok(())
    }

    fn make_marks_whole(&mut self) -> Result<()> {
        for mark in &mut self.journal.marks {
            match (&mut mark.state, &self.state) {
                (MarkedState::Cpu(marked), Some(live)) => Arc::make_mut(marked).make_whole(live),
                #[cfg(feature = "cuda")]
                (MarkedState::Gpu(marked), _) => {
                    if let Some(live) = &self.on_gpu {
                        marked.make_whole(live)?;
                    }
                }
                (MarkedState::Cpu(_) | MarkedState::Empty, _) => {}
            }
        }
        Ok(())
    }

    /// Keeps the entries in memory that the oldest mark needs.
    fn hold_entries(&mut self) {
        fn hold<S: Element>(lists: &mut ListsOf<S>, oldest: Option<&ListsOf<S>>) {
            for (index, (_, list)) in lists.iter_mut().enumerate() {
                let marked = oldest.and_then(|lists| lists.get(index));
                list.entries
                    .hold(marked.map_or(0, |(_, list)| list.entries.numbers().start));
            }
        }
        let Some(state) = &mut self.state else { return };
        // A list without a sliding window loses no entry.
        if state.sliding_window.flatten().is_none() {
            return;
        }
        let oldest = self.journal.marks.first().map(|mark| &mark.state);
        let oldest = match oldest {
            Some(MarkedState::Cpu(marked)) => Some(&marked.state.lists),
            _ => None,
        };
        match (&mut Arc::make_mut(state).lists, oldest) {
            (Lists::F64(lists), Some(Lists::F64(oldest))) => hold(lists, Some(oldest)),
            (Lists::F32(lists), Some(Lists::F32(oldest))) => hold(lists, Some(oldest)),
            (Lists::F16(lists), Some(Lists::F16(oldest))) => hold(lists, Some(oldest)),
            (Lists::BF16(lists), Some(Lists::BF16(oldest))) => hold(lists, Some(oldest)),
            (lists, _) => each!(lists, lists => hold(lists, None)),
        }
    }

    fn go_back_to_last_mark(&mut self) -> Result<()> {
        match self.journal.marks.last().map(|mark| &mark.state) {
            Some(MarkedState::Cpu(marked)) => {
                if let Some(live) = &self.state {
                    self.state = Some(Arc::new(marked.restored(live)));
                }
            }
            #[cfg(feature = "cuda")]
            Some(MarkedState::Gpu(marked)) => {
                if let Some(live) = &mut self.on_gpu {
                    live.go_back(marked)?;
                }
            }
            Some(MarkedState::Empty) | None => self.forget_tokens(),
        }
        Ok(())
    }

    /// Goes back to a length that the journal covers.
    pub(super) fn go_back(&mut self, tokens: usize) -> Result<()> {
        self.journal.cut(tokens)?;
        let Some(from) = self.journal.marks.last().map(|mark| mark.tokens) else {
            bail!("truncate: expected a mark at {tokens} tokens or before; this is a defect of the crate, report it")
        };
        self.go_back_to_last_mark()?;
        let calls = self.journal.calls.clone();
        for call in calls.iter().filter(|call| call.start >= from) {
            self.take_in_now(call, false)?;
        }
        self.hold_entries();
        Ok(())
    }
}
