//! Configurations, options, strategies and thresholds that have no meaning.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_sfattention::{
    attend, compression_loss, observed_mass, AttentionOptions, CompressedAttention, CompressedKvCache,
    CompressionConfig, Criterion, Dropout, Fold, GroupRule, HeadStrategies, MergePlan, MergeStrategy,
};

use crate::{codes, config, options, plan, refused, similarity, zeros, CPU, SHAPE};

/// Asserts that every function that takes a configuration refuses this one; the tensors fit.
#[track_caller]
fn refused_config(config: &CompressionConfig, pattern: &str) {
    let [q, k, v] = SHAPE.qkv(0, DType::F32).unwrap();
    let options = AttentionOptions::default();
    refused(config.check(true), pattern);
    refused(MergePlan::new(&q, &k, &v, &similarity(), config, &options), pattern);
    refused(plan(SHAPE, config), pattern);
    refused(compression_loss(&q, &k, &similarity(), config), pattern);
    refused(CompressedAttention::new(similarity(), config.clone(), options), pattern);
}

#[track_caller]
fn refused_options(options: &AttentionOptions, pattern: &str) {
    refused(options.check(), pattern);
    refused(
        CompressedAttention::new(similarity(), config(|_| ()), options.clone()),
        pattern,
    );
    refused_call(options, pattern);
}

/// Asserts that a call refuses these options, which only a call can judge.
#[track_caller]
fn refused_call(options: &AttentionOptions, pattern: &str) {
    let [q, k, v] = SHAPE.qkv(0, DType::F32).unwrap();
    let config = config(|_| ());
    refused(MergePlan::new(&q, &k, &v, &similarity(), &config, options), pattern);
    refused(attend(&q, &k, &v, &plan(SHAPE, &config).unwrap(), options), pattern);
}

#[track_caller]
fn refused_strategies(strategies: &HeadStrategies, pattern: &str) {
    let [q, k, v] = SHAPE.qkv(0, DType::F32).unwrap();
    let (config, options) = (config(|_| ()), options(|_| ()));
    refused(strategies.check(SHAPE.0, SHAPE.1), pattern);
    refused(MergePlan::new(&q, &k, &v, strategies, &config, &options), pattern);
    refused(compression_loss(&q, &k, strategies, &config), pattern);
}

#[test]
fn settings_that_are_not_finite() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for (name, config) in [
            ("similarity_threshold", config(|c| c.similarity_threshold = bad)),
            ("difference_threshold", config(|c| c.difference_threshold = bad)),
            ("loss_factor", config(|c| c.loss_factor = bad)),
        ] {
            let pattern = format!("{name}: expected a finite number, got {bad}; …CompressionConfig::default()");
            refused_config(&config, &pattern);
        }
        let pattern = format!("softmax_scale: expected a finite number, got {bad}; None gives 1/sqrt(head_dim)");
        refused_options(&options(|o| o.softmax_scale = Some(bad)), &pattern);
    }
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, -50.0] {
        let pattern = format!("softcap: expected a finite number above 0, got {bad}; None leaves logits as they are");
        refused_options(&options(|o| o.softcap = Some(bad)), &pattern);
    }
}

#[test]
fn sinks_without_a_meaning() -> Result<()> {
    let with = |sinks: Tensor| options(|o| o.sink_logits = Some(sinks));
    let ones = Tensor::ones(SHAPE.1, DType::U32, CPU)?;
    refused_options(
        &with(ones),
        "sink_logits: expected a float dtype, got U32; convert them with to_dtype",
    );
    for dims in [vec![], vec![3], vec![1, 4], vec![4, 1]] {
        let pattern = format!("sink_logits: expected shape (heads) = (4), got {dims:?}; give one logit per query head");
        refused_call(&with(zeros(&dims)), &pattern);
    }
    let [q, k, v] = SHAPE.qkv(0, DType::F32)?;
    for bad in [f32::NAN, f32::INFINITY] {
        let options = with(Tensor::new(&[0f32, bad, 0.0, 0.0], CPU)?);
        let pattern = format!("sink_logits: expected finite numbers or -inf, got {bad}; -inf is a head without a sink");
        refused(attend(&q, &k, &v, &plan(SHAPE, &config(|_| ()))?, &options), &pattern);
        let mut cache = CompressedKvCache::new(similarity(), config(|_| ()), Default::default())?;
        refused(cache.append_and_attend(&q, &k, &v, &options), &pattern);
        assert_eq!(cache.seq_len(), 0);
    }
    Ok(())
}

