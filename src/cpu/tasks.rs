//! Work shared among threads: a queue of tasks, and buffers that are handed on.

use std::sync::{Mutex, PoisonError};

/// Hands tasks in order to one worker per thread.
pub(crate) fn for_each_task<T: Send, W>(
    tasks: Vec<T>,
    new_worker: impl Fn() -> W + Sync,
    run: impl Fn(&mut W, T) + Sync,
) {
    let workers = rayon::current_num_threads().min(tasks.len());
    let tasks = Mutex::new(tasks.into_iter());
    let work = || {
        let mut worker = new_worker();
        // A worker that panics is reported by rayon; the queue itself is never left half-changed.
        let next = || tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
        while let Some(task) = next() {
            run(&mut worker, task)
        }
    };
    if workers <= 1 {
        work();
    } else {
        rayon::scope(|scope| (0..workers).for_each(|_| scope.spawn(|_| work())));
    }
}

/// Buffers that one task has done with and another may want: new ones would be cleared, page by page, by the system.
pub(crate) struct Pool<T>(Mutex<Vec<T>>);

impl<T> Pool<T> {
    pub fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    pub fn take(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    pub fn give(&self, buffer: T) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(buffer)
    }
}
