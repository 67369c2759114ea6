#!/usr/bin/env bash
# candle-core 0.11.1 on the CPU: `Tensor::copy` of a part of a tensor copies the storage of the whole. 64 parts of a
# tensor of 16 MiB, copied, hold 1 GiB; by `force_contiguous` they hold 16 MiB. The numbers are right either way, so
# that nothing shows but the memory.
#
#   findings/copy-of-a-part-copies-all.sh     prints the memory of both, and fails if it is otherwise
set -euo pipefail
lock=$(cd "$(dirname "$0")/.." && pwd)/Cargo.lock
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cp "$lock" Cargo.lock
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "copy-of-a-part-copies-all"
version = "0.0.0"
edition = "2021"

[dependencies]
candle-core = "=0.11.1"
TOML
cat >src/main.rs <<'RUST'
use candle_core::{DType, Device, Result, Tensor};

const PARTS: usize = 64;
/// 16 MiB of f32.
const NUMBERS: usize = 1 << 22;

/// MiB in memory.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() >> 8
}

/// MiB that copies of all parts hold.
fn held(whole: &Tensor, copy: fn(&Tensor) -> Result<Tensor>) -> Result<usize> {
    let (before, each) = (resident(), NUMBERS / PARTS);
    let parts = (0..PARTS).map(|part| copy(&whole.narrow(0, part * each, each)?));
    let parts = parts.collect::<Result<Vec<_>>>()?;
    let held = resident().saturating_sub(before);
    for (part, copied) in parts.iter().enumerate() {
        let wrong = (whole.narrow(0, part * each, each)? - copied)?.abs()?.sum_all()?;
        assert_eq!(wrong.to_scalar::<f32>()?, 0.0);
    }
    Ok(held)
}

fn main() -> Result<()> {
    let whole = Tensor::ones(NUMBERS, DType::F32, &Device::Cpu)?;
    let forced = held(&whole, Tensor::force_contiguous)?;
    let copied = held(&whole, Tensor::copy)?;
    println!("candle-core 0.11.1: {PARTS} parts of 16 MiB: copy {copied} MiB, force_contiguous {forced} MiB");
    assert!((900..1200).contains(&copied) && forced < 40);
    Ok(())
}
RUST
cargo run --quiet --release
