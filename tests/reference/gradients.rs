//! Gradients of the loss against finite differences; those of attention: peers/tests/properties/gradients.rs.

use anyhow::Result;
use candle_sfattention::reference::{attention, compression_loss, compression_loss_gradients, Array4, LossTerms};
use candle_sfattention::{
    AttentionOptions, CompressionConfig, Criterion, HeadStrategies, LossNormalizer, MergeStrategy,
};
use rand::{rngs::StdRng, SeedableRng};

use crate::arrays::{assert_close, no_bits, numeric_gradient, random_qkv};

fn mixed_strategies() -> HeadStrategies {
    use MergeStrategy::{Difference, Off, Similarity};
    HeadStrategies::per_head(vec![Similarity, Difference, Off, Difference])
}

/// The loss with the divisors of `fixed`: M and P are constants to the gradient.
fn loss_at(q: &Array4, k: &Array4, strategies: &HeadStrategies, config: &CompressionConfig, fixed: LossTerms) -> f64 {
    let squared = compression_loss(q, k, strategies, config).unwrap().unwrap().squared;
    LossTerms { squared, ..fixed }.value(config.loss_factor, config.loss_normalizer)
}

#[test]
fn loss_gradients_are_the_finite_differences() -> Result<()> {
    let rng = &mut StdRng::seed_from_u64(1);
    let mut merged = Vec::new();
    for criterion in [Criterion::QueryKey, Criterion::KeyKey] {
        for loss_normalizer in [LossNormalizer::Merged, LossNormalizer::Pairs] {
            for difference_threshold in [1e-9, 0.3] {
                let [q, k, _] = random_qkv(rng, [2, 4, 2, 6, 3]);
                let config = CompressionConfig {
                    criterion,
                    loss_normalizer,
                    difference_threshold,
                    loss_factor: 0.7,
                    ..Default::default()
                };
                let strategies = mixed_strategies();
                let fixed = compression_loss(&q, &k, &strategies, &config)?.expect("a loss");
                assert_eq!(fixed.pairs, 2 * 3 * 5);
                merged.push(fixed.merged);
                let (dq, dk) = compression_loss_gradients(&q, &k, &strategies, &config)?;
                let at = |q: &Array4, k: &Array4| loss_at(q, k, &strategies, &config, fixed);
                assert_close("dq", &dq.data, &numeric_gradient(&q, 1e-6, |q| at(q, &k)), 1e-7);
                assert_close("dk", &dk.data, &numeric_gradient(&k, 1e-6, |k| at(&q, k)), 1e-7);
            }
        }
    }
    assert!(merged.contains(&0) && merged.iter().any(|&m| m > 0), "{merged:?}");
    Ok(())
}

#[test]
fn loss_gradient_below_the_norm_floor_has_no_projection() -> Result<()> {
    let rng = &mut StdRng::seed_from_u64(2);
    let [q, mut k, _] = random_qkv(rng, [1, 1, 1, 2, 3]);
    k.data[..3].copy_from_slice(&[2e-13, -1e-13, 3e-13]);
    let (strategies, config) = (
        HeadStrategies::uniform(MergeStrategy::Similarity),
        CompressionConfig::default(),
    );
    let fixed = compression_loss(&q, &k, &strategies, &config)?.expect("a loss");
    let (_, dk) = compression_loss_gradients(&q, &k, &strategies, &config)?;
    let numeric = numeric_gradient(&k, 1e-16, |k| loss_at(&q, k, &strategies, &config, fixed));
    assert!(dk.data[..3].iter().all(|g| g.abs() > 1e10), "{:?}", &dk.data[..3]);
    // The loss is quadratic here, so the step costs no accuracy; only its rounding does.
    assert_close("dk", &dk.data[..3], &numeric[..3], 1e-8);
    Ok(())
}

#[test]
fn loss_is_zero_when_all_heads_are_off_and_none_for_one_token() -> Result<()> {
    let rng = &mut StdRng::seed_from_u64(3);
    let config = CompressionConfig::default();
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let [q, k, _] = random_qkv(rng, [1, 2, 1, 4, 3]);
    let terms = compression_loss(&q, &k, &off, &config)?.expect("terms");
    assert_eq!(terms, LossTerms::default());
    assert_eq!(terms.value(1.0, LossNormalizer::Merged), 0.0);
    let (dq, dk) = compression_loss_gradients(&q, &k, &off, &config)?;
    assert!(dq.data.iter().chain(&dk.data).all(|&g| g == 0.0));

    let [q, k, v] = random_qkv(rng, [1, 2, 1, 1, 3]);
    let similarity = HeadStrategies::uniform(MergeStrategy::Similarity);
    assert_eq!(compression_loss(&q, &k, &similarity, &config)?, None);
    let (dq, _) = compression_loss_gradients(&q, &k, &similarity, &config)?;
    assert_eq!(dq, Array4::zeros(q.dims));
    let output = attention(&q, &k, &v, &no_bits([1, 2, 0]), &config, &AttentionOptions::default())?;
    assert_eq!(output.data, [v.data.clone(), v.data].concat());
    Ok(())
}
