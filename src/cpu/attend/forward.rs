//! One forward pass: a head's far columns are gathered once, and blocks of rows attend to them.
//!
//! Work is split over (batch, head, row block). The worker that begins with a head gathers its far columns, and the
//! last worker that reads them drops them. So one head per thread is held at a time: memory is O(N·D) beyond the
//! output.

use crate::cpu::attend::input::{ForwardInput, Gathered};
use crate::cpu::attend::worker::Worker;
use crate::cpu::columns::far::{kept, FarColumns, Layout};
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::work::output::Output;
use crate::cpu::work::tasks::{for_each_list_task, row_tasks, Lease, Pool, RowTask};
use crate::problem::Problem;
use std::ops::Range;
use std::sync::Arc;

/// Query heads that read the same far columns: a KV head's group where its bits agree, else one query head.
struct HeadList<A: Accumulator> {
    batch: usize,
    kv_head: usize,
    heads: Range<usize>,
    columns: Lease<FarColumns<A>>,
}

/// A call's lists, and the form in which their columns are gathered.
struct HeadLists<'c, 'a, T: Element> {
    input: &'c ForwardInput<'a, T>,
    lists: Vec<HeadList<T::Acc>>,
    layout: Layout,
    /// The number of lists that may be begun at a time.
    open: usize,
    pool: Pool<FarColumns<T::Acc>>,
}

/// The output (B, H, Nq, Dv), contiguous. If `log_sum_exp` (B, H, Nq) is given, also each row's log-sum-exp in base 2,
/// as two numbers that add up to it.
pub(crate) fn forward<T: Element>(input: &ForwardInput<T>, log_sum_exp: Option<&mut [[T::Acc; 2]]>) -> Vec<T> {
    let Problem {
        batch,
        heads,
        tokens,
        queries,
        value_dim,
        ..
    } = input.problem;
    let mut output = Output::new(batch * heads * queries * value_dim);
    let settings = input.settings();
    let lists = HeadLists::new(input, queries.div_ceil(settings.block_rows));
    let heads = lists.lists.iter().map(|list| list.heads.clone());
    let tasks = row_tasks(
        heads,
        (queries, value_dim, settings.block_rows),
        output.blank(),
        log_sum_exp,
    );
    for_each_list_task(
        tasks,
        lists.open,
        || Worker::new(settings, tokens),
        |worker, task| lists.run(worker, task),
    );
    output.written()
}

impl<'c, 'a, T: Element> HeadLists<'c, 'a, T> {
    /// `blocks` is the number of row blocks that will read each head's columns.
    fn new(input: &'c ForwardInput<'a, T>, blocks: usize) -> Self {
        let (problem, group) = (input.problem, input.problem.group());
        let bits = |batch: usize, head: usize| input.head_bits(batch, head);
        let mut lists = Vec::new();
        for batch in 0..problem.batch {
            for kv_head in 0..problem.kv_heads {
                let heads = kv_head * group..(kv_head + 1) * group;
                let shared = heads.clone().all(|head| bits(batch, head) == bits(batch, heads.start));
                let mut push = |heads: Range<usize>| {
                    lists.push(HeadList {
                        batch,
                        kv_head,
                        columns: Lease::new(heads.len() * blocks),
                        heads,
                    })
                };
                if shared {
                    push(heads);
                } else {
                    heads.for_each(|head| push(head..head + 1));
                }
            }
        }
        let mut lists = Self {
            input,
            lists,
            layout: input.pairs().map_or(Layout::ValueRows, Layout::Pairs),
            open: usize::MAX,
            pool: Pool::new(),
        };
        if matches!(lists.layout, Layout::ValueRows) {
            lists.fit();
        }
        lists
    }

    /// Bounds the memory of the lists that are held at a time (lists with rows left, and one that ends) by the output
    /// in f32. Where each thread cannot have a list of its own, fewer lists are begun at a time. Where that would be a
    /// single list, which all threads would wait for, columns are lean.
    fn fit(&mut self) {
        let problem = self.input.problem;
        let wanted = self.lists.len().min(rayon::current_num_threads());
        // The number of lists of `columns` columns that fit.
        let output = problem.batch * problem.heads * problem.queries * problem.value_dim;
        let room = |columns: usize| output / ((problem.head_dim + problem.value_dim) * columns.max(1));
        if room(problem.tokens) >= wanted {
            return;
        }
        let columns = |list: &HeadList<_>| kept(self.input.head_bits(list.batch, list.heads.start), problem.tokens);
        let room = room(self.lists.iter().map(columns).max().unwrap_or(0));
        if room >= wanted {
            return;
        }
        self.open = room.saturating_sub(1);
        if self.open < 2 {
            (self.layout, self.open) = (Layout::Lean, usize::MAX);
        }
    }

    fn run(&self, worker: &mut Worker<T>, task: RowTask<T>) {
        let list = &self.lists[task.list];
        let far = Gathered {
            columns: self.borrow(list),
            keys: self.input.k.head(list.batch, list.kv_head),
            values: self.input.v.head(list.batch, list.kv_head),
            edges_apart: self.input.column_bias.is_some(),
        };
        let block = self.input.block(list.batch, task.head, task.rows, &far);
        worker.run(&block, task.output.clear(), task.log_sum_exp);
        drop(far);
        list.columns.give_back(&self.pool);
    }

    /// A list's columns, gathered now if this is the first call.
    fn borrow(&self, list: &HeadList<T::Acc>) -> Arc<FarColumns<T::Acc>> {
        let input = self.input;
        list.columns
            .borrow(|| input.gather([list.batch, list.heads.start], self.layout, self.pool.take()))
    }
}
