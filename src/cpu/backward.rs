//! Gradients of attention: the forward's tiles again, probabilities recomputed from the saved log-sum-exp.
//!
//! Per query head, gradients of folded columns are summed where the columns are, scattered to their tokens, and taken
//! home through the fold; heads of a group are added in order. Work is split over (batch, query head, share of the row
//! blocks) by the shapes alone, so that any number of threads gives the same bits. Memory O(N·D).

use super::aligned::{padded, Aligned};
use super::attend::drop_weights;
use super::block::BlockReader;
use super::columns::{Block, ColumnKind, Columns, FarSource, Settings, EDGE_COLUMNS};
use super::fold::{unfold, Edge, FarColumns};
use super::forward::{ForwardInput, Gathered};
use super::gemm_tile::{accumulate, accumulate_columns, scores};
use super::pairs::{Packed, PairTiles};
use super::softmax::differentiate;
use super::tasks::{for_each_task, Pool};
use super::transpose::to_columns;
use super::{dot, vectorized, Accumulator, Element, HeadRows, Rows};
use crate::config::Fold;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Fewer (batch, head) than this are split further, into shares of a head's row blocks.
const UNITS: usize = 8;

/// What one backward pass reads.
pub(crate) struct BackwardInput<'a, T: Element> {
    pub forward: ForwardInput<'a, T>,
    /// The forward's output (B, H, N, D) and its gradient.
    pub output: Rows<'a, T>,
    pub grad_output: Rows<'a, T>,
    /// The forward's log-sum-exp in base 2, (B, H, N).
    pub log_sum_exp: &'a [T::Acc],
}

/// (B, H, N, D) for the query, (B, Hk, N, D) for key and value.
pub(crate) struct Gradients<T> {
    pub dq: Vec<T>,
    pub dk: Vec<T>,
    pub dv: Vec<T>,
}

/// Gradients from one share of one query head.
#[derive(Default)]
struct Part<A: Accumulator> {
    /// Of raw keys and values (N, width).
    dk: Aligned<A>,
    dv: Aligned<A>,
    /// Of folded queries (rows, width), in the order of the share's blocks.
    dq: Aligned<A>,
}

/// The query heads of one KV head: where their gradients go, and those that have come in.
struct Group<'out, T: Element> {
    batch: usize,
    kv_head: usize,
    /// (group, N, D)
    dq: &'out mut [T],
    /// (N, D)
    dk: &'out mut [T],
    dv: &'out mut [T],
    /// Head by head, share by share.
    parts: Vec<Option<Part<T::Acc>>>,
}

pub(crate) fn backward<T: Element>(input: &BackwardInput<T>) -> Gradients<T> {
    let problem = input.forward.problem;
    let (heads, kv_heads, group) = (problem.heads, problem.kv_heads, problem.group());
    let size = problem.tokens * problem.head_dim;
    let mut gradients = Gradients {
        dq: vec![T::zero(); problem.batch * heads * size],
        dk: vec![T::zero(); problem.batch * kv_heads * size],
        dv: vec![T::zero(); problem.batch * kv_heads * size],
    };
    let units = group * shares(input);
    let targets = gradients.dk.chunks_mut(size).zip(gradients.dv.chunks_mut(size));
    let targets = gradients.dq.chunks_mut(group * size).zip(targets);
    let groups: Vec<Mutex<Group<T>>> = targets
        .enumerate()
        .map(|(index, (dq, (dk, dv)))| {
            Mutex::new(Group {
                batch: index / kv_heads,
                kv_head: index % kv_heads,
                dq,
                dk,
                dv,
                parts: (0..units).map(|_| None).collect(),
            })
        })
        .collect();
    let pool = Pool::new();
    // A group's units follow each other, so that few parts are held at once, whatever the batch.
    let tasks = (0..groups.len()).flat_map(|group| (0..units).map(move |unit| (group, unit)));
    for_each_task(
        tasks.collect(),
        || Worker::new(&input.forward),
        |worker, (group, unit)| {
            let at = (group / kv_heads, group % kv_heads);
            let part = worker.part(input, at, unit, pool.take().unwrap_or_default());
            let mut group = groups[group].lock().unwrap_or_else(PoisonError::into_inner);
            group.parts[unit] = Some(part);
            if group.parts.iter().all(Option::is_some) {
                group.store(input);
                group.parts.drain(..).flatten().for_each(|part| pool.give(part));
            }
        },
    );
    gradients
}

