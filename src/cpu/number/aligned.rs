//! Buffers that begin at a cache line. A register that lies in two cache lines takes two reads.

use std::ops::{Deref, DerefMut};

/// The length of a cache line, in bytes.
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

    /// Makes room for `len` numbers; their values are undefined.
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

/// The padded length of a row of `dim` numbers, whole registers of any instruction set: a multiple of 16 numbers, a
/// cache line of f32.
pub(crate) fn padded(dim: usize) -> usize {
    dim.next_multiple_of(16)
}
