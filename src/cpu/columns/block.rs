//! One block of query rows, its columns {far: compact; edge; near}, and the tiles of logits between them.
//!
//! A block is some consecutive query rows of one head. A row sees three kinds of columns. Far columns are compact, in
//! token order; a causal row sees a prefix of them, up to token `row - window`. The edge column is the folded token
//! `row - window` itself, where no far column holds it. Near columns are the raw tokens t of `row - window < t <= row`.
//!
//! [`BlockReader`] owns the buffers of one thread: the folded queries as rows and transposed, one tile of logits, the
//! chain that walks along the edge columns, scratch rows for widening, and the packed operands of products in bf16
//! pairs. It borrows all else: a [`Block`] refers to the queries, the bits, the raw rows and the source of the far
//! columns.
//!
//! The idea: forward and backward walk the same columns in the same order (edges, far tiles, near tiles) and differ
//! only in the closure that they pass. So the rules of visibility stand here once.
//!
//! The tricks:
//! 1. A query is folded, checked and multiplied by scale * log2(e) once per block. Logits are in base 2 from there on.
//!    (Products in bf16 pairs load the unscaled query and apply the factor to the product.)
//! 2. An edge column is seen by a single row, so that its logit is one dot product and no tile is made. A chain steps
//!    along the tokens, one token a column; a pair sum is made from its two raw rows.
//! 3. Where all raw rows are finite, a row of the accumulator's dtype is an edge in place, without a copy, if no token
//!    is folded into it and no later edge continues its chain.
//! 4. Far columns that every row sees make wide tiles without a mask. Columns of the causal diagonal, and of the border
//!    of a sliding window, make narrow tiles, and rows that see none of a tile's columns are left out, [`LANES`] rows
//!    at a time. Columns before a sliding window are never read.
//! 5. With products in bf16 pairs a tile starts at a multiple of [`PAD`] columns and holds all rows, since the far
//!    columns are packed in such groups.
//! 6. Sizes, biases and masks are applied to the finished tile, column by column; a bias that does not depend on the
//!    row is one number a column. The mask goes by panels of 16 rows and skips a panel whose rows all see the column.
//! 7. A row or column that is not finite has a NaN logit, and the mask replaces logits by minus infinity. So a NaN
//!    reaches the rows that see it and no other row.

use crate::cpu::columns::chain::{ChainFold, Edge};
use crate::cpu::columns::far::AHEAD;
use crate::cpu::columns::source::{near_rows, RowScratch, FAR_COLUMNS};
use crate::cpu::columns::tiles::{Block, BlockSettings, ColumnKind, Columns, EDGE_COLUMNS, NEAR_COLUMNS};
use crate::cpu::number::aligned::{padded, Aligned};
use crate::cpu::number::bias::BiasUnit;
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::finite::{add_row, all_finite, Check};
use crate::cpu::number::panels::{keep_lanes, PANEL};
use crate::cpu::number::vectorized::{dot, vectorized};
use crate::cpu::tile::bf16::{Packed, PairTiles, PAD};
use crate::cpu::tile::gemm_tile::scores;
use crate::cpu::tile::softcap::Softcap;
use crate::cpu::tile::softmax::LANES;
use crate::cpu::tile::transpose::to_columns;
use crate::instructions::arch;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// One thread's buffers to read blocks with, reused from block to block.
pub(crate) struct BlockReader<'a, Q: Element> {
    pub settings: BlockSettings<'a, Q::Acc>,
    /// Rows of a block, a multiple of [`LANES`]: the leading dimension of `queries` and `tile`.
    pub leading: usize,
    /// Numbers between the starts of two rows: D, padded with zeros.
    pub width: usize,
    /// Queries (rows, width), folded and multiplied by scale * log2(e).
    pub query_rows: Aligned<Q::Acc>,
    /// The queries of `query_rows`, transposed to (D, leading); empty with products in bf16 pairs.
    queries: Aligned<Q::Acc>,
    /// Logits of one tile (columns, leading): in base 2, or with products in bf16 pairs the products.
    pub tile: Aligned<Q::Acc>,
    /// 1 - tanh² of each number of `tile`, (columns, leading), with a softcap and for gradients; else empty.
    pub slopes: Aligned<Q::Acc>,
    /// The softcap of numbers in the unit of `tile`, and of logits in base 2.
    softcaps: Option<[Softcap<Q::Acc>; 2]>,
    scratch: RowScratch<Q::Acc>,
    /// One row, widened to the accumulator's dtype.
    left: Vec<Q::Acc>,
    /// The operands of products in bf16 pairs, and raw columns packed for them; None without such products.
    pub products: Option<(PairTiles, Packed)>,
    /// The chain on the token of the edge column that is visited.
    pub chain: ChainFold<Q::Acc>,
    /// Changes a bias to the unit of a tile; `bias_factor` changes that to a logit in base 2.
    tile_bias: BiasUnit<Q::Acc>,
    bias_factor: Q::Acc,
}

