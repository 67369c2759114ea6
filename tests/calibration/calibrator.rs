//! Calibration: the target is met with less error than uniform thresholds leave, the result is the same every time, and
//! policies survive JSON and fit only their model.

use crate::common::inputs::{values, Shape};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::calibrate::{CalibrationFigures, LayerPolicy, PolicyOptions};
use candle_sfattention::{
    attend, Calibrator, CompressionConfig, Criterion, Fold, GroupRule, HeadStrategies, Measurement, MergePlan,
    MergeStrategy, ModelShape, Policy,
};

const MODEL: ModelShape = ModelShape {
    layers: 2,
    heads: 4,
    kv_heads: 2,
    head_dim: 16,
};
const RATIOS: [f64; 5] = [0.2, 0.4, 0.6, 0.8, 0.9];

fn observing() -> CompressionConfig {
    CompressionConfig {
        criterion: Criterion::ObservedMass,
        fold: Fold::Drop,
        group_rule: GroupRule::Unanimous,
        window: 8,
        sinks: 2,
        ..Default::default()
    }
}

/// q, k and v of a window in a layer; one head has small values, so that hiding its tokens costs little.
fn sample(layer: usize, window: usize) -> Result<[Tensor; 3]> {
    let [q, k, v] = Shape(1, 4, 2, 130, 16).qkv((layer * 10 + window) as u64, DType::F32)?;
    let factors = Tensor::new(&[[[[1f32]], [[if layer == 0 { 0.05 } else { 1.0 }]]]], &Device::Cpu)?;
    Ok([(q * 3.0)?, k, v.broadcast_mul(&factors)?])
}

fn measured(config: &CompressionConfig, projection: Option<&Tensor>) -> Result<Measurement> {
    let mut calibrator = Calibrator::new(MODEL, config.clone(), Default::default(), &RATIOS)?;
    for (window, layer) in (0..3).flat_map(|window| (0..2).map(move |layer| (window, layer))) {
        let [q, k, v] = sample(layer, window)?;
        calibrator.observe(layer, &q, &k, &v)?;
    }
    let mut measurement = calibrator.measure()?;
    for (window, layer) in (0..3).flat_map(|window| (0..2).map(move |layer| (window, layer))) {
        let [q, k, v] = sample(layer, window)?;
        measurement.add(layer, [&q, &k, &v], projection, 1.0)?;
    }
    Ok(measurement)
}

/// The hidden share of the tokens that can be hidden, and the squared error, over all samples.
fn judge(config: &CompressionConfig, layers: &[HeadStrategies], eligible: usize) -> Result<(f64, f64)> {
    let (mut hidden, mut error, mut windows) = (0, 0.0, 0);
    for (layer, strategies) in layers.iter().enumerate() {
        for window in 0..3 {
            let [q, k, v] = sample(layer, window)?;
            let run = |strategies: &HeadStrategies| -> Result<(Tensor, usize)> {
                let plan = MergePlan::new(&q, &k, &v, strategies, config, &Default::default())?;
                Ok((attend(&q, &k, &v, &plan, &Default::default())?, plan.stats()?.hidden))
            };
            let (dense, _) = run(&HeadStrategies::uniform(MergeStrategy::Off))?;
            let (output, count) = run(strategies)?;
            error += values(&(output - dense)?)?.iter().map(|x| x * x).sum::<f64>();
            hidden += count;
            windows += 1;
        }
    }
    Ok((hidden as f64 / (windows * eligible * MODEL.heads) as f64, error))
}

