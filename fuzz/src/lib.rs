pub mod api{pub fn run(_:&[u8]){}} pub mod cache_file{pub fn run(_:&[u8]){}} pub mod policy{pub fn run(_:&[u8]){}} pub mod gguf{pub fn run(_:&[u8]){}} pub mod hf_folder{pub fn run(_:&[u8]){}}
