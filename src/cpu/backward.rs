//! Gradients of attention: the forward's tiles again, probabilities recomputed from the saved log-sum-exp.
//!
//! Per query head, gradients of folded columns are summed where the columns are, scattered to their tokens, and taken
//! home through the fold; heads of a group are added in order. Work is split over (batch, query head, share of the row
//! blocks) by the shapes alone, so that any number of threads gives the same bits. Memory O(N·D).

use super::attend::drop_weights;
use super::block::{transpose, BlockReader};
use super::columns::{Block, ColumnKind, Columns, FarSource};
use super::fold::unfold;
use super::forward::{ForwardInput, Gathered};
use super::gemm_tile::{accumulate, accumulate_columns, scores};
use super::{dot, vectorized, Accumulator, Element, HeadRows, Rows};
use crate::config::Fold;
use rayon::prelude::*;
use std::ops::Range;

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

/// One share of one query head: its gradients of raw keys and values (N, D), and of its rows' queries.
struct HeadGradients<A> {
    dk: Vec<A>,
    dv: Vec<A>,
    /// Of folded queries: each block's rows, in this share's order.
    dq: Vec<(Range<usize>, Vec<A>)>,
}

pub(crate) fn backward<T: Element>(input: &BackwardInput<T>) -> Gradients<T> {
    let problem = input.forward.problem;
    let (heads, group) = (problem.heads, problem.group());
    let shares = UNITS.div_ceil(problem.batch * heads).min(blocks(input).len());
    let size = problem.tokens * problem.head_dim;
    let mut gradients = Gradients {
        dq: vec![T::zero(); problem.batch * heads * size],
        dk: vec![T::zero(); problem.batch * problem.kv_heads * size],
        dv: vec![T::zero(); problem.batch * problem.kv_heads * size],
    };
    // Groups of KV heads bound what is held at once to a few heads per thread, whatever the batch.
    let together = (UNITS.max(2 * rayon::current_num_threads()) / group).max(1);
    let dk = gradients.dk.chunks_mut(size * together);
    let dv = gradients.dv.chunks_mut(size * together);
    let dq = gradients.dq.chunks_mut(size * group * together);
    for (index, ((dk, dv), dq)) in dk.zip(dv).zip(dq).enumerate() {
        let first = index * together * group;
        let units: Vec<HeadGradients<T::Acc>> = (0..dq.len() / size * shares)
            .into_par_iter()
            .map(|unit| head_gradients(input, first + unit / shares, (unit % shares, shares)))
            .collect();
        let by_head: Vec<&[HeadGradients<T::Acc>]> = units.chunks(shares).collect();
        dq.par_chunks_mut(size)
            .zip(&by_head)
            .enumerate()
            .for_each(|(head, (dq, units))| store_queries(input, first + head, units, dq));
        let by_group = units.par_chunks(shares * group);
        let targets = dk.par_chunks_mut(size).zip(dv.par_chunks_mut(size));
        by_group.zip(targets).for_each(|(units, (dk, dv))| {
            store_sum(units.iter().map(|unit| &unit.dk), dk);
            store_sum(units.iter().map(|unit| &unit.dv), dv);
        });
    }
    gradients
}

/// The row blocks of a head.
fn blocks<T: Element>(input: &BackwardInput<T>) -> Vec<Range<usize>> {
    let (tokens, rows) = (
        input.forward.problem.tokens,
        input.forward.settings_with(None).block_rows,
    );
    let block = |start: usize| start..tokens.min(start + rows);
    (0..tokens).step_by(rows).map(block).collect()
}

fn store_sum<'a, T: Element>(mut parts: impl Iterator<Item = &'a Vec<T::Acc>>, target: &mut [T]) {
    let Some(first) = parts.next() else { return };
    let mut sum = first.clone();
    for part in parts {
        sum.iter_mut().zip(part).for_each(|(x, y)| *x += *y);
    }
    T::narrow(&sum, target);
}

/// Gathers a head's query gradients from its shares and takes them home through the pair sum.
fn store_queries<T: Element>(
    input: &BackwardInput<T>,
    batch_head: usize,
    units: &[HeadGradients<T::Acc>],
    dq: &mut [T],
) {
    let (heads, dim) = (input.forward.problem.heads, input.forward.problem.head_dim);
    let mut sum = vec![T::Acc::ZERO; dq.len()];
    for (rows, gradients) in units.iter().flat_map(|unit| &unit.dq) {
        sum[rows.start * dim..rows.end * dim].copy_from_slice(gradients);
    }
    if input.forward.fold == Fold::PairSum {
        let bits = input.forward.head_bits(batch_head / heads, batch_head % heads);
        unfold(Fold::PairSum, &mut sum, bits, dim);
    }
    T::narrow(&sum, dq);
}

