//! The KV cache on the CPU: chunks, storage, files.

#[path = "../common/mod.rs"]
mod common;

mod chunks;
mod files;
mod halves;
mod rows;
mod save;
mod segments;
mod sliding;
mod storage;
