//! Numbers that are not finite reach only the rows that see them; dropout, zero vectors, one token, the rule
//! reference. The property tests are in peers/tests/properties/invariants.rs.

use crate::common::inputs::{values, Shape};
use crate::common::runs::{bits, other_future, run};
use anyhow::Result;
use candle_core::{DType, Device, IndexOp, Tensor};
use candle_sfattention::{
    attend, compressed_attention, AttentionOptions, CompressionConfig, Dropout, Fold, HeadStrategies, MergePlan,
    MergeRule, MergeStrategy,
};

/// As documented, a later token changes an earlier row.
#[test]
fn the_reference_rule_is_not_causal() -> Result<()> {
    let shape = Shape(1, 1, 1, 40, 8);
    let config = CompressionConfig {
        similarity_threshold: 0.35,
        ..CompressionConfig::reference()
    };
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let mut broken = 0;
    for seed in 0..20 {
        let qkv = shape.qkv(seed, DType::F32)?;
        let whole = run(&qkv, &strategies, &config)?;
        for from in 2..40 {
            let changed = run(&other_future(&qkv, &shape, from, 3.0)?, &strategies, &config)?;
            let past = |x: &Tensor| -> Result<_> { bits(&x.narrow(2, 0, from)?) };
            broken += usize::from(past(&whole)? != past(&changed)?);
        }
    }
    assert!(broken > 0, "no future reached a past row in 760 trials");
    Ok(())
}

/// A token with a NaN or infinite key or value: earlier rows keep their bits; its own row and every row that sees it
/// are NaN throughout.
#[test]
fn bad_numbers_stay_with_the_rows_that_see_them() -> Result<()> {
    let shape = Shape(1, 2, 1, 150, 16);
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    for (which, bad, window) in [
        (1, f32::NAN, 0),
        (2, f32::NAN, 0),
        (1, f32::NEG_INFINITY, 8),
        (2, f32::INFINITY, 8),
        (1, f32::INFINITY, 0),
    ] {
        let config = CompressionConfig {
            window,
            fold: Fold::Drop,
            ..Default::default()
        };
        for token in [0, 31, 77, 149] {
            let mut qkv = shape.qkv(1, DType::F32)?;
            let clean = values(&run(&qkv, &off, &config)?)?;
            let mut data = values(&qkv[which])?;
            data[token * shape.4 + 3] = f64::from(bad);
            qkv[which] = Tensor::from_vec(data, qkv[which].dims(), &Device::Cpu)?.to_dtype(DType::F32)?;
            let dirty = values(&run(&qkv, &off, &config)?)?;
            for (index, (clean, dirty)) in clean.iter().zip(&dirty).enumerate() {
                let row = index / shape.4 % shape.3;
                if row < token {
                    assert_eq!(clean, dirty, "row {row}, bad token {token}");
                } else {
                    assert!(dirty.is_nan(), "row {row} is {dirty} though it sees bad token {token}");
                }
            }
        }
    }
    Ok(())
}

/// A query that is not finite makes only its own row NaN; a hidden token that is not finite, only the rows that see its
/// chain.
#[test]
fn a_bad_query_spoils_its_row_only() -> Result<()> {
    let shape = Shape(1, 1, 1, 70, 8);
    let [q, k, v] = shape.qkv(3, DType::F32)?;
    let mut data = values(&q)?;
    data[40 * 8] = f64::INFINITY;
    let q = Tensor::from_vec(data, q.dims(), &Device::Cpu)?.to_dtype(DType::F32)?;
    let bits = Tensor::zeros((1, 1, 69), DType::U8, &Device::Cpu)?;
    let plan = MergePlan::from_indicators(&bits, &CompressionConfig::default())?;
    let rows = attend(&q, &k, &v, &plan, &AttentionOptions::default())?
        .i((0, 0))?
        .to_vec2::<f32>()?;
    for (row, values) in rows.iter().enumerate() {
        assert!(
            values.iter().all(|x| x.is_nan() == (row == 40)),
            "row {row}: {values:?}"
        );
    }
    Ok(())
}

