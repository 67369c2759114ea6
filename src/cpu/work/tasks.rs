//! Work shared among threads: queues of tasks, data that several tasks read, and buffers that are reused.

use crate::cpu::number::element::Element;
use crate::cpu::work::output::Blank;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// One block of rows of one query head, and the target of its output.
pub(crate) struct RowTask<'out, T: Element> {
    pub list: usize,
    pub head: usize,
    /// The block's rows, counted from the first row of `output`.
    pub rows: Range<usize>,
    pub output: Blank<'out, T>,
    pub log_sum_exp: Option<&'out mut [[T::Acc; 2]]>,
}

/// Each list's tasks for an output (.., H, `tokens`, `dim`) and its log-sum-exps. `lists` gives the query heads of each
/// list, in order. The longest rows come first, so that the last tasks to end are short.
pub(crate) fn row_tasks<'out, T: Element>(
    lists: impl Iterator<Item = Range<usize>>,
    (tokens, dim, block_rows): (usize, usize, usize),
    mut output: Blank<'out, T>,
    log_sum_exp: Option<&'out mut [[T::Acc; 2]]>,
) -> Vec<Vec<RowTask<'out, T>>> {
    let mut sums = log_sum_exp.map(|sums| sums.chunks_mut(tokens));
    let tasks_of = |(list, heads): (usize, Range<usize>)| {
        let mut tasks = Vec::new();
        for head in heads {
            let sums = sums.as_mut().and_then(Iterator::next);
            let mut sums = sums.map(|sums| sums.chunks_mut(block_rows));
            for start in (0..tokens).step_by(block_rows) {
                let rows = start..tokens.min(start + block_rows);
                tasks.push(RowTask {
                    list,
                    head,
                    output: output.take(rows.len() * dim),
                    rows,
                    log_sum_exp: sums.as_mut().and_then(Iterator::next),
                });
            }
        }
        tasks.sort_by_key(|task| std::cmp::Reverse(task.rows.start));
        tasks
    };
    lists.enumerate().map(tasks_of).collect()
}

/// Data that several tasks read: the first task that asks makes it, and the last task that has read it gives it up.
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

    /// The data, made now by the first task that asks; other tasks wait for it.
    pub fn borrow(&self, make: impl FnOnce() -> T) -> Arc<T> {
        let mut leased = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(leased.made.get_or_insert_with(|| Arc::new(make())))
    }

    /// Must be called once by each task, after it has dropped its borrow; the last call moves the data to `pool`.
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
    for_each_list_task(vec![tasks], usize::MAX, new_worker, run);
}

/// Hands each list's tasks, in order, to one worker as long as there are lists for all workers: data that a worker has
/// made for a list is in that worker's caches. Afterwards workers help each other. They also help before more than
/// `open` lists are begun.
pub(crate) fn for_each_list_task<T: Send, W>(
    lists: Vec<Vec<T>>,
    open: usize,
    new_worker: impl Fn() -> W + Sync,
    run: impl Fn(&mut W, T) + Sync,
) {
    let workers = rayon::current_num_threads().min(lists.iter().map(Vec::len).sum());
    let lists = lists.into_iter().filter(|tasks| !tasks.is_empty());
    let queue = Mutex::new(ListQueue {
        lists: lists.map(Vec::into_iter).collect(),
        begun: 0,
        open: 0,
        limit: open.max(1),
    });
    let work = || {
        let (mut worker, mut own) = (new_worker(), None);
        // A worker that panics is reported by rayon; the queue itself is never left half-changed.
        let mut next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next(&mut own);
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

/// Lists of tasks, begun in order.
struct ListQueue<T> {
    lists: Vec<std::vec::IntoIter<T>>,
    begun: usize,
    /// The number of begun lists with tasks left, and the largest number allowed.
    open: usize,
    limit: usize,
}

impl<T> ListQueue<T> {
    /// The next task of a worker's own list. If that list has none, the next task of another list, which becomes the
    /// worker's own.
    fn next(&mut self, own: &mut Option<usize>) -> Option<T> {
        let list = match *own {
            Some(list) if self.lists[list].len() > 0 => list,
            _ if self.begun < self.lists.len() && self.open < self.limit => {
                self.begun += 1;
                self.open += 1;
                self.begun - 1
            }
            _ => (0..self.begun).max_by_key(|list| self.lists[*list].len())?,
        };
        *own = Some(list);
        let task = self.lists[list].next()?;
        if self.lists[list].len() == 0 {
            self.open -= 1;
        }
        Some(task)
    }
}

/// Buffers that one task has finished with and another may use. The system would clear new buffers, page by page.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_keep_to_their_lists_and_then_help() {
        let mut queue = ListQueue {
            lists: vec![
                vec![0, 1, 2].into_iter(),
                vec![10, 11].into_iter(),
                vec![20].into_iter(),
            ],
            begun: 0,
            open: 0,
            limit: 2,
        };
        let (mut a, mut b, mut c) = (None, None, None);
        // Two lists are open, so that the third worker helps where most is left.
        assert_eq!(
            [queue.next(&mut a), queue.next(&mut b), queue.next(&mut c)],
            [Some(0), Some(10), Some(1)]
        );
        assert_eq!(
            [queue.next(&mut b), queue.next(&mut b), queue.next(&mut b)],
            [Some(11), Some(20), Some(2)]
        );
        assert_eq!((queue.next(&mut a), queue.next(&mut c), queue.open), (None, None, 0));
    }

    #[test]
    fn every_task_runs_once() {
        for (lists, open) in [(0, 1), (1, 1), (5, 1), (5, 3), (40, usize::MAX)] {
            let tasks: Vec<Vec<usize>> = (0..lists)
                .map(|list| (0..list % 7).map(|task| list * 100 + task).collect())
                .collect();
            let mut expected: Vec<usize> = tasks.iter().flatten().copied().collect();
            let done = Mutex::new(Vec::new());
            for_each_list_task(tasks, open, || (), |(), task| done.lock().unwrap().push(task));
            let mut done = done.into_inner().unwrap();
            done.sort();
            expected.sort();
            assert_eq!(done, expected);
        }
    }
}
