//! Gates: the relaxed one against its equations, its gradients, and the probe that it becomes.

use crate::common::inputs::{assert_close, values, Normal, Shape};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_sfattention::reference::philox4x32_10;
use candle_sfattention::{
    attend, AttentionOptions, CompressionConfig, Criterion, HeadStrategies, KeyGate, KeyProbe, MergePlan, MergeStrategy,
};

const CPU: Device = Device::Cpu;

fn config(window: usize, sinks: usize) -> CompressionConfig {
    CompressionConfig {
        criterion: Criterion::Given,
        window,
        sinks,
        ..CompressionConfig::calibrated()
    }
}

/// A gate of 2 KV heads and 8 dimensions, with its variables.
fn gate(config: &CompressionConfig, seed: usize) -> Result<(KeyGate, VarMap)> {
    let vars = VarMap::new();
    let gate = KeyGate::new(2, 8, config, VarBuilder::from_varmap(&vars, DType::F32, &CPU))?;
    let number = |i: usize| ((i * 31 + seed * 7) % 23) as f32 / 9.0 - 1.2;
    for (name, var) in vars.data().lock().unwrap().iter() {
        let count = var.elem_count();
        assert!(
            name == "weight" && count == 16 || name == "bias" && count == 2,
            "{name}"
        );
        let numbers: Vec<f32> = (0..count).map(number).collect();
        var.set(&Tensor::from_vec(numbers, var.dims(), &CPU)?)?;
    }
    Ok((gate, vars))
}

/// Each number by its equation in f64, with noise from the reference's generator.
#[test]
fn a_relaxed_gate_is_its_equations() -> Result<()> {
    let seed = 0x1234_5678_9abc_u64;
    for (window, sinks, tokens) in [(0, 0, 9), (3, 2, 40), (38, 1, 40), (60, 0, 40)] {
        let (gate, _) = gate(&config(window, sinks), 1)?;
        let [keys, _, _] = Shape(3, 2, 1, tokens, 8).qkv(5, DType::F32)?;
        let z = values(&gate.logits(&keys)?)?;
        let found = gate.relaxed(&keys, seed)?;
        let (mut bias, mut shares) = (Vec::new(), Vec::new());
        for (place, z) in z.iter().enumerate() {
            let draw = philox4x32_10([(place / 4) as u32, 0, 0, 1], [seed as u32, (seed >> 32) as u32]);
            let p = (f64::from(draw[place % 4]) + 0.5) / 2f64.powi(32);
            let u = (z + (p / (1.0 - p)).ln()) / 0.7;
            let token = place % tokens;
            if token < sinks || token + window + 1 >= tokens {
                bias.push(0.0);
                continue;
            }
            bias.push(-(u.exp() + 1.0).ln());
            shares.push(1.0 / (1.0 + (-u).exp()));
        }
        let expected = Tensor::from_vec(bias, (3, 2, tokens), &CPU)?;
        assert_close("bias", &found.column_bias, &expected, 1e-5, 1e-5)?;
        let mean = shares.iter().sum::<f64>() / shares.len().max(1) as f64;
        let share = f64::from(found.hidden_share.to_scalar::<f32>()?);
        assert!((share - mean).abs() < 1e-6, "window {window}: {share} for {mean}");
        let other = gate.relaxed(&keys, seed + 1)?;
        assert_eq!(
            values(&other.column_bias)? == values(&found.column_bias)?,
            shares.is_empty()
        );
    }
    Ok(())
}

/// Extreme logits give no NaN, and gradients reach gate and keys.
#[test]
fn noise_may_be_drawn_for_all_layers_at_once() -> Result<()> {
    let keys = Shape(2, 2, 2, 30, 8).qkv(5, DType::F32)?[1].clone();
    let (gate, _) = gate(&config(4, 1), 3)?;
    let noise = KeyGate::noise(9, (3, 2, 2, 30), &CPU)?;
    let own = gate.relaxed_by(&keys, &noise.get(0)?)?;
    let seeded = gate.relaxed(&keys, 9)?;
    assert_close("column bias", &own.column_bias, &seeded.column_bias, 0.0, 0.0)?;
    let other = gate.relaxed_by(&keys, &noise.get(1)?)?;
    assert_ne!(
        other.hidden_share.to_scalar::<f32>()?,
        own.hidden_share.to_scalar::<f32>()?
    );
    let error = gate.relaxed_by(&keys, &noise).unwrap_err().to_string();
    assert!(
        error.contains("noise: expected [2, 2, 30]") && error.contains("[3, 2, 2, 30]"),
        "{error}"
    );
    let error = gate.relaxed(&keys.get(0)?, 9).unwrap_err().to_string();
    assert!(error.contains("key: expected (batch, 2, tokens, 8)"), "{error}");
    Ok(())
}

