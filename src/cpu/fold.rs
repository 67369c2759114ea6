//! What merging leaves of one head's keys and values: compact far columns, and the folded token at a window's edge.

use super::aligned::PaddedRows;
use super::columns::{Bits, RawRows};
use super::pairs::{Packed, Pairs};
use super::{Accumulator, Element, HeadRows};
use crate::config::Fold;

/// Walks along a head's tokens and holds the folded key, value and size of the one it stands on.
#[derive(Clone)]
pub(crate) struct ChainFold<A> {
    fold: Fold,
    pub key: Vec<A>,
    pub value: Vec<A>,
    /// Tokens in the chain so far, for [`Fold::Mean`]; 1 for the other folds.
    pub size: usize,
    raw_key: Vec<A>,
    raw_value: Vec<A>,
}

impl<A: Accumulator> ChainFold<A> {
    pub fn new(fold: Fold, dim: usize) -> Self {
        let row = || vec![A::ZERO; dim];
        Self {
            fold,
            key: row(),
            value: row(),
            size: 1,
            raw_key: row(),
            raw_value: row(),
        }
    }

    /// Steps to the next token, into which the one before is folded when `merged`.
    #[inline(always)]
    pub fn step<T: Element<Acc = A>>(&mut self, merged: bool, key: &[T], value: &[T]) {
        if !merged || self.fold == Fold::Drop {
            T::widen(key, &mut self.key);
            T::widen(value, &mut self.value);
            self.size = 1;
            if self.fold == Fold::PairSum {
                self.raw_key.copy_from_slice(&self.key);
                self.raw_value.copy_from_slice(&self.value);
            }
            return;
        }
        match self.fold {
            Fold::PairSum => {
                pair_sum(&mut self.key, &mut self.raw_key, key);
                pair_sum(&mut self.value, &mut self.raw_value, value);
            }
            _ => {
                T::widen(key, &mut self.raw_key);
                T::widen(value, &mut self.raw_value);
                running_mean(&mut self.key, &self.raw_key, self.size);
                running_mean(&mut self.value, &self.raw_value, self.size);
                self.size += 1;
            }
        }
    }

    /// Stands on the token before `token` if that one is folded into it, having walked its chain as far as the fold
    /// reads; `resume` is a chain on an earlier token to start from.
    pub fn approach<T: Element<Acc = A>>(
        &mut self,
        token: usize,
        bits: Bits,
        raw: &RawRows<T>,
        resume: Option<(usize, &ChainFold<A>)>,
    ) {
        let joins_left = |t: usize| t > 0 && bits.hidden(t - 1);
        let floor = resume.map_or(0, |(stands_on, _)| stands_on + 1);
        let mut start = token;
        while self.fold != Fold::Drop && start > floor && joins_left(start) {
            start -= 1;
            // One raw left neighbour is all a pair sum reads.
            if self.fold == Fold::PairSum {
                break;
            }
        }
        let resume = resume.filter(|_| start == floor && joins_left(start));
        if let Some((_, chain)) = resume {
            self.clone_from(chain);
        }
        for t in start..token {
            self.step(t > start || resume.is_some(), raw.key(t), raw.value(t));
        }
    }

    /// The token it stands on as an edge, whose key is NaN where the token is not finite.
    pub fn edge(&mut self) -> Edge<'_, A> {
        quarantine(&mut self.key, &mut self.value);
        Edge {
            key: &self.key,
            value: &self.value,
            log2_size: if self.size > 1 {
                A::of((self.size as f64).log2())
            } else {
                A::ZERO
            },
        }
    }

    /// Key, value, raw key and raw value: with fold and size, all of its state.
    pub fn rows(&self) -> [&[A]; 4] {
        [&self.key, &self.value, &self.raw_key, &self.raw_value]
    }

    /// A chain that goes on from the [`Self::rows`] of another.
    pub fn from_rows(fold: Fold, size: usize, [key, value, raw_key, raw_value]: [Vec<A>; 4]) -> Self {
        Self {
            fold,
            key,
            value,
            size,
            raw_key,
            raw_value,
        }
    }

    /// Numbers held.
    pub fn len(&self) -> usize {
        self.key.len() + self.value.len() + self.raw_key.len() + self.raw_value.len()
    }
}

