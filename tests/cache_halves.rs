//! The KV cache in f16 and bf16 with every loop that reads it: prefill in bf16 pairs, decoding by lanes.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    compressed_attention, AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Fold, HeadStrategies,
    MergeStrategy,
};
use common::again::{on_every_instruction_set, on_every_kernel};
use common::caches::{chunked, configs, part_options, plain, shapes, strategies};
use common::inputs::{assert_close, values, Shape};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Half types: stored folds have a second rounding; everything else has one.
    #[test]
    fn half_storage_rounds_once_more(
        shape in shapes(),
        config in configs(),
        chunks in prop::collection::vec(1..40usize, 1..4),
        stored in prop_oneof![Just(DType::F16), Just(DType::BF16)],
        single in any::<bool>(),
        seed in 0..1000u64,
    ) {
        let input = if single { DType::F32 } else { stored };
        let unit = if stored == DType::F16 { 2f64.powi(-11) } else { 2f64.powi(-8) };
        let strategies = strategies(0, &shape, &config).unwrap();
        let [q, k, v] = shape.qkv(seed, input).unwrap();
        // The cache decides on keys as it stores them.
        let round = |x: &Tensor| x.to_dtype(stored).unwrap().to_dtype(input).unwrap();
        let qkv = [q, round(&k), round(&v)];
        let [q, k, v] = &qkv;
        let expected = compressed_attention(q, k, v, &strategies, &config, &Default::default()).unwrap().output;
        let options = CacheOptions { storage: Some(stored), max_entries: None };
        let mut cache = CompressedKvCache::new(strategies, config, options).unwrap();
        let got = chunked(&mut cache, &qkv, &chunks, plain).unwrap();
        // A key that is rounded by one unit moves a logit, of a few units here, by as much of it.
        assert_close("half", &got, &expected, 8.0 * unit, 4.0 * unit).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Chunks that are long enough for a list's columns to be gathered once for all rows, in bf16 pairs if the CPU has
    /// them.
    #[test]
    fn long_chunks_equal_attention_over_all(
        shape in shapes(),
        config in configs(),
        kind in 0..5u8,
        chunks in prop::collection::vec(prop_oneof![Just(1usize), 1..90usize, 64..400usize], 1..4),
        dtype in prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)],
        bias in any::<bool>(),
        seed in 0..1000u64,
    ) {
        let shape = Shape(shape.0, shape.1, shape.2, shape.3 + 200, shape.4);
        let unit = match dtype {
            DType::F32 => 7.5e-7,
            DType::F16 => 2f64.powi(-11),
            _ => 2f64.powi(-8),
        };
        let strategies = strategies(kind, &shape, &config).unwrap();
        let qkv = shape.qkv(seed, dtype).unwrap();
        let [q, k, v] = &qkv;
        let rows = Tensor::arange(0f32, (shape.3 * shape.3) as f32, &Device::Cpu).unwrap();
        let bias = bias.then(|| (rows * 0.7).unwrap().sin().unwrap().reshape((shape.3, shape.3)).unwrap());
        let whole = AttentionOptions { bias, ..Default::default() };
        let expected = compressed_attention(q, k, v, &strategies, &config, &whole).unwrap().output;
        let mut cache = CompressedKvCache::new(strategies, config, Default::default()).unwrap();
        let got = chunked(&mut cache, &qkv, &chunks, |start, count| part_options(&whole, start, count)).unwrap();
        // As with half storage: stored folds have a second rounding.
        assert_close("long chunks", &got, &expected, 8.0 * unit, 4.0 * unit).unwrap();
    }
}

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
            let run = |storage| -> Result<Tensor> {
                let options = CacheOptions {
                    storage: Some(storage),
                    max_entries: None,
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
    let tests = ["stored_halves_decode_as_their_numbers", "half_storage_rounds_once_more"];
    on_every_instruction_set(&tests)
}

/// Long chunks with every kind of half instructions that this CPU has, and with none.
#[test]
fn long_chunks_agree_on_every_kernel() -> Result<()> {
    let tests = [
        "long_chunks_equal_attention_over_all",
        "bad_numbers_stay_with_the_rows_that_see_them",
    ];
    on_every_kernel(&tests)
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