/// One share of one query head.
fn head_gradients<T: Element>(
    input: &BackwardInput<T>,
    batch_head: usize,
    (share, shares): (usize, usize),
) -> HeadGradients<T::Acc> {
    let forward = &input.forward;
    let (heads, tokens, dim) = (forward.problem.heads, forward.problem.tokens, forward.problem.head_dim);
    let (batch, head) = (batch_head / heads, batch_head % heads);
    let far = Gathered::new(forward, batch, head);
    let mut reader = BlockReader::new(forward.settings_with(None), tokens);
    let mut sums = Sums::new(forward, reader.leading, far.columns());
    let mut dq = Vec::new();
    // Neighbouring blocks go to different shares: under a causal mask later ones cost more.
    for rows in blocks(input).into_iter().skip(share).step_by(shares) {
        let block = forward.block(batch, head, rows.clone(), &far);
        reader.load_queries(&block);
        sums.load_rows(input, &block);
        reader.edges(&block, |reader, token, row| sums.edge(reader, &block, token, row));
        reader.far_tiles(&block, |reader, columns| sums.tile(reader, &block, columns));
        reader.near_tiles(&block, |reader, columns| sums.tile(reader, &block, columns));
        let scale = T::Acc::of(forward.scale);
        let rows_dq = sums.dq[..rows.len() * dim].iter().map(|x| *x * scale);
        dq.push((rows, rows_dq.collect()));
    }
    let (dk, dv) = sums.finish(&far, forward.head_bits(batch, head), forward.fold);
    HeadGradients { dk, dv, dq }
}

/// Gradients while they are summed, and the block's rows that they are made from.
struct Sums<A> {
    dim: usize,
    /// Of far columns (columns, D), where they are compact.
    far: (Vec<A>, Vec<A>),
    /// Of folded tokens at edges (N, D); in the end of all folded tokens.
    folded: (Vec<A>, Vec<A>),
    /// Of raw tokens (N, D); empty without a window.
    raw: (Vec<A>, Vec<A>),
    /// Of the block's folded queries, without the scale.
    dq: Vec<A>,
    /// The block's output gradients (leading, D) and (D, leading).
    grad_rows: Vec<A>,
    grads: Vec<A>,
    /// Per row: log-sum-exp (base 2), and output gradient times output.
    log_sum_exp: Vec<A>,
    delta: Vec<A>,
    /// Gradients of the weights of one tile, then of its logits.
    tile: Vec<A>,
}

impl<A: Accumulator> Sums<A> {
    fn new<T: Element<Acc = A>>(forward: &ForwardInput<T>, leading: usize, columns: usize) -> Self {
        let (tokens, dim) = (forward.problem.tokens, forward.problem.head_dim);
        let zeros = |count: usize| vec![A::ZERO; count];
        let pair = |rows: usize| (zeros(rows * dim), zeros(rows * dim));
        Self {
            dim,
            far: pair(columns),
            folded: pair(tokens),
            raw: pair(if forward.window > 0 { tokens } else { 0 }),
            dq: zeros(leading * dim),
            grad_rows: zeros(leading * dim),
            grads: zeros(leading * dim),
            log_sum_exp: zeros(leading),
            delta: zeros(leading),
            tile: Vec::new(),
        }
    }

    /// Rows past the block's end have no gradient.
    fn load_rows<T: Element<Acc = A>>(&mut self, input: &BackwardInput<T>, block: &Block<T, T>) {
        let dim = self.dim;
        let grads: HeadRows<T> = input.grad_output.head(block.batch, block.head);
        let outputs = input.output.head(block.batch, block.head);
        let first = (block.batch * input.forward.problem.heads + block.head) * input.forward.problem.tokens;
        self.dq.fill(A::ZERO);
        self.grad_rows.fill(A::ZERO);
        self.log_sum_exp.fill(A::ZERO);
        self.delta.fill(A::ZERO);
        let mut output = vec![A::ZERO; dim];
        for (row, token) in block.rows.clone().enumerate() {
            let grad = &mut self.grad_rows[row * dim..][..dim];
            T::widen(grads.row(token), grad);
            T::widen(outputs.row(token), &mut output);
            self.delta[row] = dot(grad, &output);
            self.log_sum_exp[row] = input.log_sum_exp[first + token];
        }
        let leading = self.delta.len();
        transpose(&self.grad_rows, dim, leading, &mut self.grads);
    }

