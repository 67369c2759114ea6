//! Buffers that begin at a cache line: a register that lies in two lines takes two reads.

use super::{Element, HeadRows};
use std::ops::{Deref, DerefMut};

/// The length of a cache line.
const LINE: usize = 64;

/// A slice that begins at a cache line.
pub(crate) struct Aligned<T> {
    data: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy + Default> Aligned<T> {
    pub fn zeroed(len: usize) -> Self {
        let data = vec![T::default(); len + LINE / size_of::<T>()];
        let start = data.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
        Self { data, start, len }
    }

    /// Makes room for `len` numbers; what they are is undefined.
    pub fn make_room(&mut self, len: usize) {
        if len > self.len {
            *self = Self::zeroed(len);
        }
    }
}

impl<T: Copy + Default> Default for Aligned<T> {
    fn default() -> Self {
        Self {
            data: Vec::new(),
            start: 0,
            len: 0,
        }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.data[self.start..][..self.len]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[self.start..][..self.len]
    }
}

/// What rows of `dim` numbers are padded to, so that they are whole registers of any instruction set: 16 numbers, a
/// cache line of f32.
pub(crate) fn padded(dim: usize) -> usize {
    dim.next_multiple_of(16)
}

/// Rows that lie [`padded`] apart, with zeros behind each.
pub(crate) struct PaddedRows<A> {
    data: Aligned<A>,
    dim: usize,
}

impl<A: Copy + Default> Default for PaddedRows<A> {
    fn default() -> Self {
        Self::zeroed(0, 0)
    }
}

impl<A: Copy + Default> PaddedRows<A> {
    pub fn zeroed(rows: usize, dim: usize) -> Self {
        Self {
            data: Aligned::zeroed(rows * padded(dim)),
            dim,
        }
    }

    /// Room for `rows` rows of `dim` numbers, to be filled.
    pub fn make_room(&mut self, rows: usize, dim: usize) {
        if self.dim != dim {
            *self = Self::zeroed(rows, dim);
        }
        self.data.make_room(rows * padded(dim));
    }

    pub fn row_mut(&mut self, row: usize) -> &mut [A] {
        let dim = self.dim;
        &mut self.data[row * padded(dim)..][..dim]
    }

    /// Takes a row in.
    pub fn widen<T: Element<Acc = A>>(&mut self, row: usize, source: &[T]) {
        T::widen(source, self.row_mut(row));
    }

    /// The rows from `first` on.
    pub fn rows(&self, first: usize) -> HeadRows<'_, A> {
        let width = padded(self.dim);
        HeadRows {
            data: self.data.get(first * width..).unwrap_or(&[]),
            stride: width,
            dim: self.dim,
        }
    }
}
