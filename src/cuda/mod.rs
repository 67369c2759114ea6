//! The CUDA path. What a launcher does (sizes, buffers, order of kernels) is written once, over [`gpu::Gpu`]: a CUDA
//! device, or the emulator of `cuda/emu` for tests. One launcher file per file of `cuda/`.

#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "cuda-emu")]
mod emu;
#[cfg(feature = "cuda-emu")]
pub mod emulated_attention;
#[cfg(feature = "cuda-emu")]
pub mod emulation;
mod forward;
mod gpu;
mod params;