/// How many shares the row blocks of each head are split into.
fn shares<T: Element>(input: &BackwardInput<T>) -> usize {
    let problem = input.forward.problem;
    UNITS.div_ceil(problem.batch * problem.heads).min(blocks(input).count())
}

/// The row blocks of a head.
fn blocks<T: Element>(input: &BackwardInput<T>) -> impl Iterator<Item = Range<usize>> {
    let (tokens, rows) = (input.forward.problem.tokens, input.forward.settings().block_rows);
    let block = move |start: usize| start..tokens.min(start + rows);
    (0..tokens).step_by(rows).map(block)
}

impl<T: Element> Group<'_, T> {
    /// Adds all parts up, in their order.
    fn store(&mut self, input: &BackwardInput<T>) {
        let (problem, shares) = (input.forward.problem, shares(input));
        let (group, dim, width) = (problem.group(), problem.head_dim, padded(problem.head_dim));
        let parts: Vec<&Part<T::Acc>> = self.parts.iter().flatten().collect();
        store_sum(&parts, |part| &part.dk, dim, self.dk);
        store_sum(&parts, |part| &part.dv, dim, self.dv);
        let size = problem.tokens * dim;
        let mut rows_dq = Part::default();
        rows_dq.dq.make_room(problem.tokens * width);
        for (index, (dq, parts)) in self.dq.chunks_mut(size).zip(parts.chunks(shares)).enumerate() {
            for (share, part) in parts.iter().enumerate() {
                let mut rows = 0;
                for block in blocks(input).skip(share).step_by(shares) {
                    let source = &part.dq[rows * width..][..block.len() * width];
                    rows_dq.dq[block.start * width..block.end * width].copy_from_slice(source);
                    rows += block.len();
                }
            }
            if input.forward.fold == Fold::PairSum {
                let bits = input.forward.head_bits(self.batch, self.kv_head * group + index);
                unfold(Fold::PairSum, &mut rows_dq.dq, bits, width);
            }
            store_sum(&[&rows_dq], |part| &part.dq, dim, dq);
        }
    }
}

/// Adds up rows that lie padded.
fn store_sum<T: Element>(
    parts: &[&Part<T::Acc>],
    rows: impl Fn(&Part<T::Acc>) -> &[T::Acc] + Sync,
    dim: usize,
    target: &mut [T],
) {
    const ROWS: usize = 256;
    let width = padded(dim);
    let store = |(chunk, target): (usize, &mut [T])| {
        let mut sum = vec![T::Acc::ZERO; dim];
        for (row, target) in target.chunks_exact_mut(dim).enumerate() {
            let row = chunk * ROWS + row;
            let mut rows = parts.iter().map(|part| &rows(part)[row * width..][..dim]);
            if let Some(first) = rows.next() {
                sum.copy_from_slice(first);
            }
            for part in rows {
                sum.iter_mut().zip(part).for_each(|(x, y)| *x += *y);
            }
            T::narrow(&sum, target);
        }
    };
    target.par_chunks_mut(ROWS * dim).enumerate().for_each(store);
}

/// One thread's buffers.
struct Worker<'a, T: Element> {
    reader: BlockReader<'a, T>,
    sums: Sums<T::Acc>,
    columns: Option<FarColumns<T::Acc>>,
}

impl<'a, T: Element> Worker<'a, T> {
    fn new(forward: &ForwardInput<'a, T>) -> Self {
        let settings = Settings {
            gradients: true,
            ..forward.settings()
        };
        let reader = BlockReader::new(settings, forward.problem.tokens);
        let sums = Sums::new(&settings, reader.leading);
        Self {
            reader,
            sums,
            columns: None,
        }
    }

    /// Unit `unit` of a KV head's group: one share of one query head.
    fn part(
        &mut self,
        input: &BackwardInput<'a, T>,
        (batch, kv_head): (usize, usize),
        unit: usize,
        mut part: Part<T::Acc>,
    ) -> Part<T::Acc> {
        let (forward, shares) = (&input.forward, shares(input));
        let head = kv_head * forward.problem.group() + unit / shares;
        let Self { reader, sums, columns } = self;
        let far = Gathered::new(forward, batch, head, columns.take());
        sums.start(far.columns(), forward);
        part.dq
            .make_room(forward.problem.tokens.div_ceil(shares).next_multiple_of(reader.leading) * sums.width);
        let mut rows_dq = &mut part.dq[..];
        // Neighbouring blocks go to different shares: under a causal mask later ones cost more.
        for rows in blocks(input).skip(unit % shares).step_by(shares) {
            let block = forward.block(batch, head, rows.clone(), &far);
            reader.load_queries(&block);
            sums.load_rows(input, &block);
            reader.edges(&block, |reader, edge, token, row| {
                sums.edge(reader, &block, edge, (token, row))
            });
            reader.far_tiles(&block, |reader, columns| sums.tile(reader, &block, columns));
            reader.near_tiles(&block, |reader, columns| sums.tile(reader, &block, columns));
            let scale = T::Acc::of(forward.scale);
            let (target, rest) = rows_dq.split_at_mut(rows.len() * sums.width);
            let rows = target.iter_mut().zip(sums.dq.iter());
            rows.for_each(|(x, y)| *x = *y * scale);
            rows_dq = rest;
        }
        sums.take_home(&far, forward.head_bits(batch, head), forward.fold);
        *columns = far.into_columns();
        std::mem::swap(&mut part.dk, &mut sums.folded.0);
        std::mem::swap(&mut part.dv, &mut sums.folded.1);
        part
    }
}

