//! One block of rows and its columns: {far: compact; edge; near}, and the tiles of logits between them.
//!
//! Where far columns come from is a trait, so that one call's gathered columns and a cache's store take the same way;
//! forward and backward walk the same tiles.

use super::fold::{all_finite, quarantine, raw_rows, ChainFold};
use super::gemm_tile::{scores, Tile};
use super::pairs::{Packed, PackedTile, PairTiles, Pairs, PAD};
use super::philox::DropoutMask;
use super::softmax::LANES;
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

/// The same where products are made in bf16 pairs: several times faster, they are held back by the caches, and a tile
/// of 32 KiB stays in the first one.
const PAIR_ROWS: usize = 64;
const PAIR_COLUMNS: usize = 256;

/// Fewer rows for short inputs: more tasks, and less of the causal diagonal is computed in vain.
pub(crate) fn block_rows(tokens: usize, pairs: Option<Pairs>) -> usize {
    if pairs.is_some() {
        return PAIR_ROWS;
    }
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
    /// Where products are made in bf16 pairs.
    pub pairs: Option<Pairs>,
}

impl<A> Settings<'_, A> {
    /// Columns of a tile that every row sees.
    fn far_columns(&self) -> usize {
        match self.pairs {
            Some(_) => PAIR_COLUMNS,
            None => FAR_COLUMNS,
        }
    }
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
    /// All columns as bf16 pairs, where [`Settings::pairs`] wants them; then `rows` is not asked.
    fn packed(&self) -> Option<&Packed> {
        None
    }
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

/// A tile's columns and who sees them.
pub(crate) struct Columns<'c, A> {
    pub keys: HeadRows<'c, A>,
    pub values: HeadRows<'c, A>,
    pub kind: ColumnKind,
    /// The first far column, or the first near token.
    pub first: usize,
    pub count: usize,
    log2_sizes: Option<&'c [A]>,
    /// Rows of the block (relative, multiples of LANES) that are computed.
    pub rows: Range<usize>,
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum ColumnKind {
    /// Far columns that every row sees.
    FarForAll,
    /// Far columns that only later rows see.
    FarForSome,
    /// Raw tokens.
    Near,
}

/// Reads blocks: one thread's buffers, reused from block to block.
pub(crate) struct BlockReader<'a, Q: Element> {
    pub settings: Settings<'a, Q::Acc>,
    /// Rows of a block, a multiple of [`LANES`]: the leading dimension of `queries` and `tile`.
    pub leading: usize,
    /// Queries (rows, D), folded and multiplied by scale * log2(e).
    pub query_rows: Vec<Q::Acc>,
    /// The same, transposed to (D, leading).
    queries: Vec<Q::Acc>,
    /// Logits in base 2 of one tile.
    pub tile: Vec<Q::Acc>,
    scratch: RowScratch<Q::Acc>,
    /// Products in bf16 pairs, and raw columns for them.
    pub products: Option<(PairTiles, Packed)>,
    /// Stands on the token of the edge that is looked at.
    pub chain: ChainFold<Q::Acc>,
}

impl<'a, Q: Element> BlockReader<'a, Q> {
    /// `columns` is an upper bound of the far columns of a block.
    pub fn new(settings: Settings<'a, Q::Acc>, columns: usize) -> Self {
        let dim = settings.head_dim;
        let leading = settings.block_rows.next_multiple_of(LANES);
        let tile_columns = columns
            .next_multiple_of(EDGE_COLUMNS)
            .clamp(EDGE_COLUMNS, settings.far_columns());
        let zeros = |count: usize| vec![Q::Acc::ZERO; count];
        Self {
            settings,
            leading,
            query_rows: zeros(leading * dim),
            queries: zeros(if settings.pairs.is_none() { leading * dim } else { 0 }),
            products: settings.pairs.map(|pairs| {
                (
                    PairTiles::new(pairs, leading, tile_columns, dim),
                    Packed::new(pairs, dim, EDGE_COLUMNS),
                )
            }),
            tile: zeros(leading * tile_columns),
            scratch: Default::default(),
            chain: ChainFold::new(settings.fold, dim),
        }
    }

