//! Attention over columns: {far: compact; edge; near}, block by block of rows, with an online softmax.
//!
//! Work is split over (batch, head, row block). A head's far columns are gathered by the first worker that needs them
//! and dropped by the last, so that about one head per thread is held at a time: memory O(N·D) beyond the output.

use super::decide::dot;
use super::fold::{quarantine, raw_rows, ChainFold, FarColumns};
use super::gemm_tile::{accumulate, scores, Tile};
use super::philox::DropoutMask;
use super::softmax::{OnlineSoftmax, LANES};
use super::{Accumulator, Element, HeadRows, Rows};
use crate::config::{Dropout, Fold};
use crate::problem::Problem;
use pulp::Arch;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Rows of a block: with [`FAR_COLUMNS`] of f32 the tile of scores is 256 KiB, a quarter of a 1 MiB L2, beside 32 KiB
/// of queries and as much output at D = 64.
const BLOCK_ROWS: usize = 128;
/// Columns of a tile that every row sees.
const FAR_COLUMNS: usize = 512;
/// Columns of a tile that only some rows see (the causal diagonal, the window's band): small, since the rest is wasted.
const EDGE_COLUMNS: usize = 32;

/// An additive bias as a strided (B, H, N, N) view.
#[derive(Clone, Copy)]
pub(crate) struct BiasView<'a, A> {
    pub data: &'a [A],
    pub offset: usize,
    pub strides: [usize; 4],
}

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

/// Query heads that read the same far columns: a KV head's group where its bits agree, else one query head.
struct HeadList<A> {
    batch: usize,
    kv_head: usize,
    heads: Range<usize>,
    columns: Mutex<Lease<A>>,
}

/// The columns of a list while anybody needs them.
struct Lease<A> {
    columns: Option<Arc<FarColumns<A>>>,
    tasks_left: usize,
}

/// One block of rows of one query head, and where its output goes.
struct Task<'out, T> {
    list: usize,
    head: usize,
    rows: Range<usize>,
    output: &'out mut [T],
}

/// The output (B, H, N, D), contiguous.
pub(crate) fn forward<T: Element>(input: &ForwardInput<T>) -> Vec<T> {
    let Problem {
        batch,
        heads,
        tokens,
        head_dim,
        ..
    } = input.problem;
    let mut output = vec![T::zero(); batch * heads * tokens * head_dim];
    let block_rows = block_rows(tokens);
    let lists = head_lists(input, tokens.div_ceil(block_rows));
    let tasks = tasks(&input.problem, &lists, block_rows, &mut output);
    let workers = rayon::current_num_threads().min(tasks.len());
    let tasks = Mutex::new(tasks.into_iter());
    let work = || {
        let mut worker = Worker::new(input, block_rows);
        // A worker that panics is reported by rayon; the queue itself is never left half-changed.
        let next = || tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
        while let Some(task) = next() {
            let list = &lists[task.list];
            let columns = list.borrow(input);
            worker.run(list, &columns, task);
            drop(columns);
            list.give_back();
        }
    };
    if workers <= 1 {
        work();
    } else {
        rayon::scope(|scope| (0..workers).for_each(|_| scope.spawn(|_| work())));
    }
    drop(tasks);
    output
}

/// Fewer rows for short inputs: more tasks, and less of the causal diagonal is computed in vain.
fn block_rows(tokens: usize) -> usize {
    let wanted = if tokens >= 8 * BLOCK_ROWS {
        BLOCK_ROWS
    } else {
        BLOCK_ROWS / 2
    };
    wanted.min(tokens.next_multiple_of(LANES))
}

