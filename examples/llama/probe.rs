//! Fits a probe of keys to a model, for `calibrate --criterion probe`.

use anyhow::Result;
use candle_sfattention::{CompressionConfig, KeyProbe};

use crate::calibrate::{Measured, Passes};

/// A probe for the measured layers.
#[cfg(feature = "fit")]
pub fn fit(measured: &Measured, passes: &Passes, config: &CompressionConfig) -> Result<KeyProbe> {
    use candle_sfattention::{ProbeFitter, ProbeSample};

    let mut fitter = ProbeFitter::new(measured.shape(), config.window, config.sinks, measured.options())?;
    let each = |what: &'static str, take: &mut dyn FnMut(&ProbeSample) -> candle_core::Result<()>| {
        passes.each(what, |layer, call, _| {
            let [q, k, v] = call.qkv;
            let sample = ProbeSample {
                layer,
                q,
                k,
                v,
                probed: call.unrotated,
                projection: &call.projection_to_stream()?,
                stream: call.stream,
            };
            Ok(take(&sample)?)
        })
    };
    each("harms", &mut |sample| fitter.observe(sample))?;
    let mut regression = fitter.regress()?;
    each("regression", &mut |sample| regression.add(sample))?;
    let (probe, explained) = regression.probe()?;
    let explained: Vec<f64> = explained.into_iter().flatten().collect();
    let mean = explained.iter().sum::<f64>() / explained.len() as f64;
    println!("the probe explains {mean:.3} of the variance of ln(harm)");
    Ok(probe)
}

/// Without the feature that fits.
#[cfg(not(feature = "fit"))]
pub fn fit(_: &Measured, _: &Passes, _: &CompressionConfig) -> Result<KeyProbe> {
    anyhow::bail!("criterion probe: expected a build that fits probes, got one without; run cargo with --features fit")
}
