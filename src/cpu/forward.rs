//! One forward pass: a head's far columns are gathered once, and blocks of rows attend to them.
//!
//! Work is split over (batch, head, row block). A head's far columns are gathered by the worker that begins with it and
//! dropped by the last that reads them, so that one head per thread is held at a time: memory O(N·D) beyond the output.

use super::attend::Worker;
use super::bias::{Apart, BiasView};
use super::columns::{block_rows, Bits, Block, FarSource, KeysValues, RawRows, RowScratch, Settings, FAR_COLUMNS};
use super::far::{kept, FarColumns, Layout};
use super::output::Output;
use super::pairs::{Packed, Pairs};
use super::philox::DropoutMask;
use super::tasks::{for_each_list_task, row_tasks, Lease, Pool, RowTask};
use super::{Accumulator, Element, HeadRows, Rows};
use crate::config::{Dropout, Fold};
use crate::problem::Problem;
use candle_core::Result;
use std::ops::Range;
use std::sync::Arc;

/// What one forward pass reads.
#[derive(Clone, Copy)]
pub(crate) struct ForwardInput<'a, T: Element> {
    pub q: Rows<'a, T>,
    pub k: Rows<'a, T>,
    pub v: Rows<'a, T>,
    pub problem: Problem,
    /// Merge indicators (B, H, N-1).
    pub bits: &'a [u8],
    pub fold: Fold,
    pub window: usize,
    pub causal: bool,
    pub scale: f64,
    pub dropout: Option<Dropout>,
    pub bias: Option<BiasView<'a, T::Acc>>,
}

impl<'a, T: Element> ForwardInput<'a, T> {
    /// With products in bf16 pairs where they serve.
    pub fn settings(&self) -> Settings<'a, T::Acc> {
        let pairs = self.pairs();
        Settings {
            head_dim: self.problem.head_dim,
            block_rows: block_rows(self.problem.tokens, pairs),
            first_row: 0,
            fold: self.fold,
            window: self.window,
            causal: self.causal,
            scale: self.scale,
            bias: self.bias,
            pairs,
            gradients: false,
        }
    }

    /// Products in bf16 pairs, where they serve: dropout takes single weights.
    fn pairs(&self) -> Option<Pairs> {
        match self.dropout {
            Some(_) => None,
            None => Pairs::new(T::SPLIT?, self.scale),
        }
    }

    /// Refuses a bias of -inf at a column that a row of a head which hides tokens would see.
    pub fn check_bias(&self) -> Result<()> {
        let Some(bias) = self.bias else { return Ok(()) };
        let Problem {
            batch, heads, tokens, ..
        } = self.problem;
        let all = (0..batch).flat_map(|batch| (0..heads).map(move |head| [batch, head]));
        let hiding = all.filter(|[batch, head]| self.head_bits(*batch, *head).contains(&1));
        Apart::new(bias, 0).check_all(hiding, (tokens, tokens), self.causal)
    }

    /// The merge bits of one query head.
    pub fn head_bits(&self, batch: usize, head: usize) -> &'a [u8] {
        let pairs = self.problem.pairs();
        &self.bits[(batch * self.problem.heads + head) * pairs..][..pairs]
    }

    /// One block of rows over gathered columns.
    pub fn block<'b>(&self, batch: usize, head: usize, rows: Range<usize>, far: &'b Gathered<'a, T>) -> Block<'b, T, T>
    where
        'a: 'b,
    {
        let batch_head = batch * self.problem.heads + head;
        Block {
            batch,
            head,
            rows,
            queries: self.q.head(batch, head),
            previous_query: None,
            bits: Bits {
                bits: self.head_bits(batch, head),
                base: 0,
            },
            raw: RawRows {
                keys: far.keys,
                values: far.values,
                base: 0,
                clean: far.columns.clean,
            },
            chain: None,
            far,
            dropout: self.dropout.map(|dropout| DropoutMask::new(dropout, batch_head)),
        }
    }
}

/// Query heads that read the same far columns: a KV head's group where its bits agree, else one query head.
struct HeadList<A: Accumulator> {
    batch: usize,
    kv_head: usize,
    heads: Range<usize>,
    columns: Lease<FarColumns<A>>,
}

/// A call's lists, and how their columns are gathered.
struct HeadLists<'c, 'a, T: Element> {
    input: &'c ForwardInput<'a, T>,
    lists: Vec<HeadList<T::Acc>>,
    layout: Layout,
    /// How many may be begun at a time.
    open: usize,
    pool: Pool<FarColumns<T::Acc>>,
}

