//! A scale of the caller's own reaches every path: a scale of 2^n / sqrt(D) is the default one with queries times 2^n,
//! to the last bit where a path multiplies by the scale once, and to rounding elsewhere.

use crate::common::caches::{chunked, strategies};
use crate::common::inputs::{assert_close, values, Shape};
use crate::common::judge::differentiate;
use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_sfattention::{
    attend, observed_mass, AttentionOptions, Calibrator, CompressedAttention, CompressionConfig, Fold, MergePlan,
    MergeStrategy, ModelShape,
};

const SHAPE: Shape = Shape(1, 4, 2, 130, 16);
/// Against the default of 1/4.
const FACTORS: [f64; 3] = [4.0, 0.5, -2.0];

fn own(factor: f64) -> AttentionOptions {
    AttentionOptions {
        softmax_scale: Some(0.25 * factor),
        ..Default::default()
    }
}

fn configs() -> [CompressionConfig; 3] {
    let observing = CompressionConfig {
        window: 8,
        ..CompressionConfig::calibrated()
    };
    let merging = |fold| CompressionConfig {
        fold,
        window: 5,
        similarity_threshold: 0.35,
        ..CompressionConfig::pretrained()
    };
    [observing, merging(Fold::Mean), merging(Fold::PairSum)]
}

#[test]
fn decisions_rows_gradients_and_caches_read_it() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let [q, k, v] = SHAPE.qkv(3, dtype)?;
        let tolerance = match dtype {
            DType::F64 => 1e-12,
            DType::F32 => 1e-5,
            _ => 3e-2,
        };
        for config in configs() {
            let strategies = strategies(MergeStrategy::Similarity as u8, &SHAPE, &config)?;
            let mut decisions = Vec::new();
            for factor in FACTORS {
                let what = format!("{dtype:?} {:?} {factor}", config.fold);
                let scaled = (&q * factor)?;
                let plan = MergePlan::new(&q, &k, &v, &strategies, &config, &own(factor))?;
                let same = MergePlan::new(&scaled, &k, &v, &strategies, &config, &Default::default())?;
                let bits = plan.indicators().to_vec3::<u8>()?;
                assert_eq!(bits, same.indicators().to_vec3::<u8>()?, "{what}");
                assert!(plan.stats()?.hidden > 0, "{what}");
                decisions.push(bits);

                let got = differentiate(&[q.clone(), k.clone(), v.clone()], &q, |q, k, v| {
                    Ok(attend(q, k, v, &plan, &own(factor))?)
                })?;
                let mut expected = differentiate(&[scaled.clone(), k.clone(), v.clone()], &q, |q, k, v| {
                    Ok(attend(q, k, v, &plan, &Default::default())?)
                })?;
                expected[1] = (&expected[1] * factor)?;
                for (got, expected) in got.iter().zip(&expected) {
                    let largest = values(expected)?.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
                    assert_close(&what, got, expected, tolerance * largest, tolerance)?;
                }

                let layer = CompressedAttention::new(strategies.clone(), config.clone(), own(factor))?;
                for chunks in [&[1][..], &[60, 1, 1], &[1000]] {
                    let mut cache = layer.new_cache(Default::default())?;
                    let all = [q.clone(), k.clone(), v.clone()];
                    let rows = chunked(&mut cache, &all, chunks, |_, _| Ok(layer.options().clone()))?;
                    assert_close(&format!("{what} {chunks:?}"), &rows, &got[0], tolerance, tolerance)?;
                }
            }
            // Observed mass depends on the scale, or the test would prove nothing.
            assert_eq!(decisions[0] != decisions[1], config.criterion.observes(), "{dtype:?}");
        }
    }
    Ok(())
}

#[test]
fn scores_and_calibration_read_it() -> Result<()> {
    let [config, ..] = configs();
    let model = ModelShape {
        layers: 1,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
    };
    let calibrated = |factor: f64, options: AttentionOptions| -> Result<_> {
        let mut calibrator = Calibrator::new(model, config.clone(), options.clone(), &[0.3, 0.6])?;
        let windows = (0..3).map(|seed| -> Result<[Tensor; 3]> {
            let [q, k, v] = SHAPE.qkv(seed, DType::F32)?;
            Ok([(q * factor)?, k, v])
        });
        let windows: Vec<_> = windows.collect::<Result<_>>()?;
        for [q, k, v] in &windows {
            calibrator.observe(0, q, k, v)?;
        }
        let mut measurement = calibrator.measure()?;
        for [q, k, v] in &windows {
            measurement.add(0, [q, k, v], None, 1.0)?;
        }
        let [q, k, v] = &windows[0];
        let scores = values(&observed_mass(q, k, v, &config, &options)?)?;
        let policy = measurement.policy(0.4, "")?;
        Ok((scores, format!("{:?}", policy.parts().layers)))
    };
    let plain = calibrated(1.0, Default::default())?;
    for factor in FACTORS {
        let got = calibrated(1.0, own(factor))?;
        assert_eq!(got, calibrated(factor, Default::default())?, "{factor}");
        assert!(got.0 != plain.0 && got.1 != plain.1, "{factor}");
    }
    Ok(())
}
