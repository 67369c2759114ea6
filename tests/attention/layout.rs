//! [`TensorLayout`]: every entry point gives (B, N, H, D) tensors the results of (B, H, N, D) ones, bit for bit,
//! without a copy.

use crate::common::caches::with_thresholds;
use crate::common::inputs::{values, Normal, Shape};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Module, VarBuilder, VarMap};
use candle_sfattention::{
    attend, compressed_attention, observed_mass, AttentionOptions, Calibrator, CompressedAttention, CompressedKvCache,
    CompressedSelfAttention, CompressionConfig, HeadStrategies, MergePlan, MergeStrategy, ModelShape, RotaryConfig,
    SelfAttentionConfig, TensorLayout,
};

/// As many tokens as heads: shapes do not reveal the order of the axes.
const SQUARE: Shape = Shape(2, 8, 8, 8, 16);
const GROUPED: Shape = Shape(2, 6, 2, 70, 16);

fn config() -> CompressionConfig {
    CompressionConfig {
        similarity_threshold: 0.4,
        window: 2,
        sinks: 0,
        ..CompressionConfig::pretrained()
    }
}

fn tokens_first() -> AttentionOptions {
    AttentionOptions {
        layout: TensorLayout::TokensFirst,
        ..Default::default()
    }
}

fn similarity() -> HeadStrategies {
    HeadStrategies::uniform(MergeStrategy::Similarity)
}

/// The same numbers as contiguous (B, N, H, D) tensors.
fn turned(qkv: &[Tensor; 3]) -> Result<[Tensor; 3]> {
    let turn = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    Ok([turn(&qkv[0])?, turn(&qkv[1])?, turn(&qkv[2])?])
}

/// `got` has its tokens first, and the same numbers.
#[track_caller]
fn assert_turned(got: &Tensor, expected: &Tensor) -> Result<()> {
    let expected = expected.transpose(1, 2)?;
    assert_eq!(got.dims(), expected.dims());
    assert_eq!(values(got)?, values(&expected)?);
    Ok(())
}

#[test]
fn attention_its_gradients_and_its_loss_honour_the_layout() -> Result<()> {
    for shape in [SQUARE, GROUPED] {
        let qkv = shape.qkv(3, DType::F32)?;
        let run = |qkv: &[Tensor; 3], options: &AttentionOptions| -> Result<([Tensor; 5], MergePlan)> {
            let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Var::from_tensor);
            let (q, k, v) = (q?, k?, v?);
            let found = compressed_attention(&q, &k, &v, &similarity(), &config(), options)?;
            let loss = found.compression_loss.context("there are pairs")?;
            let store = ((&found.output * &found.output)?.sum_all()? + &loss)?.backward()?;
            let gradient = |var: &Var| store.get(var).cloned().context("no gradient");
            let found_all = [found.output, gradient(&q)?, gradient(&k)?, gradient(&v)?, loss];
            Ok((found_all, found.plan))
        };
        let (expected, plan) = run(&qkv, &AttentionOptions::default())?;
        let (got, got_plan) = run(&turned(&qkv)?, &tokens_first())?;
        assert!(plan.stats()?.hidden > 0);
        assert_eq!(got_plan.stats()?, plan.stats()?);
        for index in 0..4 {
            assert_turned(&got[index], &expected[index])?;
        }
        assert_eq!(values(&got[4])?, values(&expected[4])?);
        // The shapes are equal, so only a missing option can make a difference.
        if shape.1 == shape.3 {
            let (wrong, _) = run(&turned(&qkv)?, &AttentionOptions::default())?;
            assert_ne!(values(&wrong[0])?, values(&expected[0].transpose(1, 2)?)?);
        }
    }
    Ok(())
}

#[test]
fn modules_plans_and_scores_honour_the_layout() -> Result<()> {
    let (shape, [q, k, v]) = (GROUPED, GROUPED.qkv(4, DType::F32)?);
    let [tq, tk, tv] = &turned(&[q.clone(), k.clone(), v.clone()])?;
    let module = |options| CompressedAttention::new(similarity(), config(), options);
    let expected = module(AttentionOptions::default())?.forward(&q, &k, &v)?;
    assert_turned(&module(tokens_first())?.forward(tq, tk, tv)?, &expected)?;

    // A view of the computed tensor, not a copy.
    let plan = MergePlan::new(tq, tk, tv, &similarity(), &config(), &tokens_first())?;
    let got = attend(tq, tk, tv, &plan, &tokens_first())?;
    assert_eq!(got.stride(), [6 * 70 * 16, 16, 70 * 16, 1]);
    assert_turned(&got, &expected)?;

    let observed = CompressionConfig {
        window: 8,
        ..CompressionConfig::calibrated()
    };
    let strategies = with_thresholds(similarity(), &shape, &observed)?;
    let plain = AttentionOptions::default();
    let expected = observed_mass(&q, &k, &v, &observed, &plain)?;
    let got = observed_mass(tq, tk, tv, &observed, &tokens_first())?;
    assert_eq!(values(&got)?, values(&expected)?);
    let plan = MergePlan::new(&q, &k, &v, &strategies, &observed, &plain)?;
    let got = MergePlan::new(tq, tk, tv, &strategies, &observed, &tokens_first())?;
    assert!(plan.stats()?.hidden > 0);
    assert_eq!(got.indicators().to_vec3::<u8>()?, plan.indicators().to_vec3::<u8>()?);
    Ok(())
}