impl<'a, Q: Element> BlockReader<'a, Q> {
    /// `columns` is an upper bound of the far columns of a block.
    pub fn new(settings: BlockSettings<'a, Q::Acc>, columns: usize) -> Self {
        let dim = settings.head_dim;
        let leading = settings.block_rows.next_multiple_of(LANES);
        let tile_columns = columns
            .next_multiple_of(EDGE_COLUMNS)
            .clamp(EDGE_COLUMNS, settings.far_columns());
        let width = padded(dim);
        let to_base_2 = settings.pairs.map_or(1.0, |pairs| f64::from(pairs.factor));
        let slopes = if settings.gradients && settings.softcap.is_some() {
            leading * tile_columns
        } else {
            0
        };
        Self {
            slopes: Aligned::zeroed(slopes),
            softcaps: settings
                .softcap
                .map(|c| [Softcap::new(c, to_base_2), Softcap::new(c, 1.0)]),
            settings,
            leading,
            width,
            query_rows: Aligned::zeroed(leading * width),
            queries: Aligned::zeroed(if settings.pairs.is_none() { leading * dim } else { 0 }),
            products: settings.pairs.map(|pairs| {
                let tiles = match settings.gradients {
                    true => PairTiles::new(pairs, leading, 0, dim).with_row_pairs(),
                    false => PairTiles::new(pairs, leading, tile_columns, dim),
                };
                (tiles, Packed::new(pairs, dim, EDGE_COLUMNS))
            }),
            tile: Aligned::zeroed(leading * tile_columns),
            scratch: Default::default(),
            left: vec![Q::Acc::ZERO; dim],
            chain: ChainFold::new(settings.fold, [dim, settings.value_dim]),
            tile_bias: BiasUnit::new(to_base_2),
            bias_factor: Q::Acc::of(to_base_2),
        }
    }

    /// Fills `query_rows` and `queries` with the block's folded queries; rows past the block's end are 0.
    pub fn load_queries<R: Element<Acc = Q::Acc>>(&mut self, block: &Block<Q, R>) {
        let BlockSettings {
            head_dim: dim,
            first_row,
            ..
        } = self.settings;
        let factor = Q::Acc::of(self.settings.scale * std::f64::consts::LOG2_E);
        let width = self.width;
        let left = &mut self.left;
        self.query_rows[block.rows.len() * width..].fill(Q::Acc::ZERO);
        let (folds_queries, query_rows) = (self.settings.fold.folds_queries(), &mut self.query_rows);
        vectorized(
            #[inline(always)]
            || {
                let mut check = Check::default();
                for (row, token) in block.rows.clone().enumerate() {
                    block.queries.prefetch_row(token + AHEAD - first_row);
                    let target = &mut query_rows[row * width..][..dim];
                    let query = block.queries.row(token - first_row);
                    if !(folds_queries && token > 0 && block.bits.hidden(token - 1)) {
                        check.copy(query, target);
                        continue;
                    }
                    match block.previous_query {
                        Some(previous) if token == first_row => {
                            Q::widen(query, target);
                            add_row(target, previous, left);
                            check.take(target);
                        }
                        _ => check.sum((block.queries.row(token - 1 - first_row), query), left, target),
                    }
                }
                if !check.passed() {
                    let rows = query_rows.chunks_exact_mut(width).take(block.rows.len());
                    rows.map(|row| &mut row[..dim])
                        .filter(|row| !all_finite(row))
                        .for_each(|row| row.fill(Q::Acc::NAN));
                }
            },
        );
        if let Some((products, _)) = &mut self.products {
            products.load_queries(Q::Acc::singles(&self.query_rows), (dim, width));
        }
        vectorized(
            #[inline(always)]
            || self.query_rows.iter_mut().for_each(|x| *x *= factor),
        );
        if self.products.is_none() {
            to_columns(&self.query_rows, (dim, width), self.leading, &mut self.queries);
        }
    }

    /// Marks rows (relative to the block) as NaN: the operand of logits becomes NaN, the operand of gradients 0. See
    /// `Sums::load_rows` of `head_gradients`.
    pub fn poison(&mut self, rows: &[bool]) {
        let poisoned = rows.iter().enumerate().filter(|(_, poisoned)| **poisoned);
        for (row, _) in poisoned {
            self.query_rows[row * self.width..][..self.width].fill(Q::Acc::ZERO);
            match &mut self.products {
                Some((products, _)) => products.poison(row),
                None => self.queries[row] = Q::Acc::NAN,
            }
        }
    }

