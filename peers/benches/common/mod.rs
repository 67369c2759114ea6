//! Shared by the benches: inputs, peers, and a table of ratios from criterion's own medians.

// Each bench is a crate of its own, and uses only a part of this module.
#![allow(dead_code)]

pub mod plot;
pub mod pytorch;
pub mod turns;

use candle_core::{DType, Device, Result, Tensor, D};
use candle_nn::attention::{flash_attn, AttnMask};
use candle_sfattention::{CompressionConfig, MergePlan};
use criterion::Criterion;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One causal attention problem of batch 1.
#[derive(Clone, Copy)]
pub struct Shape {
    pub heads: usize,
    pub tokens: usize,
    pub dim: usize,
}

impl Shape {
    pub fn name(&self) -> String {
        format!("H={} N={} D={}", self.heads, self.tokens, self.dim)
    }

    pub fn qkv(&self) -> Result<[Tensor; 3]> {
        let one = || Tensor::randn(0f32, 1.0, (1, self.heads, self.tokens, self.dim), &Device::Cpu);
        Ok([one()?, one()?, one()?])
    }

    /// A plan that hides the given share of all pairs: 0, or r = l / (l + 1) in chains of l hidden tokens.
    pub fn plan(&self, chain: usize, config: &CompressionConfig) -> Result<MergePlan> {
        self.plan_of(|token| token % (chain + 1) < chain, config)
    }

    /// A plan that hides these tokens in every head.
    pub fn plan_of(&self, hidden: impl Fn(usize) -> bool, config: &CompressionConfig) -> Result<MergePlan> {
        let pairs = self.tokens - 1;
        let bits: Vec<u8> = (0..self.heads * pairs).map(|i| u8::from(hidden(i % pairs))).collect();
        MergePlan::from_indicators(&Tensor::from_vec(bits, (1, self.heads, pairs), &Device::Cpu)?, config)
    }
}

/// candle's matmul, mask and softmax: N×N in memory.
pub fn candle_plain([q, k, v]: &[Tensor; 3], mask: &Tensor) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let scores = (q.matmul(&k.t()?)? * scale)?.broadcast_add(mask)?;
    candle_nn::ops::softmax_last_dim(&scores)?.matmul(v)
}

/// [`candle_plain`] with gradients: candle's fused softmax has none.
pub fn plain_with_gradients([q, k, v]: &[Tensor; 3], mask: &Tensor) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let scores = (q.matmul(&k.t()?)? * scale)?.broadcast_add(mask)?;
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(v)
}

/// 0 where a row sees a column, minus infinity elsewhere: (N, N).
pub fn causal_mask(tokens: usize) -> Result<Tensor> {
    let mask = (0..tokens * tokens).map(|i| {
        if i % tokens > i / tokens {
            f32::NEG_INFINITY
        } else {
            0.0
        }
    });
    Tensor::from_vec(mask.collect(), (tokens, tokens), &Device::Cpu)
}

/// candle-nn's flash attention on the CPU, which takes (B, N, H, D).
pub fn candle_flash([q, k, v]: &[Tensor; 3]) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f32).sqrt();
    flash_attn::<f32>(q, k, v, scale, AttnMask::causal(), None, None)
}

/// The same tensors in the layout of [`candle_flash`].
pub fn token_major(qkv: &[Tensor; 3]) -> Result<[Tensor; 3]> {
    let one = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    Ok([one(&qkv[0])?, one(&qkv[1])?, one(&qkv[2])?])
}

/// Fails unless two results agree to f32 rounding; a NaN fails.
pub fn verify(what: &str, ours: &Tensor, peer: &Tensor) -> Result<()> {
    verify_within(what, ours, peer, 1e-4)
}

/// Fails unless two results agree to `bound`; a NaN fails.
pub fn verify_within(what: &str, ours: &Tensor, peer: &Tensor, bound: f32) -> Result<()> {
    let difference = (ours - peer)?
        .abs()?
        .flatten_all()?
        .to_dtype(DType::F32)?
        .to_vec1::<f32>()?;
    let wrong = difference.len() - difference.iter().filter(|x| **x <= bound).count();
    if wrong > 0 {
        candle_core::bail!("{what}: expected the peer's result, got {wrong} elements that differ by more than {bound}")
    }
    Ok(())
}

/// Removes rows of an earlier run that this run may not measure.
pub fn forget(folder: &Path, functions: &[&str]) {
    for group in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        for function in functions {
            // The folder may not exist.
            let _ = std::fs::remove_dir_all(group.path().join(function));
        }
    }
}

/// Criterion with its results in `target/criterion/NAME`, from which the ratios are read.
pub fn criterion(name: &str) -> (Criterion, PathBuf) {
    // Cargo runs a bench in its package's folder, and names `target/tmp`.
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .with_file_name("criterion")
        .join(name);
    let criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .output_directory(&folder)
        .configure_from_args();
    (criterion, folder)
}

/// The median of one benchmark in seconds; None if this run did not measure it.
pub fn median(folder: &Path, group: &str, function: &str) -> Option<f64> {
    let clean = |name: &str| name.replace(['?', '"', '/', '\\', '*', '<', '>', ':', '|', '^'], "_");
    let file = folder
        .join(clean(group))
        .join(clean(function))
        .join("new/estimates.json");
    let estimates: serde_json::Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    Some(estimates["median"]["point_estimate"].as_f64()? / 1e9)
}

/// Prints each function's median and the peers' medians divided by it.
pub fn print_ratios(folder: &Path, groups: &[String], functions: &[&str], peers: &[&str]) {
    for group in groups {
        let titles: Vec<String> = peers.iter().map(|peer| format!("{peer} / this")).collect();
        println!("\n{group}\n{:<34}{:>11}  {}", "median of", "ms", titles.join(", "));
        for function in functions {
            let Some(ours) = median(folder, group, function) else {
                continue;
            };
            let ratio = |peer: &&str| match median(folder, group, peer) {
                Some(peer) => format!("{:.2}x", peer / ours),
                None => "-".into(),
            };
            let ratios: Vec<String> = peers.iter().map(ratio).collect();
            println!("{function:<34}{:>11.2}  {}", ours * 1e3, ratios.join("  "));
        }
    }
}
