//! The parts of a block of rows: the call's settings, the source of far columns, raw rows, and tiles of columns.
//!
//! The source of far columns is a trait, so that one call's gathered columns and a cache's stored columns take the same
//! path.

use crate::config::Fold;
use crate::cpu::columns::chain::ChainFold;
use crate::cpu::columns::source::{Bits, FarSource, RawRows, FAR_COLUMNS};
use crate::cpu::number::bias::BiasView;
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::philox::DropoutMask;
use crate::cpu::number::rows::HeadRows;
use crate::cpu::tile::bf16::{Packed, PackedTile, Pairs};
use crate::cpu::tile::gemm_tile::Tile;
use crate::cpu::tile::product::Left;
use crate::cpu::tile::softmax::LANES;
use std::ops::Range;

/// Rows of a block: four registers of AVX-512 in f32.
const BLOCK_ROWS: usize = 64;
/// Columns of a tile that only some rows see (the causal diagonal, the window's band): few, since the rest is wasted.
pub(crate) const EDGE_COLUMNS: usize = 32;
/// As `EDGE_COLUMNS`, for the window's band, where a row sees `window` columns: 0.98 of the time of 32, with four
/// fifths hidden.
pub(crate) const NEAR_COLUMNS: usize = 16;

/// As `BLOCK_ROWS`, for products in bf16 pairs. They are several times faster and wait for the caches; a tile of 32 KiB
/// stays in the first cache.
pub(crate) const PAIR_ROWS: usize = 64;
const PAIR_COLUMNS: usize = 256;
/// As `PAIR_ROWS`, for gradients, which sum over a tile's rows as well as over its columns. Tiles of 128 by 128 took
/// 0.85 of the time of 64 by 64 and 0.95 of the time of 64 by 256, in bf16.
const PAIR_GRADIENT_ROWS: usize = 128;
const PAIR_GRADIENT_COLUMNS: usize = 128;

/// The rows of a block: fewer for short inputs, where more of the causal diagonal would be computed in vain.
pub(crate) fn block_rows(tokens: usize, pairs: Option<Pairs>) -> usize {
    if pairs.is_some() {
        return PAIR_ROWS;
    }
    BLOCK_ROWS.min(tokens.next_multiple_of(LANES))
}

/// The settings that all blocks of a call share.
#[derive(Clone, Copy)]
pub(crate) struct BlockSettings<'a, A> {
    pub head_dim: usize,
    /// Size of a value.
    pub value_dim: usize,
    /// The largest block, see [`block_rows`].
    pub block_rows: usize,
    /// The token index of the call's first row.
    pub first_row: usize,
    pub fold: Fold,
    pub window: usize,
    pub causal: bool,
    /// L: row i sees a column of token s only where s > i - L. [`usize::MAX`] for every earlier token.
    pub sliding_window: usize,
    pub scale: f64,
    /// c of a softcap.
    pub softcap: Option<f64>,
    pub bias: Option<BiasView<'a, A>>,
    /// Sink logits (H) in base 2.
    pub sinks: Option<&'a [A]>,
    /// Set where products are made in bf16 pairs.
    pub pairs: Option<Pairs>,
    /// Whether the edge is no far column even where it is not hidden: far columns have a bias and the edge has none, or
    /// they have fewer bits.
    pub edges_apart: bool,
    /// Whether tiles are for gradients.
    pub gradients: bool,
}

