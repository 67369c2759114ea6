//! Ranks on two GPUs that sum by NCCL: the sums, the shipped model against one GPU, and one end for both. With fewer
//! than two GPUs each test prints that it is skipped.

use crate::common::device::gpu;
use crate::common::judge::{largest, largest_error};
use crate::load::{Checkpoint, LoadOptions};
use crate::model::HiddenCounts;
use crate::nccl::run;
use crate::ranks::{self, Ranks};
use anyhow::{bail, ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    AttentionOptions, CompressedAttention, CompressionConfig, Fold, HeadStrategies, MergeStrategy,
};

const TOKENS: usize = 200;

fn two_gpus() -> Result<bool> {
    let two = gpu()?.is_some() && Device::new_cuda(1).is_ok();
    if !two {
        println!("skipped: no second GPU");
    }
    Ok(two)
}

#[test]
fn sums_are_those_of_both() -> Result<()> {
    if !two_gpus()? {
        return Ok(());
    }
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let rows = run(2, 0, |ranks| {
            let device = Device::new_cuda(ranks.rank())?;
            // The second half of a tensor: it begins within its storage.
            let own = (Tensor::arange(0f32, 2048., &device)? * (1.0 + ranks.rank() as f64))?.to_dtype(dtype)?;
            let sum = ranks.sum(own.narrow(0, 1024, 1024)?)?.to_dtype(DType::F64)?;
            // Each shows its own.
            ranks.gather(sum.to_vec1()?)
        })?;
        for (index, sum) in rows[0].iter().enumerate() {
            let expected = 3.0 * (1024 + index) as f64;
            let relative = if dtype == DType::F32 || dtype == DType::F64 {
                0.0
            } else {
                1e-2
            };
            ensure!(
                (sum - expected).abs() <= relative * expected,
                "{dtype:?}: {sum} for {expected}"
            );
        }
        assert_eq!(rows[0], rows[1], "{dtype:?}");
    }
    Ok(())
}

/// Logits of all tokens, at once and through caches, and the share of hidden tokens.
fn logits(ranks: &Ranks, strategy: MergeStrategy, dtype: DType, device: Device) -> Result<([Tensor; 2], f64)> {
    let root = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_string());
    let options = LoadOptions {
        dtype,
        dequantize: false,
        device,
    };
    let mut checkpoint = Checkpoint::open(&format!("{root}/examples/llama/assets"), options)?;
    let config = CompressionConfig {
        similarity_threshold: 0.4,
        fold: Fold::Drop,
        window: 16,
        ..CompressionConfig::pretrained()
    };
    let strategies = HeadStrategies::uniform(strategy);
    let own = strategies.shard(ranks.rank(), ranks.world(), checkpoint.config.kv_heads)?;
    let attention = CompressedAttention::new(own, config, AttentionOptions::default())?;
    let layers = checkpoint.config.layers;
    let vocabulary = checkpoint.config.vocab_size;
    let model = checkpoint.load_formed(vec![attention; layers], &|linear| Ok(linear.into_prompt()), ranks)?;
    let tokens: Vec<u32> = (0..TOKENS).map(|i| (i * i * 7 % 97 * 31 % vocabulary) as u32).collect();
    let mut counts = HiddenCounts::default();
    let whole = model.logits(&model.forward(&tokens, &mut counts)?, 0, TOKENS)?;
    let (mut caches, prompt) = (model.caches(&Default::default())?, TOKENS * 2 / 3);
    let mut rows = vec![model.logits(&model.forward_cached(&tokens[..prompt], &mut caches)?, 0, prompt)?];
    for token in &tokens[prompt..] {
        rows.push(model.logits(&model.forward_cached(&[*token], &mut caches)?, 0, 1)?);
    }
    Ok(([whole, Tensor::cat(&rows, 0)?], counts.over(ranks)?.ratio()))
}

#[test]
fn two_gpus_compute_as_one() -> Result<()> {
    if !two_gpus()? {
        return Ok(());
    }
    for strategy in [MergeStrategy::Off, MergeStrategy::Similarity] {
        let on_cpu = |ranks: &Ranks| logits(ranks, strategy, DType::F32, Device::Cpu);
        let ([exact, _], hidden) = ranks::run(1, on_cpu)?;
        let most = largest(&exact)?;
        for dtype in [DType::F32, DType::BF16] {
            let on = |ranks: &Ranks| logits(ranks, strategy, dtype, Device::new_cuda(ranks.rank())?);
            let (one, hidden_on_one) = ranks::run(1, on)?;
            let (two, hidden_on_two) = run(2, 0, on)?;
            for (name, index) in [("whole", 0), ("cached", 1)] {
                let [of_one, of_two] = [largest_error(&one[index], &exact)?, largest_error(&two[index], &exact)?];
                let allowed = match dtype {
                    DType::F32 => 1e-4 * most + of_one,
                    _ => 2.0 * of_one,
                };
                println!(
                    "{strategy:?} {dtype:?} {name}: error {of_two:.2e} on two GPUs, {of_one:.2e} on one, {allowed:.2e} \
                     allowed; {hidden_on_two:.3} hidden, {hidden:.3} on the CPU"
                );
                ensure!(of_two <= allowed, "{strategy:?} {dtype:?} {name}: error {of_two:e}");
            }
            let apart = (hidden_on_two - hidden_on_one).abs();
            ensure!(
                dtype != DType::F32 || apart < 0.01,
                "{hidden_on_two} for {hidden_on_one}"
            );
        }
    }
    Ok(())
}

/// One rank fails on the host while the other waits for its sum on the GPU.
#[test]
fn an_error_on_one_gpu_ends_both() -> Result<()> {
    if !two_gpus()? {
        return Ok(());
    }
    for fails in [0, 1] {
        let result = run(2, 0, |ranks| -> Result<()> {
            let device = Device::new_cuda(ranks.rank())?;
            for step in 0.. {
                if ranks.rank() == fails && step == 3 {
                    bail!("meant by the test")
                }
                ranks.sum(Tensor::ones(1000, DType::F32, &device)?)?.to_vec1::<f32>()?;
            }
            Ok(())
        });
        let error = format!("{:#}", result.unwrap_err());
        ensure!(error.ends_with("meant by the test"), "{error}");
    }
    Ok(())
}
