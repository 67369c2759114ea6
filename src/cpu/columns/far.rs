//! Far columns: the keys and values of one head that merging leaves, compact and in token order.
//!
//! [`FarColumns`] owns the columns of one list of heads that share keys, values and bits: folded keys and values, log2
//! of the number of tokens in each, and the token index of each column. A call's raw keys and values are borrowed, both
//! while columns are gathered and where [`FarKeys`] says that a key is read in place.
//!
//! The idea: a column is made once per list and read by every block of rows. Columns are in token order, so that a
//! causal row sees a prefix, found by binary search.
//!
//! The tricks:
//! 1. One pass in token order folds, checks for numbers that are not finite, and stores or packs. Rows are prefetched
//!    [`AHEAD`] rows ahead.
//! 2. Where nothing is hidden and keys are compact accumulators, keys are not copied. With [`Layout::Lean`] only keys
//!    that merging made are stored; the other keys are read from the call's tensor.
//! 3. A pair sum is made from its two raw rows and needs no chain. Under a mean a chain of one token is the token
//!    itself.
//! 4. The first pass trusts that all rows are finite and only finds out. Where they are not, a second pass copies all
//!    keys and replaces each column that is not finite. (Where rows are widened or packed anyway, the one pass replaces
//!    at once.)
//! 5. A replaced column has a NaN key and a zero value: a row that sees it becomes NaN through its logit, and 0 * NaN
//!    reaches no other row. For gradients the key is 0 instead, see [`FarColumns::fill`].
//! 6. Columns that are packed as bf16 pairs pass through a single row: the f32 rows are never all held.
//! 7. The buffers of a list that has ended serve another list of the call (`room`).

use crate::config::Fold;
use crate::cpu::columns::chain::{log2_size, ChainFold};
use crate::cpu::columns::source::{KeysValues, FAR_COLUMNS};
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::finite::{spoil, Check};
use crate::cpu::number::rows::{HeadRows, PaddedRows};
use crate::cpu::number::vectorized::vectorized;
use crate::cpu::tile::bf16::{Packed, Pairs};
use std::ops::Range;

/// Rows between a prefetch and its read: the hardware does not follow strides of some KiB.
pub(crate) const AHEAD: usize = 8;

/// Folded keys (columns, D) and values (columns, Dv) with log2 n of each.
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
    fn start(&mut self, (keys, dim): (usize, usize), (values, value_dim): (usize, usize)) {
        self.keys.make_room(keys, dim);
        self.values.make_room(values, value_dim);
        self.log2_sizes.clear();
    }

    fn push_size(&mut self, fold: Fold, size: usize) {
        if fold.has_sizes() {
            self.log2_sizes.push(log2_size(size));
        }
    }
}

/// The form in which far columns are gathered.
#[derive(Clone, Copy)]
pub(crate) enum Layout {
    /// Values as rows, and keys too, unless keys can be read in place.
    ValueRows,
    /// As `ValueRows`, but with only the keys that merging makes: never more numbers, together with the values, than
    /// one of the tensors that they are gathered from. The other keys are read in place, if they are accumulators.
    Lean,
    /// Keys and values as rows, for gradients.
    Rows,
    /// As bf16 pairs, in place of rows.
    Pairs(Pairs),
    /// As bf16 pairs for gradients: keys by rows and by dimension, values by rows.
    Gradients(Pairs),
}

/// Where far keys are.
#[derive(Default)]
enum FarKeys {
    /// Each in its row.
    #[default]
    Rows,
    /// Keys are the raw ones, read in place.
    InPlace,
    /// Keys that merging made are in rows, with the column of each; the other keys are the raw ones of their tokens.
    Made(Vec<u32>),
}

/// The far columns of one list of heads that share keys, values and bits, in the accumulator's dtype. Columns are in
/// token order; the columns that a causal row sees are a prefix.
#[derive(Default)]
pub(crate) struct FarColumns<A: Accumulator> {
    /// One row per column; a single row where columns are only packed.
    far: FoldedRows<A>,
    keys: FarKeys,
    sizes_differ: bool,
    /// The token index of each column; None where nothing is hidden.
    pub tokens: Option<Vec<u32>>,
    pub columns: usize,
    /// Keys and values as bf16 pairs: see [`Layout`].
    pub packed: Option<Packed>,
    /// Values, packed as the keys of bf16 pairs; for gradients.
    pub packed_values: Option<Packed>,
    /// Whether every folded key and value of the head, and so every raw one, is finite.
    pub clean: bool,
}

