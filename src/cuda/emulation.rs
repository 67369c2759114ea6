//! The CUDA path on CPU tensors, for tests: the same launchers and kernels, under the emulator.

pub use super::emulated_attention::*;

use super::emu::Emulator;
use super::gpu::{Gpu, Kernel, Launch};
use super::params::BrokenParams;
use candle_core::Result;

/// Runs one of the kernels of `cuda/emu/broken.cu` over blocks of 64 threads; returns what it wrote.
///
/// # Errors
/// What the emulator detects.
pub fn run_broken(name: &str, input: &[f32], blocks: usize) -> Result<Vec<f32>> {
    let gpu = Emulator;
    let params = BrokenParams { n: input.len() as u32 };
    let source = gpu.upload(input)?;
    let mut target = gpu.alloc::<f32>(input.len())?;
    let launch = Launch {
        grid: [blocks, 1, 1],
        threads: 64,
        shared_bytes: 256,
    };
    let args = [gpu.read(&source), gpu.write(&mut target), gpu.value(&params)];
    gpu.launch(&Kernel::plain("broken", name), launch, &args)?;
    target.download()
}
