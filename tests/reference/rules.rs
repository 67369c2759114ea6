//! The tokens that merge, and the rows that can see it.

use anyhow::Result;
use candle_sfattention::reference::{
    attention, causal_rule, compression_loss, cosine, indicators, qualifies, reference_rule, Array4, Indicators,
};
use candle_sfattention::{
    AttentionOptions, CompressionConfig, Criterion, Fold, GroupRule, HeadStrategies, HeadTest, MergeRule, MergeStrategy,
};
use rand::{rngs::StdRng, Rng, SeedableRng};

use crate::arrays::{random, random_qkv, FOLDS};
use crate::bits;

#[test]
fn pair_test_is_strict_and_zero_vectors_are_orthogonal() {
    let test = |strategy, threshold| HeadTest { strategy, threshold };
    let (similar, different) = (MergeStrategy::Similarity, MergeStrategy::Difference);
    assert!(!qualifies(test(similar, 0.25), 0.75) && qualifies(test(similar, 0.26), 0.75));
    assert!(!qualifies(test(different, 0.25), -0.25) && qualifies(test(different, 0.26), -0.25));
    assert!(!qualifies(test(MergeStrategy::Off, f64::INFINITY), 0.0));
    let zero = cosine(&[0.0, 0.0], &[1.0, 2.0]);
    assert_eq!(zero, 0.0);
    assert!(qualifies(test(different, 0.0175), zero) && !qualifies(test(similar, 2e-4), zero));
    for bad in [f64::NAN, f64::INFINITY] {
        let c = cosine(&[bad, 1.0], &[1.0, 2.0]);
        assert!(c.is_nan() && !qualifies(test(different, 2.0), c) && !qualifies(test(similar, 4.0), c));
    }
}

#[test]
fn causal_rule_bounds_runs_and_compares_with_their_start() {
    assert_eq!(causal_rule(7, 20, |_, _| true), bits("1111111"));
    assert_eq!(causal_rule(7, 3, |_, _| true), bits("1110111"));
    assert_eq!(causal_rule(7, 1, |_, _| true), bits("1010101"));
    // Tokens resemble others at most two places away: a run has two tokens, then its start is out of reach.
    assert_eq!(causal_rule(7, 20, |a, p| a - p <= 2), bits("1101101"));
    assert_eq!(causal_rule(7, 20, |a, p| a - p <= 2 && p != 3), bits("1100110"));
    assert!(causal_rule(0, 20, |_, _| true).is_empty());
}

#[test]
fn reference_rule_numbers_runs_looks_ahead_and_couples_heads() {
    let one = |crit: &dyn Fn(usize, usize) -> bool| reference_rule(1, 7, 20, |_, a, p| crit(a, p)).remove(0);
    // L = 5, so number 5 is not compared and number 6 is invalid; near the end M is false.
    assert_eq!(one(&|_, _| true), bits("111010"));
    // Clearing bit 2 starts a new run at 3, where bit 4 is number 1 and no longer 3: a second sweep clears it.
    let alike = [(2, 1), (3, 2), (4, 3), (5, 4), (6, 3), (8, 4)];
    let swept = reference_rule(1, 10, 20, |_, a, p| alike.contains(&(a, p))).remove(0);
    assert_eq!(swept, bits("010100000"));
    // Lone bits, one of them at token 0 where it would be number 1: with no neighbours anywhere nothing is checked.
    assert_eq!(one(&|a, p| a == p + 1 && p % 2 == 0), bits("101010"));
    // The same head beside one that has two neighbouring bits: now the lone first bit is checked, and falls.
    let coupled = reference_rule(2, 7, 20, |head, a, p| match head {
        0 => a == p + 1 && p % 2 == 0,
        _ => p == 2 || p == 3,
    });
    assert_eq!(coupled[0], bits("001010"));
    assert_eq!(coupled[1], bits("001100"));
}

/// Tokens that turn slowly: neighbours often resemble each other, and sometimes do not.
fn slow_walk(rng: &mut StdRng, dims: [usize; 4]) -> Array4 {
    let mut walk = random(rng, dims);
    let (n, d) = (dims[2], dims[3]);
    for at in d..walk.data.len() {
        if at / d % n != 0 {
            walk.data[at] = walk.data[at - d] + 0.4 * walk.data[at];
        }
    }
    walk
}

