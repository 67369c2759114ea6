//! Segments: packed documents and padded batches are attended to as each document alone.

use crate::common::caches::{strategies, with_thresholds};
use crate::common::inputs::{assert_close, values, Shape};
use crate::common::judge::differentiate;
use crate::common::settings::reference_bits;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{
    attend, compressed_attention, compression_loss_in_segments, compression_loss_terms,
    compression_loss_terms_in_segments, observed_mass, segments_from_lengths, AttentionOptions, CompressedAttention,
    CompressionConfig, Criterion, Dropout, Fold, GroupRule, HeadStrategies, MergePlan, MergeRule, MergeStrategy,
    Segment, TensorLayout,
};

const CPU: Device = Device::Cpu;
const FOLDS: [Fold; 3] = [Fold::PairSum, Fold::Mean, Fold::Drop];

/// Runs of (number, tokens) for each batch row.
fn numbers(rows: &[&[(u32, usize)]]) -> Result<Tensor> {
    let row = |runs: &&[(u32, usize)]| -> Vec<u32> {
        runs.iter().flat_map(|(number, count)| vec![*number; *count]).collect()
    };
    Ok(Tensor::new(rows.iter().map(row).collect::<Vec<_>>(), &CPU)?)
}

/// Packed documents, segments of one token among them; left and right padding, and a row of nothing else.
fn layouts() -> Result<Vec<Tensor>> {
    Ok(vec![
        segments_from_lengths(&[1, 37, 2, 1, 1, 129, 64, 65], 300, &CPU)?,
        numbers(&[&[(0, 5), (1, 92)], &[(1, 97)], &[(0, 96), (1, 1)], &[(0, 97)]])?,
        numbers(&[&[(4, 96), (0, 1)], &[(2, 1), (0, 96)]])?,
        numbers(&[&[(3, 20), (0, 2), (7, 30), (1, 7)], &[(0, 1), (9, 1), (8, 57), (0, 0)]])?,
    ])
}

fn shape_of(segments: &Tensor) -> Result<Shape> {
    let (batch, tokens) = segments.dims2()?;
    Ok(Shape(batch, 4, 2, tokens, 16))
}

fn under(segments: &Tensor) -> AttentionOptions {
    AttentionOptions {
        segments: Some(segments.clone()),
        ..Default::default()
    }
}

fn configs() -> Vec<(CompressionConfig, bool, Option<usize>)> {
    let base = CompressionConfig {
        similarity_threshold: 0.35,
        difference_threshold: 0.25,
        sinks: 2,
        ..Default::default()
    };
    let mut configs = Vec::new();
    for fold in FOLDS {
        for criterion in [Criterion::KeyKey, Criterion::QueryKey] {
            for (window, sliding) in [(0, None), (5, None), (5, Some(9)), (9, Some(5))] {
                let config = CompressionConfig {
                    fold,
                    criterion,
                    window,
                    ..base.clone()
                };
                configs.push((config, true, sliding));
            }
        }
    }
    let observed = CompressionConfig {
        criterion: Criterion::ObservedMass,
        group_rule: GroupRule::Unanimous,
        fold: Fold::Drop,
        window: 8,
        ..base.clone()
    };
    let reference = CompressionConfig {
        rule: MergeRule::Reference,
        sinks: 0,
        ..base.clone()
    };
    configs.push((observed, true, None));
    configs.push((reference, true, None));
    configs.push((base, false, None));
    configs
}

fn narrowed(x: &Tensor, segment: &Segment) -> Result<Tensor> {
    let row = x.narrow(0, segment.batch, 1)?;
    Ok(row.narrow(2, segment.tokens.start, segment.tokens.len())?)
}

fn read(segments: &Tensor) -> Result<Vec<Segment>> {
    let (batch, tokens) = segments.dims2()?;
    Ok(Segment::read(segments, [batch, tokens])?)
}