impl<A: Accumulator> FarColumns<A> {
    /// Gathers in O(N·D). Reuses the buffers of `room`, columns of another list of the call, if given.
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
        // Rows are read in place if they are compact accumulators.
        let readable = T::as_acc(&[]).is_some();
        let in_place = nothing_hidden && readable && keys.stride == dim;
        columns.keys = match layout {
            Layout::ValueRows | Layout::Lean if in_place => FarKeys::InPlace,
            Layout::Lean if readable => FarKeys::Made(Vec::new()),
            _ => FarKeys::Rows,
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
                FarKeys::Rows => rows,
                FarKeys::InPlace => 0,
                FarKeys::Made(_) if !fold.keeps_hidden() => 0,
                FarKeys::Made(_) => chains(bits, tokens),
            };
            columns.far.start((key_rows, dim), (rows, values.dim));
            vectorized(
                #[inline(always)]
                || columns.fill((keys, values), bits, tokens, (fold, rows), (trusting, for_gradients)),
            );
        };
        let trusting = readable && columns.packed.is_none();
        fill(&mut columns, trusting);
        if trusting && !columns.clean {
            // Rows that are not finite are replaced, for which all rows are copied.
            columns.keys = FarKeys::Rows;
            fill(&mut columns, false);
        }
        let tokens_kept = || (0..tokens as u32).filter(|t| bits.get(*t as usize) != Some(&1));
        columns.tokens = (!nothing_hidden).then(|| tokens_kept().collect());
        columns
    }

    /// With `trusting` only finds out whether all rows are finite. Without it each row that is kept is checked, and
    /// replaced where it is not finite. A row of queries that sees a replaced column is NaN and stays out of the
    /// products of gradients. There the column's key is 0: another key would reach the rows of its tile that do not see
    /// it.
    #[inline(always)]
    fn fill<T: Element<Acc = A>>(
        &mut self,
        (keys, values): (&HeadRows<T>, &HeadRows<T>),
        bits: &[u8],
        tokens: usize,
        (fold, room): (Fold, usize),
        (trusting, for_gradients): (bool, bool),
    ) {
        let mut chain = ChainFold::new(fold, [keys.dim, values.dim]);
        let (mut left, mut left_value) = (vec![A::ZERO; keys.dim], vec![A::ZERO; values.dim]);
        let (mut merged, mut far, mut replaced) = (false, 0, false);
        let mut check = Check::default();
        for t in 0..tokens {
            keys.prefetch_row(t + AHEAD);
            values.prefetch_row(t + AHEAD);
            let hides = bits.get(t) == Some(&1);
            let (chained, summed) = match fold {
                // A chain of one is its token.
                Fold::Mean => (merged || hides, false),
                // A pair sum needs no chain.
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
                check.raw(values.row(t), &mut left_value);
                continue;
            }
            // A column that is only packed passes through the single row.
            let row = far.min(room - 1);
            let column = far as u32;
            far += 1;
            self.far.push_size(fold, if folded { chain.size } else { 1 });
            let value = self.far.values.row_mut(row);
            let key_row = match &mut self.keys {
                FarKeys::Rows => row,
                FarKeys::Made(made) if folded || summed => {
                    made.push(column);
                    made.len() - 1
                }
                FarKeys::Made(_) | FarKeys::InPlace => {
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
                row_check.sum((values.row(t - 1), values.row(t)), &mut left_value, value);
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

    /// Adds a number, in base 2, to the logits of each column: `bias` has one for each token.
    pub fn add_bias(&mut self, bias: &[A]) {
        let count = self.columns;
        let mut sizes = std::mem::take(&mut self.far.log2_sizes);
        sizes.resize(count, A::ZERO);
        for (column, size) in sizes.iter_mut().enumerate() {
            *size += bias[self.token(column)];
        }
        (self.far.log2_sizes, self.sizes_differ) = (sizes, true);
    }

    /// log2 n of each column, with its bias; None where all are 0.
    pub fn log2_sizes(&self) -> Option<&[A]> {
        self.sizes_differ.then_some(&self.far.log2_sizes)
    }

    /// The number of far columns that hold tokens before `token`.
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

    /// Keys and values from `column` on, (columns, D) and (columns, Dv); `keys` are the head's raw ones. Keys are empty
    /// where they lie apart.
    pub fn rows<'r, T: Element<Acc = A>>(&'r self, column: usize, keys: &HeadRows<'r, T>) -> KeysValues<'r, A> {
        let values = self.far.values.rows(column);
        let keys = match (&self.keys, keys.skip(column).as_acc()) {
            (FarKeys::InPlace, Some(keys)) => keys,
            (FarKeys::Made(_), _) => HeadRows::default(),
            _ => self.far.keys.rows(column),
        };
        (keys, values)
    }

    /// Finds the keys of some columns, if keys lie apart, and returns whether they do; `keys` are the head's raw ones.
    pub fn keys_apart<'r, T: Element<Acc = A>>(
        &'r self,
        columns: Range<usize>,
        keys: &HeadRows<'r, T>,
        apart: &mut [&'r [A]; FAR_COLUMNS],
    ) -> bool {
        let (FarKeys::Made(made), Some(keys)) = (&self.keys, keys.as_acc()) else {
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

/// The number of these tokens that are not hidden: the far columns of a list.
pub(crate) fn kept(bits: &[u8], tokens: usize) -> usize {
    tokens - bits.iter().filter(|bit| **bit == 1).count()
}

/// The number of chains of more than one token that end within these tokens.
fn chains(bits: &[u8], tokens: usize) -> usize {
    let hides = |token: usize| bits.get(token) == Some(&1);
    (1..tokens).filter(|t| hides(t - 1) && !hides(*t)).count()
}

#[cfg(test)]
mod tests {
    use crate::config::Fold;
    use crate::cpu::columns::far::{FarColumns, Layout};
    use crate::cpu::columns::source::FAR_COLUMNS;
    use crate::cpu::number::rows::HeadRows;

    /// Lean columns equal the columns gathered as rows, bit for bit; keys and values together are no more than one
    /// tensor.
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
