//! The compression loss of a call, and of the same call split over ranks.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_sfattention::{
    compression_loss, compression_loss_terms, CompressionConfig, CompressionLossTerms, Criterion, HeadStrategies,
    LossNormalizer, MergeStrategy,
};

use crate::common::inputs::{assert_close, values, Shape};
use crate::{generous, uniform, CPU};

const SHAPE: Shape = Shape(2, 4, 2, 30, 8);
/// Per (batch row, query head). In the second batch row no pair qualifies, nor in the second KV head's similarity head.
const CODES: [[u32; 4]; 2] = [[0, 1, 2, 0], [1, 2, 0, 1]];
const THRESHOLDS: [[f64; 4]; 2] = [[0.4, 0.3, 0.0, 1e-9], [1e-9; 4]];

/// The part of one rank: starts and counts of batch rows and KV heads.
#[derive(Clone, Copy)]
struct Part {
    batch: (usize, usize),
    kv_heads: (usize, usize),
}

const WHOLE: Part = Part {
    batch: (0, 2),
    kv_heads: (0, 2),
};

impl Part {
    fn heads(&self) -> (usize, usize) {
        let group = SHAPE.1 / SHAPE.2;
        (self.kv_heads.0 * group, self.kv_heads.1 * group)
    }

    fn strategies(&self) -> Result<HeadStrategies> {
        let (batch, heads) = (self.batch, self.heads());
        let codes = Tensor::new(&CODES, CPU)?
            .narrow(0, batch.0, batch.1)?
            .narrow(1, heads.0, heads.1)?;
        let thresholds = Tensor::new(&THRESHOLDS, CPU)?
            .narrow(0, batch.0, batch.1)?
            .narrow(1, heads.0, heads.1)?;
        Ok(HeadStrategies::from_tensor(&codes)?.with_thresholds(&thresholds)?)
    }

    fn terms(&self, q: &Tensor, k: &Tensor, config: &CompressionConfig) -> Result<CompressionLossTerms> {
        let (batch, heads, kv_heads) = (self.batch, self.heads(), self.kv_heads);
        let q = q.narrow(0, batch.0, batch.1)?.narrow(1, heads.0, heads.1)?;
        let k = k.narrow(0, batch.0, batch.1)?.narrow(1, kv_heads.0, kv_heads.1)?;
        let terms = compression_loss_terms(&q, &k, &self.strategies()?, config)?;
        Ok(terms.expect("there are pairs"))
    }
}

/// Splits over heads, over the batch, and over both.
fn splits() -> [Vec<Part>; 3] {
    let part = |batch, kv_heads| Part { batch, kv_heads };
    let (first, second, all) = ((0, 1), (1, 1), (0, 2));
    [
        vec![part(all, first), part(all, second)],
        vec![part(first, all), part(second, all)],
        vec![
            part(first, first),
            part(first, second),
            part(second, first),
            part(second, second),
        ],
    ]
}

fn sum(parts: Vec<CompressionLossTerms>) -> Result<CompressionLossTerms> {
    let add = |a: CompressionLossTerms, b: CompressionLossTerms| -> candle_core::Result<_> {
        Ok(CompressionLossTerms {
            squared: (a.squared + b.squared)?,
            merged: (a.merged + b.merged)?,
            pairs: a.pairs + b.pairs,
        })
    };
    let mut parts = parts.into_iter();
    let first = parts.next().expect("a part");
    Ok(parts.try_fold(first, add)?)
}

#[test]
fn terms_of_parts_add_up() -> Result<()> {
    let [q, k, _] = SHAPE.qkv(5, DType::F64)?;
    let (q, k) = (Var::from_tensor(&q)?, Var::from_tensor(&k)?);
    for criterion in [Criterion::QueryKey, Criterion::KeyKey] {
        for loss_normalizer in [LossNormalizer::Merged, LossNormalizer::Pairs] {
            let config = CompressionConfig {
                criterion,
                loss_normalizer,
                loss_factor: 1.7,
                ..generous()
            };
            let whole = compression_loss(&q, &k, &WHOLE.strategies()?, &config)?.expect("there are pairs");
            let gradients = whole.backward()?;
            for parts in splits() {
                let terms: Result<Vec<_>> = parts.iter().map(|part| part.terms(&q, &k, &config)).collect();
                let terms = sum(terms?)?;
                assert_eq!(terms.pairs, 6 * 29);
                assert!(!terms.merged.track_op() && terms.merged.to_scalar::<f64>()? > 5.0);
                let loss = terms.loss(config.loss_factor, config.loss_normalizer)?;
                assert_close("loss", &loss, &whole, 0.0, 1e-12)?;
                let split = loss.backward()?;
                for (name, var) in [("dq", &q), ("dk", &k)] {
                    let pair = split.get(var).zip(gradients.get(var));
                    let (got, expected) = pair.expect("a gradient each");
                    assert_close(name, got, expected, 1e-15, 1e-12)?;
                    let zero = name == "dq" && criterion == Criterion::KeyKey;
                    assert_eq!(values(got)?.iter().all(|x| *x == 0.0), zero, "{name}");
                }
            }
        }
    }
    Ok(())
}

/// If no pair qualifies on one rank, its own loss would divide by its pairs: the sums must come first.
#[test]
fn terms_are_divided_after_the_sum() -> Result<()> {
    let [q, k, _] = SHAPE.qkv(5, DType::F64)?;
    let config = generous();
    let parts = splits()[1]
        .iter()
        .map(|part| part.terms(&q, &k, &config))
        .collect::<Result<Vec<_>>>()?;
    let counts = |terms: &CompressionLossTerms| -> Result<_> {
        Ok((
            terms.squared.to_scalar::<f64>()?,
            terms.merged.to_scalar::<f64>()?,
            terms.pairs as f64,
        ))
    };
    let (first, second) = (counts(&parts[0])?, counts(&parts[1])?);
    assert!(first.1 > 0.0 && second.1 == 0.0);
    for (normalizer, (squared, merged, pairs), divisor) in [
        (LossNormalizer::Merged, first, first.1),
        (LossNormalizer::Merged, second, second.2),
        (LossNormalizer::Pairs, first, first.2),
        (LossNormalizer::Pairs, second, second.2),
    ] {
        let terms = &parts[usize::from(merged == 0.0)];
        let expected = 3.0 * (squared / divisor - merged / pairs);
        let got = terms.loss(3.0, normalizer)?.to_scalar::<f64>()?;
        assert!(
            (got - expected).abs() <= 1e-12 * expected.abs(),
            "{normalizer:?}: {got}, expected {expected}"
        );
    }
    Ok(())
}

#[test]
fn no_head_and_no_pair() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let [q, k, _] = SHAPE.qkv(6, dtype)?;
        let loss = |q: &Tensor, k: &Tensor, strategy| compression_loss(q, k, &uniform(strategy), &generous());
        for strategy in MergeStrategy::ALL {
            let one = |x: &Tensor| x.narrow(2, 3, 1);
            assert!(loss(&one(&q)?, &one(&k)?, strategy)?.is_none());
            let terms = compression_loss_terms(&one(&q)?, &one(&k)?, &uniform(strategy), &generous())?;
            assert!(terms.is_none());
            let some = loss(&q, &k, strategy)?.expect("there are pairs");
            assert_eq!((some.dims(), some.dtype()), (&[][..], wide));
            assert_eq!(values(&some)? == [0.0], strategy == MergeStrategy::Off);
        }
        let terms = compression_loss_terms(&q, &k, &uniform(MergeStrategy::Off), &generous())?;
        assert_eq!(terms.expect("there are tokens").pairs, 0);
    }
    Ok(())
}