    /// Fills `query_rows` and `queries`; rows past the block's end are 0.
    pub fn load_queries<R: Element<Acc = Q::Acc>>(&mut self, block: &Block<Q, R>) {
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
        }
        if let Some((products, _)) = &mut self.products {
            products.load_queries(Q::Acc::singles(&self.query_rows), dim);
        }
        self.query_rows.iter_mut().for_each(|x| *x *= factor);
        if self.products.is_none() {
            transpose(&self.query_rows, dim, self.leading, &mut self.queries);
        }
    }

    /// Calls `visit` with every edge column of the block that a row sees: the folded token `row - window`, on which
    /// `chain` then stands, and the row relative to the block. Without causality the far columns hold every token that
    /// is not hidden, and only hidden ones need their edge.
    pub fn edges<R: Element<Acc = Q::Acc>>(&mut self, block: &Block<Q, R>, mut visit: impl FnMut(&Self, usize, usize)) {
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
                visit(self, token, token + window - block.rows.start);
            }
        }
    }

    /// The logit of a row and the edge column on which `chain` stands; NaN where that is not finite.
    pub fn edge_logit<R: Element<Acc = Q::Acc>>(&self, block: &Block<Q, R>, token: usize, row: usize) -> Q::Acc {
        let (dim, chain) = (self.settings.head_dim, &self.chain);
        if !(all_finite(&chain.key) && all_finite(&chain.value)) {
            return Q::Acc::NAN;
        }
        let mut logit = dot(&self.query_rows[row * dim..][..dim], &chain.key);
        if chain.size > 1 {
            logit += Q::Acc::of((chain.size as f64).log2());
        }
        let row = block.rows.start + row;
        if let Some(bias) = self.bias(block, token, row..row + 1) {
            bias.for_each(|bias| logit += bias);
        }
        logit
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

    /// Calls `visit` with the far columns of the block, tile by tile.
    pub fn far_tiles<R: Element<Acc = Q::Acc>>(
        &mut self,
        block: &Block<Q, R>,
        mut visit: impl FnMut(&mut Self, Columns<Q::Acc>),
    ) {
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
        let packed = self.products.is_some();
        // Pairs are packed by so many columns, and a tile begins with them.
        let seen_by_all = match packed && seen_by_all < seen {
            true => seen_by_all / PAD * PAD,
            false => seen_by_all,
        };
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut start = 0;
        while start < seen {
            let (kind, end) = if start < seen_by_all {
                (
                    ColumnKind::FarForAll,
                    seen_by_all.min(start + self.settings.far_columns()),
                )
            } else {
                (ColumnKind::FarForSome, seen.min(start + EDGE_COLUMNS))
            };
            let first_row = match kind {
                _ if packed || kind == ColumnKind::FarForAll => 0,
                _ => (far.token(start) + window + 1).saturating_sub(rows.start) / LANES * LANES,
            };
            let (keys, values) = match packed {
                true => Default::default(),
                false => far.rows(start..end, &mut scratch),
            };
            let columns = Columns {
                keys,
                values,
                kind,
                first: start,
                count: end - start,
                log2_sizes: far.log2_sizes(start..end),
                rows: first_row..padded,
            };
            visit(self, columns);
            start = end;
        }
        self.scratch = scratch;
    }

    /// Calls `visit` with the raw tokens t of row - window < t <= row, tile by tile.
    pub fn near_tiles<R: Element<Acc = Q::Acc>>(
        &mut self,
        block: &Block<Q, R>,
        mut visit: impl FnMut(&mut Self, Columns<Q::Acc>),
    ) {
        let (window, rows) = (self.settings.window, block.rows.clone());
        let first_token = (rows.start + 1).saturating_sub(window);
        let tokens = if window == 0 { 0..0 } else { first_token..rows.end };
        let mut scratch = std::mem::take(&mut self.scratch);
        for start in tokens.step_by(EDGE_COLUMNS) {
            let end = rows.end.min(start + EDGE_COLUMNS);
            let (keys, values) = near_rows(&block.raw, start..end, &mut scratch);
            let (first_row, last_row) = match self.products {
                Some(_) => (0, rows.len()),
                None => (
                    start.max(rows.start) - rows.start,
                    (end - 1 + window).min(rows.end) - rows.start,
                ),
            };
            let columns = Columns {
                keys,
                values,
                kind: ColumnKind::Near,
                first: start,
                count: end - start,
                log2_sizes: None,
                rows: first_row / LANES * LANES..last_row.next_multiple_of(LANES),
            };
            visit(self, columns);
        }
        self.scratch = scratch;
    }

    /// Fills `tile` with the logits of these columns: minus infinity where a row does not see one.
    pub fn logits<R: Element<Acc = Q::Acc>>(&mut self, block: &Block<Q, R>, columns: &Columns<Q::Acc>) {
        let mut data = std::mem::take(&mut self.tile);
        let mut tile = columns.tile(&mut data, self.leading);
        match &mut self.products {
            Some((products, near)) => {
                columns.pack_raw(near);
                let packed = columns.packed(block.far, near);
                products.scores(Q::Acc::singles_mut(tile.data), packed, columns.count);
            }
            None => scores(&mut tile, &self.queries, &columns.keys),
        }
        let masked = columns.kind != ColumnKind::FarForAll;
        if self.settings.bias.is_some() || columns.log2_sizes.is_some() || masked {
            for (index, column) in tile.data.chunks_exact_mut(self.leading).take(columns.count).enumerate() {
                self.adjust(block, columns, index, column);
            }
        }
        self.tile = data;
    }

    /// Adds log2 n and the bias to one column of logits, and hides it from the rows that do not see it.
    fn adjust<R: Element<Acc = Q::Acc>>(
        &self,
        block: &Block<Q, R>,
        columns: &Columns<Q::Acc>,
        index: usize,
        column: &mut [Q::Acc],
    ) {
        // From base 2 to what the tile holds.
        let unit = self
            .settings
            .pairs
            .map(|pairs| Q::Acc::of(1.0 / f64::from(pairs.factor)));
        let unit = unit.unwrap_or(Q::Acc::ONE);
        if let Some(sizes) = columns.log2_sizes {
            let size = sizes[index] * unit;
            column[columns.rows.clone()].iter_mut().for_each(|x| *x += size);
        }
        let token = columns.token(block.far, index);
        // Rows past the block's end are computed with the others and never stored.
        if let Some(bias) = self.bias(block, token, block.rows.clone()) {
            column.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias * unit);
        }
        let (window, rows) = (self.settings.window, &block.rows);
        let visible = match columns.kind {
            ColumnKind::FarForAll => return,
            // Token s is far from row s + window + 1 on.
            ColumnKind::FarForSome => (token + window + 1).saturating_sub(rows.start)..columns.rows.end,
            ColumnKind::Near => token.max(rows.start) - rows.start..(token + window).min(rows.end) - rows.start,
        };
        let start = visible.start.min(columns.rows.end);
        column[columns.rows.start..start].fill(Q::Acc::NEG_INFINITY);
        column[visible.end.max(start)..columns.rows.end].fill(Q::Acc::NEG_INFINITY);
    }
}

