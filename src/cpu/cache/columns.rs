//! A list's closed chains as the far columns of blocks of rows: widened tile by tile, or gathered once for many blocks.

use crate::config::Fold;
use crate::cpu::cache::list::List;
use crate::cpu::columns::far::{FarColumns, Layout};
use crate::cpu::columns::source::{FarSource, KeysValues, RowScratch};
use crate::cpu::number::element::Element;
use crate::cpu::tile::bf16::{Packed, Pairs};
use crate::cpu::work::tasks::{Lease, Pool};
use std::ops::Range;
use std::sync::Arc;

impl<S: Element> FarSource<S::Acc> for List<S> {
    fn columns(&self) -> usize {
        self.tokens.len()
    }

    fn holds_until(&self) -> usize {
        self.bits_base()
    }

    fn before(&self, token: usize) -> usize {
        self.entries_before(token)
    }

    fn token(&self, column: usize) -> usize {
        self.tokens[column] as usize
    }

    fn log2_sizes(&self, columns: Range<usize>) -> Option<&[S::Acc]> {
        self.log2_sizes.get(columns)
    }

    fn rows<'s>(&'s self, columns: Range<usize>, scratch: &'s mut RowScratch<S::Acc>) -> KeysValues<'s, S::Acc> {
        let (keys, values) = scratch;
        for (stored, dim, rows) in [
            (&self.keys, self.dim, &mut *keys),
            (&self.values, self.value_dim, &mut *values),
        ] {
            rows.make_room(columns.len(), dim);
            let stored = &stored[columns.start * dim..columns.end * dim];
            for (row, source) in stored.chunks_exact(dim).enumerate() {
                rows.widen(row, source);
            }
        }
        (keys.rows(0), values.rows(0))
    }
}

/// A list whose columns were gathered, as bf16 pairs if products are made so.
pub(crate) struct GatheredList<'a, S: Element> {
    list: &'a List<S>,
    columns: Arc<FarColumns<S::Acc>>,
}

impl<'a, S: Element> GatheredList<'a, S> {
    /// Gathers the columns unless another task has; reuses buffers of `pool` if it holds any.
    pub fn borrow(
        list: &'a List<S>,
        columns: &Lease<FarColumns<S::Acc>>,
        pairs: Option<Pairs>,
        pool: &Pool<FarColumns<S::Acc>>,
    ) -> Self {
        // Stored columns are folded: nothing is hidden.
        let gather = || {
            FarColumns::gather(
                (&list.key_rows(), &list.value_rows()),
                &[],
                list.tokens.len(),
                Fold::Drop,
                pairs.map_or(Layout::ValueRows, Layout::Pairs),
                pool.take(),
            )
        };
        Self {
            list,
            columns: columns.borrow(gather),
        }
    }
}

impl<S: Element> FarSource<S::Acc> for GatheredList<'_, S> {
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

    fn log2_sizes(&self, columns: Range<usize>) -> Option<&[S::Acc]> {
        self.list.log2_sizes(columns)
    }

    fn rows<'s>(&'s self, columns: Range<usize>, _: &'s mut RowScratch<S::Acc>) -> KeysValues<'s, S::Acc> {
        self.columns.rows(columns.start, &self.list.key_rows())
    }

    fn packed(&self) -> Option<&Packed> {
        self.columns.packed.as_ref()
    }
}
