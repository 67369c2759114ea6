//! The tokens of one call, and its arguments: what a cache takes in, and what a journal keeps.

use crate::config::AttentionOptions;
use crate::problem::Problem;
use candle_core::{DType, Result, Tensor};
use std::ops::Range;

/// The tokens of one call of a cache, and its arguments.
#[derive(Clone)]
pub(super) struct TokenCall {
    /// The number of tokens before it.
    pub start: usize,
    /// Query (B, H, n, D), key and value (B, Hk, n, D).
    pub qkv: [Tensor; 3],
    /// (B, Hk, n, 1)
    pub scores: Option<Tensor>,
    /// The dtype in which the keys came.
    pub keys: DType,
    /// None of a call that did not attend.
    pub options: Option<AttentionOptions>,
}

impl TokenCall {
    pub fn count(&self) -> usize {
        self.qkv[0].dims()[2]
    }

    pub fn problem(&self) -> Result<Problem> {
        let [q, k, v] = &self.qkv;
        Problem::new(q, k, v)
    }

    /// The call on some of its tokens, after those before them.
    pub fn part(&self, tokens: Range<usize>) -> Result<Self> {
        let (count, total) = (self.count(), self.start + self.count());
        let of = |x: &Tensor| x.narrow(2, tokens.start, tokens.len());
        let [q, k, v] = &self.qkv;
        let bias = |bias: &Tensor| {
            // Axes of size 1 are broadcast.
            let rows = bias
                .rank()
                .checked_sub(2)
                .filter(|axis| bias.dims()[*axis] == count && count > 1);
            let columns = bias
                .rank()
                .checked_sub(1)
                .filter(|axis| bias.dims()[*axis] == total && total > 1);
            let bias = match rows {
                Some(axis) => bias.narrow(axis, tokens.start, tokens.len())?,
                None => bias.clone(),
            };
            match columns {
                Some(axis) => bias.narrow(axis, 0, self.start + tokens.end),
                None => Ok(bias),
            }
        };
        let options = |options: &AttentionOptions| -> Result<AttentionOptions> {
            Ok(AttentionOptions {
                bias: options.bias.as_ref().map(bias).transpose()?,
                segments: match &options.segments {
                    Some(segments) => Some(segments.narrow(1, tokens.start, tokens.len())?),
                    None => None,
                },
                ..options.clone()
            })
        };
        Ok(Self {
            start: self.start + tokens.start,
            qkv: [of(q)?, of(k)?, of(v)?],
            scores: self.scores.as_ref().map(of).transpose()?,
            keys: self.keys,
            options: self.options.as_ref().map(options).transpose()?,
        })
    }

    /// The call with tensors of its own: a view would keep all of a longer call in memory.
    pub fn owned(&self) -> Result<Self> {
        let own = |x: &Tensor| x.detach().force_contiguous();
        let [q, k, v] = &self.qkv;
        let options = |options: &AttentionOptions| -> Result<AttentionOptions> {
            Ok(AttentionOptions {
                bias: options.bias.as_ref().map(own).transpose()?,
                segments: options.segments.as_ref().map(own).transpose()?,
                ..options.clone()
            })
        };
        Ok(Self {
            qkv: [own(q)?, own(k)?, own(v)?],
            scores: self.scores.as_ref().map(own).transpose()?,
            options: self.options.as_ref().map(options).transpose()?,
            ..self.clone()
        })
    }

    pub fn has_segments(&self) -> bool {
        self.options.as_ref().is_some_and(|options| options.segments.is_some())
    }

    pub fn bytes(&self) -> usize {
        let numbers = self.qkv.iter().chain(&self.scores);
        numbers.map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum()
    }
}