#[test]
fn caches_honour_the_layout() -> Result<()> {
    let qkv = GROUPED.qkv(5, DType::F32)?;
    let by_token = turned(&qkv)?;
    let mut caches = [0, 1].map(|_| CompressedKvCache::new(similarity(), config(), Default::default()));
    let [Ok(expected), Ok(got)] = &mut caches else {
        panic!("both caches are made")
    };
    for (start, count) in [(0, 40), (40, 1), (41, 29)] {
        let part = |x: &Tensor, axis: usize| x.narrow(axis, start, count);
        let rows = expected.append_and_attend(
            &part(&qkv[0], 2)?,
            &part(&qkv[1], 2)?,
            &part(&qkv[2], 2)?,
            &AttentionOptions::default(),
        )?;
        let [q, k, v] = [0, 1, 2].map(|i| part(&by_token[i], 1));
        assert_turned(&got.append_and_attend(&q?, &k?, &v?, &tokens_first())?, &rows)?;
        assert_eq!(got.lens(), expected.lens());
    }
    // A gradient through a cached result is still an error.
    let q = Var::from_tensor(&by_token[0])?;
    let output = got.append_and_attend(&q, &by_token[1], &by_token[2], &tokens_first())?;
    assert_eq!(output.dims(), q.dims());
    assert!(output.sum_all()?.backward().is_err());
    Ok(())
}

/// A layer makes its own tensors: its input and output are (B, N, hidden_size) in either layout of its attention.
#[test]
fn a_layer_is_the_same_in_either_layout() -> Result<()> {
    let vars = VarMap::new();
    let sizes = SelfAttentionConfig {
        hidden_size: 16,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 8,
        qkv_bias: false,
        output_bias: false,
        rotary: Some(RotaryConfig {
            theta: 100.0,
            max_tokens: 64,
            ..Default::default()
        }),
        qk_norm: None,
    };
    let layer = |options| {
        let attention = CompressedAttention::new(similarity(), config(), options)?;
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        CompressedSelfAttention::new(sizes, attention, vb)
    };
    let (expected, got) = (layer(AttentionOptions::default())?, layer(tokens_first())?);
    let mut normal = Normal::new(4);
    normal.fill(&vars)?;
    let xs = normal.tensor(&[2, 50, 16])?;
    assert_eq!(values(&got.forward(&xs)?)?, values(&expected.forward(&xs)?)?);
    let cached = |layer: &CompressedSelfAttention| -> Result<Vec<f64>> {
        let mut cache = layer.attention().new_cache(Default::default())?;
        layer.forward_cached(&xs.narrow(1, 0, 30)?, &mut cache)?;
        Ok(values(&layer.forward_cached(&xs.narrow(1, 30, 20)?, &mut cache)?)?)
    };
    assert_eq!(cached(&got)?, cached(&expected)?);
    Ok(())
}

#[test]
fn calibration_honours_the_layout() -> Result<()> {
    let shape = Shape(1, 4, 2, 60, 8);
    let model = ModelShape {
        layers: 1,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
    };
    for config in [CompressionConfig::calibrated(), config()] {
        let config = CompressionConfig { window: 8, ..config };
        let run = |qkv: &[Tensor; 3], options: AttentionOptions| -> Result<String> {
            let [q, k, v] = qkv;
            let mut calibrator = Calibrator::new(model, config.clone(), options, &[0.3, 0.6])?;
            calibrator.observe(0, q, k, v)?;
            let mut measurement = calibrator.measure()?;
            measurement.add(0, [q, k, v], None, 1.0)?;
            Ok(measurement.policy(0.3, "test")?.to_json()?)
        };
        let qkv = shape.qkv(6, DType::F32)?;
        assert_eq!(run(&turned(&qkv)?, tokens_first())?, run(&qkv, Default::default())?);
    }
    Ok(())
}

/// An error names the order of its axes.
#[test]
fn errors_name_the_order_of_their_shapes() -> Result<()> {
    let zeros = |dims: (usize, usize, usize, usize)| Tensor::zeros(dims, DType::F32, &Device::Cpu);
    let (q, k) = (zeros((2, 9, 4, 8))?, zeros((2, 7, 2, 8))?);
    let error = compressed_attention(&q, &k, &k, &similarity(), &config(), &tokens_first()).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("expected shape (2, kv_heads, 9, 8)") && text.contains("TensorLayout::TokensFirst"),
        "{text}"
    );
    let error = compressed_attention(&q, &k, &k, &similarity(), &config(), &Default::default()).unwrap_err();
    assert!(error.to_string().contains("AttentionOptions::layout"), "{error}");
    Ok(())
}
