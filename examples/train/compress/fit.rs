//! The policy that the gates start from: a probe fitted to the checkpoint, with thresholds for the target.

use anyhow::Result;
use candle_core::Tensor;
use candle_sfattention::{CompressionConfig, ModelShape, Policy};
use indicatif::ProgressBar;

use super::student::Teacher;

/// How much more an error counts in a passage that comes twice, as in `llama calibrate`.
#[cfg(feature = "fit")]
const REPEAT_WEIGHT: f64 = 3.0;

/// Fits a probe to windows (1, N), and finds thresholds of the least error that hide `target`.
#[cfg(feature = "fit")]
pub fn fit(
    teacher: &Teacher,
    model: ModelShape,
    config: &CompressionConfig,
    windows: &[Tensor],
    target: f64,
    bar: &ProgressBar,
) -> Result<Policy> {
    use candle_core::DType;
    use candle_sfattention::{AttentionOptions, Calibrator, ProbeFitter, ProbeSample};

    use crate::network::AttentionCall;

    let each = |what: &'static str, visit: &mut dyn FnMut(&AttentionCall, usize) -> Result<()>| -> Result<()> {
        bar.set_message(what);
        for (index, window) in windows.iter().enumerate() {
            teacher.hidden(window, |call| visit(call, index))?;
            bar.inc(1);
        }
        Ok(())
    };
    let sample = |call: &AttentionCall, take: &mut dyn FnMut(&ProbeSample) -> candle_core::Result<()>| -> Result<()> {
        let [q, k, v] = call.qkv;
        Ok(take(&ProbeSample {
            layer: call.layer,
            q,
            k,
            v,
            probed: call.unrotated,
            projection: call.projection,
            stream: call.stream,
        })?)
    };
    let mut fitter = ProbeFitter::new(model, config.window, config.sinks, AttentionOptions::default())?;
    each("harms", &mut |call, _| {
        sample(call, &mut |sample| fitter.observe(sample))
    })?;
    let mut regression = fitter.regress()?;
    each("regression", &mut |call, _| {
        sample(call, &mut |sample| regression.add(sample))
    })?;
    let (probe, _) = regression.probe()?;
    let ratios: Vec<f64> = (1..20).map(|i| f64::from(i) / 20.0).collect();
    let mut calibrator = Calibrator::new(model, config.clone(), AttentionOptions::default(), &ratios)?;
    each("scores", &mut |call, _| {
        let scores = probe.scores(call.layer, call.unrotated)?;
        Ok(calibrator.observe_scored(call.layer, call.qkv, &scores)?)
    })?;
    let mut measurement = calibrator.measure()?;
    each("errors", &mut |call, index| {
        let scores = probe.scores(call.layer, call.unrotated)?;
        let stream = call
            .stream
            .to_dtype(DType::F32)?
            .sqr()?
            .mean_all()?
            .to_scalar::<f32>()?;
        // Passages that come twice, which are every other window, are where a hidden token is missed.
        let repeat = if index % 2 == 1 { REPEAT_WEIGHT } else { 1.0 };
        let weight = repeat / f64::from(stream).max(1e-12);
        Ok(measurement.add_scored(call.layer, (call.qkv, &scores), Some(call.projection), weight)?)
    })?;
    let mut parts = measurement.policy(target, "the checkpoint")?.parts().clone();
    parts.probe = Some(probe);
    Ok(Policy::new(parts)?)
}

/// Without the feature that fits.
#[cfg(not(feature = "fit"))]
pub fn fit(_: &Teacher, _: ModelShape, _: &CompressionConfig, _: &[Tensor], _: f64, _: &ProgressBar) -> Result<Policy> {
    anyhow::bail!(
        "policy: expected --policy in a build that does not fit probes, got none; run cargo with --features fit, or \
         give the policy of llama calibrate --criterion probe"
    )
}