fn head_lists<T: Element>(input: &ForwardInput<T>, blocks: usize) -> Vec<HeadList<T::Acc>> {
    let (problem, pairs) = (input.problem, input.problem.pairs());
    let group = problem.group();
    let bits = |batch: usize, head: usize| &input.bits[(batch * problem.heads + head) * pairs..][..pairs];
    let mut lists = Vec::new();
    for batch in 0..problem.batch {
        for kv_head in 0..problem.kv_heads {
            let heads = kv_head * group..(kv_head + 1) * group;
            let shared = heads.clone().all(|head| bits(batch, head) == bits(batch, heads.start));
            let mut push = |heads: Range<usize>| {
                lists.push(HeadList {
                    batch,
                    kv_head,
                    columns: Mutex::new(Lease {
                        columns: None,
                        tasks_left: heads.len() * blocks,
                    }),
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
    lists
}

/// List by list, the longest rows first: the last tasks to end are short ones.
fn tasks<'out, T, A>(
    problem: &Problem,
    lists: &[HeadList<A>],
    block_rows: usize,
    output: &'out mut [T],
) -> Vec<Task<'out, T>> {
    let (tokens, dim) = (problem.tokens, problem.head_dim);
    let mut outputs = output.chunks_mut(tokens * dim);
    let mut tasks = Vec::new();
    for (list, entry) in lists.iter().enumerate() {
        let first = tasks.len();
        for (head, output) in entry.heads.clone().zip(&mut outputs) {
            for (block, output) in output.chunks_mut(block_rows * dim).enumerate() {
                let start = block * block_rows;
                let rows = start..start + output.len() / dim;
                tasks.push(Task {
                    list,
                    head,
                    rows,
                    output,
                });
            }
        }
        tasks[first..].sort_by_key(|task| std::cmp::Reverse(task.rows.start));
    }
    tasks
}

impl<A: Accumulator> HeadList<A> {
    fn bits<'a, T: Element>(&self, input: &ForwardInput<'a, T>, head: usize) -> &'a [u8] {
        let pairs = input.problem.pairs();
        &input.bits[(self.batch * input.problem.heads + head) * pairs..][..pairs]
    }

    /// The list's columns, gathered now if this is the first call; the others wait for it.
    fn borrow<T: Element<Acc = A>>(&self, input: &ForwardInput<T>) -> Arc<FarColumns<A>> {
        let mut lease = self.columns.lock().unwrap_or_else(PoisonError::into_inner);
        let gather = || {
            let keys = input.k.head(self.batch, self.kv_head);
            let values = input.v.head(self.batch, self.kv_head);
            let bits = self.bits(input, self.heads.start);
            Arc::new(FarColumns::gather(
                &keys,
                &values,
                bits,
                input.problem.tokens,
                input.fold,
            ))
        };
        Arc::clone(lease.columns.get_or_insert_with(gather))
    }

    fn give_back(&self) {
        let mut lease = self.columns.lock().unwrap_or_else(PoisonError::into_inner);
        lease.tasks_left -= 1;
        if lease.tasks_left == 0 {
            lease.columns = None;
        }
    }
}

/// One thread's buffers, reused from task to task.
struct Worker<'a, T: Element> {
    input: &'a ForwardInput<'a, T>,
    /// Rows of a block, a multiple of [`LANES`]: the leading dimension of `queries` and `tile`.
    leading: usize,
    /// Queries (rows, D), folded and multiplied by scale * log2(e).
    query_rows: Vec<T::Acc>,
    /// The same, transposed to (D, leading).
    queries: Vec<T::Acc>,
    tile: Vec<T::Acc>,
    /// (leading, D)
    output: Vec<T::Acc>,
    softmax: OnlineSoftmax<T::Acc>,
    near_keys: Vec<T::Acc>,
    near_values: Vec<T::Acc>,
    chain: ChainFold<T::Acc>,
}

/// One block of rows while it is worked on.
struct Block<'b, T: Element> {
    batch: usize,
    head: usize,
    rows: Range<usize>,
    bits: &'b [u8],
    keys: HeadRows<'b, T>,
    values: HeadRows<'b, T>,
    far: &'b FarColumns<T::Acc>,
    dropout: Option<DropoutMask>,
}

/// What sets one tile apart from another: its columns' tokens and who sees them.
struct Columns<'c, A, F, V> {
    keys: HeadRows<'c, A>,
    values: HeadRows<'c, A>,
    count: usize,
    log2_sizes: Option<&'c [A]>,
    /// Rows of the block (relative, multiples of LANES) that are computed.
    rows: Range<usize>,
    /// column -> token index
    token: F,
    /// column -> the rows of the block (relative) that see it; None when all of `rows` see all columns.
    visible: Option<V>,
}

