//! Observed mass: scores against the reference, decisions for any chunking, and inputs that are not finite.

use crate::common::again::on_every_instruction_set;
use crate::common::caches::{part, with_thresholds};
use crate::common::inputs::{assert_close, laid_out, values, Memory, Shape};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{
    observed_mass, AttentionOptions, CompressedKvCache, CompressionConfig, Criterion, Fold, GroupRule, HeadStrategies,
    MergePlan, MergeStrategy,
};

fn config(window: usize, sinks: usize) -> CompressionConfig {
    CompressionConfig {
        criterion: Criterion::ObservedMass,
        fold: Fold::Drop,
        group_rule: GroupRule::Unanimous,
        window,
        sinks,
        ..Default::default()
    }
}

/// 256 tokens and more, with windows from the smallest to one that leaves a single token to decide.
#[test]
fn scores_agree_with_the_reference() -> Result<()> {
    let shape = Shape(2, 4, 2, 600, 20);
    let options = AttentionOptions {
        softmax_scale: Some(0.4),
        ..Default::default()
    };
    for (window, sinks) in [(2, 0), (3, 4), (8, 0), (32, 4), (33, 1), (300, 500), (598, 2)] {
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-5), (DType::BF16, 2e-5)] {
            let qkv = shape.qkv(window as u64, dtype)?;
            let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
            let expected = reference::observed_mass(&q?, &k?, &v?, &config(window, sinks), &options)?;
            let expected = Tensor::new(expected, &Device::Cpu)?;
            assert_eq!(expected.dims(), [2, 2, 599 - window]);
            let [q, k, v] = laid_out(&qkv, Memory::Fused)?;
            let got = observed_mass(&q, &k, &v, &config(window, sinks), &options)?;
            let what = format!("{dtype:?}, window {window}, {sinks} sinks");
            assert_close(&what, &got, &expected, tolerance, tolerance)?;
        }
    }
    Ok(())
}

/// Too few tokens for any to leave the window: no scores, nothing hidden.
#[test]
fn short_sequences_are_left_alone() -> Result<()> {
    for tokens in [1, 2, 8, 9, 10] {
        let shape = Shape(1, 2, 1, tokens, 8);
        let [q, k, v] = shape.qkv(0, DType::F32)?;
        let scores = observed_mass(&q, &k, &v, &config(8, 0), &Default::default())?;
        assert_eq!(scores.dims(), [1, 1, tokens.saturating_sub(9)]);
        let thresholds = Tensor::full(1e30f64, 2, &Device::Cpu)?;
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity).with_thresholds(&thresholds)?;
        let plan = MergePlan::new(&q, &k, &v, &strategies, &config(8, 0), &Default::default())?;
        assert_eq!(plan.stats()?.hidden, 2 * tokens.saturating_sub(9), "{tokens} tokens");
    }
    Ok(())
}

/// A cache keeps the entries that the plan keeps, at every length and for every chunking: the end of a chunk changes no
/// decision.
#[test]
fn caches_keep_what_plans_keep() -> Result<()> {
    for (window, sinks) in [(2, 3), (5, 0), (16, 4)] {
        let (shape, config) = (Shape(2, 6, 2, 120, 12), config(window, sinks));
        let qkv = shape.qkv(7, DType::F32)?;
        let strategies = with_thresholds(HeadStrategies::uniform(MergeStrategy::Difference), &shape, &config)?;
        for chunk in [1, 3, 50] {
            let mut cache = CompressedKvCache::new(strategies.clone(), config.clone(), Default::default())?;
            for start in (0..120).step_by(chunk) {
                let count = chunk.min(120 - start);
                let [q, k, v] = part(&qkv, start, count)?;
                cache.append(&q, &k, &v)?;
                let [q, k, v] = part(&qkv, 0, start + count)?;
                let plan = MergePlan::new(&q, &k, &v, &strategies, &config, &Default::default())?;
                for (lens, hidden) in cache.lens().iter().zip(plan.stats()?.per_head) {
                    let kept: Vec<_> = hidden.iter().step_by(3).map(|hidden| start + count - hidden).collect();
                    assert_eq!(
                        *lens,
                        kept,
                        "{} tokens in chunks of {chunk}, window {window}",
                        start + count
                    );
                }
            }
            assert!(cache.lens()[0][0] < 90, "{:?}: little hidden", cache.lens());
        }
    }
    Ok(())
}

/// A key that is not finite: tokens whose rows saw it are kept, because NaN never qualifies. A value that is not finite
/// spoils its own token's score only.
#[test]
fn what_is_not_a_number_is_kept() -> Result<()> {
    let (shape, config) = (Shape(1, 1, 1, 60, 8), config(6, 1));
    let thresholds = Tensor::full(1e30f64, 1, &Device::Cpu)?;
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity).with_thresholds(&thresholds)?;
    let kept = |which: usize, token: usize| -> Result<Vec<usize>> {
        let mut qkv = shape.qkv(2, DType::F32)?;
        let mut data = values(&qkv[which])?;
        data[token * 8 + 5] = f64::NAN;
        qkv[which] = Tensor::from_vec(data, qkv[which].dims(), &Device::Cpu)?.to_dtype(DType::F32)?;
        let [q, k, v] = &qkv;
        let plan = MergePlan::new(q, k, v, &strategies, &config, &Default::default())?;
        let bits = plan.indicators().flatten_all()?.to_vec1::<u8>()?;
        Ok((1..53).filter(|t| bits[*t] == 0).collect())
    };
    // Rows 30 to 35 see the bad key; they count for tokens from 30 - 5 to 35 - 3.
    assert_eq!(kept(1, 30)?, (25..=32).collect::<Vec<_>>());
    assert_eq!(kept(0, 30)?, (25..=27).collect::<Vec<_>>());
    assert_eq!(kept(2, 30)?, [30]);
    // Every row sees a bad sink.
    assert_eq!(kept(1, 0)?, (1..53).collect::<Vec<_>>());
    Ok(())
}

/// The scores and the cache again, with the loops of each instruction set.
#[test]
fn every_instruction_set_agrees() -> Result<()> {
    let tests = [
        "scores_agree_with_the_reference",
        "caches_keep_what_plans_keep",
        "what_is_not_a_number_is_kept",
    ];
    on_every_instruction_set(module_path!(), &tests)
}