#[inline(always)]
fn pair_sum<T: Element>(folded: &mut [T::Acc], raw: &mut [T::Acc], next: &[T]) {
    folded.copy_from_slice(raw);
    T::widen(next, raw);
    for (f, x) in folded.iter_mut().zip(raw.iter()) {
        *f += *x;
    }
}

#[inline(always)]
fn running_mean<A: Accumulator>(mean: &mut [A], next: &[A], size: usize) {
    let (size, inverse) = (A::of(size as f64), A::ONE / A::of((size + 1) as f64));
    for (m, x) in mean.iter_mut().zip(next) {
        *m = (*x + size * *m) * inverse;
    }
}

/// Replaces a key or value that is not finite by a NaN key and a zero value: whoever sees the column becomes NaN
/// through its logit, and nobody else is touched by 0 * NaN. Returns whether it did.
#[inline(always)]
pub(crate) fn quarantine<A: Accumulator>(key: &mut [A], value: &mut [A]) -> bool {
    let bad = !(all_finite(key) && all_finite(value));
    if bad {
        key.fill(A::NAN);
        value.fill(A::ZERO);
    }
    bad
}

#[inline(always)]
pub(crate) fn all_finite<A: Accumulator>(row: &[A]) -> bool {
    const LANES: usize = 16;
    let mut checks = [A::ZERO; LANES];
    let chunks = row.chunks_exact(LANES);
    for (check, x) in checks.iter_mut().zip(chunks.remainder()) {
        *check += *x * A::ZERO;
    }
    for chunk in chunks {
        for lane in 0..LANES {
            checks[lane] += chunk[lane] * A::ZERO;
        }
    }
    checks.iter().all(|check| *check == A::ZERO)
}

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

/// One folded token as a column that a single row sees.
#[derive(Clone, Copy)]
pub(crate) struct Edge<'e, A> {
    pub key: &'e [A],
    pub value: &'e [A],
    pub log2_size: A,
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
        super::vectorized(
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

/// Takes gradients of folded rows (tokens, D) home to the rows they were folded from, in place: the transpose of the
/// fold.
#[inline(always)]
pub(crate) fn unfold<A: Accumulator>(fold: Fold, gradients: &mut [A], bits: &[u8], dim: usize) {
    let hidden = |t: usize| bits.get(t) == Some(&1);
    let tokens = gradients.len() / dim;
    match fold {
        Fold::Drop => {}
        Fold::PairSum => {
            for t in (0..tokens).filter(|t| hidden(*t)) {
                let (mine, right) = gradients.split_at_mut((t + 1) * dim);
                let pairs = mine[t * dim..].iter_mut().zip(right);
                pairs.for_each(|(x, y)| *x += *y);
            }
        }
        Fold::Mean => {
            // F[t] = (X[t] + n[t-1] F[t-1]) / n[t]: each token of a chain of n has 1/n[t] of every later F[t].
            let mut size = 1;
            let sizes: Vec<usize> = (0..tokens)
                .map(|t| {
                    size = if t > 0 && hidden(t - 1) { size + 1 } else { 1 };
                    size
                })
                .collect();
            for t in (0..tokens).rev() {
                let inverse = A::ONE / A::of(sizes[t] as f64);
                let (mine, right) = gradients.split_at_mut((t + 1) * dim);
                let mine = &mut mine[t * dim..];
                mine.iter_mut().for_each(|x| *x *= inverse);
                if hidden(t) {
                    mine.iter_mut().zip(right).for_each(|(x, y)| *x += *y);
                }
            }
        }
    }
}