impl<'a, T: Element> Worker<'a, T> {
    fn new(input: &'a ForwardInput<'a, T>, block_rows: usize) -> Self {
        let dim = input.problem.head_dim;
        let leading = block_rows.next_multiple_of(LANES);
        let zeros = |count: usize| vec![T::Acc::ZERO; count];
        Self {
            input,
            leading,
            query_rows: zeros(leading * dim),
            queries: zeros(leading * dim),
            tile: zeros(leading * FAR_COLUMNS.min(input.problem.tokens.next_multiple_of(EDGE_COLUMNS))),
            output: zeros(leading * dim),
            softmax: OnlineSoftmax::new(leading),
            near_keys: Vec::new(),
            near_values: Vec::new(),
            chain: ChainFold::new(input.fold, dim),
        }
    }

    fn run(&mut self, list: &HeadList<T::Acc>, far: &FarColumns<T::Acc>, task: Task<T>) {
        let input = self.input;
        let batch_head = list.batch * input.problem.heads + task.head;
        let block = Block {
            batch: list.batch,
            head: task.head,
            rows: task.rows,
            bits: list.bits(input, task.head),
            keys: input.k.head(list.batch, list.kv_head),
            values: input.v.head(list.batch, list.kv_head),
            far,
            dropout: input.dropout.map(|dropout| DropoutMask::new(dropout, batch_head)),
        };
        self.load_queries(&block);
        self.start_at_edge(&block);
        self.far_tiles(&block);
        if input.window > 0 {
            self.near_tiles(&block);
        }
        self.store(&block, task.output);
    }

    /// Fills `query_rows` and `queries`; rows past the block's end are 0.
    fn load_queries(&mut self, block: &Block<T>) {
        let (input, dim) = (self.input, self.input.problem.head_dim);
        let factor = T::Acc::of(input.scale * std::f64::consts::LOG2_E);
        let source = input.q.head(block.batch, block.head);
        let mut left = vec![T::Acc::ZERO; dim];
        self.query_rows[block.rows.len() * dim..].fill(T::Acc::ZERO);
        for (row, token) in block.rows.clone().enumerate() {
            let target = &mut self.query_rows[row * dim..][..dim];
            T::widen(source.row(token), target);
            if input.fold == Fold::PairSum && token > 0 && block.bits[token - 1] == 1 {
                T::widen(source.row(token - 1), &mut left);
                target.iter_mut().zip(&left).for_each(|(x, y)| *x += *y);
            }
            if !super::fold::all_finite(target) {
                target.fill(T::Acc::NAN);
            }
            target.iter_mut().for_each(|x| *x *= factor);
        }
        let leading = self.leading;
        for (row, source) in self.query_rows.chunks_exact(dim).enumerate() {
            for (d, x) in source.iter().enumerate() {
                self.queries[d * leading + row] = *x;
            }
        }
    }

    /// Starts the softmax of each row at its edge column: the folded token `row - window`, where there is one. Without
    /// causality the far columns hold every token that is not hidden, and only hidden ones need their edge.
    fn start_at_edge(&mut self, block: &Block<T>) {
        self.softmax.reset();
        self.output.fill(T::Acc::ZERO);
        let window = self.input.window;
        let edges = block.rows.start.max(window) - window..block.rows.end.max(window) - window;
        if edges.is_empty() {
            return;
        }
        self.chain.approach(edges.start, block.bits, &block.keys, &block.values);
        for token in edges {
            let hidden = |t: usize| block.bits.get(t) == Some(&1);
            self.chain.step(
                token > 0 && hidden(token - 1),
                block.keys.row(token),
                block.values.row(token),
            );
            if self.input.causal || hidden(token) {
                self.start_row(block, token);
            }
        }
    }