/// Whether all entries but those of segments are 0.
fn rest_is_zero(x: &Tensor, segments: &[Segment]) -> Result<bool> {
    let (batch, heads, tokens, dim) = x.dims4()?;
    let x = values(x)?;
    let mine = |b: usize, t: usize| segments.iter().any(|s| s.batch == b && s.tokens.contains(&t));
    Ok((0..x.len()).all(|i| {
        let (b, t) = (i / (heads * tokens * dim), i / dim % tokens);
        assert!(b < batch);
        mine(b, t) || x[i] == 0.0
    }))
}

/// Output, decisions and gradients of each segment are those of the segment alone, bit for bit.
#[test]
fn each_segment_is_as_if_alone() -> Result<()> {
    for segments in layouts()? {
        let shape = shape_of(&segments)?;
        let found = read(&segments)?;
        for (dtype, value_dim) in [
            (DType::F32, 16),
            (DType::F64, 16),
            (DType::BF16, 16),
            (DType::F16, 16),
            // Values of another size than keys.
            (DType::F64, 24),
            (DType::F16, 7),
        ] {
            let Shape(b, h, hk, n, _) = shape;
            let values_shape = Shape(b, h, hk, n, value_dim);
            let ([q, k, _], all) = (shape.qkv(1, dtype)?, configs());
            let qkv = [q, k, values_shape.qkv(1, dtype)?[2].clone()];
            let grad = values_shape.qkv(2, dtype)?[0].clone();
            // Halves take the same way in each setting.
            let some = if dtype == DType::F32 { all.len() } else { 8 };
            for (config, causal, sliding_window) in &all[..some] {
                let heads = strategies(3, &shape, config)?;
                let options = AttentionOptions {
                    causal: *causal,
                    sliding_window: *sliding_window,
                    ..Default::default()
                };
                let whole = AttentionOptions {
                    segments: Some(segments.clone()),
                    ..options.clone()
                };
                let plan = MergePlan::new(&qkv[0], &qkv[1], &qkv[2], &heads, config, &whole)?;
                let got = differentiate(&qkv, &grad, |q, k, v| Ok(attend(q, k, v, &plan, &whole)?))?;
                let (mut hidden, what) = (0, format!("{shape:?} {dtype:?} {config:?}"));
                for segment in &found {
                    let [q, k, v] = [0, 1, 2].map(|i| narrowed(&qkv[i], segment));
                    let (alone, grad) = ([q?, k?, v?], narrowed(&grad, segment)?);
                    let own = MergePlan::new(&alone[0], &alone[1], &alone[2], &heads, config, &options)?;
                    hidden += own.stats()?.hidden;
                    let expected = differentiate(&alone, &grad, |q, k, v| Ok(attend(q, k, v, &own, &options)?))?;
                    for (name, (got, expected)) in ["output", "dq", "dk", "dv"].iter().zip(got.iter().zip(&expected)) {
                        let got = values(&narrowed(got, segment)?)?;
                        assert_eq!(got, values(expected)?, "{what} {segment:?}: {name}");
                    }
                }
                // Nothing is hidden in padding and across segments.
                assert_eq!(plan.stats()?.hidden, hidden, "{what}");
                assert!(
                    hidden > 0 || config.criterion.observes() && shape.3 < 90,
                    "{what}: nothing hidden"
                );
                for part in &got {
                    assert!(rest_is_zero(part, &found)?, "{what}: padding");
                }
            }
        }
    }
    Ok(())
}

/// Strategies of batch rows stay with their rows.
#[test]
fn batch_rows_keep_their_strategies() -> Result<()> {
    let segments = numbers(&[&[(1, 20), (2, 39)], &[(0, 9), (1, 50)]])?;
    let shape = shape_of(&segments)?;
    let qkv = shape.qkv(3, DType::F32)?;
    let config = CompressionConfig {
        similarity_threshold: 0.35,
        ..Default::default()
    };
    let codes = Tensor::new(&[[2u32, 0, 2, 0], [0, 2, 0, 2]], &CPU)?;
    let heads = HeadStrategies::from_tensor(&codes)?;
    let plan = MergePlan::new(&qkv[0], &qkv[1], &qkv[2], &heads, &config, &under(&segments))?;
    for (row, heads) in plan.stats()?.per_head.iter().enumerate() {
        for (head, hidden) in heads.iter().enumerate() {
            assert_eq!(*hidden > 0, (row + head) % 2 == 1, "row {row}, head {head}");
        }
    }
    Ok(())
}

