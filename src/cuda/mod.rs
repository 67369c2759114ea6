//! The CUDA path. What a launcher does (sizes, buffers, order of kernels) is written once, over [`gpu::Gpu`]: a CUDA
//! device, or the emulator of `cuda/emu` for tests. One launcher file per file of `cuda/`.

pub(crate) mod attention;
mod backward;
pub(crate) mod cache;
pub(crate) mod decide;
pub(crate) mod decode;
#[cfg(feature = "cuda")]
pub(crate) mod device;
#[cfg(feature = "cuda-emu")]
mod emu;
#[cfg(feature = "cuda-emu")]
pub mod emulated_attention;
#[cfg(feature = "cuda-emu")]
mod emulated_cache;
#[cfg(feature = "cuda-emu")]
mod emulated_decode;
#[cfg(feature = "cuda-emu")]
pub mod emulation;
pub(crate) mod fold;
pub(crate) mod forward;
mod fused;
pub(crate) mod gpu;
mod instance;
pub(crate) mod loss;
pub(crate) mod observe;
mod params;
#[cfg(feature = "cuda-emu")]
mod spec;
#[cfg(feature = "cuda")]
pub(crate) mod tensors;
