//! The variants of the kernels that make gradients in one pass over columns, and which of them a call takes.

use crate::config::AttentionOptions;
use crate::cuda::on_gpu::{Gpu, GpuElement, Kernel};
use crate::problem::Problem;
use candle_core::Result;

/// Columns of a block of the fused kernels.
pub(in crate::cuda) const COLUMNS: usize = 128;

/// One variant of the fused kernels of `cuda/backward/backward_fused.cu` and `backward_listed.cu`, or, by warpgroups,
/// of `backward_sm90a.cu`.
pub(in crate::cuda) struct BackwardVariant {
    dim: usize,
    pub threads: usize,
    warpgroups: bool,
}

impl BackwardVariant {
    /// None where every sum must have one owner, and where there is no fused kernel.
    fn pick<T: GpuElement>(problem: &Problem, options: &AttentionOptions) -> Option<Self> {
        let (dim, threads) = match problem.head_dim {
            _ if options.deterministic || !T::HALF => return None,
            0..=64 => (64, 128),
            65..=128 => (128, 256),
            _ => return None,
        };
        Some(Self {
            dim,
            threads,
            warpgroups: false,
        })
    }

    /// The same variant by warpgroups.
    fn by_warpgroups(self) -> Self {
        Self {
            threads: 384,
            warpgroups: true,
            ..self
        }
    }

    /// [`Self::pick`], by warpgroups where the device and the call (`extras`: a bias or dropout) allow that. None where
    /// the device lacks the shared memory: some consumer devices have 99 KiB, where the variant for D = 128 does not
    /// run.
    pub fn on<G: Gpu, T: GpuElement>(
        gpu: &G,
        problem: &Problem,
        options: &AttentionOptions,
        extras: bool,
    ) -> Result<Option<Self>> {
        let Some(mut variant) = Self::pick::<T>(problem, options) else {
            return Ok(None);
        };
        if !extras && gpu.warpgroups()?.is_some() {
            variant = variant.by_warpgroups();
        }
        let limit = gpu.shared_limit()?;
        // The same for every kind of columns.
        let bytes = gpu.shared_bytes(&variant.kernel::<T>("far"))?;
        Ok((bytes <= limit).then_some(variant))
    }

    /// Blocks that a multiprocessor runs at a time, limited by registers.
    pub fn at_a_time(&self) -> usize {
        match self.warpgroups {
            true => 1,
            false => 256 / self.threads,
        }
    }

    pub fn kernel<T: GpuElement>(&self, kind: &str) -> Kernel {
        let (dim, family) = (self.dim, if self.warpgroups { "wgmma" } else { "fused" });
        match (kind, self.warpgroups) {
            ("listed", true) => Kernel::of::<T>(&format!("backward_wgmma_listed_{dim}")),
            ("listed", false) => Kernel::of::<T>(&format!("backward_listed_{dim}")),
            _ => Kernel::plain(&format!("backward_{family}_{dim}_{}_{kind}", T::SUFFIX)),
        }
    }
}