impl<A> BlockSettings<'_, A> {
    /// The first token that a row (a token index) sees.
    pub fn first_seen(&self, row: usize) -> usize {
        (row + 1).saturating_sub(self.sliding_window)
    }

    /// The first row after `token` that no longer sees it.
    pub fn unseen_from(&self, token: usize) -> usize {
        token.saturating_add(self.sliding_window)
    }

    /// The tokens of `tokens` that a row sees, without a bias.
    pub fn seen(&self, row: usize, tokens: usize) -> Range<usize> {
        self.first_seen(row)..if self.causal { row + 1 } else { tokens }
    }

    /// The rows of a block (relative to it) that see the far column of `token`; some rows past the block's end among
    /// them, which are never stored.
    pub fn far_rows(&self, rows: &Range<usize>, token: usize) -> Range<usize> {
        let end = rows.len().next_multiple_of(LANES);
        let end = self.unseen_from(token).saturating_sub(rows.start).min(end);
        let start = if self.causal {
            token + self.window + usize::from(self.edges_apart)
        } else {
            0
        };
        start.saturating_sub(rows.start).min(end)..end
    }

    /// The number of raw tokens that a row sees, its own included.
    pub fn near(&self) -> usize {
        self.window.min(self.sliding_window)
    }

    /// Whether rows see folded tokens. Where none does, a token leaves the sliding window before it leaves the window.
    pub fn sees_folded(&self) -> bool {
        self.window < self.sliding_window
    }

    /// The settings of the same call's gradients.
    pub fn of_gradients(self, tokens: usize) -> Self {
        let block_rows = match self.pairs {
            Some(_) if tokens > PAIR_ROWS => PAIR_GRADIENT_ROWS,
            _ => self.block_rows,
        };
        Self {
            block_rows,
            gradients: true,
            ..self
        }
    }

    /// Columns of a tile that every row sees.
    pub fn far_columns(&self) -> usize {
        match self.pairs {
            Some(_) if self.gradients => PAIR_GRADIENT_COLUMNS,
            Some(_) => PAIR_COLUMNS,
            None => FAR_COLUMNS,
        }
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
    /// The query of the token before `first_row`, for [`Fold::PairSum`]; None where there is none.
    pub previous_query: Option<&'b [Q::Acc]>,
    pub bits: Bits<'b>,
    pub raw: RawRows<'b, R>,
    /// The chain on the last token that was folded before this call, and that token.
    pub chain: Option<(usize, &'b ChainFold<Q::Acc>)>,
    pub far: &'b dyn FarSource<Q::Acc>,
    pub dropout: Option<DropoutMask>,
}

/// A tile's columns and the rows that see them.
pub(crate) struct Columns<'c, A> {
    pub keys: HeadRows<'c, A>,
    /// The keys one by one, in the place of `keys`: see [`FarSource::keys_apart`].
    pub keys_apart: Option<&'c [&'c [A]]>,
    pub values: HeadRows<'c, A>,
    pub kind: ColumnKind,
    /// The first far column, or the first near token.
    pub first: usize,
    pub count: usize,
    pub log2_sizes: Option<&'c [A]>,
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

impl<'c, A> Columns<'c, A> {
    /// The keys as the left operand of a product.
    pub fn left(&self) -> Left<'c, A> {
        self.keys_apart.map_or_else(|| Left::from(&self.keys), Left::Rows)
    }

    /// The token index of a column.
    pub fn token(&self, far: &dyn FarSource<A>, index: usize) -> usize {
        match self.kind {
            ColumnKind::Near => self.first + index,
            _ => far.token(self.first + index),
        }
    }

    /// The columns as bf16 pairs: far columns as gathered, raw ones in `near` after [`Self::pack_raw`].
    pub fn packed<'p>(&self, far: &'p dyn FarSource<A>, near: &'p Packed) -> PackedTile<'p> {
        match (self.kind, far.packed()) {
            (ColumnKind::Near, _) | (_, None) => near.tile(0),
            (_, Some(packed)) => packed.tile(self.first),
        }
    }

    /// The values packed as the keys of pairs; None for raw values.
    pub fn packed_values<'p>(&self, far: &'p dyn FarSource<A>) -> Option<PackedTile<'p>> {
        let packed = far.packed_values().filter(|_| self.kind != ColumnKind::Near)?;
        Some(packed.tile(self.first))
    }

    /// Packs raw values as the keys of pairs.
    pub fn pack_raw_values(&self, near: &mut Packed)
    where
        A: Accumulator,
    {
        if self.kind == ColumnKind::Near {
            near.clear();
            (0..self.count).for_each(|column| near.push_key(A::singles(self.values.row(column))));
        }
    }

    /// Packs raw keys and values; for gradients keys take the place of values.
    pub fn pack_raw(&self, near: &mut Packed, gradients: bool)
    where
        A: Accumulator,
    {
        if self.kind == ColumnKind::Near {
            let values = if gradients { &self.keys } else { &self.values };
            near.clear();
            for column in 0..self.count {
                near.push(A::singles(self.keys.row(column)), A::singles(values.row(column)));
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
