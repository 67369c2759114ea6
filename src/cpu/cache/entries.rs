//! The entries of a list: closed chains, in token order, in pieces that clones share.
//!
//! An [`Entries`] owns rows: a key, a value, the chain's last token and, where chains have sizes, log2 of its size. Rows
//! are numbered from the first that ever came, so that a number stays when older rows leave. Rows lie in pieces. A piece
//! behind one owner grows; a piece that a clone shares is never changed again.
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

use crate::cpu::columns::chain::log2_size;
use crate::cpu::number::element::Element;
use crate::cpu::number::rows::HeadRows;
use std::ops::Range;
use std::sync::Arc;

/// Rows of a shared piece below which a writer copies it: 64 KiB at D = 64 in f16.
const SHORT: usize = 256;
/// The share of the rest that has left before it moves: one part of this many.
const SHARE: usize = 8;
/// A piece grows by an eighth, and at least by this many rows: little is copied, little is unused.
const GROWTH: usize = 64;

/// Rows in the storage dtype S. A clone shares them.
#[derive(Clone)]
pub(crate) struct Entries<S: Element> {
    /// D and Dv.
    dims: [usize; 2],
    /// Whether rows have sizes.
    sized: bool,
    parts: Vec<Part<S>>,
    /// The numbers of the rows: those before have left.
    rows: Range<usize>,
    /// Rows from this number on stay in memory.
    held: usize,
}

/// The first rows of a piece.
#[derive(Clone)]
struct Part<S: Element> {
    /// The numbers of the rows.
    rows: Range<usize>,
    piece: Arc<Piece<S>>,
}

/// Contiguous rows: keys (rows, D), values (rows, Dv).
#[derive(Clone)]
pub(crate) struct Piece<S: Element> {
    pub keys: Vec<S>,
    pub values: Vec<S>,
    pub tokens: Vec<u32>,
    /// Empty unless rows have sizes.
    pub log2_sizes: Vec<S::Acc>,
}

/// Some rows as columns to read.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'e, S: Element> {
    pub keys: HeadRows<'e, S>,
    pub values: HeadRows<'e, S>,
    pub tokens: &'e [u32],
    /// Empty unless rows have sizes.
    pub log2_sizes: &'e [S::Acc],
}

impl<S: Element> Piece<S> {
    pub fn empty() -> Self {
        Self {
            keys: Vec::new(),
            values: Vec::new(),
            tokens: Vec::new(),
            log2_sizes: Vec::new(),
        }
    }

    fn columns(&self, rows: Range<usize>, [dim, value_dim]: [usize; 2]) -> Columns<'_, S> {
        let of = |data, dim: usize| -> HeadRows<S> {
            let data: &[S] = data;
            HeadRows::compact(&data[rows.start * dim..rows.end * dim], dim)
        };
        Columns {
            keys: of(&self.keys, dim),
            values: of(&self.values, value_dim),
            tokens: &self.tokens[rows.clone()],
            log2_sizes: self.log2_sizes.get(rows.clone()).unwrap_or(&[]),
        }
    }

    fn add(&mut self, columns: Columns<S>) {
        self.keys.extend_from_slice(columns.keys.data);
        self.values.extend_from_slice(columns.values.data);
        self.tokens.extend_from_slice(columns.tokens);
        self.log2_sizes.extend_from_slice(columns.log2_sizes);
    }

    fn truncate(&mut self, rows: usize, [dim, value_dim]: [usize; 2]) {
        self.keys.truncate(rows * dim);
        self.values.truncate(rows * value_dim);
        self.tokens.truncate(rows);
        self.log2_sizes.truncate(rows);
    }

    fn clear(&mut self) {
        self.truncate(0, [0, 0]);
    }

    /// Drops the oldest rows; releases the memory that a long chunk took.
    fn drain(&mut self, rows: usize, [dim, value_dim]: [usize; 2]) {
        fn drain<T>(data: &mut Vec<T>, count: usize) {
            data.drain(..count);
            let wanted = data.len() + data.len() / SHARE;
            if data.capacity() > 2 * wanted {
                data.shrink_to(wanted);
            }
        }
        drain(&mut self.keys, rows * dim);
        drain(&mut self.values, rows * value_dim);
        drain(&mut self.tokens, rows);
        if !self.log2_sizes.is_empty() {
            drain(&mut self.log2_sizes, rows);
        }
    }

    fn reserve(&mut self, rows: usize, [dim, value_dim]: [usize; 2], sized: bool) {
        self.keys.reserve_exact(rows * dim);
        self.values.reserve_exact(rows * value_dim);
        self.tokens.reserve_exact(rows);
        if sized {
            self.log2_sizes.reserve_exact(rows);
        }
    }

    fn bytes_allocated(&self) -> usize {
        (self.keys.capacity() + self.values.capacity()) * size_of::<S>()
            + self.tokens.capacity() * size_of::<u32>()
            + self.log2_sizes.capacity() * size_of::<S::Acc>()
    }
}