    /// Calls `visit` with every edge column that a row of the block sees: the folded token `row - window`, that token's
    /// index, and the row relative to the block. A token that is a far column needs no edge.
    pub fn edges<R: Element<Acc = Q::Acc>>(
        &mut self,
        block: &Block<Q, R>,
        mut visit: impl FnMut(&Self, Edge<Q::Acc>, usize, usize),
    ) {
        let BlockSettings { window, fold, .. } = self.settings;
        let tokens = match self.settings.sees_folded() {
            true => block.rows.start.max(window) - window..block.rows.end.max(window) - window,
            false => 0..0,
        };
        let row = |token: usize| token + window - block.rows.start;
        let held = block.far.holds_until();
        let has_edge = |token: usize| token >= held || block.bits.hidden(token);
        // Whether the token before `token` is folded into it.
        let folded = |token: usize| fold.keeps_hidden() && token > 0 && block.bits.hidden(token - 1);
        let mut chain = std::mem::replace(&mut self.chain, ChainFold::new(fold, [0; 2]));
        let edges = tokens.filter(|token| has_edge(*token));
        let Block { bits, raw, .. } = block;
        if let Some(first) = edges.clone().next() {
            chain.approach(first, *bits, raw, block.chain);
        }
        vectorized(
            #[inline(always)]
            || {
                for token in edges.clone() {
                    let (key, value) = (raw.key(token), raw.value(token));
                    let goes_on = fold.walks_chains() && folded(token + 1) && has_edge(token + 1);
                    let in_place = raw.clean && !folded(token) && !goes_on;
                    if let (true, Some(key), Some(value)) = (in_place, R::as_acc(key), R::as_acc(value)) {
                        let log2_size = Q::Acc::ZERO;
                        visit(self, Edge { key, value, log2_size }, token, row(token));
                        continue;
                    }
                    if fold.sums_pairs() && folded(token) && token > raw.base {
                        chain.pair((raw.key(token - 1), key), (raw.value(token - 1), value));
                    } else {
                        chain.step(folded(token), key, value);
                        chain.quarantine();
                    }
                    visit(self, chain.edge(), token, row(token));
                }
            },
        );
        self.chain = chain;
    }

    /// The logit (base 2) of a row and an edge column, and the factor from its gradient to that of the product; NaN
    /// where the logit is not finite.
    #[inline(always)]
    pub fn edge_logit<R: Element<Acc = Q::Acc>>(
        &self,
        block: &Block<Q, R>,
        edge: Edge<Q::Acc>,
        token: usize,
        row: usize,
    ) -> [Q::Acc; 2] {
        let query = &self.query_rows[row * self.width..][..self.settings.head_dim];
        let product = dot(query, edge.key);
        let [capped, slope] = match &self.softcaps {
            Some([_, softcap]) => softcap.of(product),
            None => [product, Q::Acc::ONE],
        };
        let mut logit = capped + edge.log2_size;
        let row = block.rows.start + row;
        if let Some(bias) = self.bias(block, token, row..row + 1) {
            // As in a tile, so that the same bias is the same number in a tile and at an edge, however large.
            bias.for_each(|bias| logit += self.tile_bias.of(bias) * self.bias_factor);
        }
        [logit, slope]
    }

    /// Whether the bias hides every column from a row (a token index). Such a bias is refused where tokens are hidden,
    /// so that columns are tokens here.
    pub fn sees_nothing<R: Element<Acc = Q::Acc>>(&self, block: &Block<Q, R>, row: usize) -> bool {
        let columns = self.settings.seen(row, block.far.columns());
        let at = [block.batch, block.head, row - self.settings.first_row];
        self.settings.bias.is_some_and(|bias| bias.hides_all(at, columns))
    }

