//! What merging leaves of one head's keys and values: compact far columns.

use super::aligned::PaddedRows;
use super::columns::KeysValues;
use super::fold::{log2_size, spoil, ChainFold, Check};
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
    fn start(&mut self, keys: usize, values: usize, dim: usize) {
        self.keys.make_room(keys, dim);
        self.values.make_room(values, dim);
        self.log2_sizes.clear();
    }

    fn push_size(&mut self, fold: Fold, size: usize) {
        if fold == Fold::Mean {
            self.log2_sizes.push(log2_size(size));
        }
    }
}

/// How far columns are gathered.
#[derive(Clone, Copy)]
pub(crate) enum Layout {
    /// Values as rows, and keys too, unless they can be read where they are.
    ValueRows,
    Rows,
    /// As bf16 pairs, in place of rows.
    Pairs(Pairs),
    /// As bf16 pairs for gradients: keys by rows and by dimension, values by rows.
    Gradients(Pairs),
}

/// What merging leaves of one list of heads that share keys, values and bits, in the accumulator's dtype. Columns are in
/// token order; which of them a row sees is a prefix.
#[derive(Default)]
pub(crate) struct FarColumns<A: Accumulator> {
    /// The tokens that are not hidden; a single row where they are packed alone.
    far: FoldedRows<A>,
    /// Whether far keys are the raw ones, and read where they are.
    raw_keys: bool,
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
        let (dim, count) = (keys.dim, tokens - hidden);
        columns.columns = count;
        // Rows are read where they are if they are compact accumulators.
        let readable = T::as_acc(&[]).is_some();
        columns.raw_keys = matches!(layout, Layout::ValueRows) && hidden == 0 && readable && keys.stride == dim;
        let rows = match layout {
            Layout::ValueRows | Layout::Rows => count,
            Layout::Pairs(pairs) => {
                columns.packed = Some(Packed::new(pairs, dim, count));
                1
            }
            Layout::Gradients(pairs) => {
                columns.packed = Some(Packed::new(pairs, dim, count));
                columns.packed_values = Some(Packed::keys_only(pairs, dim, count));
                1
            }
        };
        let fill = |columns: &mut Self, trusting: bool| {
            columns.far.start(if columns.raw_keys { 0 } else { rows }, rows, dim);
            vectorized(
                #[inline(always)]
                || columns.fill((keys, values), bits, tokens, (fold, rows), trusting),
            );
        };
        let trusting = readable && columns.packed.is_none();
        fill(&mut columns, trusting);
        if trusting && !columns.clean {
            // Rows that are not finite are replaced, which takes copies of all.
            columns.raw_keys = false;
            fill(&mut columns, false);
        }
        let kept = || (0..tokens as u32).filter(|t| bits.get(*t as usize) != Some(&1));
        columns.tokens = (hidden > 0).then(|| kept().collect());
        columns
    }

    /// `trusting` only finds out whether all rows are finite; else each row that is kept is looked at, and replaced where it
    /// is not finite.
    #[inline(always)]
    fn fill<T: Element<Acc = A>>(
        &mut self,
        (keys, values): (&HeadRows<T>, &HeadRows<T>),
        bits: &[u8],
        tokens: usize,
        (fold, room): (Fold, usize),
        trusting: bool,
    ) {
        let (mut chain, mut left) = (ChainFold::new(fold, keys.dim), vec![A::ZERO; keys.dim]);
        let (mut merged, mut far, mut replaced) = (false, 0, false);
        let mut check = Check::default();
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
            let folded = chained && merged;
            merged = hides;
            if hides {
                for row in [keys.row(t), values.row(t)] {
                    match T::as_acc(row) {
                        Some(row) => check.take(row),
                        None => check.copy(row, &mut left),
                    }
                }
                continue;
            }
            // A column that is packed alone passes through the only row.
            let row = far.min(room - 1);
            far += 1;
            self.far.push_size(fold, if folded { chain.size } else { 1 });
            let value = self.far.values.row_mut(row);
            if self.raw_keys {
                check.take(T::as_acc(keys.row(t)).unwrap_or_default());
                check.copy(values.row(t), value);
                continue;
            }
            let (key, mut own) = (self.far.keys.row_mut(row), Check::default());
            let row_check = if trusting { &mut check } else { &mut own };
            if folded {
                row_check.copy(&chain.key[..], key);
                row_check.copy(&chain.value[..], value);
            } else if summed {
                row_check.sum((keys.row(t - 1), keys.row(t)), &mut left, key);
                row_check.sum((values.row(t - 1), values.row(t)), &mut left, value);
            } else {
                row_check.copy(keys.row(t), key);
                row_check.copy(values.row(t), value);
            }
            if !trusting && !own.passed() {
                spoil(key, value);
                replaced = true;
            }
            match (&mut self.packed, &mut self.packed_values) {
                (None, _) => {}
                (Some(packed), None) => packed.push(A::singles(key), A::singles(value)),
                (Some(packed), Some(packed_values)) => {
                    packed.push(A::singles(key), A::singles(key));
                    packed_values.push_key(A::singles(value));
                }
            }
        }
        self.clean = check.passed() && !replaced;
        if let Some(packed) = &mut self.packed {
            packed.finish();
        }
        self.sizes_differ = self.far.log2_sizes.iter().any(|size| *size != A::ZERO);
    }

    /// log2 n of each column; None where all are 0.
    pub fn log2_sizes(&self) -> Option<&[A]> {
        self.sizes_differ.then_some(&self.far.log2_sizes)
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

    /// Keys and values from `column` on; `keys` are the head's.
    pub fn rows<'r, T: Element<Acc = A>>(&'r self, column: usize, keys: &HeadRows<'r, T>) -> KeysValues<'r, A> {
        let raw = keys.skip(column).as_acc().filter(|_| self.raw_keys);
        let keys = raw.unwrap_or_else(|| self.far.keys.rows(column));
        (keys, self.far.values.rows(column))
    }
}