#[test]
fn the_target_is_met_at_less_error_than_uniform_ratios_leave() -> Result<()> {
    let config = observing();
    let measurement = measured(&config, None)?;
    let eligible = 129 - 8 - 2;
    for target in [0.2, 0.4, 0.6] {
        let policy = measurement.policy(target, "test")?;
        let (ratio, error) = judge(&config, &policy.head_strategies(&MODEL)?, eligible)?;
        let figures = &policy.parts().calibration;
        assert!((ratio - figures.hidden_ratio).abs() < 1e-9, "{ratio}, said {figures:?}");
        // The last step of one unit, a twentieth of all, may overshoot.
        assert!((target..target + 0.06).contains(&ratio), "{ratio} for {target}");
        assert!((error / figures.error - 1.0).abs() < 1e-4, "{error}, said {figures:?}");
        assert_eq!((figures.windows, figures.tokens), (3, 390));
        // The same share of every head.
        let uniform = uniform_at(target)?;
        let (uniform_ratio, uniform_error) = judge(&config, &uniform, eligible)?;
        assert!((uniform_ratio - target).abs() < 0.02, "{uniform_ratio}");
        assert!(
            error < 0.9 * uniform_error,
            "{target}: {error}, uniform {uniform_error}"
        );
    }
    Ok(())
}

/// Every head at the same ratio, from a calibration that tries only this one.
fn uniform_at(ratio: f64) -> Result<Vec<HeadStrategies>> {
    let mut calibrator = Calibrator::new(MODEL, observing(), Default::default(), &[ratio])?;
    for (window, layer) in (0..3).flat_map(|window| (0..2).map(move |layer| (window, layer))) {
        let [q, k, v] = sample(layer, window)?;
        calibrator.observe(layer, &q, &k, &v)?;
    }
    let mut measurement = calibrator.measure()?;
    for layer in 0..2 {
        let [q, k, v] = sample(layer, 0)?;
        measurement.add(layer, [&q, &k, &v], None, 1.0)?;
    }
    // The largest target that calibration accepts; every head must be on then.
    let all = (0..100).map(|step| measurement.policy(1.0 - step as f64 / 100.0, ""));
    let policy = all.flatten().next().expect("a policy");
    assert!(policy
        .parts()
        .layers
        .iter()
        .all(|l| !l.strategies.contains(&MergeStrategy::Off)));
    Ok(policy.head_strategies(&MODEL)?)
}

#[test]
fn the_projection_decides_what_an_error_costs() -> Result<()> {
    // The projection lets only the first KV head's output through.
    let mut weights = vec![0f32; 64 * 64];
    for i in 0..32 {
        weights[i * 64 + i] = 1.0;
    }
    let projection = Tensor::from_vec(weights, (64, 64), &Device::Cpu)?;
    let policy = measured(&observing(), Some(&projection))?.policy(0.3, "")?;
    for layer in &policy.parts().layers {
        assert!(layer.hidden_ratios[1] > layer.hidden_ratios[0], "{layer:?}");
        assert_eq!(layer.errors[1], 0.0);
    }
    Ok(())
}

#[test]
fn neighbours_are_calibrated_too() -> Result<()> {
    for (criterion, group_rule) in [
        (Criterion::KeyKey, GroupRule::Unanimous),
        (Criterion::QueryKey, GroupRule::Unanimous),
        (Criterion::QueryKey, GroupRule::PerQueryHead),
        (Criterion::KeyKey, GroupRule::PerQueryHead),
    ] {
        let config = CompressionConfig {
            criterion,
            group_rule,
            fold: Fold::Mean,
            sinks: 1,
            ..Default::default()
        };
        let policy = measured(&config, None)?.policy(0.2, "")?;
        let (ratio, error) = judge(&config, &policy.head_strategies(&MODEL)?, 128)?;
        let figures = &policy.parts().calibration;
        assert!(
            (ratio - figures.hidden_ratio).abs() < 1e-9 && ratio >= 0.2,
            "{ratio}, {figures:?}"
        );
        assert!((error / figures.error - 1.0).abs() < 1e-4, "{error}, {figures:?}");
        assert_eq!(
            policy.parts().layers[0].strategies.len(),
            if group_rule == GroupRule::Unanimous { 2 } else { 4 }
        );
    }
    Ok(())
}

