//! One ragged list of a KV cache: the columns that a KV head keeps (or a query head, where heads decide alone).
//!
//! A [`List`] owns, in the storage dtype: the closed chains as compact keys and values with their token indices and
//! sizes; the raw rows of the window; and the state for the next chunk: the open chain, the undecided bits, the scan of
//! the causal rule or the observed masses. It owns no queries but the last one of each head, which a pair sum needs.
//!
//! The idea: a list is the columns of one call, kept between calls. Tokens arrive as a stream. A token that leaves the
//! window is folded into the open chain, or it closes that chain and starts a new one. Closed chains are far columns
//! for every later row; the open chain is the next row's edge.
//!
//! The tricks:
//! 1. A chunk is decided before anything changes ([`Decided`]). A call that is refused leaves every list as it was, and
//!    the number of entries after the call is known.
//! 2. A chain of one token is copied as stored, where raw rows are finite. A longer chain is folded in the accumulator
//!    and rounded once, when it closes.
//! 3. A list that never merges has window 0: each token is one entry, and nothing is kept raw.
//! 4. Raw rows are moved to the front once per window of tokens, not at every token.
//! 5. Closed chains lie in pieces that clones share ([`Entries`]).
//! 6. Under a sliding window the entries that no later row sees leave ([`Entries::leave`]). Where the sliding window is
//!    no longer than the window, tokens are never folded, and only the sliding window is kept raw.
//! 7. A chain that is not finite is replaced when it closes, so that stored columns need no check. Raw rows of the
//!    window are checked only where [`List::last_bad`] says that one of them is not finite.

#[cfg(doc)]
use crate::config::Fold;
use crate::cpu::cache::entries::Entries;
use crate::cpu::cache::piece::EntryPiece;
use crate::cpu::cache::settings::ListSettings;
use crate::cpu::columns::chain::ChainFold;
use crate::cpu::columns::source::{Bits, RawRows};
use crate::cpu::decide::observe::Observed;
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::finite::{quarantine, Check};
use crate::cpu::number::rows::HeadRows;
use crate::cpu::number::vectorized::vectorized;
use std::mem::{replace, take};
use std::ops::Range;

/// Columns in the storage dtype S.
#[derive(Clone)]
pub(crate) struct List<S: Element> {
    pub settings: ListSettings,
    /// D: size of a key.
    pub dim: usize,
    /// Dv: size of a value.
    pub value_dim: usize,
    /// Tokens seen so far.
    pub seq_len: usize,
    /// Closed chains: keys (entries, D), values (entries, Dv), each chain's last token, and log2 n under
    /// [`Fold::Mean`].
    pub entries: Entries<S>,
    /// The first token of the chains that are kept: 0 until an entry leaves the sliding window.
    pub kept_from: usize,
    /// The chain on token `seq_len - 1 - window`; None while the window is not full, and where nothing is folded.
    pub open: Option<ChainFold<S::Acc>>,
    /// Raw tokens, (rows, D) and (rows, Dv): the window, after older rows that [`Self::trim`] has yet to drop; empty
    /// where `window` is 0.
    pub recent_keys: Vec<S>,
    pub recent_values: Vec<S>,
    /// Bits from the open chain's token (or token 0) to `seq_len - 2`; 0 where they are not decided yet.
    pub bits: Vec<u8>,
    /// The scores by which `bits` were decided, where a budget keeps them; else empty.
    pub scores: Vec<f32>,
    pub run: Run<S::Acc>,
    /// The observed masses, where they decide; else empty.
    pub observed: Observed<S>,
    /// Whether the last token is hidden once it has left the window, where scores that the caller gives decide.
    pub last_hidden: bool,
    /// The last token's score, beside `last_hidden`.
    pub last_score: f32,
    /// The last raw query (heads, D) of each query head, under [`Fold::PairSum`].
    pub last_queries: Vec<S::Acc>,
    /// The newest token whose key or value was not finite.
    pub last_bad: Option<usize>,
}

/// The state of the causal rule's scan.
#[derive(Clone, Default)]
pub(crate) struct Run<A> {
    /// The first token of the run that ends at the last token, and its key.
    pub start: Option<(usize, Vec<A>)>,
    /// The last token's key; empty before the first token and where no neighbours are compared.
    pub last_key: Vec<A>,
}