impl<S: Element> Entries<S> {
    /// For keys and values of these sizes; `sized` where chains have sizes.
    pub fn new(dims: [usize; 2], sized: bool) -> Self {
        Self {
            dims,
            sized,
            parts: Vec::new(),
            rows: 0..0,
            held: usize::MAX,
        }
    }

    /// The rows of one piece, all of the same number in each of its vectors.
    pub fn from_piece(piece: Piece<S>, dims: [usize; 2], sized: bool) -> Self {
        let rows = 0..piece.tokens.len();
        Self {
            parts: vec![Part {
                rows: rows.clone(),
                piece: Arc::new(piece),
            }],
            rows,
            ..Self::new(dims, sized)
        }
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// The part that holds a row, and its place there.
    fn find(&self, row: usize) -> (&Part<S>, usize) {
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
    pub fn columns<'e>(&'e self, rows: Range<usize>, room: &'e mut Piece<S>) -> Columns<'e, S> {
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
    pub fn parts(&self, rows: Range<usize>) -> impl Iterator<Item = Columns<'_, S>> {
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
    pub fn whole(&self) -> Option<Columns<'_, S>> {
        match (self.len(), &self.parts[..]) {
            (0, _) => Some(Columns {
                keys: HeadRows::compact(&[], self.dims[0]),
                values: HeadRows::compact(&[], self.dims[1]),
                tokens: &[],
                log2_sizes: &[],
            }),
            (count, [.., last]) if last.rows.start <= self.rows.start => {
                let at = self.rows.start - last.rows.start;
                Some(last.piece.columns(at..at + count, self.dims))
            }
            _ => None,
        }
    }

    /// A copy of all rows, in one piece.
    pub fn copied(&self) -> Piece<S> {
        let mut piece = Piece::empty();
        self.parts(0..self.len()).for_each(|part| piece.add(part));
        piece
    }

    /// All rows in a copy of [`Self::copied`].
    pub fn in_copy<'c>(&self, copy: &'c Piece<S>) -> Columns<'c, S> {
        copy.columns(0..self.len(), self.dims)
    }

    /// The keys and values of each piece, rows that have left among them.
    pub fn stored(&self) -> impl Iterator<Item = [&[S]; 2]> {
        self.parts.iter().map(|part| [&part.piece.keys[..], &part.piece.values])
    }

    /// Makes room for more rows, in a piece of this list alone.
    pub fn reserve(&mut self, more: usize) {
        let (dims, sized) = (self.dims, self.sized);
        self.release();
        // A fork's own piece is short, however long the list is.
        let alone = self.parts.last().filter(|part| Arc::strong_count(&part.piece) == 1);
        let rows = alone.map_or(0, |part| part.rows.len().min(self.len()));
        let growth = GROWTH.max(rows / 8);
        let part = self.writable(more + growth);
        if part.piece.tokens.capacity() - part.rows.len() < more {
            Arc::make_mut(&mut part.piece).reserve(more + growth, dims, sized);
        }
    }

    /// The last part, which this list alone owns; a new one has room for `room` rows.
    fn writable(&mut self, room: usize) -> &mut Part<S> {
        let (dims, end) = (self.dims, self.rows.end);
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
                        let mut piece = Piece::empty();
                        piece.reserve(rows + room, dims, self.sized);
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
            let mut piece = Piece::empty();
            piece.reserve(room, dims, self.sized);
            self.parts.push(Part {
                rows: end..end,
                piece: Arc::new(piece),
            });
        }
        let last = self.parts.len() - 1;
        &mut self.parts[last]
    }

    /// Adds a row: a chain of `size` tokens that ends at `token`.
    #[inline(always)]
    pub fn push(&mut self, key: &[S], value: &[S], token: usize, size: usize) {
        let sized = self.sized;
        let part = self.writable(GROWTH);
        part.rows.end += 1;
        let piece = Arc::make_mut(&mut part.piece);
        piece.keys.extend_from_slice(key);
        piece.values.extend_from_slice(value);
        piece.tokens.push(token as u32);
        if sized {
            piece.log2_sizes.push(log2_size(size));
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
        self.len() * ((self.dims[0] + self.dims[1]) * size_of::<S>() + size_of::<u32>() + sizes)
    }

    /// Bytes of the pieces, with their reserve.
    pub fn bytes_allocated(&self) -> usize {
        self.parts.iter().map(|part| part.piece.bytes_allocated()).sum()
    }

    /// Bytes of the pieces that other lists hold too.
    pub fn bytes_shared(&self) -> usize {
        let shared = self.parts.iter().filter(|part| Arc::strong_count(&part.piece) > 1);
        shared.map(|part| part.piece.bytes_allocated()).sum()
    }
}
