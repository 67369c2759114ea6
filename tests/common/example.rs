//! The binaries of the examples, which cargo builds next to the tests.

use std::path::PathBuf;

/// The path of an example, which exists.
pub fn path(name: &str) -> PathBuf {
    let deps = std::env::current_exe().unwrap();
    let folder = deps.ancestors().nth(2).unwrap().join("examples");
    let binary = folder.join(name).with_extension(std::env::consts::EXE_EXTENSION);
    assert!(
        binary.exists(),
        "{} is missing: run `cargo build --example {name}` first",
        binary.display()
    );
    binary
}