/// Against the reference, with bias and dropout by the tokens of the whole call.
#[test]
fn the_reference_agrees() -> Result<()> {
    for segments in layouts()? {
        let Shape(b, h, hk, n, d) = shape_of(&segments)?;
        let shape = Shape(b, h, hk, n.min(97), d);
        let segments = segments.narrow(1, 0, n.min(97))?;
        let n = shape.3;
        let (qkv, grad) = (shape.qkv(4, DType::F64)?, shape.qkv(5, DType::F64)?[0].clone());
        let bias = (0..h * n * n).map(|i| ((i * 37 % 101) as f64 - 50.0) / 40.0).collect();
        let bias = Tensor::from_vec(bias, (1, h, n, n), &CPU)?;
        for (config, causal, sliding_window) in configs() {
            let heads = strategies(3, &shape, &config)?;
            let options = AttentionOptions {
                causal,
                sliding_window,
                bias: Some(bias.clone()),
                dropout: Some(Dropout { p: 0.2, seed: 6 }),
                ..under(&segments)
            };
            let plan = MergePlan::new(&qkv[0], &qkv[1], &qkv[2], &heads, &config, &options)?;
            let [q, k, v] = [0, 1, 2].map(|i| Array4::from_tensor(&qkv[i]));
            let (q, k, v, g) = (q?, k?, v?, Array4::from_tensor(&grad)?);
            let bits = reference_bits([&q, &k, &v], &heads, &config, &options)?;
            let what = format!("{shape:?} {config:?}");
            assert_eq!(
                plan.indicators().to_vec3::<u8>()?,
                bits.to_tensor(&CPU)?.to_vec3::<u8>()?,
                "{what}"
            );
            let output = reference::attention(&q, &k, &v, &bits, &config, &options)?;
            let (dq, dk, dv) = reference::attention_gradients(&q, &k, &v, &g, &bits, &config, &options)?;
            let got = differentiate(&qkv, &grad, |q, k, v| Ok(attend(q, k, v, &plan, &options)?))?;
            for (got, expected) in got.iter().zip([output, dq, dk, dv]) {
                assert_close(&what, got, &expected.to_tensor(DType::F64, &CPU)?, 1e-11, 1e-11)?;
            }
        }
    }
    Ok(())
}

