//! What merging leaves of one head's keys and values: compact far columns, and the folded tokens that are hidden.

use super::aligned::PaddedRows;
use super::fold::{quarantine, ChainFold, Edge};
use super::pairs::{Packed, Pairs};
use super::{vectorized, Accumulator, Element, HeadRows};
use crate::config::Fold;

/// Rows that are asked for before they are read: the hardware does not follow strides of some KiB.
pub(crate) const AHEAD: usize = 8;

/// Folded keys and values with log2 n of each.
struct FoldedRows<A> {
    keys: PaddedRows<A>,
    values: PaddedRows<A>,
    /// Empty unless the fold is [`Fold::Mean`].
    log2_sizes: Vec<A>,
}

impl<A: Copy + Default> Default for FoldedRows<A> {
    fn default() -> Self {
        Self {
            keys: Default::default(),
            values: Default::default(),
            log2_sizes: Vec::new(),
        }
    }
}

impl<A: Accumulator> FoldedRows<A> {
    fn start(&mut self, rows: usize, dim: usize) {
        self.keys.make_room(rows, dim);
        self.values.make_room(rows, dim);
        self.log2_sizes.clear();
    }

    fn row_mut(&mut self, row: usize) -> (&mut [A], &mut [A]) {
        (self.keys.row_mut(row), self.values.row_mut(row))
    }
}

/// How far columns are gathered.
#[derive(Clone, Copy)]
pub(crate) enum Layout {
    Rows,
    /// As bf16 pairs, in place of rows.
    Pairs(Pairs),
    /// As rows; keys and values also as bf16 pairs, to be multiplied by rows of queries and of output gradients.
    Gradients(Pairs),
}

/// What merging leaves of one list of heads that share keys, values and bits, in the accumulator's dtype. Columns are in
/// token order; which of them a row sees is a prefix.
#[derive(Default)]
pub(crate) struct FarColumns<A: Accumulator> {
    /// The tokens that are not hidden; a single row where they are packed alone.
    far: FoldedRows<A>,
    /// The others.
    hidden: FoldedRows<A>,
    sizes_differ: bool,
    /// The token index of each column; None where nothing is hidden.
    pub tokens: Option<Vec<u32>>,
    pub columns: usize,
    /// Keys and values as bf16 pairs: see [`Layout`].
    pub packed: Option<Packed>,
    /// Values as the keys of bf16 pairs.
    pub packed_values: Option<Packed>,
    /// Whether no folded key or value of the head, and so no raw one, is NaN or infinite.
    pub clean: bool,
}

impl<A: Accumulator> FarColumns<A> {
    /// O(N·D). Into `room`, columns of a call's other list, where there is some.
    pub fn gather<T: Element<Acc = A>>(
        (keys, values): (&HeadRows<T>, &HeadRows<T>),
        bits: &[u8],
        tokens: usize,
        fold: Fold,
        layout: Layout,
        room: Option<Self>,
    ) -> Self {
        let hidden = bits.iter().filter(|bit| **bit == 1).count();
        let mut columns = room.unwrap_or_default();
        (columns.columns, columns.clean) = (tokens - hidden, true);
        let (dim, count) = (keys.dim, columns.columns);
        let rows = match layout {
            Layout::Rows => count,
            Layout::Pairs(pairs) => {
                columns.packed = Some(Packed::new(pairs, dim, count));
                1
            }
            Layout::Gradients(pairs) => {
                columns.packed = Some(Packed::keys_only(pairs, dim, count));
                columns.packed_values = Some(Packed::keys_only(pairs, dim, count));
                count
            }
        };
        columns.far.start(rows, dim);
        columns.hidden.start(hidden, dim);
        vectorized(
            #[inline(always)]
            || columns.fill(keys, values, bits, tokens, (fold, rows)),
        );
        let kept = || (0..tokens as u32).filter(|t| bits.get(*t as usize) != Some(&1));
        columns.tokens = (hidden > 0).then(|| kept().collect());
        columns
    }

    #[inline(always)]
    fn fill<T: Element<Acc = A>>(
        &mut self,
        keys: &HeadRows<T>,
        values: &HeadRows<T>,
        bits: &[u8],
        tokens: usize,
        (fold, room): (Fold, usize),
    ) {
        let (mut chain, mut left) = (ChainFold::new(fold, keys.dim), vec![A::ZERO; keys.dim]);
        let (mut merged, mut far, mut hidden) = (false, 0, 0);
        for t in 0..tokens {
            keys.prefetch_row(t + AHEAD);
            values.prefetch_row(t + AHEAD);
            let hides = bits.get(t) == Some(&1);
            // A chain of one is its token; a pair sum needs none.
            let chained = fold == Fold::Mean && (merged || hides);
            let summed = fold == Fold::PairSum && merged;
            if chained {
                chain.step(merged, keys.row(t), values.row(t));
            }
            merged = hides;
            let (rows, row) = match hides {
                true => (&mut self.hidden, hidden),
                // A column that is packed alone passes through the only row.
                false => (&mut self.far, far.min(room - 1)),
            };
            let (key, value) = rows.row_mut(row);
            if chained {
                key.copy_from_slice(&chain.key);
                value.copy_from_slice(&chain.value);
            } else {
                T::widen(keys.row(t), key);
                T::widen(values.row(t), value);
            }
            if summed {
                for (x, row) in [(&mut *key, keys.row(t - 1)), (&mut *value, values.row(t - 1))] {
                    T::widen(row, &mut left);
                    x.iter_mut().zip(&left).for_each(|(x, y)| *x += *y);
                }
            }
            self.clean &= !quarantine(key, value);
            match (hides, &mut self.packed, &mut self.packed_values) {
                (true, ..) | (_, None, _) => {}
                (_, Some(packed), None) => packed.push(A::singles(key), A::singles(value)),
                (_, Some(packed), Some(packed_values)) => {
                    packed.push_key(A::singles(key));
                    packed_values.push_key(A::singles(value));
                }
            }
            if fold == Fold::Mean {
                // Of a size of 1 nothing is computed.
                let size = if chained { chain.size } else { 1 };
                rows.log2_sizes.push(match size {
                    1 => A::ZERO,
                    size => A::of((size as f64).log2()),
                });
            }
            match hides {
                true => hidden += 1,
                false => far += 1,
            }
        }
        if let (Some(packed), None) = (&mut self.packed, &self.packed_values) {
            packed.finish();
        }
        self.sizes_differ = self.far.log2_sizes.iter().any(|size| *size != A::ZERO);
    }

    /// log2 n of each column; None where all are 0.
    pub fn log2_sizes(&self) -> Option<&[A]> {
        self.sizes_differ.then_some(&self.far.log2_sizes)
    }

    /// The `index`-th hidden token.
    pub fn edge(&self, index: usize) -> Edge<'_, A> {
        Edge {
            key: self.hidden.keys.row(index),
            value: self.hidden.values.row(index),
            log2_size: self.hidden.log2_sizes.get(index).copied().unwrap_or(A::ZERO),
        }
    }

    /// How many far columns hold tokens before `token`.
    pub fn before(&self, token: usize) -> usize {
        match &self.tokens {
            Some(tokens) => tokens.partition_point(|t| (*t as usize) < token),
            None => token,
        }
    }

    /// The token index of a column.
    pub fn token(&self, column: usize) -> usize {
        self.tokens.as_ref().map_or(column, |tokens| tokens[column] as usize)
    }

    /// Keys and values from `column` on.
    pub fn rows(&self, column: usize) -> (HeadRows<'_, A>, HeadRows<'_, A>) {
        (self.far.keys.rows(column), self.far.values.rows(column))
    }
}
