//! A list's closed chains as the far columns of blocks of rows: widened tile by tile, or gathered once for many blocks.

use crate::config::Fold;
use crate::cpu::cache::list::List;
use crate::cpu::cache::piece::EntryColumns;
use crate::cpu::columns::far::{FarColumns, Layout};
use crate::cpu::columns::source::{FarSource, KeysValues, RowScratch};
use crate::cpu::number::element::Element;
use crate::cpu::tile::bf16::{Packed, Pairs};
use crate::cpu::work::tasks::{Lease, Pool};
use std::ops::Range;
use std::sync::Arc;

impl<S: Element> FarSource<S::Acc> for List<S> {
    fn columns(&self) -> usize {
        self.entries.len()
    }

    fn holds_until(&self) -> usize {
        match self.entries.code() {
            None => self.bits_base(),
            // A row reads its edge as it was before its chain was closed, in more bits.
            Some(_) => 0,
        }
    }

    fn before(&self, token: usize) -> usize {
        self.entries.before(token)
    }

    fn token(&self, column: usize) -> usize {
        self.entries.token(column)
    }

    fn log2_sizes<'s>(&'s self, columns: Range<usize>, room: &'s mut Vec<S::Acc>) -> Option<&'s [S::Acc]> {
        self.entries.log2_sizes(columns, room)
    }

    fn rows<'s>(&'s self, columns: Range<usize>, scratch: &'s mut RowScratch<S::Acc>) -> KeysValues<'s, S::Acc> {
        let (keys, values) = scratch;
        keys.make_room(columns.len(), self.dim);
        values.make_room(columns.len(), self.value_dim);
        let count = columns.len();
        let mut rows = keys.rows_mut(count).zip(values.rows_mut(count));
        for part in self.entries.parts(columns) {
            self.entries.widen(part, rows.by_ref());
        }
        drop(rows);
        (keys.rows(0), values.rows(0))
    }
}

/// A list whose columns were gathered, as bf16 pairs if products are made so.
pub(crate) struct GatheredList<'a, S: Element, T: Element<Acc = S::Acc>> {
    list: &'a List<S>,
    stored: EntryColumns<'a, T>,
    columns: Arc<FarColumns<S::Acc>>,
}

impl<'a, S: Element, T: Element<Acc = S::Acc>> GatheredList<'a, S, T> {
    /// Gathers the columns unless another task has; reuses buffers of `pool` if it holds any. `stored` are all entries
    /// of the list, as stored or as accumulators.
    pub fn borrow(
        (list, stored): (&'a List<S>, EntryColumns<'a, T>),
        columns: &Lease<FarColumns<S::Acc>>,
        pairs: Option<Pairs>,
        pool: &Pool<FarColumns<S::Acc>>,
    ) -> Self {
        // Stored columns are folded: nothing is hidden.
        let gather = || {
            FarColumns::gather(
                (&stored.keys, &stored.values),
                &[],
                list.entries.len(),
                Fold::Drop,
                pairs.map_or(Layout::ValueRows, Layout::Pairs),
                pool.take(),
            )
        };
        Self {
            list,
            stored,
            columns: columns.borrow(gather),
        }
    }
}

impl<S: Element, T: Element<Acc = S::Acc>> FarSource<S::Acc> for GatheredList<'_, S, T> {
    fn columns(&self) -> usize {
        self.list.columns()
    }

    fn holds_until(&self) -> usize {
        self.list.holds_until()
    }

    fn before(&self, token: usize) -> usize {
        self.list.before(token)
    }

    fn token(&self, column: usize) -> usize {
        self.list.token(column)
    }

    fn log2_sizes<'s>(&'s self, columns: Range<usize>, _: &'s mut Vec<S::Acc>) -> Option<&'s [S::Acc]> {
        self.stored.log2_sizes.get(columns)
    }

    fn rows<'s>(&'s self, columns: Range<usize>, _: &'s mut RowScratch<S::Acc>) -> KeysValues<'s, S::Acc> {
        self.columns.rows(columns.start, &self.stored.keys)
    }

    fn packed(&self) -> Option<&Packed> {
        self.columns.packed.as_ref()
    }
}
