//! The bodies of the fuzz targets; `fuzz_targets` has their entry points. Modules of the llama example stand at the
//! root, where their own paths expect each other.

pub mod api;
pub mod cache_file;
mod checkpoint;
mod edits;
pub mod gguf;
pub mod hf_folder;
pub mod policy;
mod scratch;

include!("../../examples/llama/decoder.rs");