impl<A> Columns<'_, A> {
    /// The token index of a column.
    pub fn token(&self, far: &dyn FarSource<A>, index: usize) -> usize {
        match self.kind {
            ColumnKind::Near => self.first + index,
            _ => far.token(self.first + index),
        }
    }

    /// The columns as bf16 pairs: far ones where they were gathered, raw ones in `near` after [`Self::pack_raw`].
    pub fn packed<'p>(&self, far: &'p dyn FarSource<A>, near: &'p Packed) -> PackedTile<'p> {
        match (self.kind, far.packed()) {
            (ColumnKind::Near, _) | (_, None) => near.tile(0),
            (_, Some(packed)) => packed.tile(self.first),
        }
    }

    fn pack_raw(&self, near: &mut Packed)
    where
        A: Accumulator,
    {
        if self.kind == ColumnKind::Near {
            near.clear();
            for column in 0..self.count {
                near.push(A::singles(self.keys.row(column)), A::singles(self.values.row(column)));
            }
            near.finish();
        }
    }

    /// A view of a buffer as this tile.
    pub fn tile<'t>(&self, data: &'t mut [A], leading: usize) -> Tile<'t, A> {
        Tile {
            data,
            leading,
            columns: self.count,
            rows: self.rows.clone(),
        }
    }
}

/// (rows, D) to (D, leading).
pub(crate) fn transpose<A: Copy>(rows: &[A], dim: usize, leading: usize, target: &mut [A]) {
    for (row, source) in rows.chunks_exact(dim).enumerate() {
        for (d, x) in source.iter().enumerate() {
            target[d * leading + row] = *x;
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
