//! Segments: the runs of equal numbers in a batch row. Each is attended to alone.

use candle_core::{bail, DType, Device, Result, Tensor};
use std::collections::HashSet;
use std::ops::Range;

/// A run of one number other than 0 in a batch row: see [`super::AttentionOptions::segments`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The batch row.
    pub batch: usize,
    /// Its number, at least 1.
    pub number: u32,
    /// Its tokens, counted in the batch row; at least one.
    pub tokens: Range<usize>,
}

impl Segment {
    /// Reads numbers of shape (batch, tokens), u32. Segments come batch row by batch row, in token order; padding is
    /// left out. On a GPU this waits for the device.
    ///
    /// # Errors
    /// Another dtype or shape, or a number that comes back after another one.
    pub fn read(segments: &Tensor, [batch, tokens]: [usize; 2]) -> Result<Vec<Self>> {
        if segments.dtype() != DType::U32 || segments.dims() != [batch, tokens] {
            bail!(
                "segments: expected u32 of shape (batch, tokens) = ({batch}, {tokens}), got {:?} of shape {:?}; give \
                 each token its segment's number, and 0 to padding",
                segments.dtype(),
                segments.dims()
            )
        }
        let mut found = Vec::new();
        for (batch, row) in segments.to_vec2::<u32>()?.iter().enumerate() {
            let (mut seen, mut start) = (HashSet::new(), 0);
            for run in row.chunk_by(|a, b| a == b) {
                let (number, tokens) = (run[0], start..start + run.len());
                start = tokens.end;
                if number == 0 {
                    continue;
                }
                if !seen.insert(number) {
                    bail!(
                        "segments: expected equal numbers to follow each other, got {number} again at token {} of \
                         batch row {batch}; give each segment a number of its own",
                        tokens.start
                    )
                }
                found.push(Self { batch, number, tokens });
            }
        }
        Ok(found)
    }

    /// This segment's part of a (batch, heads, tokens, width) array, (1, heads, its tokens, width).
    pub(crate) fn cut<T: Copy>(&self, whole: &[T], [heads, tokens, width]: [usize; 3]) -> Vec<T> {
        let mut part = Vec::with_capacity(heads * self.tokens.len() * width);
        for head in 0..heads {
            let start = (self.batch * heads + head) * tokens + self.tokens.start;
            part.extend_from_slice(&whole[start * width..][..self.tokens.len() * width]);
        }
        part
    }

    /// Writes what [`Self::cut`] would read.
    pub(crate) fn paste<T: Copy>(&self, part: &[T], whole: &mut [T], [heads, tokens, width]: [usize; 3]) {
        let size = self.tokens.len() * width;
        for (head, rows) in part.chunks_exact(size.max(1)).take(heads).enumerate() {
            let start = (self.batch * heads + head) * tokens + self.tokens.start;
            whole[start * width..][..size].copy_from_slice(rows);
        }
    }

    /// The same segment in an array of pairs of neighbours, (batch, heads, tokens - 1): its own pairs.
    pub(crate) fn pairs(&self) -> Self {
        Self {
            tokens: self.tokens.start..self.tokens.end - 1,
            ..self.clone()
        }
    }

    /// The pairs at its ends, whose tokens lie in two segments, of a batch row of `tokens` tokens.
    pub(crate) fn borders(&self, tokens: usize) -> impl Iterator<Item = usize> {
        let (before, after) = (self.tokens.start.checked_sub(1), self.tokens.end - 1);
        before.into_iter().chain((self.tokens.end < tokens).then_some(after))
    }
}