/// Gradients while they are summed, and the block's rows that they are made from.
struct Sums<A> {
    dim: usize,
    /// How far rows lie apart.
    width: usize,
    /// Of far columns (columns, width), where they are compact.
    far: (Aligned<A>, Aligned<A>),
    /// Of folded tokens at edges (N, width); in the end of all folded tokens.
    folded: (Aligned<A>, Aligned<A>),
    /// Of raw tokens (N, width); empty without a window.
    raw: (Aligned<A>, Aligned<A>),
    /// Of the block's folded queries (leading, width), without the scale.
    dq: Aligned<A>,
    /// The block's output gradients (leading, width) and (D, leading).
    grad_rows: Aligned<A>,
    grads: Aligned<A>,
    /// The same for products in bf16 pairs, and raw values for them.
    products: Option<(PairTiles, Packed)>,
    /// From what a tile of logits holds to base 2.
    unit: A,
    /// Per row: minus log-sum-exp (base 2), and output gradient times output.
    minus_log_sum_exp: Vec<A>,
    delta: Vec<A>,
    /// Gradients of the weights of one tile, then of its logits.
    tile: Aligned<A>,
}

impl<A: Accumulator> Sums<A> {
    fn new(settings: &Settings<A>, leading: usize) -> Self {
        let dim = settings.head_dim;
        let width = padded(dim);
        let products = settings.pairs.map(|pairs| {
            let tiles = PairTiles::new(pairs, leading, 0, dim);
            (tiles, Packed::keys_only(pairs, dim, EDGE_COLUMNS))
        });
        Self {
            products,
            unit: A::of(settings.pairs.map_or(1.0, |pairs| f64::from(pairs.factor))),
            dim,
            width,
            far: Default::default(),
            folded: Default::default(),
            raw: Default::default(),
            dq: Aligned::zeroed(leading * width),
            grad_rows: Aligned::zeroed(leading * width),
            grads: Aligned::zeroed(leading * dim),
            minus_log_sum_exp: vec![A::ZERO; leading],
            delta: vec![A::ZERO; leading],
            tile: Aligned::default(),
        }
    }

    /// Starts a head of so many far columns.
    fn start<T: Element<Acc = A>>(&mut self, columns: usize, forward: &ForwardInput<T>) {
        let tokens = forward.problem.tokens;
        let raw = if forward.window > 0 { tokens } else { 0 };
        for (rows, count) in [
            (&mut self.far, columns),
            (&mut self.folded, tokens),
            (&mut self.raw, raw),
        ] {
            for rows in [&mut rows.0, &mut rows.1] {
                rows.make_room(count * self.width);
                rows[..count * self.width].fill(A::ZERO);
            }
        }
    }

    /// Rows past the block's end have no gradient.
    fn load_rows<T: Element<Acc = A>>(&mut self, input: &BackwardInput<T>, block: &Block<T, T>) {
        let (dim, width) = (self.dim, self.width);
        let grads: HeadRows<T> = input.grad_output.head(block.batch, block.head);
        let outputs = input.output.head(block.batch, block.head);
        let first = (block.batch * input.forward.problem.heads + block.head) * input.forward.problem.tokens;
        self.dq.fill(A::ZERO);
        self.grad_rows.fill(A::ZERO);
        self.minus_log_sum_exp.fill(A::ZERO);
        self.delta.fill(A::ZERO);
        let mut output = vec![A::ZERO; dim];
        for (row, token) in block.rows.clone().enumerate() {
            let grad = &mut self.grad_rows[row * width..][..dim];
            T::widen(grads.row(token), grad);
            T::widen(outputs.row(token), &mut output);
            self.delta[row] = dot(grad, &output);
            self.minus_log_sum_exp[row] = A::ZERO - input.log_sum_exp[first + token];
        }
        let leading = self.delta.len();
        match &mut self.products {
            Some((products, _)) => products.load_queries(A::singles(&self.grad_rows), (dim, width)),
            None => to_columns(&self.grad_rows, (dim, width), leading, &mut self.grads),
        }
    }