/// The sums of the loss are those of all segments, and its gradient is the reference's.
#[test]
fn the_loss_is_that_of_all_segments() -> Result<()> {
    for segments in layouts()? {
        let shape = shape_of(&segments)?;
        let found = read(&segments)?;
        let qkv = shape.qkv(6, DType::F64)?;
        for criterion in [Criterion::KeyKey, Criterion::QueryKey] {
            let config = CompressionConfig {
                criterion,
                similarity_threshold: 0.35,
                loss_factor: 0.7,
                ..Default::default()
            };
            let heads = strategies(4, &shape, &config)?;
            let [q, k] = [Var::from_tensor(&qkv[0])?, Var::from_tensor(&qkv[1])?];
            let got = compression_loss_terms_in_segments(&q, &k, &heads, &config, &segments)?.context("terms")?;
            let (aq, ak) = (Array4::from_tensor(&qkv[0])?, Array4::from_tensor(&qkv[1])?);
            let expected = reference::compression_loss_in_segments(&aq, &ak, &heads, &config, &segments)?.unwrap();
            assert_eq!(got.pairs, expected.pairs);
            assert_eq!(got.merged.to_scalar::<f64>()?, expected.merged as f64);
            assert!((got.squared.to_scalar::<f64>()? - expected.squared).abs() <= 1e-10 * expected.squared);
            let (mut pairs, mut squared) = (0, 0.0);
            let uniform = HeadStrategies::uniform(MergeStrategy::Similarity);
            for segment in &found {
                let (q, k) = (narrowed(&qkv[0], segment)?, narrowed(&qkv[1], segment)?);
                if let Some(terms) = compression_loss_terms(&q, &k, &uniform, &config)? {
                    pairs += terms.pairs;
                    squared += terms.squared.to_scalar::<f64>()?;
                }
            }
            let all = compression_loss_terms_in_segments(&q, &k, &uniform, &config, &segments)?.context("terms")?;
            assert_eq!(all.pairs, pairs);
            assert!((all.squared.to_scalar::<f64>()? - squared).abs() <= 1e-10 * squared);

            let loss = compression_loss_in_segments(&q, &k, &heads, &config, &segments)?.context("a loss")?;
            let store = loss.backward()?;
            let (dq, dk) = reference::compression_loss_gradients_in_segments(&aq, &ak, &heads, &config, &segments)?;
            for (var, expected) in [(&q, dq), (&k, dk)] {
                let expected = expected.to_tensor(DType::F64, &CPU)?;
                match store.get(var) {
                    Some(got) => assert_close("loss", got, &expected, 1e-11, 1e-11)?,
                    None => assert!(values(&expected)?.iter().all(|x| *x == 0.0)),
                }
            }
            let whole = compressed_attention(&qkv[0], &qkv[1], &qkv[2], &heads, &config, &under(&segments))?;
            let in_one = whole.compression_loss.context("a loss")?.to_scalar::<f64>()?;
            assert_eq!(in_one, loss.to_scalar::<f64>()?);
        }
    }
    let lone = segments_from_lengths(&[1, 1, 1], 4, &CPU)?;
    let q = Shape(1, 1, 1, 4, 8).qkv(0, DType::F32)?[0].clone();
    let on = HeadStrategies::uniform(MergeStrategy::Similarity);
    let none = compression_loss_in_segments(&q, &q, &on, &Default::default(), &lone)?.context("a loss")?;
    assert_eq!(none.to_scalar::<f32>()?, 0.0);
    Ok(())
}

/// Numbers that are not finite stay in their segment; those of padding reach nothing.
#[test]
fn nothing_passes_a_border() -> Result<()> {
    let segments = numbers(&[&[(0, 3), (1, 30), (2, 40)]])?;
    let shape = shape_of(&segments)?;
    for dtype in [DType::F32, DType::BF16] {
        let qkv = shape.qkv(7, dtype)?;
        for bad in [0, 10] {
            let spoiled = |x: &Tensor| -> Result<Tensor> {
                let nan = Tensor::full(f64::NAN, x.narrow(2, bad, 1)?.shape(), &CPU)?.to_dtype(dtype)?;
                let rest = x.narrow(2, bad + 1, shape.3 - bad - 1)?;
                Ok(Tensor::cat(&[x.narrow(2, 0, bad)?, nan, rest], 2)?)
            };
            let (k, v) = (spoiled(&qkv[1])?, spoiled(&qkv[2])?);
            let heads = HeadStrategies::uniform(MergeStrategy::Similarity);
            let config = CompressionConfig::pretrained();
            let output = compressed_attention(&qkv[0], &k, &v, &heads, &config, &under(&segments))?.output;
            for row in 0..shape.3 {
                let row_values = values(&output.narrow(2, row, 1)?)?;
                let nan = bad == 10 && (10..33).contains(&row);
                assert!(
                    row_values.iter().all(|x| x.is_nan() == nan),
                    "{dtype:?} {bad}: row {row}"
                );
            }
        }
    }
    Ok(())
}