    fn start_row(&mut self, block: &Block<T>, token: usize) {
        let dim = self.input.problem.head_dim;
        let row = token + self.input.window - block.rows.start;
        let query = &self.query_rows[row * dim..][..dim];
        let chain = &self.chain;
        let finite = super::fold::all_finite(&chain.key) && super::fold::all_finite(&chain.value);
        let mut logit = T::Acc::NAN;
        if finite {
            logit = Arch::new().dispatch(
                #[inline(always)]
                || dot(query, &chain.key),
            );
            if chain.size > 1 {
                logit += T::Acc::of((chain.size as f64).log2());
            }
            let row_token = token + self.input.window;
            if let Some(bias) = self.bias(block, token, row_token..row_token + 1) {
                bias.for_each(|bias| logit += bias);
            }
            self.output[row * dim..][..dim].copy_from_slice(&chain.value);
        }
        self.softmax.start(row, logit);
        if let Some(mask) = block.dropout {
            let keep = mask.keeps(block.rows.start + row, token);
            let factor = if keep { T::Acc::of(mask.scale) } else { T::Acc::ZERO };
            self.output[row * dim..][..dim].iter_mut().for_each(|x| *x *= factor);
        }
    }

    /// The bias of `rows` (token indices) against one column, times log2(e).
    fn bias<'b>(
        &self,
        block: &Block<T>,
        token: usize,
        rows: Range<usize>,
    ) -> Option<impl Iterator<Item = T::Acc> + use<'a, 'b, T>> {
        let BiasView { data, offset, strides } = self.input.bias?;
        let column = offset + block.batch * strides[0] + block.head * strides[1] + token * strides[3];
        let to_base_2 = T::Acc::of(std::f64::consts::LOG2_E);
        Some(rows.map(move |row| data[column + row * strides[2]] * to_base_2))
    }

    fn far_tiles(&mut self, block: &Block<T>) {
        let (far, window, rows) = (block.far, self.input.window, block.rows.clone());
        let (seen_by_all, seen) = if self.input.causal {
            (
                far.before(rows.start.saturating_sub(window)),
                far.before((rows.end - 1).saturating_sub(window)),
            )
        } else {
            (far.columns, far.columns)
        };
        let padded = rows.len().next_multiple_of(LANES);
        let mut start = 0;
        while start < seen {
            let all = start < seen_by_all;
            let end = if all {
                seen_by_all.min(start + FAR_COLUMNS)
            } else {
                seen.min(start + EDGE_COLUMNS)
            };
            // Causal: token s is far from row s + window + 1 on.
            let first_row = |column: usize| (far.token(start + column) + window + 1).saturating_sub(rows.start);
            let (keys, values) = far.rows(start, (&block.keys, &block.values));
            let first = if all { 0 } else { first_row(0) / LANES * LANES };
            self.push(
                block,
                Columns {
                    keys,
                    values,
                    count: end - start,
                    log2_sizes: far.log2_sizes.as_deref().map(|sizes| &sizes[start..end]),
                    rows: first..padded,
                    token: |column| far.token(start + column),
                    visible: (!all).then_some(|column| first_row(column)..padded),
                },
            );
            start = end;
        }
    }

    /// Raw tokens t with row - window < t <= row.
    fn near_tiles(&mut self, block: &Block<T>) {
        let (window, rows) = (self.input.window, block.rows.clone());
        let first_token = (rows.start + 1).saturating_sub(window);
        for start in (first_token..rows.end).step_by(EDGE_COLUMNS) {
            let count = EDGE_COLUMNS.min(rows.end - start);
            let visible = |column: usize| {
                let token = start + column;
                token.max(rows.start) - rows.start..(token + window).min(rows.end) - rows.start
            };
            let computed = visible(0).start / LANES * LANES..visible(count - 1).end.next_multiple_of(LANES);
            let mut buffers = (
                std::mem::take(&mut self.near_keys),
                std::mem::take(&mut self.near_values),
            );
            let (keys, values) = near_rows(block, start, count, &mut buffers);
            self.push(
                block,
                Columns {
                    keys,
                    values,
                    count,
                    log2_sizes: None,
                    rows: computed,
                    token: |column| start + column,
                    visible: Some(visible),
                },
            );
            (self.near_keys, self.near_values) = buffers;
        }
    }

    /// One tile: logits, what is added to them, softmax, dropout, weighted values.
    fn push<F, V>(&mut self, block: &Block<T>, columns: Columns<T::Acc, F, V>)
    where
        F: Fn(usize) -> usize,
        V: Fn(usize) -> Range<usize>,
    {
        let leading = self.leading;
        let mut data = std::mem::take(&mut self.tile);
        let mut tile = Tile {
            data: &mut data,
            leading,
            columns: columns.count,
            rows: columns.rows.clone(),
        };
        scores(&mut tile, &self.queries, &columns.keys);
        if self.input.bias.is_some() || columns.log2_sizes.is_some() || columns.visible.is_some() {
            for (index, column) in tile.data.chunks_exact_mut(leading).take(columns.count).enumerate() {
                self.adjust(block, &columns, index, column);
            }
        }
        self.softmax.push(&mut tile, &mut self.output);
        if let Some(mask) = block.dropout {
            drop_weights(&mut tile, mask, block.rows.start, &columns.token);
        }
        accumulate(&mut self.output, &tile, &columns.values);
        self.tile = data;
    }

    /// Adds log2 n and the bias to one column of logits, and hides it from the rows that do not see it.
    fn adjust<F, V>(&self, block: &Block<T>, columns: &Columns<T::Acc, F, V>, index: usize, column: &mut [T::Acc])
    where
        F: Fn(usize) -> usize,
        V: Fn(usize) -> Range<usize>,
    {
        if let Some(sizes) = columns.log2_sizes {
            let size = sizes[index];
            column[columns.rows.clone()].iter_mut().for_each(|x| *x += size);
        }
        // Rows past the block's end are computed with the others and never stored.
        if let Some(bias) = self.bias(block, (columns.token)(index), block.rows.clone()) {
            column.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
        }
        if let Some(visible) = &columns.visible {
            let visible = visible(index);
            let start = visible.start.min(columns.rows.end);
            column[columns.rows.start..start].fill(T::Acc::NEG_INFINITY);
            column[visible.end.max(start)..columns.rows.end].fill(T::Acc::NEG_INFINITY);
        }
    }

    fn store(&mut self, block: &Block<T>, target: &mut [T]) {
        let dim = self.input.problem.head_dim;
        for (row, target) in (0..block.rows.len()).zip(target.chunks_exact_mut(dim)) {
            let source = &mut self.output[row * dim..][..dim];
            self.softmax.finish(row, source);
            T::narrow(source, target);
        }
    }
}

