//! Builds nothing yet: the CUDA kernels come with the `cuda` feature's first real version.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
}
