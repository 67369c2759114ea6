//! The llama example's model on a GPU against the CPU: the shipped model's logits for whole sequences and through
//! caches, in f32 and bf16. Without a GPU the test prints that it is skipped.

use crate::common::device::gpu;
use crate::common::judge::{largest, largest_error};
use crate::load::{Checkpoint, LoadOptions};
use crate::model::{HiddenCounts, Llama};
use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    AttentionOptions, CompressedAttention, CompressionConfig, Fold, HeadStrategies, MergeStrategy,
};

const TEXT: &str = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my \
    purse, and nothing particular to interest me on shore, I thought I would sail about a little and see the watery \
    part of the world. It is a way I have of driving off the spleen and regulating the circulation. Whenever I find \
    myself growing grim about the mouth; whenever it is a damp, drizzly November in my soul; then, I account it high \
    time to get to sea.";

fn load(device: &Device, dtype: DType, strategy: MergeStrategy) -> Result<(Llama, Vec<u32>)> {
    let root = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_string());
    let options = LoadOptions {
        dtype,
        dequantize: false,
        device: device.clone(),
    };
    let mut checkpoint = Checkpoint::open(&format!("{root}/examples/llama/assets"), options)?;
    let config = CompressionConfig {
        similarity_threshold: 0.4,
        fold: Fold::Drop,
        window: 16,
        ..CompressionConfig::pretrained()
    };
    let attention = CompressedAttention::new(HeadStrategies::uniform(strategy), config, AttentionOptions::default())?;
    let tokens = checkpoint.encode(TEXT, false)?;
    Ok((checkpoint.load(vec![attention; checkpoint.config.layers])?, tokens))
}

/// Logits of every token, of the whole sequence and through caches: a prompt, then token by token.
fn logits(model: &Llama, tokens: &[u32]) -> Result<([Tensor; 2], f64)> {
    let mut counts = HiddenCounts::default();
    let whole = model.logits(&model.forward(tokens, &mut counts)?, 0, tokens.len())?;
    let (mut caches, prompt) = (model.caches(&Default::default())?, tokens.len() * 2 / 3);
    let mut rows = vec![model.logits(&model.forward_cached(&tokens[..prompt], &mut caches)?, 0, prompt)?];
    for token in &tokens[prompt..] {
        rows.push(model.logits(&model.forward_cached(&[*token], &mut caches)?, 0, 1)?);
    }
    Ok(([whole, Tensor::cat(&rows, 0)?], counts.ratio()))
}

#[test]
fn table_of_logits_agrees_with_the_cpu() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    for strategy in [MergeStrategy::Off, MergeStrategy::Similarity] {
        let (model, tokens) = load(&Device::Cpu, DType::F32, strategy)?;
        let ([exact, cached], hidden) = logits(&model, &tokens)?;
        let most = largest(&exact)?;
        ensure!(
            strategy == MergeStrategy::Off || hidden > 0.05,
            "only {hidden} hidden: this tests nothing"
        );
        let of_cpu = largest_error(&cached, &exact)?;
        let (cpu, _) = logits(&load(&Device::Cpu, DType::BF16, strategy)?.0, &tokens)?;
        for dtype in [DType::F32, DType::BF16] {
            let (got, got_hidden) = logits(&load(&device, dtype, strategy)?.0, &tokens)?;
            for (name, index) in [("whole", 0), ("cached", 1)] {
                let error = largest_error(&got[index], &exact)?;
                // In bf16 a decision near its threshold may differ, on either device.
                let allowed = match dtype {
                    DType::F32 => 1e-4 * most + of_cpu,
                    _ => 2.0 * largest_error(&cpu[index], &exact)?,
                };
                println!(
                    "{strategy:?} {dtype:?} {name}: {} tokens, error {error:.2e} of {most:.1}, {allowed:.2e} allowed; \
                     {got_hidden:.3} hidden, {hidden:.3} on the CPU",
                    tokens.len()
                );
                ensure!(error <= allowed, "{strategy:?} {dtype:?} {name}: error {error:e}");
            }
        }
    }
    Ok(())
}
