//! Gradients of one query head, summed block by block.

use crate::config::Fold;
use crate::cpu::attend::input::{BackwardInput, ForwardInput};
use crate::cpu::attend::worker::drop_weights;
use crate::cpu::columns::block::BlockReader;
use crate::cpu::columns::chain::{unfold, Edge};
use crate::cpu::columns::source::FarSource;
use crate::cpu::columns::tiles::{Block, BlockSettings, ColumnKind, Columns, EDGE_COLUMNS};
use crate::cpu::number::aligned::{padded, Aligned};
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::rows::HeadRows;
use crate::cpu::number::vectorized::{dot, vectorized};
use crate::cpu::tile::bf16::{ColumnSums, PairGradients};
use crate::cpu::tile::gemm_tile::{accumulate, accumulate_columns, scores, Tile};
use crate::cpu::tile::product::Left;
use crate::cpu::tile::softcap::uncap;
use crate::cpu::tile::softmax::{differentiate, RowSums};
use crate::cpu::tile::transpose::to_columns;

/// Sums of gradients, and the block's rows that they are made from.
pub(crate) struct Sums<A> {
    /// Sizes of a key and of a value.
    dim: usize,
    value_dim: usize,
    /// Numbers between the starts of two rows of queries or keys, and of values or outputs.
    pub width: usize,
    value_width: usize,
    /// Gradients of far columns (columns, width), by column.
    far: (Aligned<A>, Aligned<A>),
    /// Gradients of folded tokens at edges (N, width); in the end of all folded tokens.
    pub folded: (Aligned<A>, Aligned<A>),
    /// Gradients of raw tokens (N, width); empty without a window.
    raw: (Aligned<A>, Aligned<A>),
    /// Gradients of the bias of far columns, by column; empty without such a bias.
    column_bias: Vec<A>,
    /// Gradients of the block's folded queries (leading, width), without the scale.
    pub dq: Aligned<A>,
    /// The block's output gradients (leading, width of values) and (Dv, leading).
    grad_rows: Aligned<A>,
    grads: Aligned<A>,
    /// In place of `grads` where products are made in bf16 pairs.
    products: Option<PairGradients>,
    /// The factor that makes the block's queries in products with tiles equal to the queries at edges.
    query_factor: A,
    /// See [`RowSums`].
    minus_max: Vec<A>,
    minus_log2_sum: Vec<A>,
    delta: Vec<A>,
    /// The block's rows whose gradients are NaN: see [`Self::load_rows`].
    poisoned: Vec<bool>,
    /// Gradients of the weights of one tile, then of its logits.
    tile: Aligned<A>,
}

impl<A: Accumulator> Sums<A> {
    pub fn new(settings: &BlockSettings<A>, leading: usize) -> Self {
        let dim = settings.head_dim;
        let value_dim = settings.value_dim;
        let (width, value_width) = (padded(dim), padded(value_dim));
        let columns = (settings.far_columns(), EDGE_COLUMNS);
        Self {
            products: settings
                .pairs
                .map(|pairs| PairGradients::new(pairs, leading, columns, dim)),
            query_factor: A::of(settings.pairs.map_or(1.0, |pairs| f64::from(pairs.factor))),
            dim,
            value_dim,
            width,
            value_width,
            far: Default::default(),
            folded: Default::default(),
            raw: Default::default(),
            column_bias: Vec::new(),
            dq: Aligned::zeroed(leading * width),
            grad_rows: Aligned::zeroed(leading * value_width),
            grads: Aligned::zeroed(if settings.pairs.is_none() {
                leading * value_dim
            } else {
                0
            }),
            minus_max: vec![A::ZERO; leading],
            minus_log2_sum: vec![A::ZERO; leading],
            delta: vec![A::ZERO; leading],
            poisoned: vec![false; leading],
            tile: Aligned::default(),
        }
    }

    /// Starts a head with `columns` far columns.
    pub fn start<T: Element<Acc = A>>(&mut self, columns: usize, forward: &ForwardInput<T>) {
        let tokens = forward.problem.tokens;
        self.column_bias.clear();
        if forward.column_bias.is_some() {
            self.column_bias.resize(columns, A::ZERO);
        }
        let raw = if forward.window > 0 { tokens } else { 0 };
        for (rows, count) in [
            (&mut self.far, columns),
            (&mut self.folded, tokens),
            (&mut self.raw, raw),
        ] {
            for (rows, width) in [(&mut rows.0, self.width), (&mut rows.1, self.value_width)] {
                rows.make_room(count * width);
                rows[..count * width].fill(A::ZERO);
            }
        }
    }

