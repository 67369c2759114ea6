#!/usr/bin/env bash
# candle-core 0.11.1 on the CPU sums halves in halves, so that a sum stops where adding 1 no longer changes it, and its
# softmax does not add up to 1. So candle's own error in halves grows with the row, and is no yardstick.
#
#   findings/halves-sum-in-halves.sh     prints the sums, and fails if they are others
set -euo pipefail
lock=$(cd "$(dirname "$0")/.." && pwd)/Cargo.lock
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cp "$lock" Cargo.lock
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "halves-sum-in-halves"
version = "0.0.0"
edition = "2021"

[dependencies]
candle-core = "=0.11.1"
candle-nn = "=0.11.1"
TOML
cat >src/main.rs <<'RUST'
use candle_core::{DType, Device, Result, Tensor, D};

fn main() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        let ones = Tensor::ones(4096, dtype, &Device::Cpu)?;
        // The softmax of equal logits, summed exactly.
        let weights = candle_nn::ops::softmax(&ones.zeros_like()?, D::Minus1)?.to_dtype(DType::F64)?;
        let sum = ones.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        println!(
            "{dtype:?}: 4096 ones add up to {sum}, a softmax of 4096 zeros to {}",
            weights.sum_all()?.to_scalar::<f64>()?
        );
    }
    Ok(())
}
RUST
cargo run --quiet | tee got
diff got - <<'EXPECTED'
BF16: 4096 ones add up to 256, a softmax of 4096 zeros to 16
F16: 4096 ones add up to 2048, a softmax of 4096 zeros to 2
EXPECTED