    fn edge<T: Element<Acc = A>>(&mut self, reader: &BlockReader<T>, block: &Block<T, T>, token: usize, row: usize) {
        let (dim, chain) = (self.dim, &reader.chain);
        let weight = (reader.edge_logit(block, token, row) - self.log_sum_exp[row]).exp2_nonpositive();
        let kept = match block.dropout {
            Some(mask) => mask.factor(block.rows.start + row, token),
            None => A::ONE,
        };
        let grad = &self.grad_rows[row * dim..][..dim];
        let logit = weight * (dot(grad, &chain.value) * kept - self.delta[row]);
        let query = &reader.query_rows[row * dim..][..dim];
        add_scaled(&mut self.dq[row * dim..][..dim], &chain.key, logit);
        add_scaled(&mut self.folded.0[token * dim..][..dim], query, logit);
        add_scaled(&mut self.folded.1[token * dim..][..dim], grad, weight * kept);
    }

    fn tile<T: Element<Acc = A>>(&mut self, reader: &mut BlockReader<T>, block: &Block<T, T>, columns: Columns<A>) {
        let (dim, leading) = (self.dim, reader.leading);
        reader.logits(block, &columns);
        self.tile.resize(reader.tile.len(), A::ZERO);
        let mut weights = columns.tile(&mut reader.tile, leading);
        let mut logits = columns.tile(&mut self.tile, leading);
        scores(&mut logits, &self.grads, &columns.values);
        let (log_sum_exp, delta) = (&self.log_sum_exp, &self.delta);
        vectorized(
            #[inline(always)]
            || to_weights(weights.data, leading, columns.count, columns.rows.clone(), log_sum_exp),
        );
        if let Some(mask) = block.dropout {
            drop_weights(&mut logits, mask, block.rows.start, |index| {
                columns.token(block.far, index)
            });
        }
        vectorized(
            #[inline(always)]
            || {
                let pairs = logits
                    .data
                    .chunks_exact_mut(leading)
                    .zip(weights.data.chunks_exact(leading));
                for (logit, weight) in pairs.take(columns.count) {
                    for row in columns.rows.clone() {
                        logit[row] = weight[row] * (logit[row] - delta[row]);
                    }
                }
            },
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
        let at = columns.first * dim..(columns.first + columns.count) * dim;
        accumulate_columns(&mut values[at.clone()], &weights, &self.grad_rows, dim);
        accumulate_columns(&mut keys[at], &logits, &reader.query_rows, dim);
        accumulate(&mut self.dq, &logits, &columns.keys);
    }

    /// Gradients of the raw keys and values (N, D).
    fn finish(mut self, far: &dyn FarSource<A>, bits: &[u8], fold: Fold) -> (Vec<A>, Vec<A>) {
        let dim = self.dim;
        // The queries came multiplied by scale * log2(e), and logits in base 2 are natural ones times log2(e).
        let to_natural = A::of(std::f64::consts::LN_2);
        let home = |far_part: &[A], mut folded: Vec<A>, raw: &[A]| {
            for (column, gradient) in far_part.chunks_exact(dim).enumerate() {
                let token = far.token(column);
                add_scaled(&mut folded[token * dim..][..dim], gradient, A::ONE);
            }
            unfold(fold, &mut folded, bits, dim);
            folded.iter_mut().zip(raw).for_each(|(x, y)| *x += *y);
            folded
        };
        let mut dk = home(&self.far.0, std::mem::take(&mut self.folded.0), &self.raw.0);
        dk.iter_mut().for_each(|x| *x *= to_natural);
        (dk, home(&self.far.1, std::mem::take(&mut self.folded.1), &self.raw.1))
    }
}

#[inline(always)]
fn to_weights<A: Accumulator>(tile: &mut [A], leading: usize, columns: usize, rows: Range<usize>, log_sum_exp: &[A]) {
    for column in tile.chunks_exact_mut(leading).take(columns) {
        for row in rows.clone() {
            column[row] = (column[row] - log_sum_exp[row]).exp2_nonpositive();
        }
    }
}

fn add_scaled<A: Accumulator>(target: &mut [A], source: &[A], factor: A) {
    target.iter_mut().zip(source).for_each(|(x, y)| *x += *y * factor);
}
