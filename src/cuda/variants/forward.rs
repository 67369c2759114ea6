//! The variants of the tensor-core forward kernels, and which of them a call takes.

use crate::cuda::on_gpu::Gpu;
use candle_core::Result;

/// One variant of a tensor-core forward kernel, and the rows of its blocks.
pub(in crate::cuda) struct ForwardVariant {
    pub name: &'static str,
    pub rows: usize,
    warpgroups: Option<Warpgroups>,
}

/// The launch of kernels by warpgroups: the threads of a block that load (producers), and the number of resident blocks
/// of a multiprocessor that each take several blocks of rows in turn; 0 where a block takes one block of rows.
#[derive(Clone, Copy)]
struct Warpgroups {
    producers: usize,
    at_a_time: usize,
}

impl ForwardVariant {
    /// The smallest variant that holds the head size, by `FORWARD_DTYPE` in cuda/forward/forward.cu and
    /// forward_listed.cu. `extras`: with a sliding window, rows left out, or the options of [`crate::cuda::extras`].
    pub fn pick(head_dim: usize, extras: bool, listed: bool) -> Self {
        let (name, rows) = match (head_dim, extras, listed) {
            (..=64, _, true) => ("forward_listed_64", 128),
            (..=96, _, true) => ("forward_listed_96", 128),
            (_, _, true) => ("forward_listed_128", 128),
            (..=64, false, _) => ("forward_64", 128),
            (..=96, false, _) => ("forward_96", 128),
            (..=128, false, _) => ("forward_128", 128),
            (_, false, _) => ("forward_256", 64),
            (..=64, true, _) => ("forward_64_extras", 128),
            (..=128, true, _) => ("forward_128_extras", 64),
            (_, true, _) => ("forward_256_extras", 64),
        };
        Self {
            name,
            rows,
            warpgroups: None,
        }
    }

    /// The variant by warpgroups, if a faster one exists, by `FORWARD_DTYPE` in cuda/forward/forward_sm90a.cu. `short`
    /// is the most tokens for which more and smaller blocks are faster.
    pub fn by_warpgroups(head_dim: usize, tokens: usize, listed: bool, short: usize) -> Option<Self> {
        let (name, rows, producers, at_a_time) = match (head_dim, listed) {
            // With lists, half the tiles of short calls are masked, and smaller tiles waste less.
            (..=64, true) if tokens.div_ceil(4) <= short => ("forward_wgmma_short_listed_64", 64, 128, 3),
            (..=64, true) => ("forward_wgmma_listed_64", 192, 128, 1),
            // Three of these blocks run on a multiprocessor. An early launch would not find room for all of them.
            (..=64, false) if tokens <= short => ("forward_wgmma_short_64", 64, 32, 0),
            (..=64, false) => ("forward_wgmma_64", 192, 128, 1),
            (..=128, true) if tokens <= short => ("forward_wgmma_short_listed_128", 64, 64, 2),
            (..=128, true) => ("forward_wgmma_listed_128", 128, 128, 1),
            (..=128, false) => ("forward_wgmma_128", 128, 128, 1),
            _ => return None,
        };
        Some(Self {
            name,
            rows,
            warpgroups: Some(Warpgroups { producers, at_a_time }),
        })
    }

    /// The variant by warpgroups under a sliding window.
    pub fn sliding_by_warpgroups(head_dim: usize) -> Option<Self> {
        let (name, rows) = match head_dim {
            0..=64 => ("forward_wgmma_sliding_64", 192),
            65..=128 => ("forward_wgmma_sliding_128", 128),
            _ => return None,
        };
        let warpgroups = Some(Warpgroups {
            producers: 128,
            at_a_time: 1,
        });
        Some(Self { name, rows, warpgroups })
    }

    /// Four warps, or a warpgroup for each 64 rows and the producers.
    pub fn threads(&self) -> usize {
        self.warpgroups
            .map_or(THREADS, |warpgroups| 2 * self.rows + warpgroups.producers)
    }

    /// Blocks of a grid for `blocks` blocks of rows. By warpgroups only the resident blocks are launched: each takes
    /// several blocks of rows, and loads the next one while it ends the current one. Beyond [`TOGETHER`] blocks of rows
    /// (`QUEUE` in cuda/forward/forward_wgmma.cuh) the device schedules them, which balances blocks of unequal length.
    pub fn grid(&self, gpu: &impl Gpu, blocks: usize) -> Result<usize> {
        match self.warpgroups {
            Some(Warpgroups { at_a_time, .. }) if at_a_time > 0 && blocks <= TOGETHER => {
                Ok(blocks.min(at_a_time * gpu.multiprocessors()?))
            }
            _ => Ok(blocks),
        }
    }
}

/// The most blocks of rows by warpgroups that resident blocks share; the longest come first.
const TOGETHER: usize = 2048;

/// Threads of a block of the forward kernels that have no warpgroups.
pub(in crate::cuda) const THREADS: usize = 128;
