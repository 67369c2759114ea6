//! Outputs that are cleared piece by piece, by whoever writes them: cleared in one go, by one thread, they would have left
//! its caches again by the time they are written.

use super::Element;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Room for numbers of which nothing has been written.
pub(crate) struct Output<T> {
    data: Vec<T>,
    len: usize,
    cleared: AtomicUsize,
}

/// A piece of an [`Output`] that nothing has been written to.
pub(crate) struct Blank<'o, T> {
    data: &'o mut [MaybeUninit<T>],
    cleared: &'o AtomicUsize,
}

impl<T: Element> Output<T> {
    pub fn new(len: usize) -> Self {
        Self {
            data: Vec::with_capacity(len),
            len,
            cleared: AtomicUsize::new(0),
        }
    }

    /// All of it.
    pub fn blank(&mut self) -> Blank<'_, T> {
        let Self { data, len, cleared } = self;
        *cleared.get_mut() = 0;
        Blank {
            data: &mut data.spare_capacity_mut()[..*len],
            cleared,
        }
    }

    /// The numbers.
    ///
    /// # Panics
    /// If a piece was not cleared.
    pub fn written(mut self) -> Vec<T> {
        assert_eq!(
            *self.cleared.get_mut(),
            self.len,
            "a piece of an output was not written"
        );
        // SAFETY: the capacity is `len` at least, and that many numbers have been cleared since the blank was made, each in
        // the only piece that it is in.
        unsafe { self.data.set_len(self.len) }
        self.data
    }
}

impl<'o, T: Element> Blank<'o, T> {
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Takes a piece off the front: `len` numbers, or what is left.
    pub fn take(&mut self, len: usize) -> Self {
        let len = len.min(self.len());
        let (piece, rest) = std::mem::take(&mut self.data).split_at_mut(len);
        self.data = rest;
        Self {
            data: piece,
            cleared: self.cleared,
        }
    }

    /// Clears the piece, to be written.
    pub fn clear(self) -> &'o mut [T] {
        self.data.iter_mut().for_each(|x| _ = x.write(T::zero()));
        self.cleared.fetch_add(self.data.len(), Ordering::Relaxed);
        // SAFETY: all of it has been written just now, and a `MaybeUninit<T>` lies in memory as a `T`.
        unsafe { &mut *(std::ptr::from_mut(self.data) as *mut [T]) }
    }
}
