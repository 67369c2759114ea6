//! Shared by several test files.

// Each test file is a crate of its own, and uses only a part of this module.
#![allow(dead_code)]

pub mod again;
pub mod budget;
pub mod caches;
pub mod device;
pub mod files;
pub mod golden;
pub mod inputs;
pub mod judge;
#[cfg(feature = "cuda-emu")]
pub mod kernels;
pub mod layers;
pub mod runs;
pub mod saved;
pub mod segments;
pub mod settings;
