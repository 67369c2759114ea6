//! Policies: those that gates start from, and the one that they become.

use std::fs;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::calibrate::{CalibrationFigures, LayerPolicy, PolicyOptions};
use candle_sfattention::{
    attend, AttentionOptions, CompressedAttention, CompressionConfig, HeadStrategies, KeyProbe, MergePlan,
    MergeStrategy, ModelShape, Policy,
};

use super::student::Student;
use crate::load::{Checkpoint, LoadOptions};
use crate::network::AttentionCall;

/// Trained gates, and where they hide tokens.
pub struct Gates<'a> {
    pub student: &'a Student,
    pub model: ModelShape,
    pub compression: &'a CompressionConfig,
    pub shift: f64,
}

/// The gates as a policy, with the figures of the sample windows.
pub fn policy(gates: &Gates, samples: &[Tensor], target: f64, fingerprint: &str) -> Result<Policy> {
    let Gates {
        student,
        model,
        compression,
        shift,
    } = gates;
    let group = model.heads / model.kv_heads;
    let mut hidden = vec![vec![0; model.kv_heads]; model.layers];
    let mut errors = vec![vec![0.0; model.kv_heads]; model.layers];
    let (mut tokens, mut eligible) = (0, 0);
    for window in samples {
        tokens += window.dim(1)?;
        student.hiding(window, *shift, |call, logits, plan| {
            if let (0, Some(can)) = (call.layer, student.can_be_hidden(logits)?) {
                eligible += can.dim(2)?;
            }
            let per_head = plan.stats()?.per_head.concat();
            let of_heads = output_errors(call, plan)?;
            for unit in 0..model.kv_heads {
                hidden[call.layer][unit] += per_head[unit * group];
                errors[call.layer][unit] += of_heads[unit];
            }
            Ok(())
        })?;
    }
    let layers = hidden.iter().zip(&errors).map(|(hidden, errors)| LayerPolicy {
        strategies: vec![MergeStrategy::Similarity; model.kv_heads],
        thresholds: vec![-*shift; model.kv_heads],
        hidden_ratios: hidden.iter().map(|count| *count as f64 / eligible as f64).collect(),
        errors: errors.clone(),
    });
    let all = (model.layers * model.kv_heads) as f64;
    let total = hidden.iter().flatten().sum::<usize>() as f64 / all;
    Ok(Policy::new(PolicyOptions {
        fingerprint: fingerprint.into(),
        model: *model,
        config: (*compression).clone(),
        layers: layers.collect(),
        probe: Some(student.probe()?),
        calibration: CalibrationFigures {
            target,
            hidden_ratio: total / eligible as f64,
            hidden_ratio_of_all: total / (tokens - samples.len()) as f64,
            error: errors.iter().flatten().sum(),
            windows: samples.len(),
            tokens,
        },
    })?)
}

/// The squared error of a layer's output for each KV head, after the output projection.
fn output_errors(call: &AttentionCall, plan: &MergePlan) -> Result<Vec<f64>> {
    let [q, k, v] = call.qkv;
    let (heads, kv_heads, dim) = (q.dim(1)?, k.dim(1)?, q.dim(3)?);
    let off = MergePlan::from_indicators(&plan.indicators().zeros_like()?, plan.config())?;
    let options = AttentionOptions::default();
    let difference = (attend(q, k, v, plan, &options)? - attend(q, k, v, &off, &options)?)?;
    let (width, projection) = (heads / kv_heads * dim, call.projection.to_dtype(difference.dtype())?);
    let rows = difference.transpose(1, 2)?.flatten_from(2)?.flatten_to(1)?;
    let unit = |unit: usize| -> Result<f64> {
        let of_unit = projection.narrow(1, unit * width, width)?;
        let output = rows
            .narrow(1, unit * width, width)?
            .contiguous()?
            .matmul(&of_unit.contiguous()?.t()?)?;
        let sum = output.to_dtype(DType::F32)?.sqr()?.sum_all()?;
        Ok(f64::from(sum.to_scalar::<f32>()?))
    };
    (0..kv_heads).map(unit).collect()
}

/// A policy that gates can start from.
pub fn start_of(file: &Path, model: &ModelShape) -> Result<Policy> {
    let read = || -> Result<Policy> {
        let policy = Policy::from_json(&fs::read_to_string(file)?)?;
        ensure!(
            policy.parts().probe.is_some() && policy.parts().model == *model,
            "expected a policy with a probe for a model of {model:?}, got one for {:?} under Criterion::{:?}; write it \
             with llama calibrate --criterion probe",
            policy.parts().model,
            policy.parts().config.criterion
        );
        Ok(policy)
    };
    read().with_context(|| format!("policy {}", file.display()))
}

/// A probe of keys whose rotary pairs are neighbours, for the same keys with pairs of halves.
pub fn in_halves(probe: &KeyProbe) -> Result<KeyProbe> {
    let [weights, offsets] = probe.tensors(&Device::Cpu)?;
    let (layers, kv_heads, dim) = weights.dims3()?;
    let pairs = weights.reshape((layers, kv_heads, dim / 2, 2))?;
    Ok(KeyProbe::new(&pairs.transpose(2, 3)?.flatten_from(2)?, &offsets)?)
}

/// A threshold for each layer and KV head. Heads that are off start a little below the lowest threshold of the others.
pub fn thresholds(layers: &[LayerPolicy]) -> Vec<Vec<f64>> {
    let units = |layer: &LayerPolicy| -> Vec<Option<f64>> {
        let on = layer.strategies.iter().map(|strategy| !strategy.is_off());
        on.zip(&layer.thresholds)
            .map(|(on, threshold)| on.then_some(*threshold))
            .collect()
    };
    let all: Vec<Vec<Option<f64>>> = layers.iter().map(units).collect();
    let lowest = all.iter().flatten().flatten().copied().fold(f64::INFINITY, f64::min);
    let off = if lowest.is_finite() { lowest - 1.0 } else { 0.0 };
    let layer = |units: &Vec<Option<f64>>| units.iter().map(|threshold| threshold.unwrap_or(off)).collect();
    all.iter().map(layer).collect()
}

/// The name that policies give the weights of an export.
pub fn fingerprint(folder: &Path) -> Result<String> {
    let mut checkpoint = Checkpoint::open(&folder.to_string_lossy(), LoadOptions::default())?;
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let attention = CompressedAttention::new(off, CompressionConfig::default(), Default::default())?;
    let layers = checkpoint.config.layers;
    checkpoint.load(vec![attention; layers])?.fingerprint()
}
