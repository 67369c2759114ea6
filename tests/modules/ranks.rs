//! The compression loss of heads that are split over ranks: each rank's value is the whole loss, and its gradient is
//! that of its own heads.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_sfattention::{
    compression_loss, compression_loss_terms, CompressionConfig, CompressionLossTerms, Criterion, HeadStrategies,
    LossNormalizer,
};

use crate::common::inputs::{assert_close, values, Shape};
use crate::{generous, uniform, CPU};

/// 2 query heads on each of 6 KV heads.
const SHAPE: Shape = Shape(2, 12, 6, 30, 8);

/// One strategy and threshold per query head. No pair qualifies in the heads of the last third, and all of one rank of
/// two may be off.
fn strategies() -> Result<[HeadStrategies; 2]> {
    let codes: Vec<u32> = (0..12).map(|head| [0, 1, 2, 0, 0, 1][head % 6]).collect();
    let thresholds: Vec<f64> = (0..12).map(|head| if head < 8 { 0.4 } else { 1e-9 }).collect();
    let first_off: Vec<u32> = (0..12).map(|head| if head < 6 { 2 } else { 0 }).collect();
    let of = |codes: Vec<u32>| HeadStrategies::from_tensor(&Tensor::new(codes, CPU)?);
    Ok([
        of(codes)?.with_thresholds(&Tensor::new(thresholds, CPU)?)?,
        of(first_off)?,
    ])
}

/// The terms of the heads of one rank, from queries and keys of all heads.
fn terms_of(
    [q, k]: [&Tensor; 2],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    (rank, world): (usize, usize),
) -> Result<CompressionLossTerms> {
    let own = |x: &Tensor| -> Result<Tensor> {
        let each = x.dim(1)? / world;
        Ok(x.narrow(1, rank * each, each)?)
    };
    let own_strategies = strategies.shard(rank, world, SHAPE.2)?;
    let terms = compression_loss_terms(&own(q)?, &own(k)?, &own_strategies, config)?;
    Ok(terms.expect("there are pairs"))
}

#[test]
fn the_loss_of_ranks_is_the_whole_loss() -> Result<()> {
    for (dtype, bound) in [(DType::F64, 1e-12), (DType::F32, 1e-6)] {
        let [q, k, _] = SHAPE.qkv(5, dtype)?;
        let (q, k) = (Var::from_tensor(&q)?, Var::from_tensor(&k)?);
        for (strategies, criterion, loss_normalizer) in strategies()?.iter().flat_map(|strategies| {
            [
                (strategies, Criterion::QueryKey, LossNormalizer::Merged),
                (strategies, Criterion::KeyKey, LossNormalizer::Merged),
                (strategies, Criterion::QueryKey, LossNormalizer::Pairs),
            ]
        }) {
            let config = CompressionConfig {
                criterion,
                loss_normalizer,
                loss_factor: 1.7,
                ..generous()
            };
            let whole = compression_loss(&q, &k, strategies, &config)?.expect("there are pairs");
            let expected = whole.backward()?;
            for world in [2, 3] {
                let terms = (0..world).map(|rank| terms_of([&q, &k], strategies, &config, (rank, world)));
                let terms = terms.collect::<Result<Vec<_>>>()?;
                let sums = terms.iter().map(CompressionLossTerms::sums);
                let sums = sums.collect::<candle_core::Result<Vec<_>>>()?;
                let totals = Tensor::stack(&sums, 0)?.sum(0)?;
                for (rank, terms) in terms.iter().enumerate() {
                    let loss = terms.over_ranks(&totals)?.loss(config.loss_factor, loss_normalizer)?;
                    assert_eq!(loss.dtype(), dtype);
                    // A difference of terms of about 1.
                    assert_close("loss", &loss, &whole, bound, bound)?;
                    let got = loss.backward()?;
                    for (name, var) in [("dq", &q), ("dk", &k)] {
                        let each = var.dim(1)? / world;
                        let own = |x: &Tensor| x.narrow(1, rank * each, each);
                        let (got, expected) = match (got.get(var), expected.get(var)) {
                            (Some(got), Some(expected)) => (got, expected),
                            _ => panic!("{name}: a gradient each"),
                        };
                        assert_close(name, &own(got)?, &own(expected)?, bound * 1e-3, bound)?;
                        // Other ranks' heads get theirs there.
                        let all: f64 = values(got)?.iter().map(|x| x.abs()).sum();
                        let mine: f64 = values(&own(got)?)?.iter().map(|x| x.abs()).sum();
                        assert!((all - mine).abs() <= 1e-12 * all, "{name}: {mine} of {all}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// Equal bits on all ranks: a rank that compares losses decides as the others.
#[test]
fn every_rank_has_the_same_loss() -> Result<()> {
    let [q, k, _] = SHAPE.qkv(6, DType::F32)?;
    let strategies = &strategies()?[0];
    let config = generous();
    let terms = (0..3).map(|rank| terms_of([&q, &k], strategies, &config, (rank, 3)));
    let terms = terms.collect::<Result<Vec<_>>>()?;
    let mut totals = terms[0].sums()?;
    for terms in &terms[1..] {
        totals = (totals + terms.sums()?)?;
    }
    let losses = terms.iter().map(|terms| -> Result<u32> {
        let loss = terms.over_ranks(&totals)?.loss(1.0, LossNormalizer::Merged)?;
        Ok(loss.to_scalar::<f32>()?.to_bits())
    });
    let losses = losses.collect::<Result<Vec<_>>>()?;
    assert_eq!(losses, [losses[0]; 3]);
    Ok(())
}

#[test]
fn totals_that_do_not_fit_are_refused() -> Result<()> {
    let [q, k, _] = SHAPE.qkv(7, DType::F32)?;
    let strategies = uniform(candle_sfattention::MergeStrategy::Similarity);
    let terms = terms_of([&q, &k], &strategies, &generous(), (0, 2))?;
    let pairs = 2.0 * 6.0 * 29.0;
    assert_eq!(values(&terms.sums()?)?[2], pairs);
    for (totals, said) in [
        (
            Tensor::new(&[1f32, 2.0, 3.0], CPU)?,
            "totals: expected f64 of shape [3]",
        ),
        (Tensor::new(&[1f64, 2.0], CPU)?, "got F64 of shape [2]"),
        (
            Tensor::new(&[1f64, 2.0, pairs - 1.0], CPU)?,
            "expected at least the 348 pairs of this rank, got 347",
        ),
        (Tensor::new(&[1f64, 2.0, pairs + 0.5], CPU)?, "got 348.5"),
        (Tensor::new(&[1f64, 2.0, f64::NAN], CPU)?, "got NaN"),
    ] {
        let error = terms.over_ranks(&totals).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    Ok(())
}
