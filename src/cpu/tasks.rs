//! Work shared among threads: a queue of tasks, what several of them read, and buffers that are handed on.

use super::output::Blank;
use super::Element;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// One block of rows of one query head, and where its output goes.
pub(crate) struct RowTask<'out, T: Element> {
    pub list: usize,
    /// The list whose columns are to be made before: the next one, so that no thread waits for them in the end.
    pub ahead: Option<usize>,
    pub head: usize,
    /// From the first row of `output` on.
    pub rows: Range<usize>,
    pub output: Blank<'out, T>,
    pub log_sum_exp: Option<&'out mut [T::Acc]>,
}

/// Tasks for an output (.., H, `tokens`, `dim`) and its log-sum-exps, of which the lists have so many heads each, in
/// order. List by list, the longest rows first: the last tasks to end are short ones.
pub(crate) fn row_tasks<'out, T: Element>(
    lists: impl ExactSizeIterator<Item = Range<usize>>,
    (tokens, dim, block_rows): (usize, usize, usize),
    mut output: Blank<'out, T>,
    log_sum_exp: Option<&'out mut [T::Acc]>,
) -> Vec<RowTask<'out, T>> {
    let (count, threads) = (lists.len(), rayon::current_num_threads());
    let mut sums = log_sum_exp.map(|sums| sums.chunks_mut(tokens));
    let mut tasks = Vec::new();
    for (list, heads) in lists.enumerate() {
        let first = tasks.len();
        for head in heads {
            let sums = sums.as_mut().and_then(Iterator::next);
            let mut sums = sums.map(|sums| sums.chunks_mut(block_rows));
            for start in (0..tokens).step_by(block_rows) {
                let rows = start..tokens.min(start + block_rows);
                tasks.push(RowTask {
                    list,
                    ahead: None,
                    head,
                    output: output.take(rows.len() * dim),
                    rows,
                    log_sum_exp: sums.as_mut().and_then(Iterator::next),
                });
            }
        }
        tasks[first..].sort_by_key(|task| std::cmp::Reverse(task.rows.start));
        // A second thread begins with the second list, while the first one gathers the first.
        let tasks = &mut tasks[first..];
        let early = if list == 0 { 1 } else { (tasks.len() / 2).max(1) };
        if let Some(task) = tasks.get_mut(early).filter(|_| threads > 1) {
            task.ahead = Some(list + 1).filter(|next| *next < count);
        }
    }
    tasks
}

/// What several tasks read: made by the first that asks for it, given up by the last that has read it.
pub(crate) struct Lease<T>(Mutex<Leased<T>>);

struct Leased<T> {
    made: Option<Arc<T>>,
    tasks_left: usize,
}

impl<T> Lease<T> {
    pub fn new(tasks: usize) -> Self {
        Self(Mutex::new(Leased {
            made: None,
            tasks_left: tasks,
        }))
    }

    /// Made now if nobody has asked before; the others wait for it.
    pub fn borrow(&self, make: impl FnOnce() -> T) -> Arc<T> {
        let mut leased = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(leased.made.get_or_insert_with(|| Arc::new(make())))
    }

    /// For each task once, when it has dropped what it borrowed; from the last one it goes to `pool`.
    pub fn give_back(&self, pool: &Pool<T>) {
        let mut leased = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        leased.tasks_left -= 1;
        if leased.tasks_left == 0 {
            let made = leased.made.take().and_then(|made| Arc::try_unwrap(made).ok());
            made.into_iter().for_each(|made| pool.give(made));
        }
    }
}

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