#[test]
fn gradients_reach_gate_and_keys() -> Result<()> {
    let config = config(3, 1);
    let (gate, vars) = gate(&config, 2)?;
    let [q, _, v] = Shape(2, 4, 2, 30, 8).qkv(1, DType::F32)?;
    let [keys, _, _] = Shape(2, 2, 1, 30, 8).qkv(2, DType::F32)?;
    for factor in [1.0, 1e4] {
        let keys = Var::from_tensor(&(&keys * factor)?)?;
        let faded = gate.relaxed(keys.as_tensor(), 3)?;
        let options = AttentionOptions {
            column_bias: Some(faded.column_bias),
            ..Default::default()
        };
        let off = HeadStrategies::uniform(MergeStrategy::Off);
        let key = keys.detach().affine(1.0 / factor, 0.0)?;
        let plan = MergePlan::new(&q, &key, &v, &off, &config, &options)?;
        let loss = (attend(&q, &key, &v, &plan, &options)?.sqr()?.mean_all()? + faded.hidden_share)?;
        let store = loss.backward()?;
        for var in vars.all_vars().iter().chain([&keys]) {
            let gradient = values(store.get(var.as_tensor()).context("no gradient")?)?;
            assert!(gradient.iter().all(|x| x.is_finite()), "{factor}");
            // A gate that is certain has none.
            assert!(factor > 1.0 || gradient.iter().any(|x| *x != 0.0));
        }
    }
    Ok(())
}

/// A gate from a probe hides the tokens below the thresholds, and the gates' probe hides these again.
#[test]
fn a_gate_starts_and_ends_as_a_probe() -> Result<()> {
    let config = config(5, 2);
    let mut normal = Normal::new(3);
    let probe = KeyProbe::new(&normal.tensor(&[3, 2, 8])?, &normal.tensor(&[3, 2])?)?;
    let thresholds = [0.4, -0.7];
    let mut gates = Vec::new();
    for layer in 0..3 {
        let [weight, bias] = KeyGate::start(&probe, layer, &thresholds)?;
        let tensors = [("weight".to_string(), weight), ("bias".to_string(), bias)].into();
        gates.push(KeyGate::new(
            2,
            8,
            &config,
            VarBuilder::from_tensors(tensors, DType::F32, &CPU),
        )?);
    }
    let again = KeyGate::probe(&gates)?;
    let strategies = |thresholds: &[f64; 2]| {
        let thresholds = Tensor::new(vec![thresholds[0], thresholds[0], thresholds[1], thresholds[1]], &CPU)?;
        HeadStrategies::uniform(MergeStrategy::Similarity).with_thresholds(&thresholds)
    };
    for layer in 0..3 {
        let keys = normal.tensor(&[2, 2, 50, 8])?;
        let plan = |probe: &KeyProbe, thresholds: &[f64; 2]| -> Result<Vec<Vec<Vec<u8>>>> {
            let scores = probe.scores(layer, &keys)?;
            let plan = MergePlan::from_scores(&scores, &strategies(thresholds)?, &config, true)?;
            assert!(plan.stats()?.hidden > 20);
            Ok(plan.indicators().to_vec3()?)
        };
        assert_eq!(plan(&again, &[0.0, 0.0])?, plan(&probe, &thresholds)?);
    }
    let error = |result: candle_core::Result<()>| result.unwrap_err().to_string();
    assert!(error(KeyGate::start(&probe, 0, &[0.0]).map(|_| ())).contains("one for each of the 2 KV heads, got 1"));
    assert!(error(KeyGate::start(&probe, 3, &thresholds).map(|_| ())).contains("layer: expected one below 3"));
    assert!(error(KeyGate::probe(&[]).map(|_| ())).contains("gates: expected one per layer"));
    let keys = normal.tensor(&[1, 2, 5, 7])?;
    assert!(error(gates[0].logits(&keys).map(|_| ())).contains("key: expected (batch, 2, tokens, 8)"));
    Ok(())
}
