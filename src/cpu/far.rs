//! What merging leaves of one head's keys and values: compact far columns.

use super::pairs::{Packed, Pairs};
use super::{vectorized, Accumulator, Element, HeadRows};
use crate::config::Fold;
use crate::cpu::finite::{spoil, Check};
use crate::cpu::fold::{log2_size, ChainFold};
use crate::cpu::rows::PaddedRows;
use crate::cpu::source::{KeysValues, FAR_COLUMNS};
use std::ops::Range;

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
        if fold.has_sizes() {
            self.log2_sizes.push(log2_size(size));
        }
    }
}

/// How far columns are gathered.
#[derive(Clone, Copy)]
pub(crate) enum Layout {
    /// Values as rows, and keys too, unless they can be read where they are.
    ValueRows,
    /// The same, but of keys only those that merging makes: never more, together with the values, than one of the tensors
    /// that they are gathered from. The others are read where they are, if they are accumulators.
    Lean,
    /// For gradients.
    Rows,
    /// As bf16 pairs, in place of rows.
    Pairs(Pairs),
    /// As bf16 pairs for gradients: keys by rows and by dimension, values by rows.
    Gradients(Pairs),
}

/// Where far keys are.
#[derive(Default)]
enum Keys {
    /// Each in its row.
    #[default]
    Rows,
    /// They are the raw ones, and read where they are.
    InPlace,
    /// Those that merging made are in rows, with the column of each; the others are the raw ones of their tokens.
    Made(Vec<u32>),
}

/// What merging leaves of one list of heads that share keys, values and bits, in the accumulator's dtype. Columns are in
/// token order; which of them a row sees is a prefix.
#[derive(Default)]
pub(crate) struct FarColumns<A: Accumulator> {
    /// The tokens that are not hidden; a single row where they are packed alone.
    far: FoldedRows<A>,
    keys: Keys,
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
        let mut columns = room.unwrap_or_default();
        let (dim, count) = (keys.dim, kept(bits, tokens));
        let nothing_hidden = count == tokens;
        columns.columns = count;
        // Rows are read where they are if they are compact accumulators.
        let readable = T::as_acc(&[]).is_some();
        let in_place = nothing_hidden && readable && keys.stride == dim;
        columns.keys = match layout {
            Layout::ValueRows | Layout::Lean if in_place => Keys::InPlace,
            Layout::Lean if readable => Keys::Made(Vec::new()),
            _ => Keys::Rows,
        };
        let rows = match layout {
            Layout::ValueRows | Layout::Lean | Layout::Rows => count,
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
        let for_gradients = matches!(layout, Layout::Rows | Layout::Gradients(_));
        let fill = |columns: &mut Self, trusting: bool| {
            let key_rows = match columns.keys {
                Keys::Rows => rows,
                Keys::InPlace => 0,
                Keys::Made(_) if !fold.keeps_hidden() => 0,
                Keys::Made(_) => chains(bits, tokens),
            };
            columns.far.start(key_rows, rows, dim);
            vectorized(
                #[inline(always)]
                || columns.fill((keys, values), bits, tokens, (fold, rows), (trusting, for_gradients)),
            );
        };
        let trusting = readable && columns.packed.is_none();
        fill(&mut columns, trusting);
        if trusting && !columns.clean {
            // Rows that are not finite are replaced, which takes copies of all.
            columns.keys = Keys::Rows;
            fill(&mut columns, false);
        }
        let tokens_kept = || (0..tokens as u32).filter(|t| bits.get(*t as usize) != Some(&1));
        columns.tokens = (!nothing_hidden).then(|| tokens_kept().collect());
        columns
    }