/// One chunk's decisions, made before anything changes.
pub(crate) struct Decided<S: Element> {
    /// Bits from the list's first bit to the last but one token of the chunk.
    pub bits: Vec<u8>,
    pub run: Run<S::Acc>,
    pub observed: Observed<S>,
    /// [`List::last_hidden`] and [`List::last_score`] after the chunk.
    pub last_hidden: bool,
    pub last_score: f32,
    /// As `bits`: see [`List::scores`].
    pub scores: Vec<f32>,
    /// The number of entries that the chunk will close.
    pub closes: usize,
}

impl<S: Element> List<S> {
    /// For keys and values of these sizes.
    pub fn new(settings: ListSettings, [dim, value_dim]: [usize; 2]) -> Self {
        Self {
            entries: Entries::new(
                [dim, value_dim],
                [settings.fold.has_sizes(), settings.budget.is_some()],
                settings.code,
            ),
            settings,
            dim,
            value_dim,
            seq_len: 0,
            kept_from: 0,
            open: None,
            recent_keys: Vec::new(),
            recent_values: Vec::new(),
            bits: Vec::new(),
            scores: Vec::new(),
            run: Run::default(),
            observed: Observed::new(),
            last_hidden: false,
            last_score: f32::INFINITY,
            last_queries: Vec::new(),
            last_bad: None,
        }
    }

    /// The number of columns that the next row would see besides itself: closed chains, the open one, raw tokens.
    pub fn kept(&self) -> usize {
        self.entries.len() + usize::from(self.open.is_some()) + self.seq_len.min(self.settings.kept_raw())
    }

    /// [`Self::kept`] after a chunk of `count` tokens, under a sliding window.
    pub fn kept_after(&self, count: usize, decided: &Decided<S>, sliding_window: usize) -> usize {
        let (seq_len, before) = (self.seq_len + count, self.bits_base());
        let settings = ListSettings {
            sliding_window,
            ..self.settings.clone()
        };
        let raw = seq_len.min(settings.kept_raw());
        if !settings.folds() {
            return raw;
        }
        let edge = seq_len.saturating_sub(settings.window + 1);
        let first = settings.first_seen(seq_len);
        let closes = (before.max(first)..edge.max(before)).filter(|token| decided.bits[token - before] == 0);
        let closed = self.entries.len() - self.entries.before(first);
        closed + closes.count() + usize::from(seq_len > settings.window) + raw
    }

    /// Whether [`Self::truncate`] to this many tokens is exact: nothing is folded, and the next row's columns are kept.
    pub fn can_truncate(&self, tokens: usize) -> bool {
        // The newest token is raw again, which 8 bits do not give back.
        let kept = self.kept_from <= self.settings.first_seen(tokens) && self.settings.code.is_none();
        tokens == self.seq_len || !self.settings.merges() && kept
    }

    /// Puts a list under a sliding window from a chunk on, whose decisions may have been made without it.
    pub fn slide(&mut self, sliding_window: usize, decided: &mut Decided<S>) {
        self.settings.sliding_window = sliding_window;
        if !self.settings.folds() {
            self.open = None;
            self.leave(usize::MAX);
            (self.kept_from, decided.closes) = (0, 0);
        }
        if !self.settings.decides() {
            decided.bits.fill(0);
            self.bits.fill(0);
            (decided.run, decided.observed) = (Run::default(), Observed::new());
            decided.last_hidden = false;
        }
    }

    /// [`Self::slide`] between chunks: for a list that got no token of the chunk that brought the sliding window.
    pub fn slide_now(&mut self, sliding_window: usize) {
        let mut decided = Decided {
            bits: take(&mut self.bits),
            run: take(&mut self.run),
            observed: replace(&mut self.observed, Observed::new()),
            last_hidden: self.last_hidden,
            last_score: self.last_score,
            scores: take(&mut self.scores),
            closes: 0,
        };
        self.slide(sliding_window, &mut decided);
        (self.bits, self.run, self.observed) = (decided.bits, decided.run, decided.observed);
        (self.last_hidden, self.last_score) = (decided.last_hidden, decided.last_score);
        self.scores = decided.scores;
        self.trim(0);
    }