#[test]
fn settings_without_a_meaning() {
    refused_config(
        &config(|c| c.max_merge_level = 0),
        "max_merge_level: expected at least 1, got 0; use MergeStrategy::Off",
    );
    refused_config(
        &config(|c| c.window = usize::MAX),
        "window, sinks and max_merge_level: expected at most 4294967295, got 18446744073709551615…; a window of all \
         tokens folds nothing",
    );
}

/// A configuration for observed mass, changed by `change`.
fn observing(change: impl FnOnce(&mut CompressionConfig)) -> CompressionConfig {
    config(|c| {
        c.criterion = Criterion::ObservedMass;
        c.fold = Fold::Drop;
        c.group_rule = GroupRule::Unanimous;
        c.window = 2;
        change(c)
    })
}

#[test]
fn what_observed_mass_does_not_know() -> Result<()> {
    for (got, change) in [
        ("fold Mean", (|c| c.fold = Fold::Mean) as fn(&mut CompressionConfig)),
        ("group_rule PerQueryHead", |c| c.group_rule = GroupRule::PerQueryHead),
        ("window 1", |c| c.window = 1),
        ("window 0", |c| c.window = 0),
    ] {
        let pattern = format!(
            "Criterion::ObservedMass: expected causal attention, fold Drop, group_rule Unanimous and a window of at \
             least 2, got {got}; use Criterion::KeyKey"
        );
        refused_config(&observing(change), &pattern);
    }
    let [q, k, v] = SHAPE.qkv(0, DType::F32)?;
    let (config, options) = (observing(|_| ()), options(|_| ()));
    assert!(config.check(true).is_ok() && config.check(false).is_err());
    // There is no default threshold, in any function that takes strategies; a head that is off needs none.
    let pattern = "thresholds: expected one per head for Criterion::ObservedMass, … got none; calibrate them, …";
    refused(config.check_strategies(&similarity()), pattern);
    refused(MergePlan::new(&q, &k, &v, &similarity(), &config, &options), pattern);
    refused(compression_loss(&q, &k, &similarity(), &config), pattern);
    refused(
        CompressedAttention::new(similarity(), config.clone(), options.clone()),
        pattern,
    );
    refused(
        CompressedKvCache::new(similarity(), config.clone(), Default::default()),
        pattern,
    );
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    assert!(MergePlan::new(&q, &k, &v, &off, &config, &options).is_ok());
    let scores = observed_mass(&q, &k, &v, &CompressionConfig::pretrained(), &options);
    refused(scores, "criterion: expected Criterion::ObservedMass, got KeyKey; …");
    Ok(())
}

#[test]
fn what_the_reference_rule_does_not_know() {
    let reference = CompressionConfig::reference();
    for (got, change) in [
        (
            "criterion KeyKey",
            (|c| c.criterion = Criterion::KeyKey) as fn(&mut CompressionConfig),
        ),
        ("group_rule Unanimous", |c| c.group_rule = GroupRule::Unanimous),
        ("sinks 3", |c| c.sinks = 3),
        ("window 7", |c| c.window = 7),
    ] {
        let mut config = reference.clone();
        change(&mut config);
        let pattern = format!(
            "MergeRule::Reference: expected criterion QueryKey, group_rule PerQueryHead, sinks 0 and window 0, \
             got {got}; use MergeRule::Causal"
        );
        refused_config(&config, &pattern);
    }
    assert!(reference.check(true).is_ok() && reference.check(false).is_ok());
}

#[test]
fn a_window_without_causality() -> Result<()> {
    let pattern = "window: expected 0 for non-causal attention, got 5; set window to 0 or causal to true";
    let (config, options) = (config(|c| c.window = 5), options(|o| o.causal = false));
    let [q, k, v] = SHAPE.qkv(0, DType::F32)?;
    refused(config.check(false), pattern);
    refused(MergePlan::new(&q, &k, &v, &similarity(), &config, &options), pattern);
    refused(attend(&q, &k, &v, &plan(SHAPE, &config)?, &options), pattern);
    refused(CompressedAttention::new(similarity(), config, options), pattern);
    Ok(())
}

#[test]
fn a_probability_that_is_none() -> Result<()> {
    for p in [-0.1, 1.0, 1.5, f64::NAN, f64::INFINITY] {
        let pattern = format!("dropout: expected a probability p with 0 <= p < 1, got {p}; None turns dropout off");
        let dropout = Some(Dropout { p, seed: 1 });
        refused_options(&options(|o| o.dropout = dropout), &pattern);
        let before = Some(Dropout { p: 0.5, seed: 3 });
        let mut attention = CompressedAttention::new(similarity(), config(|_| ()), options(|o| o.dropout = before))?;
        refused(attention.set_dropout(dropout), &pattern);
        assert_eq!(attention.options().dropout, before);
    }
    Ok(())
}

