//! Outputs that the threads that write them clear, piece by piece. An output that one thread clears in one go has left
//! the caches again by the time it is written.

use crate::cpu::number::element::Element;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Memory for numbers that are not yet written.
pub(crate) struct Output<T> {
    data: Vec<T>,
    len: usize,
    cleared: AtomicUsize,
}

/// A piece of an [`Output`] in which nothing is written yet.
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

    /// The whole output as one piece.
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
        // SAFETY: the capacity is `len` at least. Since the blank was made, `len` numbers have been cleared, each in
        // the only piece that holds it.
        unsafe { self.data.set_len(self.len) }
        self.data
    }
}

impl<'o, T: Element> Blank<'o, T> {
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Takes a piece from the front: `len` numbers, or as many as are left.
    pub fn take(&mut self, len: usize) -> Self {
        let len = len.min(self.len());
        let (piece, rest) = std::mem::take(&mut self.data).split_at_mut(len);
        self.data = rest;
        Self {
            data: piece,
            cleared: self.cleared,
        }
    }

    /// Clears the piece, so that it can be written.
    pub fn clear(self) -> &'o mut [T] {
        self.data.iter_mut().for_each(|x| _ = x.write(T::zero()));
        self.cleared.fetch_add(self.data.len(), Ordering::Relaxed);
        // SAFETY: all of it has been written just now, and a `MaybeUninit<T>` lies in memory as a `T`.
        unsafe { &mut *(std::ptr::from_mut(self.data) as *mut [T]) }
    }
}

#[cfg(test)]
mod tests {
    use crate::cpu::work::output::Output;

    #[test]
    fn pieces_are_cleared_and_written_by_whoever_takes_them() {
        let mut output = Output::<f32>::new(10);
        let mut blank = output.blank();
        let (first, second, rest) = (blank.take(4), blank.take(4), blank.take(4));
        assert_eq!((rest.len(), blank.len()), (2, 0));
        std::thread::scope(|scope| {
            scope.spawn(|| second.clear().fill(2.0));
            scope.spawn(|| assert_eq!(first.clear(), [0.0; 4]));
        });
        rest.clear()[1] = 3.0;
        blank.clear();
        assert_eq!(output.written(), [0., 0., 0., 0., 2., 2., 2., 2., 0., 3.]);
    }

    #[test]
    #[should_panic(expected = "a piece of an output was not written")]
    fn what_was_not_cleared_is_never_handed_out() {
        let mut output = Output::<f32>::new(10);
        output.blank().take(9).clear();
        output.written();
    }
}