#[test]
fn policies_survive_json_and_fit_one_shape() -> Result<()> {
    let policy = measured(&observing(), None)?.policy(0.5, "some model")?;
    assert_eq!(
        policy,
        measured(&observing(), None)?.policy(0.5, "some model")?,
        "not deterministic"
    );
    let json = policy.to_json()?;
    let read = Policy::from_json(&json)?;
    assert_eq!(read, policy);
    assert_eq!(read.head_strategies(&MODEL)?, policy.head_strategies(&MODEL)?);
    let other = ModelShape { layers: 3, ..MODEL };
    let message = read.head_strategies(&other).unwrap_err().to_string();
    for part in ["layers: 3", "got a policy for", "layers: 2", "calibrate this model"] {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
    for (from, to, part) in [
        ("policy 1", "policy 9", "candle-sfattention policy 9"),
        ("\"layers\": 2", "\"layers\": 3", "layers: expected 3, got 2"),
        ("\"heads\": 4", "\"heads\": 8", "divide"),
        ("\"kv_heads\": 2", "\"kv_heads\": 4", "expected 4 entries"),
        ("\"fold\": \"drop\"", "\"fold\": \"mean\"", "fold Drop"),
        ("\"target\"", "\"targets\"", "unknown field"),
    ] {
        let damaged = json.replace(from, to);
        assert_ne!(damaged, json, "{from}");
        match Policy::from_json(&damaged) {
            Err(error) => assert!(error.to_string().contains(part), "no {part:?} in: {error}"),
            // Eight heads for two KV heads are a valid shape, but another one.
            Ok(policy) => assert!(from == "\"heads\": 4" && policy.head_strategies(&MODEL).is_err()),
        }
    }
    Ok(())
}

/// A small file may name any sizes: reading it must not take memory for them.
#[test]
fn a_policy_of_absurd_sizes_is_refused() -> Result<()> {
    let config = serde_json::to_value(CompressionConfig::pretrained())?;
    let layer =
        serde_json::json!({"strategies": ["off"], "thresholds": [0.0], "hidden_ratios": [0.0], "errors": [0.0]});
    let figures = serde_json::json!({
        "target": 0.5, "hidden_ratio": 0.5, "hidden_ratio_of_all": 0.5, "error": 0.0, "windows": 1, "tokens": 1
    });
    let read = |heads: u64, head_dim: u64| {
        let model = serde_json::json!({"layers": 1, "heads": heads, "kv_heads": 1, "head_dim": head_dim});
        let parts = serde_json::json!({
            "fingerprint": "", "model": model, "config": config, "layers": [layer], "calibration": figures
        });
        let file = serde_json::json!({"format": "candle-sfattention policy 1", "policy": parts});
        Policy::from_json(&file.to_string())
    };
    assert_eq!(read(71, 64)?.parts().model.heads, 71);
    for (heads, head_dim) in [(1 << 31, 64), (u64::MAX, 64), (65_537, 64), (8, 1 << 40)] {
        let error = read(heads, head_dim).unwrap_err().to_string();
        for part in [
            "model: expected heads and head_dim of at most 65536",
            &heads.to_string(),
            "see its config",
        ] {
            assert!(error.contains(part), "no {part:?} in: {error}");
        }
    }
    Ok(())
}

#[test]
fn a_policy_that_lacks_a_setting_is_refused() -> Result<()> {
    let json: serde_json::Value = serde_json::from_str(&measured(&observing(), None)?.policy(0.5, "")?.to_json()?)?;
    let fields = json["policy"]["config"].as_object().unwrap();
    assert_eq!(fields.len(), 11);
    for field in fields.keys() {
        let mut lacking = json.clone();
        lacking["policy"]["config"].as_object_mut().unwrap().remove(field);
        let error = Policy::from_json(&lacking.to_string()).unwrap_err().to_string();
        assert!(error.contains(&format!("missing field `{field}`")), "{error}");
    }
    Ok(())
}

/// JSON has no NaN or infinity, and a `null` in their place could not be read back.
#[test]
fn figures_that_are_not_finite_are_not_written() -> Result<()> {
    let parts = measured(&observing(), None)?.policy(0.5, "")?.parts().clone();
    type Damage = fn(&mut PolicyOptions, f64);
    let damages: [(&str, Damage); 6] = [
        ("layer 1: hidden_ratios", |p, x| p.layers[1].hidden_ratios[0] = x),
        ("layer 0: errors", |p, x| p.layers[0].errors[1] = x),
        ("calibration: target", |p, x| p.calibration.target = x),
        ("calibration: hidden_ratio", |p, x| p.calibration.hidden_ratio = x),
        ("calibration: hidden_ratio_of_all", |p, x| {
            p.calibration.hidden_ratio_of_all = x
        }),
        ("calibration: error", |p, x| p.calibration.error = x),
    ];
    for (name, damage) in damages {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut parts = parts.clone();
            damage(&mut parts, bad);
            let error = Policy::new(parts)?.to_json().unwrap_err().to_string();
            assert!(
                error.contains(&format!("{name}: expected finite numbers, got {bad}")),
                "{error}"
            );
        }
    }
    Ok(())
}

