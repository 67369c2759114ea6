//! A configuration as JSON.

use anyhow::Result;
use candle_sfattention::{CompressionConfig, Criterion, Fold, GroupRule, LossNormalizer, MergeRule};

use crate::config;

/// A configuration with no value at its default.
fn unusual() -> CompressionConfig {
    CompressionConfig {
        similarity_threshold: 0.125,
        difference_threshold: 0.5,
        max_merge_level: 3,
        rule: MergeRule::Reference,
        group_rule: GroupRule::Unanimous,
        criterion: Criterion::ObservedMass,
        fold: Fold::Drop,
        sinks: 7,
        window: 9,
        loss_factor: 2.5,
        loss_normalizer: LossNormalizer::Pairs,
    }
}

#[test]
fn configurations_survive_json() -> Result<()> {
    let json = r#"{
        "similarity_threshold": 0.125, "difference_threshold": 0.5, "max_merge_level": 3, "rule": "reference",
        "group_rule": "unanimous", "criterion": "observed_mass", "fold": "drop", "sinks": 7, "window": 9,
        "loss_factor": 2.5, "loss_normalizer": "pairs"
    }"#;
    assert_eq!(serde_json::from_str::<CompressionConfig>(json)?, unusual());
    for config in [
        config(|_| ()),
        CompressionConfig::reference(),
        CompressionConfig::pretrained(),
        unusual(),
    ] {
        let json = serde_json::to_string(&config)?;
        assert_eq!(serde_json::from_str::<CompressionConfig>(&json)?, config, "{json}");
    }
    Ok(())
}

#[test]
fn json_may_leave_out_but_not_add() -> Result<()> {
    let read = |json| serde_json::from_str::<CompressionConfig>(json);
    assert_eq!(read("{}")?, CompressionConfig::default());
    let expected = config(|c| (c.fold, c.window) = (Fold::Mean, 8));
    assert_eq!(read(r#"{"fold": "mean", "window": 8}"#)?, expected);
    for (json, named) in [
        (r#"{"similarity": 0.1}"#, "unknown field `similarity`"),
        (r#"{"window": 8, "Window": 8}"#, "unknown field `Window`"),
        (r#"{"fold": "sum"}"#, "unknown variant `sum`"),
        (r#"{"sinks": -1}"#, "invalid value: integer `-1`"),
    ] {
        let error = read(json).expect_err(json).to_string();
        assert!(error.contains(named), "{json}: {error}");
    }
    Ok(())
}
