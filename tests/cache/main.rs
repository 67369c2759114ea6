//! The KV cache on the CPU: chunks, storage, files.

#[path = "../common/mod.rs"]
mod common;

mod chunks;
mod files;
mod forks;
mod halves;
mod rollback;
mod rows;
mod save;
mod segments;
mod sliding;
mod storage;
mod threads;
