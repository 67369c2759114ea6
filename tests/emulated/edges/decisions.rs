//! Pairs of tokens that a bias of -inf keeps apart: as `reference::indicators_under` decides.

use super::masks::chunked;
use super::*;
use crate::common::caches::with_thresholds;
use candle_sfattention::emulation::EmulatedCache;
use candle_sfattention::{Criterion, GroupRule, HeadStrategies, MergeRule, MergeStrategy};
use rand::{rngs::StdRng, Rng, SeedableRng};

/// Every width of the deciding kernel, and pairs for several warps.
const SHAPES: [Shape; 6] = [
    Shape(2, 4, 2, 97, 12),
    Shape(1, 4, 2, 300, 40),
    Shape(2, 2, 1, 150, 96),
    Shape(1, 2, 2, 80, 256),
    Shape(1, 3, 1, 2, 16),
    Shape(1, 1, 1, 1, 16),
];

/// -inf at random in few entries, so that every head sees most pairs. Some axes are broadcast, and one bias has -inf
/// only above the diagonal, which the rule must not read.
fn biases(shape: &Shape, seed: u64) -> Result<Vec<(&'static str, Tensor)>> {
    let &Shape(batch, heads, _, tokens, _) = shape;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut random = |dims: [usize; 4]| -> Result<Tensor> {
        let entry = |_| if rng.random_bool(0.08) { f32::NEG_INFINITY } else { -1.5 };
        let data: Vec<f32> = (0..dims.iter().product()).map(entry).collect();
        Ok(Tensor::from_vec(data, &dims, &Device::Cpu)?)
    };
    let above = |[_, _, row, column]: [usize; 4]| if column > row { f32::NEG_INFINITY } else { 0.0 };
    Ok(vec![
        ("full", random([batch, heads, tokens, tokens])?),
        ("padding", random([batch, 1, 1, tokens])?),
        ("rows", random([1, heads, tokens, 1])?),
        ("causal mask", bias_of(shape, DType::F32, above)?),
        ("least", Tensor::full(f32::MIN, (tokens, tokens), &Device::Cpu)?),
    ])
}

fn configs() -> Vec<CompressionConfig> {
    let base = CompressionConfig {
        similarity_threshold: 0.35,
        difference_threshold: 0.25,
        max_merge_level: 3,
        ..Default::default()
    };
    let key = CompressionConfig {
        criterion: Criterion::KeyKey,
        ..base.clone()
    };
    vec![
        CompressionConfig {
            group_rule: GroupRule::Unanimous,
            sinks: 2,
            ..base.clone()
        },
        CompressionConfig {
            group_rule: GroupRule::Unanimous,
            max_merge_level: 20,
            window: 5,
            ..key.clone()
        },
        CompressionConfig {
            fold: Fold::Mean,
            window: 3,
            ..key
        },
        base,
    ]
}

fn decided(
    qkv: &[Tensor; 3],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    bias: &Tensor,
) -> Result<Indicators> {
    let (q, k) = (Array4::from_tensor(&qkv[0])?, Array4::from_tensor(&qkv[1])?);
    Ok(reference::indicators_under(&q, &k, strategies, config, Some(bias))?)
}

#[test]
fn a_pair_merges_only_where_its_second_row_sees_both() -> Result<()> {
    let (mut apart, mut merged) = (0, 0);
    for (seed, shape) in SHAPES.iter().enumerate() {
        for dtype in DTYPES {
            let [q, k, v] = &shape.qkv(seed as u64, dtype)?;
            let qkv = [q.clone(), k.clone(), v.clone()];
            for (config, strategy) in configs()
                .iter()
                .flat_map(|config| [MergeStrategy::Similarity, MergeStrategy::Difference].map(|x| (config, x)))
            {
                let strategies = HeadStrategies::uniform(strategy);
                let free = emulation::decide([q, k, v], &strategies, config, &Default::default())?.to_vec3::<u8>()?;
                for (name, bias) in biases(shape, seed as u64 + 50)? {
                    let what = format!("{name} {shape:?} {dtype:?} {strategy:?} {config:?}");
                    let expected = decided(&qkv, &strategies, config, &bias)?.to_tensor(&Device::Cpu)?;
                    let bits = emulation::decide([q, k, v], &strategies, config, &with_bias(bias))
                        .with_context(|| what.clone())?;
                    let (bits, expected) = (bits.to_vec3::<u8>()?, expected.to_vec3::<u8>()?);
                    assert_eq!(bits, expected, "{what}");
                    if ["causal mask", "least"].contains(&name) {
                        assert_eq!(bits, free, "{what}");
                    }
                    apart += usize::from(bits != free);
                    merged += usize::from(bits.concat().concat().contains(&1));
                }
            }
        }
    }
    assert!(apart > 50 && merged > 100, "{apart} {merged}");
    Ok(())
}

