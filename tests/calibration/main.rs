//! Decisions that are fitted to a model: thresholds, key probes, gates.

#[path = "../common/mod.rs"]
mod common;

mod calibrator;
mod gate;
#[cfg(feature = "fit")]
mod probe;
mod shard;
