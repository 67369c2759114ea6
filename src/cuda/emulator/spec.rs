//! Launches of `cuda/forward/spec.cu`: attention with one thread per row, to which tests compare the fast kernels.

use crate::cuda::forward::{Attended, AttentionCall, Kept};
use crate::cuda::on_gpu::{Gpu, GpuElement, Kernel, Launch};
use crate::problem::Problem;
use candle_core::Result;

/// Attends as [`crate::cuda::forward::forward`], with one thread per row.
///
/// # Errors
/// As [`crate::cuda::forward::forward`].
pub(crate) fn forward<G: Gpu, T: GpuElement>(gpu: &G, call: &AttentionCall<'_, G, T>) -> Result<Attended<G, T>> {
    let Problem {
        batch,
        heads,
        tokens,
        head_dim,
        ..
    } = call.problem;
    let params = call.params()?;
    let rows = batch * heads;
    let mut output = gpu.alloc::<T>(rows * tokens * head_dim)?;
    let mut log_sum_exp = gpu.alloc::<f32>(2 * rows * tokens)?;
    let mut args = call.inputs(gpu);
    args.push(gpu.write(&mut output));
    args.push(gpu.write(&mut log_sum_exp));
    args.push(gpu.read_some(call.sinks));
    args.push(gpu.value(&params));
    let launch = Launch {
        grid: [tokens.div_ceil(64), rows, 1],
        threads: 64,
        shared_bytes: 0,
    };
    gpu.launch(&Kernel::of::<T>("spec_forward"), launch, &args)?;
    drop(args);
    Ok(Attended {
        output,
        kept: Some(Kept {
            log_sum_exp,
            rest: None,
        }),
    })
}
