//! A vector whose front leaves: the entries of a list that no later row sees.

use std::ops::{Deref, DerefMut};

/// Numbers in order of their arrival. The oldest leave in amortised O(1): they stay in memory until they are an eighth
/// of the rest, and then the rest moves to the front.
#[derive(Clone)]
pub(crate) struct Queue<T> {
    data: Vec<T>,
    /// The number of elements at the front that have left.
    left: usize,
}

/// The share of the rest that has left before it moves: one part of this many.
const SHARE: usize = 8;

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Vec::new().into()
    }
}

impl<T> From<Vec<T>> for Queue<T> {
    fn from(data: Vec<T>) -> Self {
        Self { data, left: 0 }
    }
}

impl<T> Deref for Queue<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.data[self.left..]
    }
}

impl<T> DerefMut for Queue<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[self.left..]
    }
}

impl<T: Copy> Queue<T> {
    pub fn push(&mut self, x: T) {
        self.data.push(x);
    }

    pub fn extend_from_slice(&mut self, more: &[T]) {
        self.data.extend_from_slice(more);
    }

    /// Appends `count` copies of `x`.
    pub fn fill(&mut self, count: usize, x: T) {
        self.data.resize(self.data.len() + count, x);
    }

    /// Cuts the newest off.
    pub fn truncate(&mut self, count: usize) {
        self.data.truncate(self.left + count);
    }

    /// The number of elements that fit before memory is allocated.
    pub fn room(&self) -> usize {
        self.data.capacity() - self.data.len()
    }

    pub fn capacity(&self) -> usize {
        self.data.capacity()
    }

    pub fn reserve_exact(&mut self, more: usize) {
        self.move_up();
        self.data.reserve_exact(more);
    }

    /// Drops the oldest `count` elements; releases the memory that a long chunk took.
    pub fn leave(&mut self, count: usize) {
        self.left += count;
        if self.left * SHARE >= self.len() {
            self.move_up();
            let wanted = self.data.len() + self.data.len() / SHARE;
            if self.data.capacity() > 2 * wanted {
                self.data.shrink_to(wanted);
            }
        }
    }

    fn move_up(&mut self) {
        self.data.drain(..std::mem::take(&mut self.left));
    }
}

#[cfg(test)]
mod tests {
    use super::Queue;

    /// A queue of at most `length` holds the newest, moves few elements, and takes little memory.
    #[test]
    fn the_newest_stay() {
        for length in [0usize, 1, 7, 100] {
            let (mut queue, mut moved) = (Queue::default(), 0);
            for x in 0..1000usize {
                queue.push(x);
                let before = queue.left;
                queue.leave(queue.len().saturating_sub(length));
                moved += if queue.left < before { queue.len() } else { 0 };
                let expected: Vec<usize> = ((x + 1).saturating_sub(length)..=x).collect();
                assert_eq!(queue[..], expected);
                assert!(
                    queue.data.len() <= length + length / super::SHARE + 1,
                    "{length}: {}",
                    queue.data.len()
                );
            }
            assert!(moved <= super::SHARE * 1000, "{length}: {moved}");
        }
    }

    #[test]
    fn a_long_chunk_gives_its_memory_back() {
        let mut queue = Queue::default();
        queue.extend_from_slice(&[1u8; 10_000]);
        queue.leave(9_990);
        assert!(queue.len() == 10 && queue.capacity() < 100, "{}", queue.capacity());
        queue.reserve_exact(5);
        assert!(queue.room() >= 5);
        queue.truncate(3);
        queue.fill(2, 7);
        assert_eq!(queue[..], [1, 1, 1, 7, 7]);
    }
}
