//! The entries of a list: closed chains, in token order, in pieces that clones share.
//!
//! An [`Entries`] owns rows: a key, a value, the chain's last token and, where chains have sizes, log2 of its size.
//! Rows are numbered from the first that ever came, so that a number stays when older rows leave. Rows lie in pieces. A
//! piece behind one owner grows; a piece that a clone shares is never changed again.
//!
//! The idea: clones are forks of one prompt. A fork that appends begins a piece of its own after the shared ones, so
//! that a thousand forks hold the prompt once. Without forks there is one piece, and its rows are contiguous.
//!
//! The tricks:
//! 1. A short shared piece ([`SHORT`]) is copied instead, so that a list of n rows has at most n / SHORT pieces more
//!    than it has long ones.
//! 2. Tiles of columns begin at multiples of the tile, whatever the pieces are ([`Entries::runs`]): the one tile that
//!    crosses a border is copied. So a fork computes the same bits as a list that was never forked.
//! 3. The oldest rows leave in amortised O(1): they stay in memory until they are an eighth of the rest.
//! 4. [`Entries::hold`] keeps rows that have left, for a mark of the past ([`Entries::at`]).

use crate::config::ByteCode;
use crate::cpu::cache::piece::{EntryColumns, EntryPiece, SHARE};
use crate::cpu::columns::chain::log2_size;
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::rows::{narrowed, widened, HeadRows};
use crate::cpu::number::vectorized::vectorized;
use half::bf16;
use std::ops::Range;
use std::sync::Arc;

/// Rows of a shared piece below which a writer copies it: 64 KiB at D = 64 in f16.
const SHORT: usize = 256;
/// A piece grows by an eighth, and at least by this many rows: little is copied, little is unused.
const GROWTH: usize = 64;

/// Rows in the storage dtype S. A clone shares them.
#[derive(Clone)]
pub(crate) struct Entries<S: Element> {
    /// D and Dv.
    dims: [usize; 2],
    /// Whether rows have sizes.
    sized: bool,
    /// Whether rows have scores.
    scored: bool,
    /// The code of keys and values in 8 bits.
    code: Option<ByteCode>,
    parts: Vec<SharedPart<S>>,
    /// The numbers of the rows: those before have left.
    rows: Range<usize>,
    /// Rows from this number on stay in memory.
    held: usize,
}

/// The first rows of a piece.
#[derive(Clone)]
struct SharedPart<S: Element> {
    /// The numbers of the rows.
    rows: Range<usize>,
    piece: Arc<EntryPiece<S>>,
}

impl<S: Element> Entries<S> {
    /// For keys and values of these sizes; `sized` where chains have sizes, `scored` where they have scores, in 8 bits
    /// by a `code`.
    pub fn new(dims: [usize; 2], [sized, scored]: [bool; 2], code: Option<ByteCode>) -> Self {
        Self {
            dims,
            sized,
            scored,
            code,
            parts: Vec::new(),
            rows: 0..0,
            held: usize::MAX,
        }
    }