/// Modules pass segments on, in either layout.
#[test]
fn modules_pass_them_on() -> Result<()> {
    let segments = numbers(&[&[(1, 20), (2, 39)], &[(0, 9), (1, 50)]])?;
    let shape = shape_of(&segments)?;
    let [q, k, v] = shape.qkv(8, DType::F32)?;
    let heads = HeadStrategies::uniform(MergeStrategy::Similarity);
    let config = CompressionConfig::pretrained();
    let expected = compressed_attention(&q, &k, &v, &heads, &config, &under(&segments))?.output;
    let mut layer = CompressedAttention::new(heads.clone(), config.clone(), Default::default())?;
    layer.set_segments(Some(segments.clone()))?;
    assert_eq!(values(&layer.forward(&q, &k, &v)?)?, values(&expected)?);
    assert!(layer.set_segments(Some(segments.to_dtype(DType::U8)?)).is_err());
    layer.set_segments(None)?;
    assert_ne!(values(&layer.forward(&q, &k, &v)?)?, values(&expected)?);
    let options = AttentionOptions {
        layout: TensorLayout::TokensFirst,
        ..under(&segments)
    };
    let [q, k, v] = [q, k, v].map(|x| x.transpose(1, 2).unwrap().contiguous().unwrap());
    let got = compressed_attention(&q, &k, &v, &heads, &config, &options)?.output;
    assert_close("tokens first", &got.transpose(1, 2)?, &expected, 1e-6, 1e-6)?;
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let segments = numbers(&[&[(1, 3), (2, 3), (0, 2)]])?;
    let shape = shape_of(&segments)?;
    let [q, k, v] = shape.qkv(9, DType::F32)?;
    let config = CompressionConfig::default();
    for (pair, fits) in [(1, true), (2, false), (3, true), (5, false), (6, true)] {
        let mut bits = vec![0u8; 4 * 7];
        bits[7 + pair] = 1;
        let plan = MergePlan::from_indicators(&Tensor::from_vec(bits, (1, 4, 7), &CPU)?, &config)?;
        match attend(&q, &k, &v, &plan, &under(&segments)) {
            Ok(_) => assert!(fits, "pair {pair}"),
            Err(error) => {
                let message = error.to_string();
                let part = format!("got 1 at token {pair} of batch row 0, head 1");
                assert!(!fits && message.contains(&part), "pair {pair}: {message}");
            }
        }
    }
    let heads = HeadStrategies::uniform(MergeStrategy::Similarity);
    let refused = |segments: Tensor, part: &str| {
        let result = compressed_attention(&q, &k, &v, &heads, &config, &under(&segments));
        let message = result.unwrap_err().to_string();
        assert!(
            message.contains("segments: expected") && message.contains(part),
            "{message}"
        );
    };
    refused(segments.narrow(1, 0, 7)?, "(1, 8)");
    refused(segments.to_dtype(DType::I64)?, "I64");
    refused(
        numbers(&[&[(1, 3), (2, 3), (1, 2)]])?,
        "got 1 again at token 6 of batch row 0",
    );
    let observed = CompressionConfig {
        window: 2,
        ..CompressionConfig::calibrated()
    };
    let message = observed_mass(&q, &k, &v, &observed, &under(&segments))
        .unwrap_err()
        .to_string();
    assert!(message.contains("segments: expected None"), "{message}");
    with_thresholds(heads.clone(), &shape, &observed)?;
    // -inf beside hidden tokens is named with its segment.
    let mut bias = vec![0f32; 8];
    bias[4] = f32::NEG_INFINITY;
    let options = AttentionOptions {
        bias: Some(Tensor::from_vec(bias, 8, &CPU)?),
        ..under(&segments)
    };
    let mut bits = vec![0u8; 4 * 7];
    bits[3] = 1;
    let plan = MergePlan::from_indicators(&Tensor::from_vec(bits, (1, 4, 7), &CPU)?, &config)?;
    let message = attend(&q, &k, &v, &plan, &options).unwrap_err().to_string();
    assert!(
        message.contains("batch row 0 from token 3 on") && message.contains("column 1"),
        "{message}"
    );
    Ok(())
}
