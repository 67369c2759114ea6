//! Segments: each run of equal numbers in a batch row, computed alone.

use candle_core::{Result, Tensor};

use super::{Array4, Indicators};
use crate::config::Segment;

/// The segments of arrays of `batch` rows and `tokens` tokens; None without the option.
pub(super) fn read(segments: Option<&Tensor>, [batch, tokens]: [usize; 2]) -> Result<Option<Vec<Segment>>> {
    segments
        .map(|numbers| Segment::read(numbers, [batch, tokens]))
        .transpose()
}

impl Array4 {
    /// The tokens of a segment, (1, heads, its tokens, dim).
    pub(super) fn cut(&self, segment: &Segment) -> Self {
        let [_, heads, tokens, dim] = self.dims;
        Self {
            dims: [1, heads, segment.tokens.len(), dim],
            data: segment.cut(&self.data, [heads, tokens, dim]),
        }
    }

    /// Writes what [`Self::cut`] would read.
    pub(super) fn paste(&mut self, segment: &Segment, part: &Self) {
        let [_, heads, tokens, dim] = self.dims;
        segment.paste(&part.data, &mut self.data, [heads, tokens, dim]);
    }
}

impl Indicators {
    /// The bits between the tokens of a segment.
    pub(super) fn cut(&self, segment: &Segment) -> Self {
        let [_, heads, pairs] = self.dims;
        let segment = segment.pairs();
        Self {
            dims: [1, heads, segment.tokens.len()],
            bits: segment.cut(&self.bits, [heads, pairs, 1]),
        }
    }

    /// Writes what [`Self::cut`] would read.
    pub(super) fn paste(&mut self, segment: &Segment, part: &Self) {
        let [_, heads, pairs] = self.dims;
        segment.pairs().paste(&part.bits, &mut self.bits, [heads, pairs, 1]);
    }
}
