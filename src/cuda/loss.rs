//! Launches of `cuda/decide/loss.cu`: the sums of the compression loss, and their gradient.

use super::decide::DecideCall;
use super::on_gpu::{Gpu, GpuElement, Kernel, Launch};
use super::params::TotalParams;
use crate::problem::Problem;
use candle_core::Result;

/// [S, M], added up in the same order on every run. N is at least 2.
///
/// # Errors
/// An error of the device.
pub(crate) fn sums<G: Gpu, T: GpuElement>(gpu: &G, call: &DecideCall<G, T>) -> Result<G::Slice<f32>> {
    let rows = call.problem.batch * call.problem.heads;
    let params = call.params(call.problem.heads)?;
    let tests = gpu.upload(&call.table())?;
    let launch = Launch::warps(call.problem.pairs(), rows);
    let blocks = launch.grid[0] * launch.grid[1];
    let mut partial = gpu.alloc::<f64>(2 * blocks)?;
    let args = [
        gpu.read(call.q.0),
        gpu.read(call.k.0),
        gpu.read(&tests),
        gpu.write(&mut partial),
        gpu.value(&params),
    ];
    gpu.launch(&Kernel::of::<T>("loss_sums"), launch, &args)?;
    drop(args);
    let total = TotalParams { blocks: blocks as u32 };
    let mut out = gpu.alloc::<f32>(2)?;
    let args = [gpu.read(&partial), gpu.write(&mut out), gpu.value(&total)];
    let launch = Launch {
        grid: [1, 1, 1],
        threads: 256,
        shared_bytes: 0,
    };
    gpu.launch(&Kernel::plain("loss_total"), launch, &args)?;
    drop(args);
    Ok(out)
}

/// The gradients of the query (B, H, N, D) and the key (B, Hk, N, D), from `upstream`: [dS, dM]; dM is not read.
///
/// # Errors
/// An error of the device.
pub(crate) fn gradients<G: Gpu, T: GpuElement>(
    gpu: &G,
    call: &DecideCall<G, T>,
    upstream: &G::Slice<f32>,
) -> Result<[G::Slice<T>; 2]> {
    let Problem {
        batch,
        heads,
        kv_heads,
        tokens,
        head_dim,
        ..
    } = call.problem;
    let params = call.params(heads)?;
    let tests = gpu.upload(&call.table())?;
    let one = |name: &str, heads: usize| -> Result<G::Slice<T>> {
        let mut out = gpu.alloc::<T>(batch * heads * tokens * head_dim)?;
        let args = [
            gpu.read(call.q.0),
            gpu.read(call.k.0),
            gpu.read(&tests),
            gpu.read(upstream),
            gpu.write(&mut out),
            gpu.value(&params),
        ];
        gpu.launch(&Kernel::of::<T>(name), Launch::warps(tokens, batch * heads), &args)?;
        drop(args);
        Ok(out)
    };
    Ok([one("loss_dq", heads)?, one("loss_dk", kv_heads)?])
}
