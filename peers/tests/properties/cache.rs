//! The KV cache: any chunking gives the rows of attention over the whole sequence.

use crate::common::again::on_every_instruction_set;
use crate::common::caches::{chunked, plain, strategies};
use crate::common::inputs::{assert_close, laid_out, Memory};
use crate::draw::{configs, shapes};
use anyhow::Result;
use candle_core::DType;
use candle_sfattention::{compressed_attention, CompressedKvCache};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_chunking_equals_attention_over_all(
        shape in shapes(),
        config in configs(),
        kind in 0..5u8,
        chunks in prop::collection::vec(prop_oneof![Just(1usize), 1..5usize, 1..90usize], 1..6),
        memory in prop_oneof![Just(Memory::HeadMajor), Just(Memory::Fused)],
        double in any::<bool>(),
        seed in 0..1000u64,
    ) {
        let dtype = if double { DType::F64 } else { DType::F32 };
        let tolerance = if double { 1e-12 } else { 6e-6 };
        let strategies = strategies(kind, &shape, &config).unwrap();
        let qkv = laid_out(&shape.qkv(seed, dtype).unwrap(), memory).unwrap();
        let [q, k, v] = &qkv;
        let expected = compressed_attention(q, k, v, &strategies, &config, &Default::default()).unwrap();
        let mut cache = CompressedKvCache::new(strategies, config.clone(), Default::default()).unwrap();
        let got = chunked(&mut cache, &qkv, &chunks, plain).unwrap();
        assert_close("chunked", &got, &expected.output, tolerance, tolerance).unwrap();
        prop_assert_eq!(cache.seq_len(), shape.3);
        // A list holds the visible tokens: all except those hidden left of the window.
        if shape.1 == shape.2 {
            let bits = expected.plan.indicators().to_vec3::<u8>().unwrap();
            for (lens, heads) in cache.lens().iter().zip(&bits) {
                for (len, bits) in lens.iter().zip(heads) {
                    let off = bits.iter().all(|bit| *bit == 0);
                    let edge = if off { shape.3 } else { shape.3.saturating_sub(config.window + 1) };
                    let hidden = bits.iter().take(edge).filter(|bit| **bit == 1).count();
                    prop_assert_eq!(*len, shape.3 - hidden);
                }
            }
        }
    }
}

/// Decoding with the loops of each instruction set.
#[test]
fn every_instruction_set_agrees() -> Result<()> {
    let tests = ["any_chunking_equals_attention_over_all"];
    on_every_instruction_set(module_path!(), &tests)
}
