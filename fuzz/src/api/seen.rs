//! What rows may see beside the method: sliding window, softcap, sink logits, segments.

use super::inputs::Random;
use super::one_in;
use anyhow::Result;
use arbitrary::Unstructured;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// Logits of the softmax's denominator, one per query head.
#[derive(Clone, Copy, Debug)]
pub struct Sinks {
    pub dtype: DType,
    pub size: f64,
    /// Minus infinity for the first head.
    pub none_first: bool,
}

#[derive(Clone, Debug)]
pub struct Seen {
    pub sliding_window: Option<usize>,
    pub softcap: Option<f64>,
    pub sinks: Option<Sinks>,
    /// Numbers and lengths of the runs of each batch row; 0 is padding.
    pub segments: Option<Vec<Vec<(u32, usize)>>>,
}

impl Seen {
    pub fn draw(u: &mut Unstructured, [batch, tokens]: [usize; 2], dtype: DType) -> arbitrary::Result<Self> {
        Ok(Self {
            sliding_window: match one_in(u, 4)? {
                true => Some(u.int_in_range(1..=tokens + 3)?),
                false => None,
            },
            softcap: match one_in(u, 5)? {
                true => Some(*u.choose(&[0.05, 1.0, 30.0])?),
                false => None,
            },
            sinks: match one_in(u, 5)? {
                true => Some(Sinks {
                    dtype: if one_in(u, 2)? { dtype } else { DType::F32 },
                    size: *u.choose(&[0.0, 1.0, 20.0])?,
                    none_first: one_in(u, 3)?,
                }),
                false => None,
            },
            segments: match one_in(u, 4)? {
                true => Some((0..batch).map(|_| runs(u, tokens)).collect::<arbitrary::Result<_>>()?),
                false => None,
            },
        })
    }

    /// The segments' numbers, (B, N).
    pub fn numbers(&self) -> Result<Option<Tensor>> {
        let Some(rows) = &self.segments else { return Ok(None) };
        let numbers = rows.iter().flatten().flat_map(|(number, count)| vec![*number; *count]);
        let numbers: Vec<u32> = numbers.collect();
        let tokens = numbers.len() / rows.len();
        Ok(Some(Tensor::from_vec(numbers, (rows.len(), tokens), &Device::Cpu)?))
    }

    /// The tokens of each segment, by batch row; whole rows without segments.
    pub fn parts(&self, [batch, tokens]: [usize; 2]) -> Vec<(usize, Range<usize>)> {
        let Some(rows) = &self.segments else {
            return (0..batch).map(|row| (row, 0..tokens)).collect();
        };
        let mut parts = Vec::new();
        for (row, runs) in rows.iter().enumerate() {
            let mut start = 0;
            for (number, count) in runs {
                if *number > 0 {
                    parts.push((row, start..start + count));
                }
                start += count;
            }
        }
        parts
    }
}

/// Runs that fill a row. Numbers rise, so that none comes back.
fn runs(u: &mut Unstructured, tokens: usize) -> arbitrary::Result<Vec<(u32, usize)>> {
    let (mut runs, mut left, mut last) = (Vec::new(), tokens, 0);
    while left > 0 {
        let count = u.int_in_range(1..=left)?;
        let number = match one_in(u, 4)? {
            true => 0,
            false => {
                last += 1 + u32::from(one_in(u, 3)?);
                last
            }
        };
        runs.push((number, count));
        left -= count;
    }
    Ok(runs)
}

impl Sinks {
    /// (H)
    pub fn tensor(&self, heads: usize, seed: u64) -> Result<Tensor> {
        let mut random = Random::new(seed ^ 0x5135);
        let mut logits: Vec<f64> = (0..heads).map(|_| self.size * random.next()).collect();
        if self.none_first {
            logits[0] = f64::NEG_INFINITY;
        }
        Ok(Tensor::new(logits, &Device::Cpu)?.to_dtype(self.dtype)?)
    }
}