#[test]
fn causal_rule_does_not_look_ahead() -> Result<()> {
    let rng = &mut StdRng::seed_from_u64(10);
    let (n, cut, mut seen) = (14, 8, 0);
    for fold in FOLDS {
        for window in [0, 1, 3] {
            for criterion in [Criterion::QueryKey, Criterion::KeyKey] {
                for group_rule in [GroupRule::PerQueryHead, GroupRule::Unanimous] {
                    let k = slow_walk(rng, [1, 1, n, 3]);
                    let mut q = Array4::zeros([1, 2, n, 3]);
                    q.data = [k.data.clone(), k.data.iter().map(|x| 2.0 * x).collect()].concat();
                    let config = CompressionConfig {
                        fold,
                        window,
                        criterion,
                        group_rule,
                        max_merge_level: 3,
                        similarity_threshold: 0.2,
                        ..Default::default()
                    };
                    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
                    let run = |[q, k, v]: &[Array4; 3]| -> Result<(Indicators, Array4)> {
                        let m = indicators(q, k, &strategies, &config)?;
                        let output = attention(q, k, v, &m, &config, &AttentionOptions::default())?;
                        Ok((m, output))
                    };
                    let mut qkv = [q, k.clone(), k];
                    let before = run(&qkv)?;
                    for array in &mut qkv {
                        for head in 0..array.dims[1] {
                            for t in cut..n {
                                array.row_mut(0, head, t).fill_with(|| rng.random_range(-1.0..1.0));
                            }
                        }
                    }
                    let after = run(&qkv)?;
                    for head in 0..2 {
                        assert_eq!(before.0.head(0, head)[..cut - 1], after.0.head(0, head)[..cut - 1]);
                        for row in 0..cut {
                            assert_eq!(before.1.row(0, head, row), after.1.row(0, head, row));
                        }
                        assert_ne!(before.1.row(0, head, cut), after.1.row(0, head, cut));
                        seen += before.0.head(0, head)[..cut - 1].iter().filter(|&&bit| bit).count();
                    }
                }
            }
        }
    }
    assert!(seen > 100, "{seen} bits before the cut");
    Ok(())
}

/// Unit vectors of the plane, by their angles in degrees, as q, k and v.
fn plane(angles: &[f64]) -> Array4 {
    let data = angles.iter().flat_map(|a| [a.to_radians().cos(), a.to_radians().sin()]);
    Array4 {
        dims: [1, 1, angles.len(), 2],
        data: data.collect(),
    }
}

#[test]
fn reference_rule_looks_ahead_where_the_causal_rule_does_not() -> Result<()> {
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    // Tokens resemble each other up to 25.8 degrees.
    let run = |rule, angles: &[f64]| -> Result<(Vec<bool>, Vec<f64>)> {
        let config = CompressionConfig {
            rule,
            similarity_threshold: 0.1,
            fold: Fold::Drop,
            ..Default::default()
        };
        let x = plane(angles);
        let m = indicators(&x, &x, &strategies, &config)?;
        let output = attention(&x, &x, &x, &m, &config, &AttentionOptions::default())?;
        Ok((m.bits, output.row(0, 0, 3).to_vec()))
    };
    let (near, away) = ([90.0, 0.0, 10.0, 20.0, 30.0], [90.0, 0.0, 10.0, 20.0, 100.0]);
    let (first, second) = (run(MergeRule::Reference, &near)?, run(MergeRule::Reference, &away)?);
    assert_eq!((first.0, second.0), (bits("0110"), bits("0100")));
    let moved = first.1.iter().zip(&second.1).any(|(a, b)| (a - b).abs() > 1e-2);
    assert!(moved, "row 3 depends on token 4");
    assert_eq!(run(MergeRule::Causal, &near)?.1, run(MergeRule::Causal, &away)?.1);
    Ok(())
}

#[test]
fn unanimous_bits_are_shared_and_need_every_head() -> Result<()> {
    let rng = &mut StdRng::seed_from_u64(11);
    let [q, k, _] = random_qkv(rng, [2, 6, 2, 40, 2]);
    let strategies = HeadStrategies::uniform(MergeStrategy::Difference);
    let with = |group_rule| CompressionConfig {
        group_rule,
        difference_threshold: 0.8,
        // No runs, so that a bit depends on no other bit than its left neighbour.
        max_merge_level: 1,
        ..Default::default()
    };
    let shared = indicators(&q, &k, &strategies, &with(GroupRule::Unanimous))?;
    let mut set = 0;
    for (batch, head) in (0..2).flat_map(|b| (0..6).map(move |h| (b, h))) {
        let first = head / 3 * 3;
        assert_eq!(shared.head(batch, head), shared.head(batch, first));
        for (t, _) in shared.head(batch, head).iter().enumerate().filter(|(_, &bit)| bit) {
            for other in first..first + 3 {
                let c = cosine(q.row(batch, other, t + 1), k.row(batch, head / 3, t));
                assert!(c.abs() < 0.8);
            }
            set += 1;
        }
    }
    let own = indicators(&q, &k, &strategies, &with(GroupRule::PerQueryHead))?;
    let own = own.bits.iter().filter(|&&bit| bit).count();
    assert!(0 < set && set < own, "{set} shared bits, {own} of single heads");
    Ok(())
}

#[test]
fn sinks_stay_as_they_are() -> Result<()> {
    let x = plane(&[0.0; 9]);
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let config = CompressionConfig {
        sinks: 3,
        max_merge_level: 4,
        ..Default::default()
    };
    assert_eq!(indicators(&x, &x, &strategies, &config)?.bits, bits("00011110"));
    // The loss counts pairs without the sinks rule.
    let terms = compression_loss(&x, &x, &strategies, &config)?.expect("terms");
    assert_eq!((terms.merged, terms.pairs), (8, 8));
    Ok(())
}
