//! A piece of a list's entries: contiguous rows, as stored or in 8 bits.

use crate::cpu::number::element::Element;
use crate::cpu::number::rows::HeadRows;
use half::bf16;
use std::ops::Range;

/// The share of the rest that has left before it moves: one part of this many.
pub(crate) const SHARE: usize = 8;

/// Contiguous rows: keys (rows, D), values (rows, Dv). In 8 bits they are in `codes`, and `keys` and `values` empty.
#[derive(Clone)]
pub(crate) struct EntryPiece<S: Element> {
    pub keys: Vec<S>,
    pub values: Vec<S>,
    /// Of keys, then of values.
    pub codes: [Vec<u8>; 2],
    pub scales: [Vec<bf16>; 2],
    pub tokens: Vec<u32>,
    /// Empty unless rows have sizes.
    pub log2_sizes: Vec<S::Acc>,
    /// What a budget goes by; empty unless rows have scores.
    pub scores: Vec<f32>,
}

/// Some rows as columns to read.
#[derive(Clone, Copy)]
pub(crate) struct EntryColumns<'e, S: Element> {
    pub keys: HeadRows<'e, S>,
    pub values: HeadRows<'e, S>,
    /// Codes (rows, D) and (rows, Dv), and their scales, where rows are in 8 bits; else empty.
    pub codes: [&'e [u8]; 2],
    pub scales: [&'e [bf16]; 2],
    pub tokens: &'e [u32],
    /// Empty unless rows have sizes.
    pub log2_sizes: &'e [S::Acc],
    /// Empty unless rows have scores.
    pub scores: &'e [f32],
}

impl<'e, S: Element> EntryColumns<'e, S> {
    /// Some of the rows.
    pub fn part(&self, rows: Range<usize>) -> Self {
        let of = |data: HeadRows<'e, S>| HeadRows {
            data: data.data.get(rows.start * data.dim..rows.end * data.dim).unwrap_or(&[]),
            ..data
        };
        let dims = [self.keys.dim, self.values.dim];
        let some = |which: usize| self.codes[which].get(rows.start * dims[which]..rows.end * dims[which]);
        Self {
            keys: of(self.keys),
            values: of(self.values),
            codes: [0, 1].map(|which| some(which).unwrap_or(&[])),
            scales: self.scales.map(|scales| scales.get(rows.clone()).unwrap_or(&[])),
            tokens: &self.tokens[rows.clone()],
            log2_sizes: self.log2_sizes.get(rows.clone()).unwrap_or(&[]),
            scores: self.scores.get(rows.clone()).unwrap_or(&[]),
        }
    }
}

impl<S: Element> EntryPiece<S> {
    pub fn empty() -> Self {
        Self {
            keys: Vec::new(),
            values: Vec::new(),
            codes: Default::default(),
            scales: Default::default(),
            tokens: Vec::new(),
            log2_sizes: Vec::new(),
            scores: Vec::new(),
        }
    }

    pub fn columns(&self, rows: Range<usize>, [dim, value_dim]: [usize; 2]) -> EntryColumns<'_, S> {
        // Empty where the rows are in 8 bits.
        let of = |data, dim: usize| -> HeadRows<S> {
            let data: &[S] = data;
            HeadRows::compact(data.get(rows.start * dim..rows.end * dim).unwrap_or(&[]), dim)
        };
        let codes = |which: usize, dim: usize| -> &[u8] {
            self.codes[which].get(rows.start * dim..rows.end * dim).unwrap_or(&[])
        };
        EntryColumns {
            keys: of(&self.keys, dim),
            values: of(&self.values, value_dim),
            codes: [codes(0, dim), codes(1, value_dim)],
            scales: [0, 1].map(|which| self.scales[which].get(rows.clone()).unwrap_or(&[])),
            tokens: &self.tokens[rows.clone()],
            log2_sizes: self.log2_sizes.get(rows.clone()).unwrap_or(&[]),
            scores: self.scores.get(rows.clone()).unwrap_or(&[]),
        }
    }

    pub fn add(&mut self, columns: EntryColumns<S>) {
        self.keys.extend_from_slice(columns.keys.data);
        self.values.extend_from_slice(columns.values.data);
        for which in 0..2 {
            self.codes[which].extend_from_slice(columns.codes[which]);
            self.scales[which].extend_from_slice(columns.scales[which]);
        }
        self.tokens.extend_from_slice(columns.tokens);
        self.log2_sizes.extend_from_slice(columns.log2_sizes);
        self.scores.extend_from_slice(columns.scores);
    }

    pub fn truncate(&mut self, rows: usize, [dim, value_dim]: [usize; 2]) {
        self.keys.truncate(rows * dim);
        self.values.truncate(rows * value_dim);
        self.codes[0].truncate(rows * dim);
        self.codes[1].truncate(rows * value_dim);
        self.scales.iter_mut().for_each(|scales| scales.truncate(rows));
        self.tokens.truncate(rows);
        self.log2_sizes.truncate(rows);
        self.scores.truncate(rows);
    }

    pub fn clear(&mut self) {
        self.truncate(0, [0, 0]);
    }

    /// Drops the oldest rows; releases the memory that a long chunk took.
    pub fn drain(&mut self, rows: usize, [dim, value_dim]: [usize; 2]) {
        fn drain<T>(data: &mut Vec<T>, count: usize) {
            data.drain(..count);
            let wanted = data.len() + data.len() / SHARE;
            if data.capacity() > 2 * wanted {
                data.shrink_to(wanted);
            }
        }
        match self.scales[0].is_empty() {
            true => {
                drain(&mut self.keys, rows * dim);
                drain(&mut self.values, rows * value_dim);
            }
            false => {
                drain(&mut self.codes[0], rows * dim);
                drain(&mut self.codes[1], rows * value_dim);
                self.scales.iter_mut().for_each(|scales| drain(scales, rows));
            }
        }
        drain(&mut self.tokens, rows);
        if !self.log2_sizes.is_empty() {
            drain(&mut self.log2_sizes, rows);
        }
        if !self.scores.is_empty() {
            drain(&mut self.scores, rows);
        }
    }

    pub fn reserve(&mut self, rows: usize, [dim, value_dim]: [usize; 2], [sized, coded]: [bool; 2]) {
        match coded {
            false => {
                self.keys.reserve_exact(rows * dim);
                self.values.reserve_exact(rows * value_dim);
            }
            true => {
                self.codes[0].reserve_exact(rows * dim);
                self.codes[1].reserve_exact(rows * value_dim);
                self.scales.iter_mut().for_each(|scales| scales.reserve_exact(rows));
            }
        }
        self.tokens.reserve_exact(rows);
        if sized {
            self.log2_sizes.reserve_exact(rows);
        }
    }

    pub fn bytes_allocated(&self) -> usize {
        (self.keys.capacity() + self.values.capacity()) * size_of::<S>()
            + self.codes.iter().map(Vec::capacity).sum::<usize>()
            + self.scales.iter().map(Vec::capacity).sum::<usize>() * size_of::<bf16>()
            + self.tokens.capacity() * size_of::<u32>()
            + self.log2_sizes.capacity() * size_of::<S::Acc>()
            + self.scores.capacity() * size_of::<f32>()
    }
}
