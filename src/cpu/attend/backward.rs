//! Gradients of attention: the forward's tiles again, probabilities recomputed from the saved log-sum-exp.
//!
//! Per query head, gradients of folded columns are summed by column, scattered to the columns' tokens, and unfolded to
//! the raw tokens. The query heads of a group are added in order. Work is split over
//! (batch, query head, share of the row blocks) by the shapes alone, so that any number of threads gives the same bits.
//! Memory is O(N·D).

use crate::config::Fold;
use crate::cpu::attend::head_gradients::Sums;
use crate::cpu::attend::input::{BackwardInput, ForwardInput, Gathered};
use crate::cpu::columns::block::BlockReader;
use crate::cpu::columns::chain::unfold;
use crate::cpu::columns::far::FarColumns;
use crate::cpu::columns::source::FarSource;
use crate::cpu::number::aligned::{padded, Aligned};
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::work::tasks::{for_each_task, Pool};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// A call with fewer (batch, head) than this is split further, into shares of a head's row blocks.
const UNITS: usize = 8;

/// Gradients: (B, H, Nq, D) for the query, (B, Hk, N, D) for the key, (B, Hk, N, Dv) for the value.
pub(crate) struct Gradients<T: Element> {
    pub dq: Vec<T>,
    pub dk: Vec<T>,
    pub dv: Vec<T>,
    /// (B, Hk, N) of the column bias; empty without one.
    pub column_bias: Vec<T::Acc>,
}

/// Gradients from one share of one query head.
#[derive(Default)]
struct GradientPart<A: Accumulator> {
    /// Gradients of raw keys (`dk`) and values (`dv`), (N, width of a padded row).
    dk: Aligned<A>,
    dv: Aligned<A>,
    /// Gradients of folded queries (rows, width), in the order of the share's blocks.
    dq: Aligned<A>,
    /// Gradients of the column bias (N); empty without one.
    column_bias: Vec<A>,
}

/// The query heads of one KV head: the targets of their gradients, and the parts that are finished.
struct Group<'out, T: Element> {
    batch: usize,
    kv_head: usize,
    /// (group, Nq, D)
    dq: &'out mut [T],
    /// (N, D)
    dk: &'out mut [T],
    /// (N, Dv)
    dv: &'out mut [T],
    /// (N), or empty.
    column_bias: &'out mut [T::Acc],
    /// Head by head, share by share.
    parts: Vec<Option<GradientPart<T::Acc>>>,
}

