//! The methods of the config enums say what decisions, folds and rules do.

use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_sfattention::reference::{
    attention, compression_loss, fold, indicators, observed_mass, qualifies, Array4, Indicators,
};
use candle_sfattention::{
    AttentionOptions, CompressedKvCache, CompressionConfig, Criterion, Fold, GroupRule, HeadStrategies, HeadTest,
    MergePlan, MergeRule, MergeStrategy,
};
use rand::{rngs::StdRng, SeedableRng};

use crate::arrays::{no_bits, random, random_qkv, tensor, FOLDS};
use crate::bits;

const SIZES: [usize; 5] = [1, 4, 2, 48, 8];

#[test]
fn a_criterion_reads_what_its_methods_say() -> Result<()> {
    for criterion in [Criterion::QueryKey, Criterion::KeyKey, Criterion::ObservedMass] {
        let config = CompressionConfig {
            criterion,
            fold: Fold::Drop,
            group_rule: GroupRule::Unanimous,
            similarity_threshold: 1.0,
            window: 8,
            ..Default::default()
        };
        let uniform = HeadStrategies::uniform(MergeStrategy::Similarity);
        assert_eq!(config.check_strategies(&uniform).is_err(), criterion.needs_thresholds());
        let threshold = if criterion.needs_thresholds() { 1.5 } else { 1.0 };
        let strategies = uniform.with_thresholds(&Tensor::full(threshold, SIZES[1], &Device::Cpu)?)?;
        let decide = |[q, k, v]: [&Array4; 3]| -> Result<Vec<u8>> {
            let (q, k, v) = (tensor(q)?, tensor(k)?, tensor(v)?);
            let plan = MergePlan::new(&q, &k, &v, &strategies, &config, &AttentionOptions::default())?;
            Ok(plan.indicators().flatten_all()?.to_vec1()?)
        };
        let mut rng = StdRng::seed_from_u64(26);
        let [q, k, v] = &random_qkv(&mut rng, SIZES);
        let (other_q, other_v) = (&random(&mut rng, q.dims), &random(&mut rng, v.dims));
        let bits = decide([q, k, v])?;
        assert!(bits.contains(&0) && bits.contains(&1), "{criterion:?}: {bits:?}");
        assert_eq!(
            decide([other_q, k, v])? != bits,
            criterion.reads_queries(),
            "{criterion:?}"
        );
        assert_eq!(
            decide([q, k, other_v])? != bits,
            criterion.reads_values(),
            "{criterion:?}"
        );
        let loss = compression_loss(q, k, &strategies, &config)?;
        assert_eq!(loss.is_some(), criterion.compares_pairs(), "{criterion:?}");
        let scores = observed_mass(q, k, v, &config, &AttentionOptions::default());
        assert_eq!(scores.is_ok(), criterion.observes(), "{criterion:?}");
    }
    Ok(())
}

/// Token 1 is hidden: it is folded into token 2.
#[test]
fn a_fold_does_what_its_methods_say() -> Result<()> {
    let mut rng = StdRng::seed_from_u64(27);
    let [q, k, v] = &random_qkv(&mut rng, [1, 1, 1, 4, 3]);
    let hidden = Indicators {
        bits: bits("010"),
        ..no_bits([1, 1, 3])
    };
    let mut other_q = q.clone();
    other_q.row_mut(0, 0, 1).fill(2.0);
    for kind in FOLDS {
        let config = CompressionConfig {
            fold: kind,
            ..Default::default()
        };
        let rows: Vec<Vec<f64>> = (0..4).map(|t| k.row(0, 0, t).to_vec()).collect();
        let (folded, sizes) = fold(kind, &rows, &hidden.bits);
        assert_eq!(sizes == [1.0, 1.0, 2.0, 1.0], kind.has_sizes(), "{kind:?}");
        assert_eq!(folded[2] != rows[2], kind.keeps_hidden(), "{kind:?}");
        let attend = |q: &Array4| attention(q, k, v, &hidden, &config, &AttentionOptions::default());
        let (output, other) = (attend(q)?, attend(&other_q)?);
        assert_eq!(
            output.row(0, 0, 2) != other.row(0, 0, 2),
            kind.folds_queries(),
            "{kind:?}"
        );
    }
    Ok(())
}

#[test]
fn strategies_and_rules_do_what_their_methods_say() -> Result<()> {
    for strategy in MergeStrategy::ALL {
        let threshold = f64::INFINITY;
        assert_ne!(qualifies(HeadTest { strategy, threshold }, 0.5), strategy.is_off());
    }
    let similar = || HeadStrategies::uniform(MergeStrategy::Similarity);
    for rule in [MergeRule::Causal, MergeRule::Reference] {
        let config = CompressionConfig {
            rule,
            ..Default::default()
        };
        let cache = CompressedKvCache::new(similar(), config, Default::default());
        assert_eq!(cache.is_ok(), rule.is_causal());
    }
    let [q, k, _] = &random_qkv(&mut StdRng::seed_from_u64(28), SIZES);
    for group_rule in [GroupRule::PerQueryHead, GroupRule::Unanimous] {
        let config = CompressionConfig {
            group_rule,
            similarity_threshold: 1.0,
            ..Default::default()
        };
        let bits = indicators(q, k, &similar(), &config)?;
        let agree = (0..4)
            .step_by(2)
            .all(|head| bits.head(0, head) == bits.head(0, head + 1));
        assert_eq!(agree, group_rule.heads_agree());
    }
    Ok(())
}
