//! The modules and the loss as a user wires them: layers, sinks, heads with their own strategies, split models.

mod attention;
mod cached;
#[path = "../common/mod.rs"]
mod common;
mod layer;
mod loss;
mod ranks;
mod training;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_sfattention::{
    CompressedAttention, CompressedSelfAttention, CompressionConfig, HeadStrategies, MergeStrategy, RotaryConfig,
    RotaryLayout, SelfAttentionConfig,
};
use rand::{rngs::StdRng, Rng, SeedableRng};

const CPU: &Device = &Device::Cpu;

/// One entry per query head of [`SIZES`].
const STRATEGIES: [MergeStrategy; 4] = [
    MergeStrategy::Similarity,
    MergeStrategy::Difference,
    MergeStrategy::Off,
    MergeStrategy::Similarity,
];

/// Grouped heads, and a hidden size that is not heads times head_dim.
const SIZES: SelfAttentionConfig = SelfAttentionConfig {
    hidden_size: 12,
    num_heads: 4,
    num_kv_heads: 2,
    head_dim: 6,
    qkv_bias: false,
    output_bias: false,
    rotary: None,
    qk_norm: None,
};

const LAYOUTS: [Option<RotaryLayout>; 3] = [None, Some(RotaryLayout::Half), Some(RotaryLayout::Interleaved)];

fn rotary(layout: Option<RotaryLayout>) -> Option<RotaryConfig> {
    layout.map(|layout| RotaryConfig {
        theta: 100.0,
        max_tokens: 40,
        layout,
        ..Default::default()
    })
}

/// Thresholds at which random vectors merge.
fn generous() -> CompressionConfig {
    CompressionConfig {
        similarity_threshold: 0.8,
        difference_threshold: 0.3,
        ..Default::default()
    }
}

fn uniform(strategy: MergeStrategy) -> HeadStrategies {
    HeadStrategies::uniform(strategy)
}

fn random(seed: u64, dims: &[usize], dtype: DType) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    let data: Vec<f64> = (0..dims.iter().product())
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    Tensor::from_vec(data, dims, CPU)?.to_dtype(dtype)
}

/// A layer whose weights are Vars; the same sizes give the same weights.
fn trainable(
    sizes: SelfAttentionConfig,
    attention: CompressedAttention,
    dtype: DType,
) -> Result<(CompressedSelfAttention, VarMap)> {
    let vars = VarMap::new();
    let layer = CompressedSelfAttention::new(sizes, attention, VarBuilder::from_varmap(&vars, dtype, CPU))?;
    for (name, var) in vars.data().lock().unwrap().iter() {
        let seed = name
            .bytes()
            .fold(7, |seed: u64, byte| seed * 31 % 1_000_003 + u64::from(byte));
        var.set(&random(seed, var.dims(), dtype)?)?;
    }
    Ok((layer, vars))
}

fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    let values: Vec<f64> = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    Ok(values.into_iter().map(f64::to_bits).collect())
}

/// Equal to the last bit, and no NaN among them.
#[track_caller]
fn assert_same(got: &Tensor, expected: &Tensor) -> Result<()> {
    assert_eq!(got.dims(), expected.dims());
    assert_eq!(bits(got)?, bits(expected)?);
    assert!(bits(got)?.into_iter().all(|x| f64::from_bits(x).is_finite()));
    Ok(())
}