pub(crate) fn backward<T: Element>(input: &BackwardInput<T>) -> Gradients<T> {
    let problem = input.forward.problem;
    let (heads, kv_heads, group) = (problem.heads, problem.kv_heads, problem.group());
    let size = problem.tokens * problem.head_dim;
    let value_size = problem.tokens * problem.value_dim;
    let query_size = problem.queries * problem.head_dim;
    let mut gradients = Gradients {
        dq: vec![T::zero(); problem.batch * heads * query_size],
        dk: vec![T::zero(); problem.batch * kv_heads * size],
        dv: vec![T::zero(); problem.batch * kv_heads * value_size],
        column_bias: match input.forward.column_bias {
            Some(_) => vec![T::Acc::ZERO; problem.batch * kv_heads * problem.tokens],
            None => Vec::new(),
        },
    };
    let mut biases = gradients.column_bias.chunks_mut(problem.tokens);
    let units = group * shares(input);
    let targets = gradients.dk.chunks_mut(size).zip(gradients.dv.chunks_mut(value_size));
    let targets = gradients.dq.chunks_mut(group * query_size).zip(targets);
    let groups: Vec<Mutex<Group<T>>> = targets
        .enumerate()
        .map(|(index, (dq, (dk, dv)))| {
            Mutex::new(Group {
                batch: index / kv_heads,
                kv_head: index % kv_heads,
                dq,
                dk,
                dv,
                column_bias: biases.next().unwrap_or_default(),
                parts: (0..units).map(|_| None).collect(),
            })
        })
        .collect();
    let pool = Pool::new();
    // A group's units follow each other, so that few parts are held at once for any batch.
    let tasks = (0..groups.len()).flat_map(|group| (0..units).map(move |unit| (group, unit)));
    for_each_task(
        tasks.collect(),
        || GradientWorker::new(&input.forward),
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

/// The number of shares that the row blocks of each head are split into.
fn shares<T: Element>(input: &BackwardInput<T>) -> usize {
    let problem = input.forward.problem;
    UNITS.div_ceil(problem.batch * problem.heads).min(blocks(input).count())
}

/// The row blocks of a head, counted from the first query's row.
fn blocks<T: Element>(input: &BackwardInput<T>) -> impl Iterator<Item = Range<usize>> {
    let queries = input.forward.problem.queries;
    let rows = input.forward.settings().of_gradients(queries).block_rows;
    let block = move |start: usize| start..queries.min(start + rows);
    (0..queries).step_by(rows).map(block)
}

impl<T: Element> Group<'_, T> {
    /// Adds up all parts, in order, and stores the sums.
    fn store(&mut self, input: &BackwardInput<T>) {
        let (problem, shares) = (input.forward.problem, shares(input));
        let (group, dim, width) = (problem.group(), problem.head_dim, padded(problem.head_dim));
        let parts: Vec<&GradientPart<T::Acc>> = self.parts.iter().flatten().collect();
        store_sum(&parts, |part| &part.dk, dim, self.dk);
        store_sum(&parts, |part| &part.dv, problem.value_dim, self.dv);
        for part in &parts {
            let sums = self.column_bias.iter_mut().zip(&part.column_bias);
            sums.for_each(|(sum, x)| *sum += *x);
        }
        let size = problem.queries * dim;
        let mut rows_dq = GradientPart::default();
        for (index, (dq, parts)) in self.dq.chunks_mut(size).zip(parts.chunks(shares)).enumerate() {
            if let ([part], false) = (parts, input.forward.fold.folds_queries()) {
                store_sum(&[*part], |part| &part.dq, dim, dq);
                continue;
            }
            rows_dq.dq.make_room(problem.queries * width);
            for (share, part) in parts.iter().enumerate() {
                let mut rows = 0;
                for block in blocks(input).skip(share).step_by(shares) {
                    let source = &part.dq[rows * width..][..block.len() * width];
                    rows_dq.dq[block.start * width..block.end * width].copy_from_slice(source);
                    rows += block.len();
                }
            }
            // With fewer queries than tokens nothing is hidden under such a fold.
            if input.forward.fold.folds_queries() {
                let bits = input.forward.head_bits(self.batch, self.kv_head * group + index);
                unfold(Fold::PairSum, &mut rows_dq.dq, bits, width);
            }
            store_sum(&[&rows_dq], |part| &part.dq, dim, dq);
        }
    }
}

/// Adds up padded rows and stores the sums.
fn store_sum<T: Element>(
    parts: &[&GradientPart<T::Acc>],
    rows: impl Fn(&GradientPart<T::Acc>) -> &[T::Acc] + Sync,
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
struct GradientWorker<'a, T: Element> {
    reader: BlockReader<'a, T>,
    sums: Sums<T::Acc>,
    columns: Option<FarColumns<T::Acc>>,
}

impl<'a, T: Element> GradientWorker<'a, T> {
    fn new(forward: &ForwardInput<'a, T>) -> Self {
        let settings = forward.settings().of_gradients(forward.problem.queries);
        let reader = BlockReader::new(settings, forward.problem.tokens);
        let sums = Sums::new(&settings, reader.leading);
        Self {
            reader,
            sums,
            columns: None,
        }
    }

    /// Computes unit `unit` of a KV head's group: one share of one query head.
    fn part(
        &mut self,
        input: &BackwardInput<'a, T>,
        (batch, kv_head): (usize, usize),
        unit: usize,
        mut part: GradientPart<T::Acc>,
    ) -> GradientPart<T::Acc> {
        let (forward, shares) = (&input.forward, shares(input));
        let head = kv_head * forward.problem.group() + unit / shares;
        let Self { reader, sums, columns } = self;
        let far = Gathered::new(forward, batch, head, columns.take());
        sums.start(far.columns(), forward);
        part.dq.make_room(
            forward
                .problem
                .queries
                .div_ceil(shares)
                .next_multiple_of(reader.leading)
                * sums.width,
        );
        let mut rows_dq = &mut part.dq[..];
        // Neighbouring blocks go to different shares: under a causal mask later blocks cost more.
        for rows in blocks(input).skip(unit % shares).step_by(shares) {
            let block = forward.block(batch, head, rows.clone(), &far);
            reader.load_queries(&block);
            sums.load_rows(input, &block, reader);
            reader.edges(
                &block,
                #[inline(always)]
                |reader, edge, token, row| sums.edge(reader, &block, edge, (token, row)),
            );
            sums.start_tiles();
            reader.far_tiles(&block, |reader, columns| sums.tile(reader, &block, columns));
            reader.near_tiles(&block, |reader, columns| sums.tile(reader, &block, columns));
            let (target, rest) = rows_dq.split_at_mut(rows.len() * sums.width);
            sums.store_queries(T::Acc::of(forward.scale), target);
            rows_dq = rest;
        }
        sums.store_column_bias(&far, &mut part.column_bias, forward.problem.tokens);
        sums.take_home(&far, forward.head_bits(batch, head), forward.fold);
        *columns = far.into_columns();
        std::mem::swap(&mut part.dk, &mut sums.folded.0);
        std::mem::swap(&mut part.dv, &mut sums.folded.1);
        part
    }
}