#[test]
fn a_bias_of_no_use() -> Result<()> {
    let with = |bias: Tensor| options(|o| o.bias = Some(bias));
    refused_options(
        &with(Tensor::zeros((6, 6), DType::U8, CPU)?),
        "bias: expected a float dtype, got U8; convert it with to_dtype",
    );
    let var = Var::zeros((6, 6), DType::F32, CPU)?;
    for tracked in [var.as_tensor().clone(), (var.as_tensor() * 2.0)?] {
        refused_options(
            &with(tracked),
            "bias: expected a tensor without gradient, got a tracked one; …pass bias.detach()",
        );
    }
    for dims in [&[5, 6][..], &[3, 1, 6, 6], &[2, 2, 6, 6], &[1, 2, 4, 6, 6]] {
        let pattern = format!(
            "bias: expected a shape that broadcasts to (batch, heads, queries, tokens) = [2, 4, 6, 6], got {dims:?}; \
             use size 1 for the axes it does not depend on"
        );
        refused_call(&with(zeros(dims)), &pattern);
    }
    Ok(())
}

#[test]
fn strategies_for_another_model() -> Result<()> {
    use MergeStrategy::{Off, Similarity};
    let thresholds = |dims: &[usize]| similarity().with_thresholds(&zeros(dims));
    for (what, got, table) in [
        ("strategies", "(2)", HeadStrategies::per_head(vec![Similarity, Off])),
        ("strategies", "(5)", codes(&[5])),
        ("strategies", "(2, 2)", codes(&[2, 2])),
        ("strategies", "(3, 4)", codes(&[3, 4])),
        // The number of heads is right, but the axes are not.
        ("strategies", "(4, 2)", codes(&[4, 2])),
        ("thresholds", "(3)", thresholds(&[3])?),
        ("thresholds", "(1, 4)", thresholds(&[1, 4])?),
        ("thresholds", "(4, 2)", thresholds(&[4, 2])?),
    ] {
        let pattern = format!("{what}: expected shape (4) or (2, 4), got {got}; give one entry per query head");
        refused_strategies(&table, &pattern);
    }
    Ok(())
}

#[test]
fn strategy_tensors_that_say_nothing() -> Result<()> {
    let from = |codes: Tensor| HeadStrategies::from_tensor(&codes);
    for dtype in [DType::F32, DType::BF16] {
        let pattern = format!("strategy tensor: expected dtype u32, u8 or i64, got {dtype:?}; …to_dtype");
        refused(from(Tensor::zeros(4, dtype, CPU)?), &pattern);
    }
    for (code, tensor) in [
        (3, Tensor::new(&[0u32, 3], CPU)?),
        (255, Tensor::new(&[255u8, 1], CPU)?),
        (-1, Tensor::new(&[[2i64], [-1]], CPU)?),
        (1i64 << 32, Tensor::new(&[1i64 << 32], CPU)?),
    ] {
        let pattern = format!(
            "strategy tensor: expected the codes 0 (similarity), 1 (difference) or 2 (off), got {code}; \
             write them with MergeStrategy::code"
        );
        refused(from(tensor), &pattern);
    }
    for dims in [&[][..], &[1, 2, 4]] {
        let pattern = format!("strategy tensor: expected shape (heads) or (batch, heads), got {dims:?}; reshape it");
        refused(from(Tensor::zeros(dims, DType::U32, CPU)?), &pattern);
    }
    Ok(())
}

#[test]
fn threshold_tensors_that_say_nothing() -> Result<()> {
    let with = |thresholds: Tensor| similarity().with_thresholds(&thresholds);
    refused(
        with(Tensor::zeros(4, DType::U32, CPU)?),
        "thresholds: expected a float dtype, got U32; convert them with to_dtype",
    );
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let pattern = format!("thresholds: expected finite numbers, got {bad}; use MergeStrategy::Off");
        refused(with(Tensor::new(&[0.1, bad], CPU)?), &pattern);
    }
    for dims in [&[][..], &[1, 2, 4]] {
        let pattern = format!("thresholds: expected shape (heads) or (batch, heads), got {dims:?}; reshape it");
        refused(with(zeros(dims)), &pattern);
    }
    Ok(())
}