    /// Drops the closed chains whose last token is before `first`, which no later row sees.
    fn leave(&mut self, first: usize) {
        if self.entries.len() == 0 || self.entries.token(0) >= first {
            return;
        }
        let count = self.entries.before(first);
        self.kept_from = self.entries.token(count - 1) + 1;
        self.entries.leave(count);
    }

    /// Cuts a list that never merges back to its first `tokens` tokens (at least 1): each entry is one token.
    pub fn truncate(&mut self, tokens: usize) {
        if tokens >= self.seq_len || self.settings.merges() {
            return;
        }
        let entries = tokens - 1 - self.kept_from;
        let mut chain = ChainFold::new(self.settings.fold, [self.dim, self.value_dim]);
        let mut room = EntryPiece::empty();
        let last = self.entries.columns(entries..entries + 1, &mut room);
        chain.step(false, last.keys.row(0), last.values.row(0));
        self.open = Some(chain);
        self.entries.truncate(entries);
        self.bits.clear();
        self.scores.clear();
        self.last_bad = self.last_bad.filter(|bad| *bad < tokens);
        self.seq_len = tokens;
    }

    /// Bytes in use: entries with their token indices and sizes, the open chain, raw tokens, run state.
    pub fn bytes(&self) -> usize {
        let recent = self.seq_len.min(self.settings.kept_raw()) * (self.dim + self.value_dim);
        self.entries.bytes() + recent * size_of::<S>() + self.state_bytes()
    }

    /// Bytes allocated: [`Self::bytes`] and the reserve for growth.
    pub fn bytes_allocated(&self) -> usize {
        let recent = self.recent_keys.capacity() + self.recent_values.capacity();
        self.entries.bytes_allocated() + recent * size_of::<S>() + self.state_bytes()
    }

    fn state_bytes(&self) -> usize {
        let numbers = self.open.as_ref().map_or(0, ChainFold::len)
            + self.run.last_key.len()
            + self.run.start.as_ref().map_or(0, |(_, key)| key.len())
            + self.last_queries.len();
        numbers * size_of::<S::Acc>() + self.bits.len() + self.scores.len() * size_of::<f32>() + self.observed.bytes()
    }

    /// The token of `bits[0]`.
    pub fn bits_base(&self) -> usize {
        self.seq_len.saturating_sub(self.settings.window + 1)
    }

    /// Appends a decided chunk: raw rows, bits, and the chains that its tokens push out of the window. Returns the open
    /// chain as it was before.
    pub fn append(
        &mut self,
        decided: Decided<S>,
        keys: &HeadRows<S>,
        values: &HeadRows<S>,
        count: usize,
    ) -> Option<ChainFold<S::Acc>> {
        let first = self.seq_len;
        let before = self.open.clone();
        if self.settings.window > 0 {
            for row in 0..count {
                self.recent_keys.extend_from_slice(keys.row(row));
                self.recent_values.extend_from_slice(values.row(row));
            }
        }
        if let Some(bad) = last_not_finite(keys, values, count) {
            self.last_bad = Some(first + bad);
        }
        let (base, bits, scores) = (self.bits_base(), decided.bits, decided.scores);
        self.run = decided.run;
        self.observed = decided.observed;
        (self.last_hidden, self.last_score) = (decided.last_hidden, decided.last_score);
        self.seq_len += count;
        if decided.closes > 0 {
            self.entries.reserve(decided.closes);
        }
        let edge = self.seq_len.checked_sub(self.settings.window + 1);
        if let Some(edge) = edge.filter(|_| self.settings.folds()) {
            let next = if self.open.is_some() { base + 1 } else { 0 };
            let recent = (take(&mut self.recent_keys), take(&mut self.recent_values));
            let raw = self.raw_of((&recent.0, &recent.1), (*keys, *values), count);
            let bits = Bits { bits: &bits, base };
            vectorized(
                #[inline(always)]
                || self.fold_in(next..edge + 1, (bits, &scores), &raw),
            );
            (self.recent_keys, self.recent_values) = recent;
        }
        (self.bits, self.scores) = (bits, scores);
        self.leave(self.settings.first_seen(first));
        before
    }

