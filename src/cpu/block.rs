//! Attention of one block of rows over its columns: {far: compact; edge; near}, with an online softmax.
//!
//! The columns' source is a trait, so that one call's gathered columns and a cache's store take the same way.

use super::fold::{all_finite, quarantine, raw_rows, ChainFold};
use super::gemm_tile::{accumulate, scores, Tile};
use super::philox::DropoutMask;
use super::softmax::{OnlineSoftmax, LANES};
use super::{dot, Accumulator, Element, HeadRows};
use crate::config::Fold;
use std::ops::Range;

/// Rows of a block: with [`FAR_COLUMNS`] of f32 the tile of scores is 256 KiB, a quarter of a 1 MiB L2, beside 32 KiB
/// of queries and as much output at D = 64.
const BLOCK_ROWS: usize = 128;
/// Columns of a tile that every row sees.
const FAR_COLUMNS: usize = 512;
/// Columns of a tile that only some rows see (the causal diagonal, the window's band): small, since the rest is wasted.
const EDGE_COLUMNS: usize = 32;

/// Fewer rows for short inputs: more tasks, and less of the causal diagonal is computed in vain.
pub(crate) fn block_rows(tokens: usize) -> usize {
    let wanted = if tokens >= 8 * BLOCK_ROWS {
        BLOCK_ROWS
    } else {
        BLOCK_ROWS / 2
    };
    wanted.min(tokens.next_multiple_of(LANES))
}

/// An additive bias as a strided (B, H, rows, N) view; its first row is the call's first row.
#[derive(Clone, Copy)]
pub(crate) struct BiasView<'a, A> {
    pub data: &'a [A],
    pub offset: usize,
    pub strides: [usize; 4],
}

/// What is the same for all blocks of a call.
#[derive(Clone, Copy)]
pub(crate) struct Settings<'a, A> {
    pub head_dim: usize,
    /// The largest block, see [`block_rows`].
    pub block_rows: usize,
    /// The token index of the call's first row.
    pub first_row: usize,
    pub fold: Fold,
    pub window: usize,
    pub causal: bool,
    pub scale: f64,
    pub bias: Option<BiasView<'a, A>>,
}

/// Where a block finds its far columns, which are in token order.
pub(crate) trait FarSource<A>: Sync {
    fn columns(&self) -> usize;
    /// How many columns hold tokens before `token`.
    fn before(&self, token: usize) -> usize;
    /// The token index of a column.
    fn token(&self, column: usize) -> usize;
    /// log2 n of some columns; None where all are 0.
    fn log2_sizes(&self, columns: Range<usize>) -> Option<&[A]>;
    /// Keys and values of some columns, through `scratch` where they are stored in another dtype.
    fn rows<'s>(&'s self, columns: Range<usize>, scratch: &'s mut RowScratch<A>) -> KeysValues<'s, A>;
}

/// Keys and values of the same columns.
pub(crate) type KeysValues<'s, A> = (HeadRows<'s, A>, HeadRows<'s, A>);
/// Buffers for keys and values that need widening.
pub(crate) type RowScratch<A> = (Vec<A>, Vec<A>);

/// Merge bits of one head, from token `base` on.
#[derive(Clone, Copy)]
pub(crate) struct Bits<'b> {
    pub bits: &'b [u8],
    pub base: usize,
}

impl Bits<'_> {
    pub fn hidden(&self, token: usize) -> bool {
        token >= self.base && self.bits.get(token - self.base) == Some(&1)
    }
}

/// Raw keys and values of one head, from token `base` on.
#[derive(Clone, Copy)]
pub(crate) struct RawRows<'b, R> {
    pub keys: HeadRows<'b, R>,
    pub values: HeadRows<'b, R>,
    pub base: usize,
    /// Whether none of them is NaN or infinite.
    pub clean: bool,
}

impl<'b, R> RawRows<'b, R> {
    pub fn key(&self, token: usize) -> &'b [R] {
        self.keys.row(token - self.base)
    }

    pub fn value(&self, token: usize) -> &'b [R] {
        self.values.row(token - self.base)
    }
}

/// One block of rows: queries in Q, raw keys and values in R.
pub(crate) struct Block<'b, Q: Element, R: Element<Acc = Q::Acc>> {
    pub batch: usize,
    /// Query head.
    pub head: usize,
    /// Token indices.
    pub rows: Range<usize>,
    /// The call's queries; row 0 is token `Settings::first_row`.
    pub queries: HeadRows<'b, Q>,
    /// The query before them, for [`Fold::PairSum`]; None where there is none.
    pub previous_query: Option<&'b [Q::Acc]>,
    pub bits: Bits<'b>,
    pub raw: RawRows<'b, R>,
    /// The chain as it stood on the last token that was folded before this call, with that token.
    pub chain: Option<(usize, &'b ChainFold<Q::Acc>)>,
    pub far: &'b dyn FarSource<Q::Acc>,
    pub dropout: Option<DropoutMask>,
}

