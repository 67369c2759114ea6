//! CUDA's kernels and caches under the emulator.

use super::caches::{part, part_options};
use anyhow::{Context, Result};
use candle_core::Tensor;
use candle_sfattention::emulation::{self, EmulatedCache};
use candle_sfattention::AttentionOptions;

/// The families of kernels that the emulator runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kernels {
    Plain,
    Deterministic,
    Warpgroups,
    /// Warpgroups in small blocks.
    ShortWarpgroups,
}

impl Kernels {
    pub const ALL: [Self; 4] = [
        Self::Plain,
        Self::Deterministic,
        Self::Warpgroups,
        Self::ShortWarpgroups,
    ];

    pub fn run<R>(self, run: impl FnOnce() -> R) -> R {
        match self {
            Self::Warpgroups => emulation::with_warpgroups(0, run),
            Self::ShortWarpgroups => emulation::with_warpgroups(usize::MAX, run),
            Self::Plain | Self::Deterministic => run(),
        }
    }
}

/// Appends chunks of these lengths to a cache, repeated until all tokens are in; returns the rows of all. `options` are
/// those of the whole sequence.
pub fn chunked(
    cache: &mut EmulatedCache,
    qkv: &[Tensor; 3],
    options: &AttentionOptions,
    chunks: &[usize],
) -> Result<Tensor> {
    let (tokens, mut start, mut outputs) = (qkv[0].dim(2)?, 0, Vec::new());
    for chunk in chunks.iter().cycle() {
        let count = (*chunk).min(tokens - start);
        if count == 0 {
            break;
        }
        let options = part_options(options, start, count)?;
        let output = cache.append(&part(qkv, start, count)?, Some(&options))?;
        outputs.push(output.context("options were given")?);
        start += count;
    }
    Ok(Tensor::cat(&outputs, 2)?)
}
