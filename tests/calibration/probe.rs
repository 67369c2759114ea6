//! Probes of keys: their scores, the harm that they are fitted to, and the fit.

use crate::common::inputs::{assert_close, values, Normal, Shape};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::{linear_b, Module, VarBuilder, VarMap};
use candle_sfattention::calibrate::ProbeSample;
use candle_sfattention::reference::{self, Array4, HarmLayer};
use candle_sfattention::{
    AttentionOptions, Calibrator, CompressedAttention, CompressedSelfAttention, CompressionConfig, Criterion,
    HeadStrategies, KeyProbe, MergePlan, MergeStrategy, ModelShape, Policy, ProbeFitter, RotaryConfig,
    SelfAttentionConfig, TensorLayout,
};

const MODEL: ModelShape = ModelShape {
    layers: 2,
    heads: 4,
    kv_heads: 2,
    head_dim: 8,
};

/// One window's tensors: query, key, value, unrotated key, projection, stream.
struct Window {
    qkv: [Tensor; 3],
    probed: Tensor,
    projection: Tensor,
    stream: Tensor,
}

impl Window {
    fn new(tokens: usize, seed: u64, dtype: DType) -> Result<Self> {
        let shape = Shape(1, 4, 2, tokens, 8);
        let [probed, _, _] = Shape(1, 2, 1, tokens, 8).qkv(seed + 100, dtype)?;
        let wide = |rows, columns, seed| -> Result<Tensor> {
            let [x, _, _] = Shape(1, 1, 1, rows, columns).qkv(seed, DType::F32)?;
            Ok(x.squeeze(0)?)
        };
        Ok(Self {
            qkv: shape.qkv(seed, dtype)?,
            probed,
            projection: wide(24, 32, 7)?.squeeze(0)?,
            stream: wide(tokens, 24, seed + 200)?,
        })
    }

    fn sample(&self, layer: usize) -> ProbeSample<'_> {
        let [q, k, v] = &self.qkv;
        ProbeSample {
            layer,
            q,
            k,
            v,
            probed: &self.probed,
            projection: &self.projection,
            stream: &self.stream,
        }
    }
}