/// One thread's buffers, reused from block to block.
pub(crate) struct Worker<'a, Q: Element> {
    settings: Settings<'a, Q::Acc>,
    /// Rows of a block, a multiple of [`LANES`]: the leading dimension of `queries` and `tile`.
    leading: usize,
    /// Queries (rows, D), folded and multiplied by scale * log2(e).
    query_rows: Vec<Q::Acc>,
    /// The same, transposed to (D, leading).
    queries: Vec<Q::Acc>,
    tile: Vec<Q::Acc>,
    /// (leading, D)
    output: Vec<Q::Acc>,
    softmax: OnlineSoftmax<Q::Acc>,
    scratch: RowScratch<Q::Acc>,
    chain: ChainFold<Q::Acc>,
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

impl<'a, Q: Element> Worker<'a, Q> {
    /// `columns` is an upper bound of the far columns of a block.
    pub fn new(settings: Settings<'a, Q::Acc>, columns: usize) -> Self {
        let dim = settings.head_dim;
        let leading = settings.block_rows.next_multiple_of(LANES);
        let tile_columns = columns.next_multiple_of(EDGE_COLUMNS).clamp(EDGE_COLUMNS, FAR_COLUMNS);
        let zeros = |count: usize| vec![Q::Acc::ZERO; count];
        Self {
            settings,
            leading,
            query_rows: zeros(leading * dim),
            queries: zeros(leading * dim),
            tile: zeros(leading * tile_columns),
            output: zeros(leading * dim),
            softmax: OnlineSoftmax::new(leading),
            scratch: Default::default(),
            chain: ChainFold::new(settings.fold, dim),
        }
    }

    /// Writes the block's output rows, (rows, D).
    pub fn run<R: Element<Acc = Q::Acc>>(&mut self, block: &Block<Q, R>, output: &mut [Q]) {
        self.load_queries(block);
        self.start_at_edge(block);
        self.far_tiles(block);
        if self.settings.window > 0 {
            self.near_tiles(block);
        }
        let dim = self.settings.head_dim;
        for (row, target) in output.chunks_exact_mut(dim).enumerate() {
            let source = &mut self.output[row * dim..][..dim];
            self.softmax.finish(row, source);
            Q::narrow(source, target);
        }
    }

