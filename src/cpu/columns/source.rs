//! Where columns come from: far columns from gathered columns or a cache's list, raw rows from the call's tensors.
//!
//! The source is a trait, so that one call's gathered columns and a cache's stored columns take the same path.

use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::finite::quarantine;
use crate::cpu::number::rows::{HeadRows, PaddedRows};
use crate::cpu::tile::bf16::Packed;
use std::ops::Range;

/// Columns of a tile that every row sees. In f32 and at D = 64 the tile of logits, the queries, the keys and the values
/// are 16 KiB each. So every product finds two of its operands in an L1 cache of 32 to 48 KiB and the third in L2. Of
/// 32, 48, 64, 96, 192 and 512 columns 64 was the fastest, forward and backward.
pub(crate) const FAR_COLUMNS: usize = 64;
/// A block's source of far columns, which are in token order.
pub(crate) trait FarSource<A>: Sync {
    fn columns(&self) -> usize;
    /// Every token before this one that is not hidden is a column, so that only hidden tokens need an edge. A cache
    /// learns that the last token that left its window ends its chain only when the next token leaves.
    fn holds_until(&self) -> usize;
    /// The number of columns that hold tokens before `token`.
    fn before(&self, token: usize) -> usize;
    /// The token index of a column.
    fn token(&self, column: usize) -> usize;
    /// log2 n of some columns, through `room` where they lie apart; None where all are 0.
    fn log2_sizes<'s>(&'s self, columns: Range<usize>, room: &'s mut Vec<A>) -> Option<&'s [A]>;
    /// Keys and values of some columns as padded rows, through `scratch` where they are stored otherwise.
    fn rows<'s>(&'s self, columns: Range<usize>, scratch: &'s mut RowScratch<A>) -> KeysValues<'s, A>;
    /// Whether keys are not in `rows` but apart, each at its own address; `keys` then holds the keys of these columns.
    fn keys_apart<'s>(&'s self, _columns: Range<usize>, _keys: &mut [&'s [A]; FAR_COLUMNS]) -> bool {
        false
    }
    /// All columns as bf16 pairs, where `Settings::pairs` is set; then `rows` is not called. For gradients keys take
    /// the place of values too.
    fn packed(&self) -> Option<&Packed> {
        None
    }
    /// All values packed as the keys of bf16 pairs, where `Settings::gradients` is set.
    fn packed_values(&self) -> Option<&Packed> {
        None
    }
}

/// Keys and values of the same columns.
pub(crate) type KeysValues<'s, A> = (HeadRows<'s, A>, HeadRows<'s, A>);
/// Buffers for keys and values that need widening.
pub(crate) type RowScratch<A> = (PaddedRows<A>, PaddedRows<A>);

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
    /// Whether all rows are finite.
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

/// Raw rows as accumulators, padded and quarantined: in place, if they are stored so. For gradients the key of a row
/// that is not finite is 0: see [`crate::cpu::columns::far::FarColumns`].
pub(crate) fn near_rows<'b, R: Element>(
    raw: &RawRows<'b, R>,
    tokens: Range<usize>,
    for_gradients: bool,
    scratch: &'b mut RowScratch<R::Acc>,
) -> KeysValues<'b, R::Acc> {
    let first = tokens.start - raw.base;
    if let (true, Some(keys), Some(values)) = (
        raw.clean && [&raw.keys, &raw.values].iter().all(|rows| rows.are_padded()),
        raw.keys.skip(first).as_acc(),
        raw.values.skip(first).as_acc(),
    ) {
        return (keys, values);
    }
    let (keys, values) = scratch;
    keys.make_room(tokens.len(), raw.keys.dim);
    values.make_room(tokens.len(), raw.values.dim);
    for (row, token) in tokens.enumerate() {
        keys.widen(row, raw.key(token));
        values.widen(row, raw.value(token));
        if !raw.clean && quarantine(keys.row_mut(row), values.row_mut(row)) && for_gradients {
            keys.row_mut(row).fill(R::Acc::ZERO);
        }
    }
    (keys.rows(0), values.rows(0))
}
