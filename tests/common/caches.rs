//! Strategies and chunks for caches.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, HeadStrategies, MergeStrategy, Storage,
};

use super::inputs::Shape;

/// Uniform strategies, per head, or per batch row and head; with thresholds if the criterion needs them.
pub fn strategies(kind: u8, shape: &Shape, config: &CompressionConfig) -> Result<HeadStrategies> {
    let codes = |count: usize| (0..count).map(|i| (i * 7 % 3) as u32).collect::<Vec<_>>();
    let strategies = match kind {
        0..=2 => HeadStrategies::uniform(MergeStrategy::ALL[kind as usize]),
        3 => HeadStrategies::from_tensor(&Tensor::new(codes(shape.1), &Device::Cpu)?)?,
        _ => {
            let codes = Tensor::from_vec(codes(shape.0 * shape.1), (shape.0, shape.1), &Device::Cpu)?;
            HeadStrategies::from_tensor(&codes)?
        }
    };
    with_thresholds(strategies, shape, config)
}

/// Thresholds that hide about half of the tokens, if the criterion needs thresholds; the heads of a group have
/// different ones.
pub fn with_thresholds(
    strategies: HeadStrategies,
    shape: &Shape,
    config: &CompressionConfig,
) -> Result<HeadStrategies> {
    if !config.criterion.needs_thresholds() {
        return Ok(strategies);
    }
    let group = (shape.1 / shape.2) as f64;
    let middle = 0.5 * group * (shape.4 as f64 / 3.0).sqrt();
    let thresholds = (Tensor::arange(0u32, shape.1 as u32, &Device::Cpu)?.to_dtype(DType::F64)? * (0.1 * middle))?;
    Ok(strategies.with_thresholds(&(thresholds + middle)?)?)
}

/// An empty cache that can take back its last `rollback` tokens.
pub fn recorded(
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    storage: Option<Storage>,
    rollback: usize,
) -> Result<CompressedKvCache> {
    let options = CacheOptions {
        storage,
        rollback,
        ..Default::default()
    };
    Ok(CompressedKvCache::new(strategies.clone(), config.clone(), options)?)
}

/// Tokens `start..start + count` of q, k and v.
pub fn part(qkv: &[Tensor; 3], start: usize, count: usize) -> Result<[Tensor; 3]> {
    let one = |x: &Tensor| x.narrow(2, start, count);
    Ok([one(&qkv[0])?, one(&qkv[1])?, one(&qkv[2])?])
}

/// The options of a whole sequence, cut down to its tokens `start..start + count`: their segments, and the bias of
/// their rows and visible columns.
pub fn part_options(options: &AttentionOptions, start: usize, count: usize) -> Result<AttentionOptions> {
    let bias = options.bias.as_ref();
    let rows = bias.map(|bias| {
        let axis = bias.rank() - 2;
        bias.narrow(axis, start, count)?.narrow(axis + 1, 0, start + count)
    });
    let segments = options.segments.as_ref().map(|numbers| numbers.narrow(1, start, count));
    Ok(AttentionOptions {
        bias: rows.transpose()?,
        segments: segments.transpose()?,
        ..options.clone()
    })
}

/// Appends chunks of these lengths, repeated until all tokens are in.
pub fn chunked(
    cache: &mut CompressedKvCache,
    qkv: &[Tensor; 3],
    chunks: &[usize],
    options: impl Fn(usize, usize) -> Result<AttentionOptions>,
) -> Result<Tensor> {
    let tokens = qkv[0].dim(2)?;
    let (mut outputs, mut start) = (Vec::new(), 0);
    for chunk in chunks.iter().cycle() {
        let count = (*chunk).min(tokens - start);
        if count == 0 {
            break;
        }
        let [q, k, v] = part(qkv, start, count)?;
        outputs.push(cache.append_and_attend(&q, &k, &v, &options(start, count)?)?);
        start += count;
    }
    Ok(Tensor::cat(&outputs, 2)?)
}

pub fn plain(_: usize, _: usize) -> Result<AttentionOptions> {
    Ok(AttentionOptions::default())
}
