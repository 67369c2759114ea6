//! Calls whose batch rows bring different numbers of tokens: prompts of some rows beside single tokens of others.

use super::CompressedKvCache;
use crate::config::AttentionOptions;
use candle_core::{bail, Device, Result, Tensor};

impl CompressedKvCache {
    /// [`Self::append_and_attend`] with `lens[b]` new tokens in batch row b, the first ones of its n; the others are
    /// not read. Output rows beyond a row's own are zeros. A row of 0 tokens stays as it is. So sequences of any length
    /// step together: see [`Self::cat`] and [`Self::split`] for rows that come and go. Each row equals that row alone,
    /// to rounding; its segment goes on.
    ///
    /// On CUDA rows that take one token, or none, share a launch, whatever their lengths; a row that takes more has
    /// launches of its own.
    ///
    /// # Errors
    /// Another number of rows than the batch has, more tokens than the call brings, none at all, segments, or as
    /// [`Self::append_and_attend`]. The cache is then unchanged.
    pub fn append_and_attend_ragged(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        lens: &[usize],
        options: &AttentionOptions,
    ) -> Result<Tensor> {
        let options = self.with_lens(q, lens, options)?;
        self.append_and_attend(q, k, v, &options)
    }

    /// [`Self::append_and_attend_scored`], ragged as [`Self::append_and_attend_ragged`]; scores of tokens beyond a
    /// row's own are not read.
    ///
    /// # Errors
    /// As the two.
    pub fn append_and_attend_ragged_scored(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scores: &Tensor,
        lens: &[usize],
        options: &AttentionOptions,
    ) -> Result<Tensor> {
        let options = self.with_lens(q, lens, options)?;
        self.append_and_attend_scored(q, k, v, scores, &options)
    }

    /// The options with segments that go on for each row's own tokens, and padding behind.
    fn with_lens(&self, q: &Tensor, lens: &[usize], options: &AttentionOptions) -> Result<AttentionOptions> {
        if options.segments.is_some() {
            bail!("segments: expected None beside lens, got some; give 0 as the segment of tokens that are padding")
        }
        let turned = options.layout.turned(q)?;
        let [batch, _, tokens, _] = *turned.dims() else {
            bail!(
                "query: expected 4 axes (batch, heads, tokens, head_dim), got shape {:?}; split the heads with reshape \
                 and transpose",
                q.dims()
            )
        };
        if lens.len() != batch {
            bail!(
                "lens: expected {batch}, one for each batch row, got {}; give 0 for a row that brings no token",
                lens.len()
            )
        }
        if let Some(long) = lens.iter().find(|len| **len > tokens) {
            bail!("lens: expected at most the call's {tokens} tokens, got {long}; pad all rows to the longest")
        }
        if lens.iter().all(|len| *len == 0) {
            bail!("lens: expected a row with at least one token, got none; leave the call out")
        }
        if lens.iter().all(|len| *len == tokens) {
            return Ok(options.clone());
        }
        let places = self.places();
        let number = |row: usize| {
            places
                .as_ref()
                .and_then(|places| places.get(row))
                .map_or(1, |place| place.number)
        };
        let of_row = |row: usize| (0..tokens).map(move |token| (row, token < lens[row]));
        let numbers = (0..batch).flat_map(of_row);
        let numbers: Vec<u32> = numbers.map(|(row, own)| if own { number(row) } else { 0 }).collect();
        let segments = Tensor::from_vec(numbers, (batch, tokens), &Device::Cpu)?;
        Ok(AttentionOptions {
            segments: Some(segments),
            ..options.clone()
        })
    }
}
