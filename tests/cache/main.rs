//! The KV cache on the CPU: chunks, storage, files.

#[path = "../common/mod.rs"]
mod common;

mod budget;
mod bytes;
mod chunks;
mod files;
mod forks;
mod halves;
mod heads;
mod prefix;
mod ragged;
mod rollback;
mod rows;
mod save;
mod segments;
mod sliding;
mod storage;
mod threads;