    /// The rows of one piece, all of the same number in each of its vectors.
    pub fn from_piece(piece: EntryPiece<S>, dims: [usize; 2], flags: [bool; 2], code: Option<ByteCode>) -> Self {
        let rows = 0..piece.tokens.len();
        Self {
            parts: vec![SharedPart {
                rows: rows.clone(),
                piece: Arc::new(piece),
            }],
            rows,
            ..Self::new(dims, flags, code)
        }
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// The part that holds a row, and its place there.
    fn find(&self, row: usize) -> (&SharedPart<S>, usize) {
        let number = self.rows.start + row;
        let index = match &self.parts[..] {
            [_] => 0,
            parts => parts.partition_point(|part| part.rows.end <= number),
        };
        let part = &self.parts[index];
        (part, number - part.rows.start)
    }

    /// The last token of a row's chain.
    pub fn token(&self, row: usize) -> usize {
        let (part, at) = self.find(row);
        part.piece.tokens[at] as usize
    }

    /// The number of rows whose last token is before `token`.
    pub fn before(&self, token: usize) -> usize {
        let is_before = |last: &u32| (*last as usize) < token;
        let mut count = 0;
        for part in self.parts(0..self.len()) {
            let seen = part.tokens.partition_point(is_before);
            count += seen;
            if seen < part.tokens.len() {
                break;
            }
        }
        count
    }

    /// Splits rows into runs that [`Self::columns`] reads: each lies in one piece, or is a tile that crosses a border.
    /// Tiles are counted from the first of the rows.
    pub fn runs(&self, rows: Range<usize>, tile: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut start = rows.start;
        std::iter::from_fn(move || {
            if start >= rows.end {
                return None;
            }
            let (part, _) = self.find(start);
            let border = part.rows.end - self.rows.start;
            let end = match border >= rows.end {
                true => rows.end,
                false => {
                    let tiles = (border - start) / tile;
                    rows.end.min(start + tiles.max(1) * tile)
                }
            };
            let run = start..end;
            start = end;
            Some(run)
        })
    }

    /// Some rows as columns: where they are, or copied to `room` where they cross a border of pieces.
    pub fn columns<'e>(&'e self, rows: Range<usize>, room: &'e mut EntryPiece<S>) -> EntryColumns<'e, S> {
        if rows.is_empty() {
            room.clear();
            return room.columns(0..0, self.dims);
        }
        let (part, at) = self.find(rows.start);
        if at + rows.len() <= part.rows.len() {
            return part.piece.columns(at..at + rows.len(), self.dims);
        }
        room.clear();
        self.parts(rows.clone()).for_each(|part| room.add(part));
        room.columns(0..rows.len(), self.dims)
    }

    /// Some rows where they are, piece by piece.
    pub fn parts(&self, rows: Range<usize>) -> impl Iterator<Item = EntryColumns<'_, S>> {
        let numbers = self.rows.start + rows.start..self.rows.start + rows.end;
        self.parts.iter().filter_map(move |part| {
            let both = part.rows.start.max(numbers.start)..part.rows.end.min(numbers.end);
            let places = || both.start - part.rows.start..both.end - part.rows.start;
            (!both.is_empty()).then(|| part.piece.columns(places(), self.dims))
        })
    }

    /// log2 n of some rows, through `room` where they lie in several pieces; None where rows have no sizes.
    pub fn log2_sizes<'e>(&'e self, rows: Range<usize>, room: &'e mut Vec<S::Acc>) -> Option<&'e [S::Acc]> {
        if !self.sized {
            return None;
        }
        let mut parts = self.parts(rows);
        match (parts.next(), parts.next()) {
            (None, _) => None,
            (Some(only), None) => Some(only.log2_sizes),
            (Some(first), Some(second)) => {
                room.clear();
                let all = [first, second].into_iter().chain(parts);
                all.for_each(|part| room.extend_from_slice(part.log2_sizes));
                Some(room)
            }
        }
    }