/// A row whose every column the bias hides gives zeros, and no other row does.
#[test]
fn a_row_without_columns_is_zeros() -> Result<()> {
    let [q, k, v] = Shape(1, 1, 1, 5, 4).qkv(0, DType::F32)?;
    let bias: Vec<f32> = (0..25)
        .map(|i| if i / 5 == 2 { f32::NEG_INFINITY } else { 0.0 })
        .collect();
    let options = AttentionOptions {
        bias: Some(Tensor::from_vec(bias, (1, 1, 5, 5), &Device::Cpu)?),
        ..Default::default()
    };
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let output = compressed_attention(&q, &k, &v, &off, &CompressionConfig::default(), &options)?.output;
    for (row, values) in output.i((0, 0))?.to_vec2::<f32>()?.iter().enumerate() {
        assert!(
            values.iter().all(|x| (*x == 0.0) == (row == 2)),
            "row {row}: {values:?}"
        );
    }
    Ok(())
}

/// Zero vectors have cosine 0: they qualify as different, never as similar.
#[test]
fn zero_vectors_are_different_not_similar() -> Result<()> {
    let zeros = Tensor::zeros((1, 1, 6, 4), DType::F32, &Device::Cpu)?;
    let config = CompressionConfig {
        max_merge_level: 100,
        ..Default::default()
    };
    for (strategy, bit) in [(MergeStrategy::Similarity, 0), (MergeStrategy::Difference, 1)] {
        let strategies = HeadStrategies::uniform(strategy);
        let plan = MergePlan::new(&zeros, &zeros, &zeros, &strategies, &config, &Default::default())?;
        assert_eq!(plan.indicators().to_vec3::<u8>()?, [[[bit; 5]]]);
    }
    Ok(())
}

/// One token: the output is its value, and there is no loss.
#[test]
fn one_token_attends_to_itself() -> Result<()> {
    let [q, k, v] = Shape(2, 3, 3, 1, 8).qkv(0, DType::F32)?;
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let result = compressed_attention(
        &q,
        &k,
        &v,
        &strategies,
        &CompressionConfig::default(),
        &Default::default(),
    )?;
    assert_eq!(values(&result.output)?, values(&v)?);
    assert!(result.compression_loss.is_none());
    assert_eq!(result.plan.stats()?.pairs, 0);
    Ok(())
}

/// The dropped share is p, kept weights are scaled, and another seed draws another mask.
#[test]
fn dropout_drops_its_share() -> Result<()> {
    // With equal logits and one-hot values the output is the weights.
    let tokens = 256;
    let zeros = Tensor::zeros((1, 1, tokens, tokens), DType::F32, &Device::Cpu)?;
    let eye = Tensor::eye(tokens, DType::F32, &Device::Cpu)?.reshape((1, 1, tokens, tokens))?;
    let draw = |seed| -> Result<Vec<f64>> {
        let options = AttentionOptions {
            causal: false,
            dropout: Some(Dropout { p: 0.25, seed }),
            ..Default::default()
        };
        let off = HeadStrategies::uniform(MergeStrategy::Off);
        let config = CompressionConfig::default();
        Ok(values(
            &compressed_attention(&zeros, &zeros, &eye, &off, &config, &options)?.output,
        )?)
    };
    let weights = draw(7)?;
    let dropped = weights.iter().filter(|w| **w == 0.0).count() as f64 / weights.len() as f64;
    assert!((dropped - 0.25).abs() <= 0.01, "{dropped} of the weights were dropped");
    let kept = 1.0 / tokens as f64 / 0.75;
    assert!(weights.iter().all(|w| *w == 0.0 || (w - kept).abs() <= 1e-8));
    assert_eq!(weights, draw(7)?);
    assert_ne!(weights, draw(8)?);
    Ok(())
}

/// The reference rule couples heads and batch rows only in its first test; with a lone bit at t = 0 it shows.
#[test]
fn the_reference_rule_couples_the_call() -> Result<()> {
    let config = CompressionConfig {
        similarity_threshold: 0.1,
        rule: MergeRule::Reference,
        max_merge_level: 5,
        ..Default::default()
    };
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    // Row 0: only the first pair is similar. Row 1: two adjacent pairs are.
    let rows = [
        [[1f32, 0.], [1., 0.], [0., 1.], [-1., 0.]],
        [[1., 0.], [1., 0.], [1., 0.], [-1., 0.]],
    ];
    let x = Tensor::new(&rows, &Device::Cpu)?.unsqueeze(1)?;
    let indicators = |x: &Tensor| -> Result<Vec<Vec<Vec<u8>>>> {
        let plan = MergePlan::new(x, x, x, &strategies, &config, &Default::default())?;
        Ok(plan.indicators().to_vec3()?)
    };
    assert_eq!(indicators(&x.narrow(0, 0, 1)?)?[0], [[1, 0, 0]]);
    assert_eq!(indicators(&x)?[0], [[0, 0, 0]]);
    Ok(())
}
