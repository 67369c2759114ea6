//! Properties of attention, its gradients and the KV cache, over drawn inputs and settings.

#[path = "../../../tests/reference/arrays.rs"]
mod arrays;
#[path = "../../../tests/common/mod.rs"]
mod common;

mod draw;

mod cache;
mod cache_halves;
mod cache_save;
mod gradients;
mod invariants;
