//! Folding of one head's keys and values, token by token, and its transpose for gradients.

use crate::config::Fold;
use crate::cpu::columns::source::{Bits, RawRows};
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::finite::{quarantine, spoil, Check};
use std::sync::LazyLock;

/// Walks along a head's tokens and holds the folded key, value and size of the current token.
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
    /// For keys and values of these sizes.
    pub fn new(fold: Fold, [dim, value_dim]: [usize; 2]) -> Self {
        let row = |dim: usize| vec![A::ZERO; dim];
        Self {
            fold,
            key: row(dim),
            value: row(value_dim),
            size: 1,
            raw_key: row(dim),
            raw_value: row(value_dim),
        }
    }

    /// Steps to the next token; `merged` folds the current token into it.
    #[inline(always)]
    pub fn step<T: Element<Acc = A>>(&mut self, merged: bool, key: &[T], value: &[T]) {
        if !merged || !self.fold.keeps_hidden() {
            T::widen(key, &mut self.key);
            T::widen(value, &mut self.value);
            self.size = 1;
            if self.fold.sums_pairs() {
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
            Fold::Mean => {
                T::widen(key, &mut self.raw_key);
                T::widen(value, &mut self.raw_value);
                running_mean(&mut self.key, &self.raw_key, self.size);
                running_mean(&mut self.value, &self.raw_value, self.size);
                self.size += 1;
            }
            // Drop keeps nothing of a hidden token.
            Fold::Drop => {}
        }
    }

    /// Makes a quarantined pair sum from its two raw rows. Afterwards [`Self::step`] must not fold: its raw rows are
    /// gone.
    #[inline(always)]
    pub fn pair<T: Element<Acc = A>>(&mut self, keys: (&[T], &[T]), values: (&[T], &[T])) {
        let mut check = Check::default();
        check.sum(keys, &mut self.raw_key, &mut self.key);
        check.sum(values, &mut self.raw_value, &mut self.value);
        if !check.passed() {
            spoil(&mut self.key, &mut self.value);
        }
    }

    /// Moves to the token before `token` if that token is folded into `token`, having walked its chain as far as the
    /// fold reads. `resume` is a chain on an earlier token to start from, with that token.
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
        while start > floor && joins_left(start) {
            match self.fold {
                Fold::Mean => start -= 1,
                // A pair sum reads one raw left neighbour only.
                Fold::PairSum => {
                    start -= 1;
                    break;
                }
                Fold::Drop => break,
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

    /// Replaces a key or value that is not finite: see [`quarantine`].
    #[inline(always)]
    pub fn quarantine(&mut self) {
        quarantine(&mut self.key, &mut self.value);
    }

    /// The current token as an edge column.
    pub fn edge(&self) -> Edge<'_, A> {
        Edge {
            key: &self.key,
            value: &self.value,
            log2_size: log2_size(self.size),
        }
    }

    /// Key, value, raw key and raw value: with fold and size, all of the state.
    pub fn rows(&self) -> [&[A]; 4] {
        [&self.key, &self.value, &self.raw_key, &self.raw_value]
    }

    /// A chain from the state that [`Self::rows`] of another chain gave.
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

    /// The number of numbers held.
    pub fn len(&self) -> usize {
        self.key.len() + self.value.len() + self.raw_key.len() + self.raw_value.len()
    }
}

/// log2 of the number of tokens in a mean; the usual numbers come from a table.
pub(crate) fn log2_size<A: Accumulator>(size: usize) -> A {
    static LOGARITHMS: LazyLock<[f64; 64]> = LazyLock::new(|| std::array::from_fn(|size| (size as f64).log2()));
    A::of(LOGARITHMS.get(size).copied().unwrap_or_else(|| (size as f64).log2()))
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
    // Two weights, not a sum that is divided: the sum could overflow where the mean does not.
    let inverse = A::ONE / A::of((size + 1) as f64);
    let rest = A::ONE - inverse;
    for (m, x) in mean.iter_mut().zip(next) {
        *m = *x * inverse + rest * *m;
    }
}

/// One folded token as a column that a single row sees.
#[derive(Clone, Copy)]
pub(crate) struct Edge<'e, A> {
    pub key: &'e [A],
    pub value: &'e [A],
    pub log2_size: A,
}

/// Changes gradients of folded rows (tokens, D) to gradients of the raw rows, in place: the transpose of the fold.
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