    fn edge<T: Element<Acc = A>>(
        &mut self,
        reader: &BlockReader<T>,
        block: &Block<T, T>,
        edge: Edge<A>,
        (token, row): (usize, usize),
    ) {
        let (dim, width) = (self.dim, self.width);
        let weight = (reader.edge_logit(block, edge, token, row) + self.minus_log_sum_exp[row]).exp2_nonpositive();
        let kept = match block.dropout {
            Some(mask) => mask.factor(block.rows.start + row, token),
            None => A::ONE,
        };
        let grad = &self.grad_rows[row * width..][..dim];
        let logit = weight * (dot(grad, edge.value) * kept - self.delta[row]);
        let query = &reader.query_rows[row * width..][..dim];
        add_scaled(&mut self.dq[row * width..][..dim], edge.key, logit);
        add_scaled(&mut self.folded.0[token * width..][..dim], query, logit);
        add_scaled(&mut self.folded.1[token * width..][..dim], grad, weight * kept);
    }

    fn tile<T: Element<Acc = A>>(&mut self, reader: &mut BlockReader<T>, block: &Block<T, T>, columns: Columns<A>) {
        let (width, leading) = (self.width, reader.leading);
        reader.logits(block, &columns);
        self.tile.make_room(reader.tile.len());
        let mut weights = columns.tile(&mut reader.tile, leading);
        let mut logits = columns.tile(&mut self.tile, leading);
        match &mut self.products {
            Some((products, near)) => {
                columns.pack_raw_values(near);
                let packed = columns.packed_values(block.far, near);
                products.scores(A::singles_mut(logits.data), packed, columns.count);
            }
            None => scores(&mut logits, &self.grads, &columns.values),
        }
        if let Some(mask) = block.dropout {
            drop_weights(&mut logits, mask, block.rows.start, |index| {
                columns.token(block.far, index)
            });
        }
        differentiate(
            &mut weights,
            &mut logits,
            self.unit,
            (&self.minus_log_sum_exp, &self.delta),
        );
        if let Some(mask) = block.dropout {
            drop_weights(&mut weights, mask, block.rows.start, |index| {
                columns.token(block.far, index)
            });
        }
        let (keys, values) = match columns.kind {
            ColumnKind::Near => (&mut self.raw.0, &mut self.raw.1),
            _ => (&mut self.far.0, &mut self.far.1),
        };
        let at = columns.first * width..(columns.first + columns.count) * width;
        accumulate_columns(&mut values[at.clone()], width, &weights, &self.grad_rows);
        accumulate_columns(&mut keys[at], width, &logits, &reader.query_rows);
        accumulate(&mut self.dq, width, &logits, &columns.keys);
    }

    /// Makes gradients of the raw keys and values of what was summed; they end in `folded`.
    fn take_home(&mut self, far: &dyn FarSource<A>, bits: &[u8], fold: Fold) {
        let (width, columns) = (self.width, far.columns());
        // The queries came multiplied by scale * log2(e), and logits in base 2 are natural ones times log2(e).
        let factors = [A::of(std::f64::consts::LN_2), A::ONE];
        let parts = [
            (&mut self.far.0, &mut self.folded.0, &self.raw.0),
            (&mut self.far.1, &mut self.folded.1, &self.raw.1),
        ];
        for ((far_part, folded, raw), factor) in parts.into_iter().zip(factors) {
            let far_part = &far_part[..columns * width];
            for (column, gradient) in far_part.chunks_exact(width).enumerate() {
                let token = far.token(column);
                add_scaled(&mut folded[token * width..][..width], gradient, A::ONE);
            }
            vectorized(
                #[inline(always)]
                || {
                    unfold(fold, folded, bits, width);
                    folded.iter_mut().zip(raw.iter()).for_each(|(x, y)| *x += *y);
                    folded.iter_mut().for_each(|x| *x *= factor);
                },
            );
        }
    }
}

fn add_scaled<A: Accumulator>(target: &mut [A], source: &[A], factor: A) {
    vectorized(
        #[inline(always)]
        || target.iter_mut().zip(source).for_each(|(x, y)| *x += *y * factor),
    )
}