/// The scores are w·k + b, of keys by any strides and in halves.
#[test]
fn scores_are_a_linear_form() -> Result<()> {
    let mut normal = Normal::new(1);
    let mut random = |shape: &[usize]| normal.tensor(shape);
    let (weights, offsets, keys) = (random(&[3, 2, 8])?, random(&[3, 2])?, random(&[2, 30, 2, 8])?);
    let probe = KeyProbe::new(&weights, &offsets)?;
    let keys = keys.transpose(1, 2)?;
    for (layer, dtype, tolerance) in [(0, DType::F32, 1e-5), (2, DType::F64, 1e-5), (1, DType::BF16, 0.1)] {
        let got = probe.scores(layer, &keys.to_dtype(dtype)?)?;
        assert_eq!((got.dims(), got.dtype()), (&[2, 2, 30][..], DType::F32));
        let weights = weights
            .get(layer)?
            .reshape((1, 2, 8, 1))?
            .broadcast_as((2, 2, 8, 1))?
            .contiguous()?;
        let expected = keys.contiguous()?.matmul(&weights)?.squeeze(3)?;
        let expected = expected.broadcast_add(&offsets.get(layer)?.reshape((1, 2, 1))?)?;
        assert_close("scores", &got, &expected, tolerance, tolerance)?;
    }
    let [w, b] = probe.tensors(&Device::Cpu)?;
    assert_close("weights", &w, &weights, 0.0, 0.0)?;
    assert_close("offsets", &b, &offsets, 0.0, 0.0)?;
    let json = serde_json::to_string(&probe)?;
    assert_eq!(serde_json::from_str::<KeyProbe>(&json)?, probe);
    for (bad, part) in [
        ("[]", "expected weights"),
        (
            r#"[{"weights": [[1.0]], "offsets": [1.0, 2.0]}]"#,
            "an offset in every layer",
        ),
        (
            r#"[{"weights": [[1.0], [1.0, 2.0]], "offsets": [1.0, 2.0]}]"#,
            "in layer 0",
        ),
        (r#"[{"weights": [[1e39]], "offsets": [1.0]}]"#, ""),
    ] {
        let error = serde_json::from_str::<KeyProbe>(bad).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let error = |result: candle_core::Result<Tensor>| result.unwrap_err().to_string();
    assert!(error(probe.scores(3, &keys)).contains("layer: expected one below 3, got 3"));
    assert!(error(probe.scores(0, &keys.narrow(1, 0, 1)?)).contains("before rotary embedding, got [2, 1, 30, 8]"));
    Ok(())
}

/// The least sum of squares: with a large sample and no noise the fit is the form behind the harms; here the harms are
/// those of the reference, and the fit is checked against normal equations in f64.
#[test]
fn the_fit_is_that_of_the_reference_s_harms() -> Result<()> {
    let (window, sinks) = (3, 2);
    for (layout, dtype) in [
        (TensorLayout::HeadsFirst, DType::F32),
        (TensorLayout::TokensFirst, DType::F32),
    ] {
        let options = AttentionOptions {
            softmax_scale: Some(0.6),
            layout,
            ..Default::default()
        };
        let mut fitter = ProbeFitter::new(MODEL, window, sinks, options)?;
        let windows = [
            Window::new(70, 1, dtype)?,
            Window::new(131, 2, dtype)?,
            Window::new(5, 3, dtype)?,
        ];
        let turned: Vec<Window> = windows
            .iter()
            .map(|w| {
                let turn = |x: &Tensor| match layout {
                    TensorLayout::HeadsFirst => Ok(x.clone()),
                    TensorLayout::TokensFirst => x.transpose(1, 2)?.contiguous(),
                };
                let [q, k, v] = &w.qkv;
                Ok(Window {
                    qkv: [turn(q)?, turn(k)?, turn(v)?],
                    probed: turn(&w.probed)?,
                    projection: w.projection.clone(),
                    stream: w.stream.clone(),
                })
            })
            .collect::<Result<_>>()?;
        for window in &turned {
            fitter.observe(&window.sample(0))?;
            fitter.observe(&window.sample(1))?;
        }
        let mut regression = fitter.regress()?;
        for window in turned.iter().rev() {
            regression.add(&window.sample(1))?;
            regression.add(&window.sample(0))?;
        }
        let (probe, explained) = regression.probe()?;
        for kv_head in 0..2 {
            let (mut keys, mut harms) = (Vec::new(), Vec::new());
            for w in &windows {
                let [q, k, v] = [&w.qkv[0], &w.qkv[1], &w.qkv[2]].map(Array4::from_tensor);
                let layer = HarmLayer {
                    projection: w.projection.to_dtype(DType::F64)?.to_vec2()?,
                    stream: w.stream.squeeze(0)?.to_dtype(DType::F64)?.to_vec2()?,
                    scale: 0.6,
                };
                let harm = reference::harm(&q?, &k?, &v?, &layer, window)?;
                let probed = Array4::from_tensor(&w.probed)?;
                for (t, harm) in harm[kv_head].iter().enumerate().skip(sinks) {
                    keys.push(probed.row(0, kv_head, t).to_vec());
                    harms.push(*harm);
                }
            }
            let expected = ridge(&keys, &harms);
            let [weights, offsets] = probe.tensors(&Device::Cpu)?;
            let got = [
                values(&weights.get(0)?.get(kv_head)?)?,
                values(&offsets.get(0)?.narrow(0, kv_head, 1)?)?,
            ]
            .concat();
            for (got, expected) in got.iter().zip(&expected) {
                // A quantile is known to its bin, and harms to f32.
                assert!((got - expected).abs() < 0.02, "{got} for {expected}");
            }
            assert!((0.0..1.0).contains(&explained[0][kv_head]), "{explained:?}");
        }
        assert_eq!(explained[0], explained[1]);
    }
    Ok(())
}

/// Weights and offset by normal equations with the quantile taken from sorted harms.
fn ridge(keys: &[Vec<f64>], harms: &[f64]) -> Vec<f64> {
    let (n, dim) = (keys.len() as f64, keys[0].len());
    let mut sorted = harms.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = 0.1 * n;
    let floor = sorted[(place as usize).min(sorted.len() - 1)];
    let y: Vec<f64> = harms.iter().map(|harm| (harm + floor).ln()).collect();
    let mean_y = y.iter().sum::<f64>() / n;
    let mean: Vec<f64> = (0..dim).map(|d| keys.iter().map(|k| k[d]).sum::<f64>() / n).collect();
    let deviation: Vec<f64> = (0..dim)
        .map(|d| (keys.iter().map(|k| (k[d] - mean[d]).powi(2)).sum::<f64>() / n).sqrt())
        .collect();
    let standard: Vec<Vec<f64>> = keys
        .iter()
        .map(|k| (0..dim).map(|d| (k[d] - mean[d]) / deviation[d]).collect())
        .collect();
    // Gauss-Seidel on (XᵀX / n + λ) β = Xᵀy / n, which converges for such matrices.
    let gram = |a: usize, b: usize| standard.iter().map(|x| x[a] * x[b]).sum::<f64>() / n;
    let gram: Vec<Vec<f64>> = (0..dim).map(|a| (0..dim).map(|b| gram(a, b)).collect()).collect();
    let with_y: Vec<f64> = (0..dim)
        .map(|d| standard.iter().zip(&y).map(|(x, y)| x[d] * (y - mean_y)).sum::<f64>() / n)
        .collect();
    let mut beta = vec![0.0; dim];
    for _ in 0..2000 {
        for d in 0..dim {
            let others: f64 = (0..dim)
                .filter(|other| *other != d)
                .map(|other| gram[d][other] * beta[other])
                .sum();
            beta[d] = (with_y[d] - others) / (gram[d][d] + 1e-3);
        }
    }
    let mut weights: Vec<f64> = (0..dim).map(|d| beta[d] / deviation[d]).collect();
    let offset = mean_y - weights.iter().zip(&mean).map(|(w, m)| w * m).sum::<f64>();
    weights.push(offset);
    weights
}

/// A policy of a probe: calibration under given scores, to JSON and back.
#[test]
fn a_policy_keeps_its_probe() -> Result<()> {
    let config = CompressionConfig {
        criterion: Criterion::Given,
        window: 4,
        sinks: 2,
        ..CompressionConfig::calibrated()
    };
    let mut normal = Normal::new(2);
    let mut random = |shape: &[usize]| normal.tensor(shape);
    let probe = KeyProbe::new(&random(&[2, 2, 8])?, &random(&[2, 2])?)?;
    let windows = [Window::new(90, 1, DType::F32)?, Window::new(90, 2, DType::F32)?];
    let ratios = [0.2, 0.4, 0.6, 0.8];
    let mut calibrator = Calibrator::new(MODEL, config, AttentionOptions::default(), &ratios)?;
    let error = calibrator.observe(0, &windows[0].qkv[0], &windows[0].qkv[1], &windows[0].qkv[2]);
    assert!(error
        .unwrap_err()
        .to_string()
        .contains("scores: expected a score per token"));
    for (layer, window) in (0..2).flat_map(|layer| windows.iter().map(move |window| (layer, window))) {
        let [q, k, v] = &window.qkv;
        calibrator.observe_scored(layer, [q, k, v], &probe.scores(layer, &window.probed)?)?;
    }
    let mut measurement = calibrator.measure()?;
    for (layer, window) in (0..2).flat_map(|layer| windows.iter().map(move |window| (layer, window))) {
        let ([q, k, v], scores) = (&window.qkv, probe.scores(layer, &window.probed)?);
        measurement.add_scored(layer, ([q, k, v], &scores), Some(&window.projection), 1.0)?;
    }
    let mut parts = measurement.policy(0.5, "model")?.parts().clone();
    assert!(
        (parts.calibration.hidden_ratio - 0.5).abs() < 0.1,
        "{:?}",
        parts.calibration
    );
    parts.probe = Some(probe.clone());
    let policy = Policy::new(parts.clone())?;
    let again = Policy::from_json(&policy.to_json()?)?;
    assert_eq!(again, policy);
    assert_eq!(again.parts().probe.as_ref(), Some(&probe));
    parts.model.head_dim = 16;
    let error = Policy::new(parts.clone()).unwrap_err().to_string();
    assert!(
        error.contains("probe: expected layers, KV heads and head_dim"),
        "{error}"
    );
    parts.config = CompressionConfig::calibrated();
    let error = Policy::new(parts).unwrap_err().to_string();
    assert!(
        error.contains("probe: expected none under Criterion::ObservedMass"),
        "{error}"
    );
    Ok(())
}

#[test]
fn samples_that_do_not_fit_are_refused() -> Result<()> {
    let window = Window::new(40, 1, DType::F32)?;
    let new = || ProbeFitter::new(MODEL, 3, 2, AttentionOptions::default());
    let refused = |sample: ProbeSample, part: &str| {
        let error = new().unwrap().observe(&sample).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(window.sample(2), "of a layer below 2");
    let stream = window.stream.narrow(1, 0, 39)?;
    refused(
        ProbeSample {
            stream: &stream,
            ..window.sample(0)
        },
        "stream: expected the layer's input",
    );
    let projection = window.projection.narrow(1, 0, 16)?;
    refused(
        ProbeSample {
            projection: &projection,
            ..window.sample(0)
        },
        "projection: expected shape (hidden, 32)",
    );
    let short = window.probed.narrow(2, 0, 39)?;
    refused(
        ProbeSample {
            probed: &short,
            ..window.sample(0)
        },
        "probe: expected query (1, 4, N, 8)",
    );
    let error = new()?.regress().unwrap_err().to_string();
    assert!(error.contains("expected samples of layer 0, got none"), "{error}");
    let sliding = AttentionOptions {
        sliding_window: Some(4),
        ..Default::default()
    };
    let error = ProbeFitter::new(MODEL, 3, 2, sliding).unwrap_err().to_string();
    assert!(
        error.contains("options: expected causal attention over all tokens"),
        "{error}"
    );
    Ok(())
}

/// A layer with a probe: its cache gives the rows of the whole, and its decisions are those of the probe's scores on
/// keys before rotary embedding.
#[test]
fn a_layer_reads_its_keys_before_rotation() -> Result<()> {
    let mut normal = Normal::new(3);
    let mut random = |shape: &[usize]| normal.tensor(shape);
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let sizes = SelfAttentionConfig {
        hidden_size: 24,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 8,
        qkv_bias: true,
        output_bias: false,
        rotary: Some(RotaryConfig::default()),
        qk_norm: None,
    };
    let config = CompressionConfig {
        criterion: Criterion::Given,
        window: 4,
        sinks: 2,
        ..CompressionConfig::calibrated()
    };
    let probe = KeyProbe::new(&random(&[3, 2, 8])?, &random(&[3, 2])?)?;
    let thresholds = Tensor::new(&[0f32, 0.0, 0.5, 0.5], &Device::Cpu)?;
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity).with_thresholds(&thresholds)?;
    for layout in [TensorLayout::HeadsFirst, TensorLayout::TokensFirst] {
        let options = AttentionOptions {
            layout,
            ..Default::default()
        };
        let attention = CompressedAttention::new(strategies.clone(), config.clone(), options)?;
        let attention = attention.with_probe(&probe, 2)?;
        let layer = CompressedSelfAttention::new(sizes, attention.clone(), vb.clone())?;
        Normal::new(8).fill(&vars)?;
        let xs = random(&[2, 60, 24])?;
        let (whole, plan) = layer.forward_with_plan(&xs)?;
        let keys = linear_b(24, 16, true, vb.pp("k_proj"))?
            .forward(&xs)?
            .reshape((2, 60, 2, 8))?
            .transpose(1, 2)?;
        let scores = probe.scores(2, &keys)?;
        let expected = MergePlan::from_scores(&scores, &strategies, &config, true)?;
        assert_eq!(
            plan.indicators().to_vec3::<u8>()?,
            expected.indicators().to_vec3::<u8>()?
        );
        assert!(plan.stats()?.hidden_ratio() > 0.2);
        assert!(layer.forward_with_loss(&xs)?.1.is_none());
        let mut cache = layer.attention().new_cache(Default::default())?;
        let mut rows = Vec::new();
        for (start, count) in [(0, 20), (20, 1), (21, 39)] {
            rows.push(layer.forward_cached(&xs.narrow(1, start, count)?, &mut cache)?);
        }
        assert_close("cached", &Tensor::cat(&rows, 1)?, &whole, 2e-5, 2e-5)?;
    }
    let plain = CompressedAttention::new(strategies.clone(), config.clone(), Default::default())?;
    assert!(plain
        .clone()
        .with_probe(&probe, 3)
        .unwrap_err()
        .to_string()
        .contains("layer: expected one below 3"));
    let observed = CompressedAttention::new(strategies, CompressionConfig::calibrated(), Default::default())?;
    let error = observed.with_probe(&probe, 0).unwrap_err().to_string();
    assert!(
        error.contains("probe: expected Criterion::Given with a probe, got ObservedMass"),
        "{error}"
    );
    Ok(())
}