    /// Loads the block's output gradients; rows past the block's end have gradient 0. A row that is NaN, or whose
    /// gradient is not finite, must make NaN of the tokens that it sees and of no other token of a tile. So its logits
    /// become NaN, which a mask replaces, and every number that is multiplied with them is 0.
    pub fn load_rows<T: Element<Acc = A>>(
        &mut self,
        input: &BackwardInput<T>,
        block: &Block<T, T>,
        reader: &mut BlockReader<T>,
    ) {
        let (dim, width) = (self.value_dim, self.value_width);
        let grads: HeadRows<T> = input.grad_output.head(block.batch, block.head);
        let outputs = input.output.head(block.batch, block.head);
        let (queries, first_row) = (input.forward.problem.queries, input.forward.first_row());
        let first = (block.batch * input.forward.problem.heads + block.head) * queries;
        self.dq.fill(A::ZERO);
        self.grad_rows.fill(A::ZERO);
        self.minus_max.fill(A::ZERO);
        self.minus_log2_sum.fill(A::ZERO);
        self.delta.fill(A::ZERO);
        self.poisoned.fill(false);
        let mut output = vec![A::ZERO; dim];
        for (row, query) in block.rows.clone().map(|token| token - first_row).enumerate() {
            let grad = &mut self.grad_rows[row * width..][..dim];
            T::widen(grads.row(query), grad);
            T::widen(outputs.row(query), &mut output);
            let delta = dot(grad, &output);
            let [max, log2_sum] = input.log_sum_exp[first + query].map(|part| A::ZERO - part);
            if delta.finite() && log2_sum.finite() && max.finite() {
                self.delta[row] = delta;
                (self.minus_max[row], self.minus_log2_sum[row]) = (max, log2_sum);
            } else {
                self.poisoned[row] = true;
                grad.fill(A::ZERO);
            }
        }
        if self.poisoned.contains(&true) {
            reader.poison(&self.poisoned);
        }
        let leading = self.delta.len();
        match &mut self.products {
            Some(products) => products.load_rows(A::singles(&self.grad_rows), (dim, width)),
            None => to_columns(&self.grad_rows, (dim, width), leading, &mut self.grads),
        }
    }

    pub fn edge<T: Element<Acc = A>>(
        &mut self,
        reader: &BlockReader<T>,
        block: &Block<T, T>,
        edge: Edge<A>,
        (token, row): (usize, usize),
    ) {
        let (dim, width) = (self.dim, self.width);
        let (value_dim, value_width) = (self.value_dim, self.value_width);
        let [weight, slope] = match self.poisoned[row] {
            true => [A::NAN; 2],
            false => {
                let [logit, slope] = reader.edge_logit(block, edge, token, row);
                let weight = (logit + self.minus_max[row] + self.minus_log2_sum[row]).exp2_nonpositive();
                [weight, slope]
            }
        };
        let kept = match block.dropout {
            Some(mask) => mask.factor(block.rows.start + row, token),
            None => A::ONE,
        };
        let grad = &self.grad_rows[row * value_width..][..value_dim];
        let logit = weight * (dot(grad, edge.value) * kept - self.delta[row]) * slope;
        let query = &reader.query_rows[row * width..][..dim];
        add_scaled(&mut self.dq[row * width..][..dim], edge.key, logit);
        add_scaled(&mut self.folded.0[token * width..][..dim], query, logit);
        add_scaled(
            &mut self.folded.1[token * value_width..][..value_dim],
            grad,
            weight * kept,
        );
    }

    /// Must be called after the last edge and before the first tile.
    pub fn start_tiles(&mut self) {
        if let Some(products) = &mut self.products {
            products.load_queries(A::singles(&self.dq), (self.dim, self.width));
        }
    }

    pub fn tile<T: Element<Acc = A>>(&mut self, reader: &mut BlockReader<T>, block: &Block<T, T>, columns: Columns<A>) {
        let (width, value_width, leading) = (self.width, self.value_width, reader.leading);
        reader.logits(block, &columns);
        self.tile.make_room(reader.tile.len());
        let (keys, values) = match columns.kind {
            ColumnKind::Near => (&mut self.raw.0, &mut self.raw.1),
            _ => (&mut self.far.0, &mut self.far.1),
        };
        let at = |width: usize| columns.first * width..(columns.first + columns.count) * width;
        let (keys, values) = (&mut keys[at(width)], &mut values[at(value_width)]);
        let rows = RowSums {
            minus_max: &self.minus_max[..],
            minus_log2_sum: &self.minus_log2_sum[..],
            delta: &self.delta[..],
        };
        if let (Some(products), Some((queries, near))) = (&mut self.products, &mut reader.products) {
            columns.pack_raw_values(&mut products.near);
            return products.tile(
                (
                    A::singles(&reader.tile),
                    A::singles(&reader.slopes),
                    A::singles_mut(&mut self.tile),
                ),
                queries,
                (columns.packed(block.far, near), columns.packed_values(block.far)),
                columns.count,
                RowSums {
                    minus_max: A::singles(rows.minus_max),
                    minus_log2_sum: A::singles(rows.minus_log2_sum),
                    delta: A::singles(rows.delta),
                },
                ColumnSums {
                    keys: A::singles_mut(keys),
                    values: A::singles_mut(values),
                    width,
                },
            );
        }
        let mut weights = columns.tile(&mut reader.tile, leading);
        let mut logits = columns.tile(&mut self.tile, leading);
        let left = (Left::from(&columns.values), columns.values.dim);
        scores(&mut logits, &self.grads, left, None);
        let token = |index| columns.token(block.far, index);
        if let Some(mask) = block.dropout {
            drop_weights(&mut logits, mask, block.rows.start, token);
        }
        differentiate(&mut weights, &mut logits, rows);
        if columns.kind != ColumnKind::Near && !self.column_bias.is_empty() {
            let sums = &mut self.column_bias[columns.first..][..columns.count];
            add_columns(&logits, block.rows.len(), sums);
        }
        uncap_tile(&weights, &mut logits, &reader.slopes);
        if let Some(mask) = block.dropout {
            drop_weights(&mut weights, mask, block.rows.start, token);
        }
        accumulate_columns(values, value_width, &weights, &self.grad_rows);
        accumulate_columns(keys, width, &logits, &reader.query_rows);
        accumulate(&mut self.dq, width, &logits, &columns.keys);
    }

