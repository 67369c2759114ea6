//! Saved caches: a loaded cache continues bit for bit, and a damaged file never panics.

use crate::common::caches::{part, strategies};
use crate::common::files::{Contents, TempFile};
use crate::common::saved::{assert_go_on_alike, saved, through_a_file, SHAPE};
use crate::draw::{configs, shapes};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{CacheOptions, CompressedKvCache};
use proptest::prelude::*;
use std::collections::HashMap;

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_loaded_cache_goes_on_bit_for_bit(
        shape in shapes(),
        config in configs(),
        kind in 0..5u8,
        thresholds in any::<bool>(),
        chunks in prop::collection::vec(prop_oneof![Just(1usize), 1..5usize, 1..90usize], 1..6),
        (input, storage) in prop_oneof![
            Just((DType::F32, None)),
            Just((DType::F64, None)),
            Just((DType::F16, None)),
            Just((DType::BF16, None)),
            Just((DType::F32, Some(DType::BF16))),
            Just((DType::BF16, Some(DType::F32))),
            Just((DType::F64, Some(DType::F64))),
        ],
        saves in 0..6usize,
        bad in prop_oneof![2 => Just(None), 1 => (0..160usize).prop_map(Some)],
        seed in 0..1000u64,
    ) {
        let mut strategies = strategies(kind, &shape, &config).unwrap();
        if thresholds {
            let own: Vec<f64> = (0..shape.1).map(|head| config.similarity_threshold / (1.0 + head as f64)).collect();
            strategies = strategies.with_thresholds(&Tensor::new(own, &Device::Cpu).unwrap()).unwrap();
        }
        let mut qkv = shape.qkv(seed, input).unwrap();
        if let Some(bad) = bad.filter(|bad| *bad < shape.3) {
            let at = Tensor::arange(0u32, shape.3 as u32, &Device::Cpu).unwrap().eq(bad as f64).unwrap();
            let at = at.reshape((1, 1, shape.3, 1)).unwrap().broadcast_as(qkv[2].dims()).unwrap();
            let infinite = Tensor::full(f32::INFINITY, qkv[2].dims(), &Device::Cpu).unwrap().to_dtype(input).unwrap();
            qkv[2] = at.where_cond(&infinite, &qkv[2]).unwrap();
        }
        let storage = storage.map(|dtype| dtype.try_into().unwrap());
        let options = CacheOptions { storage, max_entries: Some(10_000), ..CacheOptions::default() };
        let mut original = CompressedKvCache::new(strategies, config, options).unwrap();
        let mut start = 0;
        for chunk in chunks.iter().cycle().take(saves) {
            let count = (*chunk).min(shape.3 - start);
            if count > 0 {
                let [q, k, v] = part(&qkv, start, count).unwrap();
                original.append_and_attend(&q, &k, &v, &Default::default()).unwrap();
            }
            start += count;
        }
        let mut loaded = through_a_file(&original).unwrap();
        assert_go_on_alike([&mut original, &mut loaded], &qkv, start, &chunks).unwrap();
        // A second file shows any difference that the rows did not.
        let (first, second) = (TempFile::new(), TempFile::new());
        original.save(&first.0).unwrap();
        loaded.save(&second.0).unwrap();
        prop_assert!(Contents::read(&first.0).unwrap() == Contents::read(&second.0).unwrap());
        // The settings are loaded as well: the cache can start afresh.
        original.reset();
        loaded.reset();
        assert_go_on_alike([&mut original, &mut loaded], &qkv, 0, &[shape.3]).unwrap();
    }

    /// A damaged header whose checksum fits is refused or harmless; nothing panics.
    #[test]
    fn a_damaged_header_never_panics(at in 0..20_000usize, byte in any::<u8>(), window in 0..5usize) {
        let saved = saved(window).unwrap();
        let contents = Contents::read(&saved.0).unwrap();
        let mut cache = contents.cache.to_string().into_bytes();
        // A digit becomes another digit, so that many of the files still parse.
        let at = at % cache.len();
        cache[at] = if cache[at].is_ascii_digit() { b'0' + byte % 10 } else { byte & 0x7f };
        let cache = String::from_utf8(cache).unwrap();
        let mut metadata: HashMap<_, _> = contents.metadata.clone().into_iter().collect();
        metadata.insert("checksum".into(), contents.checksum(&cache));
        metadata.insert("cache".into(), cache);
        contents.write_as(&saved.0, metadata).unwrap();
        if let Ok(mut cache) = CompressedKvCache::load(&saved.0, &Device::Cpu) {
            let [q, k, v] = SHAPE.qkv(4, DType::F32).unwrap();
            let _ = cache.append_and_attend(&q, &k, &v, &Default::default());
            cache.lens();
        }
    }
}