/// The output (B, H, N, D), contiguous; also each row's log-sum-exp in base 2, as two numbers that add up to it, where
/// `log_sum_exp` (B, H, N) is given.
pub(crate) fn forward<T: Element>(input: &ForwardInput<T>, log_sum_exp: Option<&mut [[T::Acc; 2]]>) -> Vec<T> {
    let Problem {
        batch,
        heads,
        tokens,
        head_dim,
        ..
    } = input.problem;
    let mut output = Output::new(batch * heads * tokens * head_dim);
    let settings = input.settings();
    let lists = HeadLists::new(input, tokens.div_ceil(settings.block_rows));
    let heads = lists.lists.iter().map(|list| list.heads.clone());
    let tasks = row_tasks(
        heads,
        (tokens, head_dim, settings.block_rows),
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

/// A call's far columns, with the rows they were gathered from.
pub(crate) struct Gathered<'a, T: Element> {
    columns: Arc<FarColumns<T::Acc>>,
    keys: HeadRows<'a, T>,
    values: HeadRows<'a, T>,
}

impl<'a, T: Element> Gathered<'a, T> {
    /// Gathers for gradients of one query head; into `room` where there is some.
    pub fn new(input: &ForwardInput<'a, T>, batch: usize, head: usize, room: Option<FarColumns<T::Acc>>) -> Self {
        let kv_head = head / input.problem.group();
        let (keys, values) = (input.k.head(batch, kv_head), input.v.head(batch, kv_head));
        let bits = input.head_bits(batch, head);
        let tokens = input.problem.tokens;
        Self {
            columns: Arc::new(FarColumns::gather(
                (&keys, &values),
                bits,
                tokens,
                input.fold,
                input.pairs().map_or(Layout::Rows, Layout::Gradients),
                room,
            )),
            keys,
            values,
        }
    }

    /// The columns, for their room, when nobody reads them any more.
    pub fn into_columns(self) -> Option<FarColumns<T::Acc>> {
        Arc::try_unwrap(self.columns).ok()
    }
}

impl<T: Element> FarSource<T::Acc> for Gathered<'_, T> {
    fn holds_until(&self) -> usize {
        usize::MAX
    }

    fn columns(&self) -> usize {
        self.columns.columns
    }

    fn before(&self, token: usize) -> usize {
        self.columns.before(token)
    }

    fn token(&self, column: usize) -> usize {
        self.columns.token(column)
    }

    fn log2_sizes(&self, columns: Range<usize>) -> Option<&[T::Acc]> {
        self.columns.log2_sizes().map(|sizes| &sizes[columns])
    }

    fn rows<'s>(&'s self, columns: Range<usize>, _: &'s mut RowScratch<T::Acc>) -> KeysValues<'s, T::Acc> {
        self.columns.rows(columns.start, &self.keys)
    }

    fn keys_apart<'s>(&'s self, columns: Range<usize>, keys: &mut [&'s [T::Acc]; FAR_COLUMNS]) -> bool {
        self.columns.keys_apart(columns, &self.keys, keys)
    }

    fn packed(&self) -> Option<&Packed> {
        self.columns.packed.as_ref()
    }

    fn packed_values(&self) -> Option<&Packed> {
        self.columns.packed_values.as_ref()
    }
}

impl<'c, 'a, T: Element> HeadLists<'c, 'a, T> {
    /// `blocks` of rows will read each head's columns.
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

    /// Sees to it that the lists that are held at a time, those with rows left and one that ends, take no more than the
    /// output in f32. Where each thread cannot have its own, fewer are begun at a time; where that would be a single one,
    /// which all threads would wait for, columns are lean.
    fn fit(&mut self) {
        let problem = self.input.problem;
        let wanted = self.lists.len().min(rayon::current_num_threads());
        // How many lists of so many columns fit.
        let room = |columns: usize| problem.batch * problem.heads * problem.tokens / (2 * columns.max(1));
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
        };
        let block = self.input.block(list.batch, task.head, task.rows, &far);
        worker.run(&block, task.output.clear(), task.log_sum_exp);
        drop(far);
        list.columns.give_back(&self.pool);
    }

    /// A list's columns, gathered now if this is the first call.
    fn borrow(&self, list: &HeadList<T::Acc>) -> Arc<FarColumns<T::Acc>> {
        let input = self.input;
        list.columns.borrow(|| {
            FarColumns::gather(
                (
                    &input.k.head(list.batch, list.kv_head),
                    &input.v.head(list.batch, list.kv_head),
                ),
                input.head_bits(list.batch, list.heads.start),
                input.problem.tokens,
                input.fold,
                self.layout,
                self.pool.take(),
            )
        })
    }
}