/// The numbers, (1, tokens) in u32, of packed documents: 1 for the first `lengths[0]` tokens, 2 for the next
/// `lengths[1]`, and so on, then 0 (padding) up to `tokens`. For
/// [`AttentionOptions::segments`](super::AttentionOptions::segments).
///
/// The lengths of other libraries' `cu_seqlens` are the differences of its neighbours. An attention mask of zeros and
/// ones, (B, N), is segments already: `mask.to_dtype(DType::U32)`.
///
/// ```
/// # use candle_core::Device;
/// use candle_sfattention::segments_from_lengths;
/// let segments = segments_from_lengths(&[2, 3], 6, &Device::Cpu)?;
/// assert_eq!(segments.to_vec2::<u32>()?, [[1, 1, 2, 2, 2, 0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A length of 0, or lengths whose sum is above `tokens`.
pub fn segments_from_lengths(lengths: &[usize], tokens: usize, device: &Device) -> Result<Tensor> {
    let sum = lengths.iter().try_fold(0usize, |sum, length| sum.checked_add(*length));
    if lengths.contains(&0) || sum.is_none_or(|sum| sum > tokens) || u32::try_from(lengths.len()).is_err() {
        bail!(
            "lengths: expected lengths of at least 1 whose sum is at most the {tokens} tokens, got {lengths:?}; leave \
             empty documents out, and count the tokens of all"
        )
    }
    let mut numbers = Vec::with_capacity(tokens);
    for (index, length) in lengths.iter().enumerate() {
        numbers.resize(numbers.len() + length, index as u32 + 1);
    }
    numbers.resize(tokens, 0);
    Tensor::from_vec(numbers, (1, tokens), device)
}

#[cfg(test)]
mod tests {
    use super::{segments_from_lengths, Segment};
    use candle_core::{DType, Device, Tensor};

    fn segment(batch: usize, number: u32, tokens: std::ops::Range<usize>) -> Segment {
        Segment { batch, number, tokens }
    }

    #[test]
    fn runs_are_read() {
        let numbers = Tensor::new(&[[0u32, 7, 7, 3, 0], [5, 0, 0, 2, 2]], &Device::Cpu).unwrap();
        let expected = [
            segment(0, 7, 1..3),
            segment(0, 3, 3..4),
            segment(1, 5, 0..1),
            segment(1, 2, 3..5),
        ];
        assert_eq!(Segment::read(&numbers, [2, 5]).unwrap(), expected);
        assert_eq!(expected[1].borders(5).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(expected[2].borders(5).collect::<Vec<_>>(), [0]);
        let whole: Vec<usize> = (0..2 * 3 * 5 * 2).collect();
        for segment in expected {
            let part = segment.cut(&whole, [3, 5, 2]);
            assert_eq!(part.len(), 3 * segment.tokens.len() * 2);
            let mut again = vec![0; whole.len()];
            segment.paste(&part, &mut again, [3, 5, 2]);
            assert_eq!(segment.cut(&again, [3, 5, 2]), part);
            assert_eq!(
                again.iter().filter(|x| **x != 0).count(),
                part.iter().filter(|x| **x != 0).count()
            );
        }
    }

    #[test]
    fn numbers_that_come_back_are_refused() {
        let numbers = Tensor::new(&[[1u32, 1, 2], [4, 0, 4]], &Device::Cpu).unwrap();
        let message = Segment::read(&numbers, [2, 3]).unwrap_err().to_string();
        assert!(message.contains("got 4 again at token 2 of batch row 1"), "{message}");
        for (tensor, dims) in [(numbers.to_dtype(DType::I64).unwrap(), [2, 3]), (numbers, [3, 2])] {
            let message = Segment::read(&tensor, dims).unwrap_err().to_string();
            assert!(message.contains("expected u32 of shape (batch, tokens)"), "{message}");
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        for lengths in [&[2usize, 0][..], &[3, 3], &[usize::MAX, 2]] {
            let message = segments_from_lengths(lengths, 5, &Device::Cpu).unwrap_err().to_string();
            assert!(message.contains("lengths: expected"), "{message}");
        }
        let none = segments_from_lengths(&[], 2, &Device::Cpu).unwrap();
        assert_eq!(none.to_vec2::<u32>().unwrap(), [[0, 0]]);
    }
}