    /// All rows where they are, if one piece holds them.
    pub fn whole(&self) -> Option<EntryColumns<'_, S>> {
        match (self.len(), &self.parts[..]) {
            (0, _) => Some(EntryColumns {
                keys: HeadRows::compact(&[], self.dims[0]),
                values: HeadRows::compact(&[], self.dims[1]),
                codes: [&[]; 2],
                scales: [&[]; 2],
                tokens: &[],
                log2_sizes: &[],
                scores: &[],
            }),
            (count, [.., last]) if last.rows.start <= self.rows.start => {
                let at = self.rows.start - last.rows.start;
                Some(last.piece.columns(at..at + count, self.dims))
            }
            _ => None,
        }
    }

    /// A copy of all rows, in one piece.
    pub fn copied(&self) -> EntryPiece<S> {
        let mut piece = EntryPiece::empty();
        self.parts(0..self.len()).for_each(|part| piece.add(part));
        piece
    }

    /// A copy of all rows as accumulators, in one piece.
    pub fn copied_wide(&self) -> EntryPiece<S::Acc> {
        let mut piece = EntryPiece::empty();
        let [dim, value_dim] = self.dims;
        piece.keys.resize(self.len() * dim, S::Acc::ZERO);
        piece.values.resize(self.len() * value_dim, S::Acc::ZERO);
        let mut row = 0;
        for part in self.parts(0..self.len()) {
            let end = row + part.tokens.len();
            let keys = piece.keys[row * dim..end * dim].chunks_exact_mut(dim);
            let values = piece.values[row * value_dim..end * value_dim].chunks_exact_mut(value_dim);
            self.widen(part, keys.zip(values));
            piece.tokens.extend_from_slice(part.tokens);
            piece.log2_sizes.extend_from_slice(part.log2_sizes);
            row = end;
        }
        piece
    }

    /// Writes rows as accumulators.
    pub fn widen<'r>(
        &self,
        columns: EntryColumns<S>,
        rows: impl Iterator<Item = (&'r mut [S::Acc], &'r mut [S::Acc])>,
    ) {
        let (code, mut rows) = (self.code, rows);
        vectorized(
            #[inline(always)]
            || {
                for at in 0..columns.tokens.len() {
                    let Some((key, value)) = rows.next() else { return };
                    match code {
                        None => {
                            S::widen(columns.keys.row(at), key);
                            S::widen(columns.values.row(at), value);
                        }
                        Some(code) => {
                            for (which, row) in [key, value].into_iter().enumerate() {
                                let dim = row.len();
                                let codes = &columns.codes[which][at * dim..][..dim];
                                code.decode(codes, columns.scales[which][at], row);
                            }
                        }
                    }
                }
            },
        );
    }

    /// All rows in a copy of [`Self::copied_wide`].
    pub fn in_wide<'c>(&self, copy: &'c EntryPiece<S::Acc>) -> EntryColumns<'c, S::Acc> {
        copy.columns(0..self.len(), self.dims)
    }

    /// All rows in a copy of [`Self::copied`].
    pub fn in_copy<'c>(&self, copy: &'c EntryPiece<S>) -> EntryColumns<'c, S> {
        copy.columns(0..self.len(), self.dims)
    }

    /// The code of keys and values in 8 bits.
    pub fn code(&self) -> Option<ByteCode> {
        self.code
    }

    /// The keys and values of each piece, rows that have left among them.
    pub fn stored(&self) -> impl Iterator<Item = [&[S]; 2]> {
        self.parts.iter().map(|part| [&part.piece.keys[..], &part.piece.values])
    }

    /// Makes room for more rows, in a piece of this list alone.
    pub fn reserve(&mut self, more: usize) {
        let (dims, flags) = (self.dims, [self.sized, self.code.is_some()]);
        self.release();
        // A fork's own piece is short, however long the list is.
        let alone = self.parts.last().filter(|part| Arc::strong_count(&part.piece) == 1);
        let rows = alone.map_or(0, |part| part.rows.len().min(self.len()));
        let growth = GROWTH.max(rows / 8);
        let part = self.writable(more + growth);
        if part.piece.tokens.capacity() - part.rows.len() < more {
            Arc::make_mut(&mut part.piece).reserve(more + growth, dims, flags);
        }
    }

    /// The last part, which this list alone owns; a new one has room for `room` rows.
    fn writable(&mut self, room: usize) -> &mut SharedPart<S> {
        let (dims, end, flags) = (self.dims, self.rows.end, [self.sized, self.code.is_some()]);
        let alone = match self.parts.last_mut() {
            Some(last) => {
                let rows = last.rows.len();
                match Arc::get_mut(&mut last.piece) {
                    // Rows that were cut off.
                    Some(piece) => {
                        piece.truncate(rows, dims);
                        true
                    }
                    None if rows < SHORT => {
                        let mut piece = EntryPiece::empty();
                        piece.reserve(rows + room, dims, flags);
                        piece.add(last.piece.columns(0..rows, dims));
                        last.piece = Arc::new(piece);
                        true
                    }
                    None => false,
                }
            }
            None => false,
        };
        if !alone {
            let mut piece = EntryPiece::empty();
            piece.reserve(room, dims, flags);
            self.parts.push(SharedPart {
                rows: end..end,
                piece: Arc::new(piece),
            });
        }
        let last = self.parts.len() - 1;
        &mut self.parts[last]
    }

    /// Adds a row: a chain of `size` tokens that ends at `token`. Its score is kept where rows have scores.
    #[inline(always)]
    pub fn push(&mut self, key: &[S], value: &[S], token: usize, size: usize, score: f32) {
        if self.code.is_some() {
            return self.push_folded(&widened(key), &widened(value), token, size, score);
        }
        self.push_with(token, size, score, |piece| {
            piece.keys.extend_from_slice(key);
            piece.values.extend_from_slice(value);
        });
    }

    /// [`Self::push`] of a row that is rounded here.
    pub fn push_folded(&mut self, key: &[S::Acc], value: &[S::Acc], token: usize, size: usize, score: f32) {
        let code = self.code;
        self.push_with(token, size, score, |piece| match code {
            None => {
                piece.keys.extend_from_slice(&narrowed::<S>(key));
                piece.values.extend_from_slice(&narrowed::<S>(value));
            }
            Some(code) => {
                for (which, row) in [key, value].into_iter().enumerate() {
                    let scale = code.encode(row, &mut piece.codes[which]);
                    piece.scales[which].push(scale);
                }
            }
        });
    }

    #[inline(always)]
    fn push_with(&mut self, token: usize, size: usize, score: f32, add: impl FnOnce(&mut EntryPiece<S>)) {
        let (sized, scored) = (self.sized, self.scored);
        let part = self.writable(GROWTH);
        part.rows.end += 1;
        let piece = Arc::make_mut(&mut part.piece);
        add(piece);
        piece.tokens.push(token as u32);
        if sized {
            piece.log2_sizes.push(log2_size(size));
        }
        if scored {
            piece.scores.push(score);
        }
        self.rows.end += 1;
    }

    /// Cuts the newest rows off.
    pub fn truncate(&mut self, count: usize) {
        if count < self.len() {
            self.cut(self.rows.start + count);
        }
    }

    /// Cuts the rows from a number on off.
    fn cut(&mut self, end: usize) {
        while self.parts.pop_if(|part| part.rows.start >= end).is_some() {}
        if let Some(last) = self.parts.last_mut() {
            last.rows.end = last.rows.end.min(end);
        }
        self.rows.end = end;
    }

    /// Keeps the rows that `keep` accepts, which is asked for each in turn: a row's number is then its place among
    /// these.
    pub fn retain(&mut self, mut keep: impl FnMut(usize) -> bool) {
        let mut kept = EntryPiece::empty();
        kept.reserve(self.len(), self.dims, [self.sized, self.code.is_some()]);
        let mut row = 0;
        for part in self.parts(0..self.len()) {
            let mut start = 0;
            for at in 0..=part.tokens.len() {
                let ends = at == part.tokens.len();
                if ends || !keep(row + at) {
                    kept.add(part.part(start..at));
                    start = at + 1;
                }
            }
            row += part.tokens.len();
        }
        *self = Self {
            held: self.held,
            ..Self::from_piece(kept, self.dims, [self.sized, self.scored], self.code)
        };
    }

    /// Drops the oldest `count` rows.
    pub fn leave(&mut self, count: usize) {
        self.rows.start += count;
        self.release();
    }

    /// Releases the memory of rows that have left and are not held.
    fn release(&mut self) {
        let (floor, rest, dims) = (self.rows.start.min(self.held), self.len(), self.dims);
        let gone = self.parts.iter().take_while(|part| part.rows.end <= floor).count();
        self.parts.drain(..gone);
        let Some(first) = self.parts.first_mut() else { return };
        let left = floor.saturating_sub(first.rows.start);
        if left > 0 && left * SHARE >= rest {
            if let Some(piece) = Arc::get_mut(&mut first.piece) {
                piece.drain(left, dims);
                first.rows.start = floor;
            }
        }
    }

    /// The numbers of the rows, for [`Self::at`].
    pub fn numbers(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Keeps the rows from a number on in memory when they leave; `usize::MAX` keeps none.
    pub fn hold(&mut self, number: usize) {
        self.held = number;
        self.release();
    }

    /// Keeps the numbers only.
    pub fn forget(&mut self) {
        self.parts.clear();
    }

    /// The rows of these numbers, which were held since [`Self::numbers`] gave them.
    pub fn at(&self, numbers: Range<usize>) -> Self {
        let mut past = self.clone();
        past.cut(numbers.end);
        past.rows.start = numbers.start;
        past
    }

    /// Bytes of all rows.
    pub fn bytes(&self) -> usize {
        let sizes = if self.sized { size_of::<S::Acc>() } else { 0 };
        let scores = if self.scored { size_of::<f32>() } else { 0 };
        let numbers = self.dims[0] + self.dims[1];
        let rows = match self.code {
            None => numbers * size_of::<S>(),
            Some(_) => numbers + 2 * size_of::<bf16>(),
        };
        self.len() * (rows + size_of::<u32>() + sizes + scores)
    }

    /// Bytes of the pieces, with their reserve.
    pub fn bytes_allocated(&self) -> usize {
        self.parts.iter().map(|part| part.piece.bytes_allocated()).sum()
    }

    /// Copies the pieces that other lists hold too.
    pub fn unshare(&mut self) {
        for part in &mut self.parts {
            Arc::make_mut(&mut part.piece);
        }
    }

    /// Bytes of the pieces that other lists hold too.
    pub fn bytes_shared(&self) -> usize {
        let shared = self.parts.iter().filter(|part| Arc::strong_count(&part.piece) > 1);
        shared.map(|part| part.piece.bytes_allocated()).sum()
    }
}