    /// `trusting` only finds out whether all rows are finite; else each row that is kept is looked at, and replaced where it
    /// is not finite. The rows that see such a column are NaN and stay out of gradients' products, where its key is 0: any
    /// other one would reach the rows of its tile that do not see it.
    #[inline(always)]
    fn fill<T: Element<Acc = A>>(
        &mut self,
        (keys, values): (&HeadRows<T>, &HeadRows<T>),
        bits: &[u8],
        tokens: usize,
        (fold, room): (Fold, usize),
        (trusting, for_gradients): (bool, bool),
    ) {
        let (mut chain, mut left) = (ChainFold::new(fold, keys.dim), vec![A::ZERO; keys.dim]);
        let (mut merged, mut far, mut replaced) = (false, 0, false);
        let mut check = Check::default();
        for t in 0..tokens {
            keys.prefetch_row(t + AHEAD);
            values.prefetch_row(t + AHEAD);
            let hides = bits.get(t) == Some(&1);
            let (chained, summed) = match fold {
                // A chain of one is its token.
                Fold::Mean => (merged || hides, false),
                // It needs no chain.
                Fold::PairSum => (false, merged),
                Fold::Drop => (false, false),
            };
            if chained {
                chain.step(merged, keys.row(t), values.row(t));
            }
            let folded = chained && merged;
            merged = hides;
            if hides {
                check.raw(keys.row(t), &mut left);
                check.raw(values.row(t), &mut left);
                continue;
            }
            // A column that is packed alone passes through the only row.
            let row = far.min(room - 1);
            let column = far as u32;
            far += 1;
            self.far.push_size(fold, if folded { chain.size } else { 1 });
            let value = self.far.values.row_mut(row);
            let key_row = match &mut self.keys {
                Keys::Rows => row,
                Keys::Made(made) if folded || summed => {
                    made.push(column);
                    made.len() - 1
                }
                Keys::Made(_) | Keys::InPlace => {
                    check.raw(keys.row(t), &mut left);
                    check.copy(values.row(t), value);
                    continue;
                }
            };
            let (key, mut own) = (self.far.keys.row_mut(key_row), Check::default());
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
                if for_gradients {
                    key.fill(A::ZERO);
                }
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

    /// Keys and values from `column` on; `keys` are the head's. Without keys where they lie apart.
    pub fn rows<'r, T: Element<Acc = A>>(&'r self, column: usize, keys: &HeadRows<'r, T>) -> KeysValues<'r, A> {
        let values = self.far.values.rows(column);
        let keys = match (&self.keys, keys.skip(column).as_acc()) {
            (Keys::InPlace, Some(keys)) => keys,
            (Keys::Made(_), _) => HeadRows::default(),
            _ => self.far.keys.rows(column),
        };
        (keys, values)
    }

    /// Where the keys of some columns are, if they lie apart; `keys` are the head's.
    pub fn keys_apart<'r, T: Element<Acc = A>>(
        &'r self,
        columns: Range<usize>,
        keys: &HeadRows<'r, T>,
        apart: &mut [&'r [A]; FAR_COLUMNS],
    ) -> bool {
        let (Keys::Made(made), Some(keys)) = (&self.keys, keys.as_acc()) else {
            return false;
        };
        let stored = self.far.keys.rows(0);
        let mut next = made.partition_point(|column| (*column as usize) < columns.start);
        for (key, column) in apart.iter_mut().zip(columns) {
            if made.get(next) == Some(&(column as u32)) {
                *key = stored.row(next);
                next += 1;
            } else {
                *key = keys.row(self.token(column));
            }
        }
        true
    }
}

/// How many of these tokens are not hidden: the far columns of a list.
pub(crate) fn kept(bits: &[u8], tokens: usize) -> usize {
    tokens - bits.iter().filter(|bit| **bit == 1).count()
}

/// How many chains of more than one token end within these tokens.
fn chains(bits: &[u8], tokens: usize) -> usize {
    let hides = |token: usize| bits.get(token) == Some(&1);
    (1..tokens).filter(|t| hides(t - 1) && !hides(*t)).count()
}

#[cfg(test)]
mod tests {
    use super::{FarColumns, Layout};
    use crate::config::Fold;
    use crate::cpu::source::FAR_COLUMNS;
    use crate::cpu::HeadRows;

    /// Lean columns are those gathered as rows, bit for bit, and of keys and values together no more than one tensor.
    #[test]
    fn lean_columns_are_the_gathered_ones() {
        let (tokens, dim, stride) = (157, 16, 40);
        let number = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 500.0 - 1.0;
        let keys: Vec<f32> = (0..tokens * stride).map(number).collect();
        let values: Vec<f32> = (1..=tokens * stride).map(number).collect();
        for (name, keys) in [
            ("finite", keys.clone()),
            ("one infinite", with_infinity(keys, 50 * stride)),
        ] {
            let rows = |data| HeadRows { data, stride, dim };
            let (keys, values) = (rows(&keys[..]), rows(&values[..]));
            for fold in [Fold::Mean, Fold::PairSum, Fold::Drop] {
                for period in [2, 3, 5, 1000] {
                    let bits: Vec<u8> = (0..tokens - 1)
                        .map(|t| u8::from(t % period == 0 || t % 7 == 3))
                        .collect();
                    let gather = |layout| FarColumns::gather((&keys, &values), &bits, tokens, fold, layout, None);
                    let (whole, lean) = (gather(Layout::ValueRows), gather(Layout::Lean));
                    assert_eq!(whole.columns, lean.columns);
                    for start in (0..lean.columns).step_by(FAR_COLUMNS) {
                        let columns = start..lean.columns.min(start + FAR_COLUMNS);
                        let mut apart = [&[][..]; FAR_COLUMNS];
                        let found = lean.keys_apart(columns.clone(), &keys, &mut apart);
                        assert_eq!(found, name == "finite");
                        let (expected, got) = (whole.rows(start, &keys), lean.rows(start, &keys));
                        for (row, apart) in apart.iter().take(columns.len()).enumerate() {
                            let key = if found { apart } else { got.0.row(row) };
                            let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
                            assert!(same(expected.0.row(row), key), "{name} {fold:?} {period}: key {row}");
                            assert!(
                                same(expected.1.row(row), got.1.row(row)),
                                "{name} {fold:?} {period}: value {row}"
                            );
                        }
                    }
                    if name == "finite" {
                        let held = lean.far.keys.rows(0).data.len() + lean.far.values.rows(0).data.len();
                        assert!(held <= tokens * dim, "{fold:?} {period}: {held} numbers");
                    }
                }
            }
        }
    }

    fn with_infinity(mut keys: Vec<f32>, at: usize) -> Vec<f32> {
        keys[at] = f32::INFINITY;
        keys
    }
}
