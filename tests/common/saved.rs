//! Saved caches, and caches that must stay equal.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{CompressedKvCache, CompressionConfig, Criterion, Fold, HeadStrategies, MergeStrategy};

use super::caches::part;
use super::files::TempFile;
use super::inputs::{values, Shape};

/// The shape of [`saved`].
pub const SHAPE: Shape = Shape(2, 4, 2, 40, 8);

/// A saved cache of [`SHAPE`] that merges, with four lists to a batch row.
pub fn saved(window: usize) -> Result<TempFile> {
    let config = CompressionConfig {
        similarity_threshold: 0.4,
        fold: Fold::Mean,
        criterion: Criterion::KeyKey,
        window,
        ..Default::default()
    };
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let mut cache = CompressedKvCache::new(strategies, config, Default::default())?;
    let [q, k, v] = SHAPE.qkv(0, DType::F32)?;
    cache.append_and_attend(&q, &k, &v, &Default::default())?;
    let file = TempFile::new();
    cache.save(&file.0)?;
    Ok(file)
}

/// The cache saved and loaded.
pub fn through_a_file(cache: &CompressedKvCache) -> Result<CompressedKvCache> {
    let file = TempFile::new();
    cache.save(&file.0)?;
    Ok(CompressedKvCache::load(&file.0, &Device::Cpu)?)
}

/// Every number as its bits, with one NaN for all NaNs.
pub fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    let bits = |x: f64| if x.is_nan() { f64::NAN } else { x }.to_bits();
    Ok(values(tensor)?.into_iter().map(bits).collect())
}

/// Both caches append the same tokens from `start` on, in chunks, and stay equal throughout.
pub fn assert_go_on_alike(
    caches: [&mut CompressedKvCache; 2],
    qkv: &[Tensor; 3],
    mut start: usize,
    chunks: &[usize],
) -> Result<()> {
    let [original, loaded] = caches;
    let tokens = qkv[0].dim(2)?;
    for chunk in chunks.iter().cycle() {
        // Debug shows length, bytes and the settings to the last bit.
        assert_eq!(format!("{loaded:?}"), format!("{original:?}"), "at token {start}");
        assert_eq!(loaded.lens(), original.lens(), "at token {start}");
        assert_eq!(loaded.bytes_dense(), original.bytes_dense());
        let count = (*chunk).min(tokens - start);
        if count == 0 {
            return Ok(());
        }
        let [q, k, v] = part(qkv, start, count)?;
        let expected = original.append_and_attend(&q, &k, &v, &Default::default())?;
        let got = loaded.append_and_attend(&q, &k, &v, &Default::default())?;
        assert_eq!(bits(&got)?, bits(&expected)?, "{count} tokens at {start}");
        start += count;
    }
    Ok(())
}