    /// Fills `query_rows` and `queries`; rows past the block's end are 0.
    fn load_queries<R: Element<Acc = Q::Acc>>(&mut self, block: &Block<Q, R>) {
        let Settings {
            head_dim: dim,
            first_row,
            ..
        } = self.settings;
        let factor = Q::Acc::of(self.settings.scale * std::f64::consts::LOG2_E);
        let mut left = vec![Q::Acc::ZERO; dim];
        self.query_rows[block.rows.len() * dim..].fill(Q::Acc::ZERO);
        for (row, token) in block.rows.clone().enumerate() {
            let target = &mut self.query_rows[row * dim..][..dim];
            Q::widen(block.queries.row(token - first_row), target);
            if self.settings.fold == Fold::PairSum && token > 0 && block.bits.hidden(token - 1) {
                match block.previous_query {
                    Some(previous) if token == first_row => left.copy_from_slice(previous),
                    _ => Q::widen(block.queries.row(token - 1 - first_row), &mut left),
                }
                target.iter_mut().zip(&left).for_each(|(x, y)| *x += *y);
            }
            if !all_finite(target) {
                target.fill(Q::Acc::NAN);
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
    fn start_at_edge<R: Element<Acc = Q::Acc>>(&mut self, block: &Block<Q, R>) {
        self.softmax.reset();
        self.output.fill(Q::Acc::ZERO);
        let window = self.settings.window;
        let edges = block.rows.start.max(window) - window..block.rows.end.max(window) - window;
        if edges.is_empty() {
            return;
        }
        self.chain.approach(edges.start, block.bits, &block.raw, block.chain);
        for token in edges {
            let merged = token > 0 && block.bits.hidden(token - 1);
            self.chain.step(merged, block.raw.key(token), block.raw.value(token));
            if self.settings.causal || block.bits.hidden(token) {
                self.start_row(block, token);
            }
        }
    }

    fn start_row<R: Element<Acc = Q::Acc>>(&mut self, block: &Block<Q, R>, token: usize) {
        let dim = self.settings.head_dim;
        let row_token = token + self.settings.window;
        let row = row_token - block.rows.start;
        let query = &self.query_rows[row * dim..][..dim];
        let chain = &self.chain;
        let mut logit = Q::Acc::NAN;
        if all_finite(&chain.key) && all_finite(&chain.value) {
            logit = dot(query, &chain.key);
            if chain.size > 1 {
                logit += Q::Acc::of((chain.size as f64).log2());
            }
            if let Some(bias) = self.bias(block, token, row_token..row_token + 1) {
                bias.for_each(|bias| logit += bias);
            }
            self.output[row * dim..][..dim].copy_from_slice(&chain.value);
        }
        self.softmax.start(row, logit);
        if let Some(mask) = block.dropout {
            let keep = mask.keeps(row_token, token);
            let factor = if keep { Q::Acc::of(mask.scale) } else { Q::Acc::ZERO };
            self.output[row * dim..][..dim].iter_mut().for_each(|x| *x *= factor);
        }
    }

    /// The bias of `rows` (token indices) against one column, times log2(e).
    fn bias<R: Element<Acc = Q::Acc>>(
        &self,
        block: &Block<Q, R>,
        token: usize,
        rows: Range<usize>,
    ) -> Option<impl Iterator<Item = Q::Acc> + use<'a, Q, R>> {
        let BiasView { data, offset, strides } = self.settings.bias?;
        let column = offset + block.batch * strides[0] + block.head * strides[1] + token * strides[3];
        let (to_base_2, first_row) = (Q::Acc::of(std::f64::consts::LOG2_E), self.settings.first_row);
        Some(rows.map(move |row| data[column + (row - first_row) * strides[2]] * to_base_2))
    }

    fn far_tiles<R: Element<Acc = Q::Acc>>(&mut self, block: &Block<Q, R>) {
        let (far, window, rows) = (block.far, self.settings.window, block.rows.clone());
        let (seen_by_all, seen) = if self.settings.causal {
            (
                far.before(rows.start.saturating_sub(window)),
                far.before((rows.end - 1).saturating_sub(window)),
            )
        } else {
            (far.columns(), far.columns())
        };
        let padded = rows.len().next_multiple_of(LANES);
        let mut scratch = std::mem::take(&mut self.scratch);
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
            let (keys, values) = far.rows(start..end, &mut scratch);
            let first = if all { 0 } else { first_row(0) / LANES * LANES };
            self.push(
                block,
                Columns {
                    keys,
                    values,
                    count: end - start,
                    log2_sizes: far.log2_sizes(start..end),
                    rows: first..padded,
                    token: |column| far.token(start + column),
                    visible: (!all).then_some(|column| first_row(column)..padded),
                },
            );
            start = end;
        }
        self.scratch = scratch;
    }

    /// Raw tokens t with row - window < t <= row.
    fn near_tiles<R: Element<Acc = Q::Acc>>(&mut self, block: &Block<Q, R>) {
        let (window, rows) = (self.settings.window, block.rows.clone());
        let first_token = (rows.start + 1).saturating_sub(window);
        let mut scratch = std::mem::take(&mut self.scratch);
        for start in (first_token..rows.end).step_by(EDGE_COLUMNS) {
            let count = EDGE_COLUMNS.min(rows.end - start);
            let visible = |column: usize| {
                let token = start + column;
                token.max(rows.start) - rows.start..(token + window).min(rows.end) - rows.start
            };
            let computed = visible(0).start / LANES * LANES..visible(count - 1).end.next_multiple_of(LANES);
            let (keys, values) = near_rows(&block.raw, start..start + count, &mut scratch);
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
        }
        self.scratch = scratch;
    }

    /// One tile: logits, what is added to them, softmax, dropout, weighted values.
    fn push<R, F, V>(&mut self, block: &Block<Q, R>, columns: Columns<Q::Acc, F, V>)
    where
        R: Element<Acc = Q::Acc>,
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
        if self.settings.bias.is_some() || columns.log2_sizes.is_some() || columns.visible.is_some() {
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
    fn adjust<R, F, V>(&self, block: &Block<Q, R>, columns: &Columns<Q::Acc, F, V>, index: usize, column: &mut [Q::Acc])
    where
        R: Element<Acc = Q::Acc>,
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
            column[columns.rows.start..start].fill(Q::Acc::NEG_INFINITY);
            column[visible.end.max(start)..columns.rows.end].fill(Q::Acc::NEG_INFINITY);
        }
    }
}

/// Raw rows as accumulators: the caller's own, or widened and quarantined copies in `scratch`.
fn near_rows<'b, R: Element>(
    raw: &RawRows<'b, R>,
    tokens: Range<usize>,
    scratch: &'b mut RowScratch<R::Acc>,
) -> KeysValues<'b, R::Acc> {
    if raw.clean && R::as_acc(raw.keys.data).is_some() {
        let start = tokens.start - raw.base;
        return (raw_rows(&raw.keys).skip(start), raw_rows(&raw.values).skip(start));
    }
    let dim = raw.keys.dim;
    scratch.0.resize(tokens.len() * dim, R::Acc::ZERO);
    scratch.1.resize(tokens.len() * dim, R::Acc::ZERO);
    let rows = scratch.0.chunks_exact_mut(dim).zip(scratch.1.chunks_exact_mut(dim));
    for (token, (key, value)) in tokens.zip(rows) {
        R::widen(raw.key(token), key);
        R::widen(raw.value(token), value);
        if !raw.clean {
            quarantine(key, value);
        }
    }
    (HeadRows::compact(&scratch.0, dim), HeadRows::compact(&scratch.1, dim))
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