    /// Folds the tokens that leave the window; the chain of the last one stays open.
    #[inline(always)]
    fn fold_in(&mut self, tokens: Range<usize>, (bits, scores): (Bits, &[f32]), raw: &RawRows<S>) {
        let opened = self.open.take();
        let mut open = opened.is_some();
        let mut chain = opened.unwrap_or_else(|| ChainFold::new(self.settings.fold, [self.dim, self.value_dim]));
        for token in tokens.clone() {
            let merged = token > 0 && bits.hidden(token - 1);
            if open && !merged {
                self.close(&chain, token - 1, self.score_of(token - 1, scores, bits.base));
            }
            // A chain of one is its token.
            open = merged || bits.hidden(token) || token + 1 == tokens.end || !raw.clean;
            if open {
                chain.step(merged, raw.key(token), raw.value(token));
            } else {
                let score = self.score_of(token, scores, bits.base);
                self.entries.push(raw.key(token), raw.value(token), token, 1, score);
            }
        }
        self.open = open.then_some(chain);
    }

    #[inline(always)]
    fn close(&mut self, chain: &ChainFold<S::Acc>, token: usize, score: f32) {
        let (mut key, mut value) = (chain.key.clone(), chain.value.clone());
        quarantine(&mut key, &mut value);
        self.entries.push_folded(&key, &value, token, chain.size, score);
    }

    /// The raw rows that a chunk's blocks read: the chunk's own where nothing is kept raw, else the window's and the
    /// chunk's.
    pub fn raw<'a>(&'a self, keys: HeadRows<'a, S>, values: HeadRows<'a, S>, count: usize) -> RawRows<'a, S> {
        self.raw_of((&self.recent_keys, &self.recent_values), (keys, values), count)
    }

    fn raw_of<'a>(
        &self,
        recent: (&'a [S], &'a [S]),
        chunk: (HeadRows<'a, S>, HeadRows<'a, S>),
        count: usize,
    ) -> RawRows<'a, S> {
        let compact = HeadRows::compact;
        let (base, (keys, values)) = match self.settings.window {
            0 => (self.seq_len - count, chunk),
            _ => (
                self.seq_len - recent.0.len() / self.dim,
                (compact(recent.0, self.dim), compact(recent.1, self.value_dim)),
            ),
        };
        RawRows {
            keys,
            values,
            base,
            clean: self.last_bad.is_none_or(|bad| bad < base),
        }
    }

    /// The bits that a chunk's blocks read.
    pub fn chunk_bits(&self, count: usize) -> Bits<'_> {
        Bits {
            bits: &self.bits,
            base: (self.seq_len - count).saturating_sub(self.settings.window + 1),
        }
    }

    /// Drops the entries, bits and raw rows that no later row reads, after a chunk of `count` tokens.
    pub fn trim(&mut self, count: usize) {
        let (old, new) = (self.chunk_bits(count).base, self.bits_base());
        self.bits.drain(..(new - old).min(self.bits.len()));
        self.scores.drain(..(new - old).min(self.scores.len()));
        self.leave(self.settings.first_seen(self.seq_len));
        let keep = self.settings.kept_raw().min(self.seq_len);
        let rows = self.recent_keys.len() / self.dim;
        // Rows are moved once per window of tokens, not at every step; the memory of a long chunk is released.
        if rows > 2 * keep {
            let sizes = [self.dim, self.value_dim];
            for (recent, dim) in [&mut self.recent_keys, &mut self.recent_values].into_iter().zip(sizes) {
                recent.drain(..(rows - keep) * dim);
                recent.shrink_to(2 * keep * dim + dim);
            }
        }
    }
}

/// The last row whose key or value is NaN or infinite.
fn last_not_finite<T: Element>(keys: &HeadRows<T>, values: &HeadRows<T>, count: usize) -> Option<usize> {
    let [mut room, mut value_room] = [keys.dim, values.dim].map(|dim| vec![T::Acc::ZERO; dim]);
    let mut finite = |rows: Range<usize>| {
        vectorized(
            #[inline(always)]
            || {
                let mut check = Check::default();
                for row in rows.clone() {
                    check.copy(keys.row(row), &mut room);
                    check.copy(values.row(row), &mut value_room);
                }
                check.passed()
            },
        )
    };
    match finite(0..count) {
        true => None,
        false => (0..count).rev().find(|row| !finite(*row..row + 1)),
    }
}
