//! Launches of `cuda/observe.cu`: the decisions of [`Criterion::ObservedMass`](crate::Criterion).

use super::decide::DecideCall;
use super::gpu::{Gpu, GpuElement, Kernel, Launch, Source};
use super::params::{ObservedParams, Rows, Sizes};
use crate::problem::{Problem, RowLayout};
use candle_core::Result;

const MODULE: &str = "observe";
/// Rows of a tile, and threads of its block.
const TILE: usize = 64;
const THREADS: usize = 128;

/// How the two kernels of one call are launched.
struct Instance {
    /// Between a kernel's name and its dtype.
    infix: &'static str,
    /// Tokens of a block, and its shared memory.
    tokens: usize,
    shared_bytes: [usize; 2],
}

impl Instance {
    /// Tensor cores where the dtype and the rows' addresses allow it.
    fn pick<T: GpuElement>(head_dim: usize, layouts: [&RowLayout; 3]) -> Self {
        let tiled = |infix, dim: usize| {
            let tiles = 3 * TILE * dim * 2;
            Self {
                infix,
                tokens: TILE,
                shared_bytes: [tiles, tiles + 2 * 4 * TILE],
            }
        };
        let aligned = |layout: &RowLayout| {
            layout
                .strides
                .iter()
                .chain([&layout.offset])
                .all(|at| at.is_multiple_of(8))
        };
        let tiles = T::SUFFIX != "f32" && head_dim.is_multiple_of(8) && layouts.into_iter().all(aligned);
        match head_dim {
            ..=64 if tiles => tiled("_64", 64),
            ..=128 if tiles => tiled("_128", 128),
            ..=256 if tiles => tiled("_256", 256),
            _ => Self {
                infix: "",
                tokens: 4,
                shared_bytes: [0, 0],
            },
        }
    }

    fn kernel<T: GpuElement>(&self, name: &str) -> Kernel {
        Kernel::of::<T>(MODULE, &format!("{name}{}", self.infix))
    }

    fn launch(&self, tokens: usize, lists: usize, shared_bytes: usize) -> Launch {
        Launch {
            grid: [tokens.div_ceil(self.tokens), lists, 1],
            threads: THREADS,
            shared_bytes,
        }
    }
}

/// The merge indicators (B, H, N-1), 0 or 1, one decision per KV head. N is at least 2.
///
/// # Errors
/// What the device reports.
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
            // Beyond all tokens, more makes no difference.
            window: call.config.window.min(tokens) as u32,
            sinks: call.config.sinks.min(tokens) as u32,
            scale: scale as f32,
            reserved: 0,
        })
    };
    let (per_head, per_kv_head) = (params(heads)?, params(kv_heads)?);
    let instance = Instance::pick::<T>(head_dim, [&call.q.1, &call.k.1, &v.1]);
    let mut log_sum_exp = gpu.alloc::<f32>(batch * heads * tokens)?;
    let args = [
        gpu.read(call.q.0),
        gpu.read(call.k.0),
        gpu.write(&mut log_sum_exp),
        gpu.value(&per_head),
    ];
    let launch = instance.launch(tokens, batch * heads, instance.shared_bytes[0]);
    gpu.launch(&instance.kernel::<T>("observe_rows"), launch, &args)?;
    drop(args);
    let mut bits = gpu.alloc::<u8>(batch * heads * pairs)?;
    let args = [
        gpu.read(call.q.0),
        gpu.read(call.k.0),
        gpu.read(v.0),
        gpu.read(&log_sum_exp),
        gpu.read(&tests),
        gpu.write(&mut bits),
        gpu.value(&per_kv_head),
    ];
    let launch = instance.launch(pairs, batch * kv_heads, instance.shared_bytes[1]);
    gpu.launch(&instance.kernel::<T>("observe_bits"), launch, &args)?;
    drop(args);
    Ok(bits)
}
