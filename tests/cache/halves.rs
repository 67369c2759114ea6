//! The KV cache in f16 and bf16 with every loop that reads it: prefill in bf16 pairs, decoding by lanes.

use crate::common::again::{on_every_instruction_set, on_every_kernel};
use crate::common::caches::{chunked, plain};
use crate::common::inputs::{assert_close, values, Shape};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{CacheOptions, CompressedKvCache, CompressionConfig, Fold, HeadStrategies, MergeStrategy};

/// Decoding widens stored halves exactly: single tokens give the rows that f32 of the same numbers gives.
#[test]
fn stored_halves_decode_as_their_numbers() -> Result<()> {
    let shapes = [(1, 2), (3, 6), (4, 16), (2, 33), (6, 64), (1, 80), (5, 98)];
    for ((group, dim), stored) in shapes
        .iter()
        .flat_map(|shape| [(*shape, DType::F16), (*shape, DType::BF16)])
    {
        let shape = Shape(1, 2 * group, 2, 70, dim);
        let [q, k, v] = shape.qkv(dim as u64, DType::F32)?;
        // Among them the smallest and the largest numbers of f16, subnormal ones too.
        let extremes = Tensor::new(&[6e-8f32, -3e-5, 6.1e-5, -65504.0, 1e-4, 0.0, -0.0], &Device::Cpu)?;
        let extremes = extremes
            .repeat(70 * dim)?
            .narrow(0, 0, 2 * 70 * dim)?
            .reshape(v.dims())?;
        let v = v.gt(0.9f32)?.where_cond(&extremes, &v)?;
        let round = |x: &Tensor| x.to_dtype(stored)?.to_dtype(DType::F32);
        let qkv = [q, round(&k)?, round(&v)?];
        for window in [0, 5] {
            let config = CompressionConfig {
                window,
                fold: Fold::Drop,
                ..CompressionConfig::pretrained()
            };
            let run = |storage: DType| -> Result<Tensor> {
                let options = CacheOptions {
                    storage: Some(storage.try_into()?),
                    ..Default::default()
                };
                let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
                let mut cache = CompressedKvCache::new(strategies, config.clone(), options)?;
                chunked(&mut cache, &qkv, &[61, 1, 1, 1, 1, 1, 1, 1, 1, 1], plain)
            };
            let what = format!("{stored:?}, group {group}, D = {dim}, window {window}");
            assert_close(&what, &run(stored)?, &run(DType::F32)?, 1e-5, 1e-5)?;
        }
    }
    Ok(())
}

/// Decoding with the loops of each instruction set.
#[test]
fn every_instruction_set_decodes_alike() -> Result<()> {
    let tests = ["stored_halves_decode_as_their_numbers"];
    on_every_instruction_set(module_path!(), &tests)
}

/// Long chunks with every kind of half instructions that this CPU has, and with none.
#[test]
fn long_chunks_agree_on_every_kernel() -> Result<()> {
    let tests = ["bad_numbers_stay_with_the_rows_that_see_them"];
    on_every_kernel(module_path!(), &tests)
}

/// A token that is not finite makes the rows that see it NaN, now and later, and no earlier row.
#[test]
fn bad_numbers_stay_with_the_rows_that_see_them() -> Result<()> {
    let shape = Shape(1, 2, 1, 140, 8);
    let settings = [(1, 0), (2, 0), (1, 4), (2, 4)].into_iter();
    let settings = settings.flat_map(|(which, window)| [DType::F32, DType::BF16].map(|dtype| (which, window, dtype)));
    for (which, window, dtype) in settings {
        let config = CompressionConfig {
            window,
            ..CompressionConfig::pretrained()
        };
        for chunks in [&[1usize][..], &[9], &[70], &[140]] {
            let mut qkv = shape.qkv(2, dtype)?;
            let mut data = values(&qkv[which])?;
            data[20 * 8 + 1] = f64::INFINITY;
            qkv[which] = Tensor::from_vec(data, qkv[which].dims(), &Device::Cpu)?.to_dtype(dtype)?;
            let strategies = HeadStrategies::uniform(MergeStrategy::Off);
            let mut cache = CompressedKvCache::new(strategies, config.clone(), Default::default())?;
            let output = values(&chunked(&mut cache, &qkv, chunks, plain)?)?;
            for (index, x) in output.iter().enumerate() {
                let row = index / 8 % 140;
                assert_eq!(x.is_nan(), row >= 20, "row {row}, chunks {chunks:?}, {dtype:?}");
            }
        }
    }
    Ok(())
}
