//! Keys by panels: a query is multiplied by a register of tokens at once.

use crate::cpu::number::aligned::Aligned;
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::panels::PANEL;
use crate::cpu::tile::transpose::transpose;
use crate::instructions::arch;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Keys by panels of [`PANEL`] tokens, each by dimension, so that no sum crosses the lanes of a register.
#[derive(Default)]
pub(crate) struct Keys<A: Accumulator> {
    /// (panels, D, PANEL)
    data: Aligned<A>,
    dim: usize,
    /// The index in the sequence of the first panel.
    first: usize,
    panels: usize,
}

impl<A: Accumulator> Keys<A> {
    /// Replaces the panels by the keys of `tokens`, from panel `first` on. Tokens that are missing at the start or in
    /// the last panel are zeros.
    pub fn fill<'r, T: Element<Acc = A>>(
        &mut self,
        first: usize,
        tokens: Range<usize>,
        row: impl Fn(usize) -> &'r [T],
    ) {
        (self.first, self.dim) = (first, 0);
        if !tokens.is_empty() {
            self.dim = row(tokens.start).len();
            let panels = tokens.end.div_ceil(PANEL) - first;
            // The loop below writes every number.
            self.panels = panels;
            self.data.make_room(panels * self.dim * PANEL);
            arch().dispatch(Fill {
                keys: self,
                tokens,
                row,
            })
        }
    }

    /// Panel `index` of the sequence, (D, PANEL).
    #[inline(always)]
    pub fn panel(&self, index: usize) -> &[A] {
        &self.data[(index - self.first) * self.dim * PANEL..][..self.dim * PANEL]
    }
}

/// [`Keys::fill`] as code for one instruction set.
struct Fill<'k, A: Accumulator, F> {
    keys: &'k mut Keys<A>,
    tokens: Range<usize>,
    row: F,
}

impl<'r, T: Element, F: Fn(usize) -> &'r [T]> WithSimd for Fill<'_, T::Acc, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { keys, tokens, row } = self;
        let dim = keys.dim;
        // Rows that need widening, and zeros for missing rows.
        let mut wide = vec![T::Acc::ZERO; PANEL * dim];
        for (panel, target) in keys.data.chunks_exact_mut(PANEL * dim).take(keys.panels).enumerate() {
            let first = (keys.first + panel) * PANEL;
            let present = |c: usize| tokens.contains(&(first + c)).then(|| row(first + c));
            for (c, wide) in wide.chunks_exact_mut(dim).enumerate() {
                match present(c) {
                    Some(row) if T::as_acc(row).is_none() => T::widen(row, wide),
                    Some(_) => {}
                    None => wide.fill(T::Acc::ZERO),
                }
            }
            let mut rows: [&[T::Acc]; PANEL] = [&[]; PANEL];
            for (c, target) in rows.iter_mut().enumerate() {
                *target = present(c).and_then(T::as_acc).unwrap_or(&wide[c * dim..][..dim]);
            }
            transpose(simd, rows, target, PANEL);
        }
    }
}
