//! The kernels, the cache, the layer and the llama example's model on a GPU, against the reference and the CPU. Without
//! a GPU each test prints that it is skipped.
#![cfg(feature = "cuda")]

#[path = "../common/mod.rs"]
mod common;

include!("../../examples/llama/decoder.rs");

mod attention;
mod cache;
mod cache_bytes;
mod fades;
mod layer;
mod llama;
#[cfg(feature = "nccl")]
#[path = "../../examples/llama/nccl.rs"]
mod nccl;
#[cfg(feature = "nccl")]
mod ranks_on_gpus;
mod streams;