    /// Stores the gradients of the block's queries, (rows, width), times `scale`. Must be called after the last tile.
    pub fn store_queries(&mut self, scale: A, target: &mut [A]) {
        if let Some(products) = &mut self.products {
            products.store_queries(A::singles_mut(&mut self.dq), (self.dim, self.width));
        }
        target.iter_mut().zip(self.dq.iter()).for_each(|(x, y)| *x = *y * scale);
    }

    /// Writes the gradients of the far columns' bias to their tokens, where there is such a bias; other tokens get 0.
    pub fn store_column_bias(&self, far: &dyn FarSource<A>, target: &mut Vec<A>, tokens: usize) {
        target.clear();
        if self.column_bias.is_empty() {
            return;
        }
        target.resize(tokens, A::ZERO);
        for (column, gradient) in self.column_bias.iter().enumerate() {
            target[far.token(column)] = *gradient;
        }
    }

    /// Unfolds the summed gradients to gradients of the raw keys and values; they end in `folded`.
    pub fn take_home(&mut self, far: &dyn FarSource<A>, bits: &[u8], fold: Fold) {
        let columns = far.columns();
        // The queries come multiplied by scale * log2(e), and logits in base 2 are natural logits times log2(e).
        let factors = [(self.query_factor, A::of(std::f64::consts::LN_2)), (A::ONE, A::ONE)];
        let parts = [
            (&mut self.far.0, &mut self.folded.0, &self.raw.0, self.width),
            (&mut self.far.1, &mut self.folded.1, &self.raw.1, self.value_width),
        ];
        for ((far_part, folded, raw, width), (of_tiles, factor)) in parts.into_iter().zip(factors) {
            let far_part = &far_part[..columns * width];
            for (column, gradient) in far_part.chunks_exact(width).enumerate() {
                let token = far.token(column);
                add_scaled(&mut folded[token * width..][..width], gradient, of_tiles);
            }
            vectorized(
                #[inline(always)]
                || {
                    unfold(fold, folded, bits, width);
                    folded.iter_mut().zip(raw.iter()).for_each(|(x, y)| *x += *y * of_tiles);
                    folded.iter_mut().for_each(|x| *x *= factor);
                },
            );
        }
    }
}

/// Adds each column of a tile, but for rows from `rows` on, to its sum.
fn add_columns<A: Accumulator>(tile: &Tile<A>, rows: usize, sums: &mut [A]) {
    let rows = tile.rows.start..tile.rows.end.min(rows);
    vectorized(
        #[inline(always)]
        || {
            for (column, sum) in tile.data.chunks_exact(tile.leading).zip(sums.iter_mut()) {
                for x in column.get(rows.clone()).unwrap_or_default() {
                    *sum += *x;
                }
            }
        },
    )
}

/// Changes gradients of capped logits to those of the logits; without a softcap there are no `slopes`.
fn uncap_tile<A: Accumulator>(weights: &Tile<A>, gradients: &mut Tile<A>, slopes: &[A]) {
    if slopes.is_empty() {
        return;
    }
    let (leading, rows) = (weights.leading, weights.rows.clone());
    vectorized(
        #[inline(always)]
        || {
            for column in 0..weights.columns {
                let at = column * leading + rows.start..column * leading + rows.end;
                let weights = &weights.data[at.clone()];
                uncap(weights, &mut gradients.data[at.clone()], &slopes[at]);
            }
        },
    )
}

fn add_scaled<A: Accumulator>(target: &mut [A], source: &[A], factor: A) {
    vectorized(
        #[inline(always)]
        || target.iter_mut().zip(source).for_each(|(x, y)| *x += *y * factor),
    )
}
