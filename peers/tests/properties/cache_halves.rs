//! The KV cache in f16 and bf16 over random shapes, settings and chunks.

use crate::common::again::{on_every_instruction_set, on_every_kernel};
use crate::common::caches::{chunked, part_options, plain, strategies};
use crate::common::inputs::{assert_close, Shape};
use crate::draw::{configs, shapes};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{compressed_attention, AttentionOptions, CacheOptions, CompressedKvCache};
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
        let options = CacheOptions { storage: Some(stored.try_into().unwrap()), ..CacheOptions::default() };
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

/// Decoding with the loops of each instruction set.
#[test]
fn every_instruction_set_decodes_alike() -> Result<()> {
    on_every_instruction_set(module_path!(), &["half_storage_rounds_once_more"])
}

/// Long chunks with every kind of half instructions that this CPU has, and with none.
#[test]
fn long_chunks_agree_on_every_kernel() -> Result<()> {
    on_every_kernel(module_path!(), &["long_chunks_equal_attention_over_all"])
}
