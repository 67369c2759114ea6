//! What merging leaves of one head's keys and values: compact far columns, and the folded tokens that are hidden.

use super::aligned::PaddedRows;
use super::columns::KeysValues;
use super::fold::{quarantine, ChainFold, Check, Edge};
use super::pairs::{Packed, Pairs};
use super::{vectorized, Accumulator, Element, HeadRows};
use crate::config::Fold;

/// Rows that are asked for before they are read: the hardware does not follow strides of some KiB.
pub(crate) const AHEAD: usize = 8;

/// In place of a row's number: nothing was folded into the token, and it is read where it is.
const RAW: u32 = u32::MAX;

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

    /// Of a size of 1 nothing is computed.
    fn push_size(&mut self, fold: Fold, size: usize) {
        if fold == Fold::Mean {
            self.log2_sizes.push(match size {
                1 => A::ZERO,
                size => A::of((size as f64).log2()),
            });
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
    /// The others, but for those that are read where they are.
    hidden: FoldedRows<A>,
    /// Of each hidden token its row in `hidden`, or [`RAW`].
    hidden_rows: Vec<u32>,
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
        let fill = |columns: &mut Self, stored: usize, trusting: bool| {
            columns.far.start(if columns.raw_keys { 0 } else { rows }, rows, dim);
            columns.hidden.start(stored, stored, dim);
            vectorized(
                #[inline(always)]
                || columns.fill((keys, values), bits, tokens, (fold, rows), trusting),
            );
        };
        let trusting = readable && columns.packed.is_none();
        let stored = match fold {
            _ if !trusting => hidden,
            Fold::Drop => 0,
            _ => bits.windows(2).filter(|pair| *pair == [1, 1]).count(),
        };
        fill(&mut columns, stored, trusting);
        if trusting && !columns.clean {
            // Rows that are not finite are replaced, which takes copies of all.
            columns.raw_keys = false;
            fill(&mut columns, hidden, false);
        }
        let kept = || (0..tokens as u32).filter(|t| bits.get(*t as usize) != Some(&1));
        columns.tokens = (hidden > 0).then(|| kept().collect());
        columns
    }

    /// `trusting` only finds out whether all rows are finite, and copies none of those that can be read where they are;
    /// else each row is looked at, and replaced where it is not finite.
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
        let (mut merged, mut far, mut hidden) = (false, 0, 0);
        let mut check = Check::default();
        self.clean = true;
        self.hidden_rows.clear();
        for t in 0..tokens {
            keys.prefetch_row(t + AHEAD);
            values.prefetch_row(t + AHEAD);
            let hides = bits.get(t) == Some(&1);
            // A chain of one is its token; a pair sum needs none.
            let chained = fold == Fold::Mean && (merged || hides);
            let summed = fold == Fold::PairSum && merged;
            let folded = merged && fold != Fold::Drop;
            if chained {
                chain.step(merged, keys.row(t), values.row(t));
            }
            merged = hides;
            let in_place = trusting && hides && !folded;
            if hides {
                self.hidden_rows.push(if in_place { RAW } else { hidden as u32 });
            }
            if in_place {
                for row in [keys.row(t), values.row(t)] {
                    check.take(T::as_acc(row).unwrap_or_default());
                }
                continue;
            }
            let (rows, row) = match hides {
                true => (&mut self.hidden, hidden),
                // A column that is packed alone passes through the only row.
                false => (&mut self.far, far.min(room - 1)),
            };
            let size = if chained { chain.size } else { 1 };
            rows.push_size(fold, size);
            let value = rows.values.row_mut(row);
            if self.raw_keys {
                check.take(T::as_acc(keys.row(t)).unwrap_or_default());
                check.copy(values.row(t), value);
                far += 1;
                continue;
            }
            let key = rows.keys.row_mut(row);
            if folded && fold == Fold::Mean {
                check.copy(&chain.key, key);
                check.copy(&chain.value, value);
            } else {
                check.copy(keys.row(t), key);
                check.copy(values.row(t), value);
            }
            if summed {
                for (x, row) in [(&mut *key, keys.row(t - 1)), (&mut *value, values.row(t - 1))] {
                    T::widen(row, &mut left);
                    x.iter_mut().zip(&left).for_each(|(x, y)| *x += *y);
                    check.take(x);
                }
            }
            if !trusting {
                self.clean &= !quarantine(key, value);
            }
            match (hides, &mut self.packed, &mut self.packed_values) {
                (true, ..) | (_, None, _) => {}
                (_, Some(packed), None) => packed.push(A::singles(key), A::singles(value)),
                (_, Some(packed), Some(packed_values)) => {
                    packed.push(A::singles(key), A::singles(key));
                    packed_values.push_key(A::singles(value));
                }
            }
            match hides {
                true => hidden += 1,
                false => far += 1,
            }
        }
        if trusting {
            self.clean = check.passed();
        }
        if let Some(packed) = &mut self.packed {
            packed.finish();
        }
        self.sizes_differ = self.far.log2_sizes.iter().any(|size| *size != A::ZERO);
    }

    /// log2 n of each column; None where all are 0.
    pub fn log2_sizes(&self) -> Option<&[A]> {
        self.sizes_differ.then_some(&self.far.log2_sizes)
    }

    /// The `index`-th hidden token, which is `token` of the head's rows.
    pub fn edge<'e, T: Element<Acc = A>>(
        &'e self,
        index: usize,
        token: usize,
        (keys, values): (&HeadRows<'e, T>, &HeadRows<'e, T>),
    ) -> Edge<'e, A> {
        match self.hidden_rows[index] {
            RAW => Edge {
                key: T::as_acc(keys.row(token)).unwrap_or_default(),
                value: T::as_acc(values.row(token)).unwrap_or_default(),
                log2_size: A::ZERO,
            },
            row => Edge {
                key: self.hidden.keys.row(row as usize),
                value: self.hidden.values.row(row as usize),
                log2_size: self.hidden.log2_sizes.get(row as usize).copied().unwrap_or(A::ZERO),
            },
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

    /// Keys and values from `column` on; `keys` are the head's.
    pub fn rows<'r, T: Element<Acc = A>>(&'r self, column: usize, keys: &HeadRows<'r, T>) -> KeysValues<'r, A> {
        let raw = keys.skip(column).as_acc().filter(|_| self.raw_keys);
        let keys = raw.unwrap_or_else(|| self.far.keys.rows(column));
        (keys, self.far.values.rows(column))
    }
}
