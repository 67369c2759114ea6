//! The CUDA kernels under the emulator against the reference and the CPU. It needs neither a GPU nor CUDA.
#![cfg(feature = "cuda-emu")]

#[path = "../common/mod.rs"]
mod common;

mod attention;
mod cache;
mod cache_bytes;
mod cache_chunks;
mod cache_pages;
mod cache_ragged;
mod cache_rollback;
mod cache_rules;
mod cache_saved;
mod cache_segments;
mod column_bias;
mod decode;
mod edges;
mod emulator;
mod exact;
mod logits;
mod sliding_cache;
mod sliding_window;
mod visibility;