/// Raw rows as accumulators: the caller's own, or widened and quarantined copies in `buffers`.
fn near_rows<'b, T: Element>(
    block: &Block<'b, T>,
    start: usize,
    count: usize,
    buffers: &'b mut (Vec<T::Acc>, Vec<T::Acc>),
) -> (HeadRows<'b, T::Acc>, HeadRows<'b, T::Acc>) {
    if block.far.clean && T::as_acc(block.keys.data).is_some() {
        return (raw_rows(&block.keys).skip(start), raw_rows(&block.values).skip(start));
    }
    let dim = block.keys.dim;
    buffers.0.resize(EDGE_COLUMNS * dim, T::Acc::ZERO);
    buffers.1.resize(EDGE_COLUMNS * dim, T::Acc::ZERO);
    let rows = buffers.0.chunks_exact_mut(dim).zip(buffers.1.chunks_exact_mut(dim));
    for (token, (key, value)) in (start..start + count).zip(rows) {
        T::widen(block.keys.row(token), key);
        T::widen(block.values.row(token), value);
        if !block.far.clean {
            quarantine(key, value);
        }
    }
    (HeadRows::compact(&buffers.0, dim), HeadRows::compact(&buffers.1, dim))
}

fn drop_weights<A: Accumulator>(
    tile: &mut Tile<A>,
    mask: DropoutMask,
    first_row: usize,
    token: &impl Fn(usize) -> usize,
) {
    let scale = A::of(mask.scale);
    for (index, column) in tile.data.chunks_exact_mut(tile.leading).take(tile.columns).enumerate() {
        for row in tile.rows.clone() {
            let keep = mask.keeps(first_row + row, token(index));
            column[row] = if keep { column[row] * scale } else { A::ZERO };
        }
    }
}
