//! Launches of `cuda/decide/observe.cu`: the decisions of [`Criterion::ObservedMass`](crate::Criterion).

use super::decide::DecideCall;
use super::on_gpu::{Gpu, GpuElement, Kernel, Launch, Source};
use super::params::{ObservedParams, Rows, Sizes};
use crate::config::CompressionConfig;
use crate::cuda::operands::padded;
use crate::problem::{Problem, RowLayout};
use candle_core::Result;

/// Rows of a tile, and threads of its block.
const TILE: usize = 64;
const THREADS: usize = 128;

/// The launch shape of the two kernels of one call.
struct ObserveVariant {
    /// The padded head size of the tensor-core kernels; None for a warp per row.
    dim: Option<usize>,
}

impl ObserveVariant {
    /// Takes tensor cores where the dtype and the rows' addresses allow it.
    fn pick<T: GpuElement>(head_dim: usize, layouts: [&RowLayout; 3]) -> Self {
        let fits = head_dim.is_multiple_of(8) && head_dim <= 256;
        let tiles = T::HALF && fits && layouts.into_iter().all(|layout| layout.is_aligned(8));
        Self {
            dim: tiles.then(|| padded(head_dim)),
        }
    }

    fn kernel<T: GpuElement>(&self, name: &str) -> Kernel {
        match self.dim {
            Some(dim) => Kernel::of::<T>(&format!("{name}_{dim}")),
            None => Kernel::of::<T>(name),
        }
    }

    fn launch(&self, tokens: usize, lists: usize) -> Launch {
        if self.dim.is_none() {
            return Launch::warps(tokens, lists);
        }
        Launch {
            grid: [tokens.div_ceil(TILE), lists, 1],
            threads: THREADS,
            shared_bytes: 0,
        }
    }
}

/// One variant of the kernel that decides in one pass.
struct Band {
    /// The padded head size.
    dim: usize,
    /// The columns that a warp's 16 rows see, in units of eight.
    eighths: usize,
    warps: usize,
    /// Whether the window is the one that needs no masks.
    whole: bool,
}

impl Band {
    /// Picks a variant of `OBSERVE_DTYPE` in cuda/decide/observe.cu, if one fits.
    fn pick(
        head_dim: usize,
        config: &CompressionConfig,
        variant: &ObserveVariant,
        params: &ObservedParams,
    ) -> Option<Self> {
        let dim = variant.dim.filter(|_| head_dim <= 128 && config.sinks <= 8)?;
        let eighths = match config.window {
            0..=33 => 6,
            34..=65 => 10,
            _ => return None,
        };
        Some(Self {
            dim,
            eighths,
            warps: if (dim, eighths) == (128, 6) { 10 } else { 8 },
            whole: params.window as usize == 8 * eighths - 16 && params.scale > 0.0,
        })
    }

    fn rows(&self) -> usize {
        16 * self.warps
    }

    fn kernel<T: GpuElement>(&self) -> Kernel {
        let name = if self.whole { "whole" } else { "band" };
        Kernel::of::<T>(&format!("observe_{name}_{}_{}", self.dim, self.eighths))
    }
}

/// The merge indicators (B, H, N-1), 0 or 1, one decision per KV head. N is at least 2.
///
/// # Errors
/// An error of the device.
pub(crate) fn indicators<G: Gpu, T: GpuElement>(
    gpu: &G,
    call: &DecideCall<G, T>,
    v: Source<'_, G, T>,
    scale: f64,
) -> Result<G::Slice<u8>> {
    let Problem {
        batch,
        heads,
        kv_heads,
        tokens,
        head_dim,
        ..
    } = call.problem;
    let pairs = call.problem.pairs();
    if call.strategies.all_off() {
        return gpu.zeros(batch * heads * pairs);
    }
    let tests = call.tests(gpu)?;
    let params = |lists: usize| -> Result<ObservedParams> {
        Ok(ObservedParams {
            q: Rows::new(&call.q.1),
            k: Rows::new(&call.k.1),
            v: Rows::new(&v.1),
            sizes: Sizes::new(&call.problem, lists)?,
            // A window beyond all tokens acts like one of all tokens.
            window: call.config.window.min(tokens) as u32,
            sinks: call.config.sinks.min(tokens) as u32,
            scale: scale as f32,
            group: (heads / kv_heads) as u32,
        })
    };
    let (per_head, per_kv_head) = (params(heads)?, params(kv_heads)?);
    let variant = ObserveVariant::pick::<T>(head_dim, [&call.q.1, &call.k.1, &v.1]);
    let mut bits = gpu.alloc::<u8>(batch * heads * pairs)?;
    let limit = gpu.shared_limit()?;
    let band = match Band::pick(head_dim, call.config, &variant, &per_kv_head) {
        Some(band) if gpu.shared_bytes(&band.kernel::<T>())? <= limit => Some(band),
        _ => None,
    };
    if let Some(band) = band {
        let window = per_kv_head.window as usize;
        let share = band.rows() + 1 - (window - window / 2);
        let launch = Launch {
            grid: [pairs.div_ceil(share), kv_heads, batch],
            threads: 32 * band.warps,
            shared_bytes: 0,
        };
        let args = [
            gpu.read(call.q.0),
            gpu.read(call.k.0),
            gpu.read(v.0),
            gpu.read_some(tests.many.as_ref()),
            gpu.write(&mut bits),
            gpu.value(&per_kv_head),
            gpu.value(&tests.few),
        ];
        gpu.launch(&band.kernel::<T>().early(), launch, &args)?;
        drop(args);
        return Ok(bits);
    }
    let mut log_sum_exp = gpu.alloc::<f32>(batch * heads * tokens)?;
    let args = [
        gpu.read(call.q.0),
        gpu.read(call.k.0),
        gpu.write(&mut log_sum_exp),
        gpu.value(&per_head),
    ];
    let launch = variant.launch(tokens, batch * heads);
    gpu.launch(&variant.kernel::<T>("observe_rows"), launch, &args)?;
    drop(args);
    let args = [
        gpu.read(call.q.0),
        gpu.read(call.k.0),
        gpu.read(v.0),
        gpu.read(&log_sum_exp),
        gpu.read_some(tests.many.as_ref()),
        gpu.write(&mut bits),
        gpu.value(&per_kv_head),
        gpu.value(&tests.few),
    ];
    let launch = variant.launch(pairs, batch * kv_heads);
    gpu.launch(&variant.kernel::<T>("observe_bits"), launch, &args)?;
    drop(args);
    Ok(bits)
}