#[test]
fn calibration_refuses_what_it_cannot_do() -> Result<()> {
    let new = |config: CompressionConfig, ratios: &[f64]| Calibrator::new(MODEL, config, Default::default(), ratios);
    let said =
        |error: candle_core::Error, part: &str| assert!(error.to_string().contains(part), "no {part:?} in: {error}");
    said(
        new(CompressionConfig::reference(), &RATIOS).unwrap_err(),
        "MergeRule::Causal",
    );
    for ratios in [&[][..], &[0.0], &[0.5, 1.0], &[f64::NAN]] {
        said(new(observing(), ratios).unwrap_err(), "shares between 0 and 1");
    }
    let calibrator = new(observing(), &RATIOS)?;
    said(calibrator.measure().unwrap_err(), "observe windows of more tokens");
    let [q, k, v] = sample(0, 0)?;
    said(calibrator.clone().observe(2, &q, &k, &v).unwrap_err(), "layer below 2");
    said(
        calibrator.clone().observe(0, &k, &k, &v).unwrap_err(),
        "one window of one layer",
    );
    let short = v.narrow(3, 0, 8)?;
    said(
        calibrator.clone().observe(0, &q, &k, &short).unwrap_err(),
        "values of the keys' head_dim 16, got 8",
    );
    let mut measurement = measured(&observing(), None)?;
    // One token has no pair, under any criterion; for tensors that do not fit, the crate's own errors come through.
    let one = [&q, &k, &v].map(|x| x.narrow(2, 0, 1));
    let [q1, k1, v1] = [&one[0], &one[1], &one[2]].map(|x| x.as_ref().expect("a token"));
    for config in [
        observing(),
        CompressionConfig::default(),
        CompressionConfig::pretrained(),
    ] {
        let mut calibrator = new(config, &RATIOS)?;
        let error = calibrator.observe(0, q1, k1, v1).unwrap_err();
        said(
            error,
            "calibration: expected windows of at least 2 tokens, got 1 in layer 0; leave",
        );
        said(calibrator.observe(0, &q, k1, v1).unwrap_err(), "key: expected shape (");
    }
    let error = measurement.add(0, [q1, k1, v1], None, 1.0).unwrap_err();
    said(error, "expected windows of at least 2 tokens, got 1");
    said(measurement.policy(0.99, "").unwrap_err(), "lower the target");
    said(measurement.policy(1.5, "").unwrap_err(), "share from 0 to 1");
    said(
        measurement.add(0, [&q, &k, &v], Some(&v), 1.0).unwrap_err(),
        "output projection",
    );
    said(
        measurement.add(0, [&q, &k, &v], None, 0.0).unwrap_err(),
        "positive number",
    );
    let layer = LayerPolicy {
        strategies: vec![MergeStrategy::Similarity; 2],
        thresholds: vec![f64::INFINITY; 2],
        hidden_ratios: vec![0.0; 2],
        errors: vec![0.0; 2],
    };
    let figures = CalibrationFigures {
        target: 0.5,
        hidden_ratio: 0.5,
        hidden_ratio_of_all: 0.5,
        error: 0.0,
        windows: 1,
        tokens: 1,
    };
    let parts = PolicyOptions {
        fingerprint: String::new(),
        model: MODEL,
        config: observing(),
        layers: vec![layer.clone(), layer],
        probe: None,
        calibration: figures,
    };
    said(Policy::new(parts).unwrap_err(), "finite numbers");
    Ok(())
}