    /// The bias of `rows` (token indices) against one column.
    fn bias<R: Element<Acc = Q::Acc>>(
        &self,
        block: &Block<Q, R>,
        token: usize,
        rows: Range<usize>,
    ) -> Option<impl Iterator<Item = Q::Acc> + use<'a, Q, R>> {
        let first = self.settings.first_row;
        let rows = rows.start - first..rows.end - first;
        Some(self.settings.bias?.column([block.batch, block.head], rows, token))
    }

    /// Calls `visit` with the far columns that a row of the block sees, tile by tile.
    pub fn far_tiles<R: Element<Acc = Q::Acc>>(
        &mut self,
        block: &Block<Q, R>,
        mut visit: impl FnMut(&mut Self, Columns<Q::Acc>),
    ) {
        let (far, window, rows) = (block.far, self.settings.window, block.rows.clone());
        let (seen_by_all, seen) = if self.settings.causal {
            // The last token that a row sees as a far column is its edge, or the one before.
            let apart = usize::from(self.settings.edges_apart);
            (
                far.before((rows.start + 1).saturating_sub(window + apart)),
                far.before(rows.end.saturating_sub(window + apart)),
            )
        } else {
            (far.columns(), far.columns())
        };
        // Columns from `left` on are still seen by the first row, those from `inner` on by all rows.
        let left = far.before(self.settings.first_seen(rows.start));
        let inner = far.before(self.settings.first_seen(rows.end - 1));
        let seen = if self.settings.sees_folded() { seen } else { left };
        let padded = rows.len().next_multiple_of(LANES);
        let packed = self.products.is_some();
        // Columns are packed in groups of `PAD`, and a tile begins with a group.
        let seen_by_all = match packed && seen_by_all < seen {
            true => seen_by_all / PAD * PAD,
            false => seen_by_all,
        };
        let (left, inner) = match packed {
            true => (left / PAD * PAD, inner.next_multiple_of(PAD)),
            false => (left, inner),
        };
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut keys_apart = [&[][..]; FAR_COLUMNS];
        let mut start = left;
        while start < seen {
            let (kind, end) = if (inner..seen_by_all).contains(&start) {
                (
                    ColumnKind::FarForAll,
                    seen_by_all.min(start + self.settings.far_columns()),
                )
            } else {
                let border = if start < inner { inner } else { seen };
                (ColumnKind::FarForSome, border.min(seen).min(start + EDGE_COLUMNS))
            };
            let (first_row, last_row) = match kind {
                _ if packed || kind == ColumnKind::FarForAll => (0, padded),
                _ => (
                    self.settings.far_rows(&rows, far.token(start)).start / LANES * LANES,
                    self.settings
                        .far_rows(&rows, far.token(end - 1))
                        .end
                        .next_multiple_of(LANES),
                ),
            };
            let (keys, values) = match packed {
                true => Default::default(),
                false => far.rows(start..end, &mut scratch),
            };
            let apart = !packed && far.keys_apart(start..end, &mut keys_apart);
            let mut sizes = Vec::new();
            let columns = Columns {
                keys,
                keys_apart: apart.then(|| &keys_apart[..end - start]),
                values,
                kind,
                first: start,
                count: end - start,
                log2_sizes: far.log2_sizes(start..end, &mut sizes),
                rows: first_row..last_row,
            };
            visit(self, columns);
            start = end;
        }
        self.scratch = scratch;
    }

    /// Calls `visit` with the raw tokens t of row - window < t <= row for the rows of the block, tile by tile.
    pub fn near_tiles<R: Element<Acc = Q::Acc>>(
        &mut self,
        block: &Block<Q, R>,
        mut visit: impl FnMut(&mut Self, Columns<Q::Acc>),
    ) {
        let (window, rows) = (self.settings.near(), block.rows.clone());
        let first_token = (rows.start + 1).saturating_sub(window);
        let tokens = if window == 0 { 0..0 } else { first_token..rows.end };
        let mut scratch = std::mem::take(&mut self.scratch);
        let columns = if self.products.is_some() {
            EDGE_COLUMNS
        } else {
            NEAR_COLUMNS
        };
        for start in tokens.step_by(columns) {
            let end = rows.end.min(start + columns);
            let (keys, values) = near_rows(&block.raw, start..end, self.settings.gradients, &mut scratch);
            let (first_row, last_row) = match self.products {
                Some(_) => (0, rows.len()),
                None => (
                    start.max(rows.start) - rows.start,
                    (end - 1 + window).min(rows.end) - rows.start,
                ),
            };
            let columns = Columns {
                keys,
                keys_apart: None,
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

    /// Fills `tile` with the logits of these columns: minus infinity where a row does not see the column.
    pub fn logits<R: Element<Acc = Q::Acc>>(&mut self, block: &Block<Q, R>, columns: &Columns<Q::Acc>) {
        let (mut data, mut slopes) = (std::mem::take(&mut self.tile), std::mem::take(&mut self.slopes));
        // A softcap comes before the sizes, as do the kernels of bf16 pairs.
        let sizes_later = self.settings.pairs.is_some() || self.softcaps.is_some();
        let mut tile = columns.tile(&mut data, self.leading);
        match &mut self.products {
            Some((products, near)) => {
                columns.pack_raw(near, self.settings.gradients);
                let packed = columns.packed(block.far, near);
                products.scores(Q::Acc::singles_mut(tile.data), packed, columns.count);
            }
            None => scores(
                &mut tile,
                &self.queries,
                (columns.left(), self.settings.head_dim),
                columns.log2_sizes.filter(|_| !sizes_later),
            ),
        }
        let masked = columns.kind != ColumnKind::FarForAll;
        let sizes_left = sizes_later && columns.log2_sizes.is_some();
        if self.settings.bias.is_some() || self.softcaps.is_some() || sizes_left || masked {
            arch().dispatch(Adjust {
                reader: self,
                block,
                columns,
                tile: tile.data,
                slopes: &mut slopes,
            });
        }
        (self.tile, self.slopes) = (data, slopes);
    }

    /// Caps one column of products; adds log2 n where the product left it out, and the bias. Sets minus infinity for
    /// the rows that do not see the column. `slopes` is the column's part of [`Self::slopes`], or empty.
    #[inline(always)]
    fn adjust<S: Simd, R: Element<Acc = Q::Acc>>(
        &self,
        simd: S,
        block: &Block<Q, R>,
        columns: &Columns<Q::Acc>,
        index: usize,
        (column, slopes): (&mut [Q::Acc], &mut [Q::Acc]),
    ) {
        if let Some([softcap, _]) = &self.softcaps {
            let slopes = slopes.get_mut(columns.rows.clone()).unwrap_or_default();
            softcap.column(&mut column[columns.rows.clone()], slopes);
        }
        let sizes_later = self.settings.pairs.is_some() || self.softcaps.is_some();
        if let (Some(sizes), true) = (columns.log2_sizes, sizes_later) {
            // From base 2 to the unit of the tile.
            let size = match self.settings.pairs {
                Some(pairs) => sizes[index] * Q::Acc::of(1.0 / f64::from(pairs.factor)),
                None => sizes[index],
            };
            column[columns.rows.clone()].iter_mut().for_each(|x| *x += size);
        }
        let token = columns.token(block.far, index);
        let constant = self
            .settings
            .bias
            .map(|bias| bias.of_all_rows([block.batch, block.head], token));
        // Rows past the block's end are computed with the others and never stored.
        if let Some(Some(bias)) = constant {
            let bias = self.tile_bias.of(bias);
            column[columns.rows.clone()].iter_mut().for_each(|x| *x += bias);
        } else if let Some(bias) = self.bias(block, token, block.rows.clone()) {
            let pairs = column.iter_mut().zip(bias);
            pairs.for_each(|(x, bias)| *x += self.tile_bias.of(bias));
        }
        let (window, rows) = (self.settings.near(), &block.rows);
        let visible = match columns.kind {
            ColumnKind::FarForAll => return,
            ColumnKind::FarForSome => self.settings.far_rows(rows, token),
            ColumnKind::Near => token.max(rows.start) - rows.start..(token + window).min(rows.end) - rows.start,
        };
        let first = columns.rows.start;
        for (index, panel) in column[columns.rows.clone()].as_chunks_mut().0.iter_mut().enumerate() {
            let lane = |row: usize| row.saturating_sub(first + index * PANEL).min(PANEL) as u32;
            let lanes = (lane(visible.start), lane(visible.end));
            if lanes != (0, PANEL as u32) {
                keep_lanes(simd, lanes, panel, &[Q::Acc::NEG_INFINITY; PANEL]);
            }
        }
    }
}

/// [`BlockReader::adjust`] of all columns of a tile as code for one instruction set.
struct Adjust<'s, 'a, 'b, 'c, Q: Element, R: Element<Acc = Q::Acc>> {
    reader: &'s BlockReader<'a, Q>,
    block: &'s Block<'b, Q, R>,
    columns: &'s Columns<'c, Q::Acc>,
    tile: &'s mut [Q::Acc],
    /// As the tile, or empty.
    slopes: &'s mut [Q::Acc],
}

impl<Q: Element, R: Element<Acc = Q::Acc>> WithSimd for Adjust<'_, '_, '_, '_, Q, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let columns = self.tile.chunks_exact_mut(self.reader.leading);
        let mut slopes = self.slopes.chunks_exact_mut(self.reader.leading);
        for (index, column) in columns.take(self.columns.count).enumerate() {
            let slopes = slopes.next().unwrap_or_default();
            self.reader
                .adjust(simd, self.block, self.columns, index, (column, slopes));
        }
    }
}