/// The reference rule and observed mass read no bias.
#[test]
fn other_criteria_read_no_bias() -> Result<()> {
    let shape = SHAPES[0];
    let [q, k, v] = &shape.qkv(8, DType::F32)?;
    let base = configs().remove(3);
    let configs = [
        CompressionConfig {
            rule: MergeRule::Reference,
            ..base.clone()
        },
        CompressionConfig {
            criterion: Criterion::ObservedMass,
            group_rule: GroupRule::Unanimous,
            fold: Fold::Drop,
            window: 6,
            ..base
        },
    ];
    for config in configs {
        let strategies = with_thresholds(HeadStrategies::uniform(MergeStrategy::Similarity), &shape, &config)?;
        let free = emulation::decide([q, k, v], &strategies, &config, &Default::default())?.to_vec3::<u8>()?;
        assert!(free.concat().concat().contains(&1));
        for (name, bias) in biases(&shape, 1)? {
            let bits = emulation::decide([q, k, v], &strategies, &config, &with_bias(bias))?;
            assert_eq!(bits.to_vec3::<u8>()?, free, "{name} {config:?}");
        }
    }
    Ok(())
}

/// A pair is decided when its second token comes, by that token's row of the call: any chunking gives lists of the same
/// length.
#[test]
fn a_cache_decides_the_same_by_any_chunking() -> Result<()> {
    let mut shorter = 0;
    for (seed, shape) in [Shape(2, 4, 2, 70, 16), Shape(1, 2, 1, 90, 64)].iter().enumerate() {
        let &Shape(batch, heads, kv_heads, tokens, _) = shape;
        for (config, dtype) in configs().iter().zip([DType::F32, DType::BF16, DType::F16, DType::F32]) {
            let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
            let qkv = shape.qkv(seed as u64 + 20, dtype)?;
            for (name, bias) in biases(shape, seed as u64)? {
                let bits = decided(&qkv, &strategies, config, &bias)?;
                let lists = match config.group_rule {
                    GroupRule::Unanimous => kv_heads,
                    GroupRule::PerQueryHead => heads,
                };
                let expected: Vec<Vec<usize>> = (0..batch)
                    .map(|b| {
                        let lists = (0..lists).map(|list| bits.head(b, list * (heads / lists)));
                        lists.map(|bits| entries(bits, config.window)).collect()
                    })
                    .collect();
                let options = with_bias(bias.broadcast_as((batch, heads, tokens, tokens))?.contiguous()?);
                let mut first = None;
                for chunks in [&[1][..], &[tokens], &[40, 1, 7]] {
                    let what = format!("{name} {shape:?} {dtype:?} {chunks:?} {config:?}");
                    let mut cache = EmulatedCache::new(&qkv, &strategies, config, &Default::default())?;
                    let output = chunked(&mut cache, &qkv, &options, chunks).with_context(|| what.clone())?;
                    assert_eq!(cache.lens()?, expected, "{what}");
                    let first = first.get_or_insert_with(|| output.clone());
                    agree(&what, &output, &first.to_dtype(DType::F64)?, 2.0 * share_of(dtype))?;
                }
                shorter += usize::from(expected.concat().iter().any(|len| *len < tokens));
            }
        }
    }
    assert!(shorter > 20, "{shorter} caches hid anything");
    Ok(())
}

/// The entries of a list: far columns, the edge, raw tokens.
fn entries(bits: &[bool], window: usize) -> usize {
    let tokens = bits.len() + 1;
    match (tokens - 1).checked_sub(window) {
        Some(edge) => bits[..edge].iter().filter(|hidden| !**hidden).count() + 1 + window,
        None => tokens,
    }
}
