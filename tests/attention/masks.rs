//! Columns that a bias hides and does not hide: -inf, the dtype's least number, padding, and tokens that would merge
//! across a mask.

use crate::common::inputs::{assert_close, values, Shape};
use anyhow::Result;
use candle_core::{DType, Device, IndexOp, Tensor, Var};
use candle_sfattention::{
    attend, AttentionOptions, CompressedAttention, CompressedKvCache, CompressionConfig, Criterion, Fold, GroupRule,
    HeadStrategies, MergePlan, MergeStrategy,
};

const CPU: Device = Device::Cpu;
const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

fn under(bias: Tensor) -> AttentionOptions {
    AttentionOptions {
        bias: Some(bias),
        ..Default::default()
    }
}

fn layer(strategy: MergeStrategy, config: &CompressionConfig, bias: &Tensor) -> Result<CompressedAttention> {
    let strategies = HeadStrategies::uniform(strategy);
    Ok(CompressedAttention::new(
        strategies,
        config.clone(),
        under(bias.clone()),
    )?)
}

/// The same through a cache, in chunks of `chunk` tokens.
fn cached(
    [q, k, v]: [&Tensor; 3],
    (strategy, config): (MergeStrategy, &CompressionConfig),
    bias: &Tensor,
    chunk: usize,
) -> Result<Tensor> {
    let tokens = q.dim(2)?;
    let mut cache = CompressedKvCache::new(HeadStrategies::uniform(strategy), config.clone(), Default::default())?;
    let bias = bias.broadcast_as((1, 1, tokens, tokens))?;
    let mut rows = Vec::new();
    for start in (0..tokens).step_by(chunk) {
        let count = chunk.min(tokens - start);
        let [q, k, v] = [q, k, v].map(|x| x.narrow(2, start, count));
        let bias = bias.narrow(2, start, count)?.narrow(3, 0, start + count)?;
        rows.push(cache.append_and_attend(&q?, &k?, &v?, &under(bias))?);
    }
    Ok(Tensor::cat(&rows, 2)?)
}

fn least(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::MIN,
        DType::F32 => f32::MIN.into(),
        DType::BF16 => half::bf16::MIN.into(),
        _ => half::f16::MIN.into(),
    }
}

/// A row whose every logit is the least number is the softmax of equal logits; beside a bias of 0 such a column has no
/// weight.
#[test]
fn the_least_number_as_a_mask_is_finite() -> Result<()> {
    for dtype in DTYPES {
        let v = Tensor::from_vec((0..48).map(f64::from).collect(), (1, 1, 3, 16), &CPU)?.to_dtype(dtype)?;
        // A dot product is not rounded away beside the least number of f16.
        let qk = (v.clone() * if dtype == DType::F16 { 0.0 } else { 1e-3 })?;
        let bias = Tensor::new(&[least(dtype), least(dtype), 0.0], &CPU)?.to_dtype(dtype)?;
        let whole = layer(MergeStrategy::Off, &CompressionConfig::default(), &bias)?.forward(&qk, &qk, &v)?;
        let off = (MergeStrategy::Off, &CompressionConfig::default());
        for output in [
            whole,
            cached([&qk, &qk, &v], off, &bias, 1)?,
            cached([&qk, &qk, &v], off, &bias, 3)?,
        ] {
            let rows = values(&output)?;
            for d in 0..16 {
                let expected = [d as f64, d as f64 + 8.0, d as f64 + 32.0];
                for (row, expected) in expected.iter().enumerate() {
                    let got = rows[row * 16 + d];
                    assert!(
                        (got - expected).abs() <= 1e-5 * expected,
                        "{dtype:?} row {row}: {got} for {expected}"
                    );
                }
            }
        }
    }
    Ok(())
}

/// The larger of two masks wins, at any size.
#[test]
fn huge_biases_keep_their_order() -> Result<()> {
    let v = Tensor::new(&[1f32, 2.0, 3.0], &CPU)?.reshape((1, 1, 3, 1))?;
    for (biases, expected) in [
        ([f32::MIN, -3e38, -3.2e38], [1.0, 2.0, 2.0]),
        ([-1e38, f32::MIN, -3e38], [1.0, 1.0, 1.0]),
        ([3e38, f32::MAX, 1e38], [1.0, 2.0, 2.0]),
    ] {
        let bias = Tensor::new(&biases, &CPU)?;
        let rows = layer(MergeStrategy::Off, &CompressionConfig::default(), &bias)?.forward(&v, &v, &v)?;
        assert_eq!(values(&rows)?, expected, "{biases:?}");
    }
    Ok(())
}

/// Rows whose every column has the same huge bias, edges among them: the bias is the same number everywhere.
#[test]
fn one_huge_bias_for_all_is_none() -> Result<()> {
    let tokens = 70;
    for dtype in DTYPES {
        let [q, k, v] = Shape(1, 1, 1, tokens, 32).qkv(8, dtype)?;
        let [q, k] = [(q * 1e-3)?, (k * 1e-3)?];
        for huge in [-1e20, -1e30, -1e37, f64::from(f32::MIN)] {
            let bias = Tensor::full(huge, (1, tokens), &CPU)?.to_dtype(DType::F32)?;
            for (fold, window) in [(Fold::Drop, 0), (Fold::Drop, 9), (Fold::PairSum, 0)] {
                let config = CompressionConfig {
                    fold,
                    window,
                    ..Default::default()
                };
                let bits: Vec<u8> = (0..tokens - 1).map(|t| u8::from(t % 3 == 1)).collect();
                let plan = MergePlan::from_indicators(&Tensor::from_vec(bits, (1, 1, tokens - 1), &CPU)?, &config)?;
                let got = attend(&q, &k, &v, &plan, &under(bias.clone()))?;
                let expected = attend(&q, &k, &v, &plan, &Default::default())?;
                assert_close(
                    &format!("{dtype:?} {huge:e} {fold:?} {window}"),
                    &got,
                    &expected,
                    0.02,
                    0.02,
                )?;
            }
        }
    }
    Ok(())
}

/// A bias in f64 beside tensors in f32: its larger numbers do not become infinite.
#[test]
fn a_finite_bias_of_a_wider_dtype_is_finite() -> Result<()> {
    let v = Tensor::new(&[1f32, 3.0, 5.0], &CPU)?.reshape((1, 1, 3, 1))?;
    let off = (MergeStrategy::Off, &CompressionConfig::default());
    let bias = Tensor::new(&[f64::MIN, f64::MIN, 0.0], &CPU)?;
    for rows in [
        layer(off.0, off.1, &bias)?.forward(&v, &v, &v)?,
        cached([&v, &v, &v], off, &bias, 2)?,
    ] {
        assert_eq!(values(&rows)?, [1.0, 2.0, 5.0]);
    }
    let bias = Tensor::new(&[f64::NEG_INFINITY, f64::NAN, 0.0], &CPU)?;
    let rows = values(&layer(off.0, off.1, &bias)?.forward(&v, &v, &v)?)?;
    assert!(rows[0] == 0.0 && rows[1].is_nan() && rows[2].is_nan(), "{rows:?}");
    Ok(())
}

/// A padded batch: rows of padding are zeros or means of padding; the other rows equal those of the sequence alone.
#[test]
fn left_padding_leaves_the_other_rows_alone_where_nothing_merges() -> Result<()> {
    let (tokens, dim, padding) = (90, 32, 37);
    for dtype in DTYPES {
        let qkv = Shape(1, 4, 2, tokens, dim).qkv(5, dtype)?;
        for hidden in [f64::NEG_INFINITY, least(dtype)] {
            let bias: Vec<f64> = (0..tokens).map(|t| if t < padding { hidden } else { 0.0 }).collect();
            let bias = Tensor::from_vec(bias, tokens, &CPU)?.to_dtype(dtype)?;
            let plan = layer(MergeStrategy::Off, &CompressionConfig::pretrained(), &bias)?;
            let whole = plan.forward(&qkv[0], &qkv[1], &qkv[2])?;
            let alone: Vec<Tensor> = qkv
                .iter()
                .map(|x| x.narrow(2, padding, tokens - padding))
                .collect::<candle_core::Result<_>>()?;
            let no_bias = CompressedAttention::new(
                HeadStrategies::uniform(MergeStrategy::Off),
                CompressionConfig::pretrained(),
                Default::default(),
            )?;
            let expected = no_bias.forward(&alone[0], &alone[1], &alone[2])?;
            let tolerance = if dtype == DType::BF16 { 1.0 / 128.0 } else { 1e-3 };
            let what = format!("{dtype:?} {hidden}");
            assert_close(
                &what,
                &whole.narrow(2, padding, tokens - padding)?,
                &expected,
                tolerance,
                tolerance,
            )?;
            let padded = values(&whole.narrow(2, 0, padding)?)?;
            assert!(
                padded
                    .iter()
                    .all(|x| x.is_finite() && (hidden.is_finite() || *x == 0.0)),
                "{what}"
            );
        }
    }
    Ok(())
}

/// A row that sees nothing sends no gradient, even if the loss reads it.
#[test]
fn rows_that_see_nothing_send_no_gradient() -> Result<()> {
    let (tokens, dim, padding) = (70, 16, 5);
    for dtype in DTYPES {
        let qkv = Shape(1, 2, 1, tokens, dim).qkv(6, dtype)?;
        let vars = [&qkv[0], &qkv[1], &qkv[2]].map(|x| Var::from_tensor(x).unwrap());
        for hidden in [f64::NEG_INFINITY, least(dtype)] {
            let bias: Vec<f64> = (0..tokens).map(|t| if t < padding { hidden } else { 0.0 }).collect();
            let bias = Tensor::from_vec(bias, tokens, &CPU)?.to_dtype(dtype)?;
            let layer = layer(MergeStrategy::Off, &CompressionConfig::default(), &bias)?;
            for from in [0, padding] {
                let rows = layer.forward(&vars[0], &vars[1], &vars[2])?;
                let store = rows.narrow(2, from, tokens - from)?.sum_all()?.backward()?;
                for (name, var) in ["dq", "dk", "dv"].iter().zip(&vars) {
                    let gradient = values(store.get(var).unwrap())?;
                    let what = format!("{dtype:?} {hidden} from row {from}: {name}");
                    assert!(gradient.iter().all(|x| x.is_finite()), "{what}");
                    let of_padding = values(&store.get(var).unwrap().narrow(2, 0, padding)?)?;
                    let none = hidden.is_infinite() || from == padding;
                    assert!(!none || of_padding.iter().all(|x| *x == 0.0), "{what}");
                    assert!(gradient.iter().any(|x| *x != 0.0), "{what}");
                }
            }
        }
    }
    Ok(())
}

fn merging(fold: Fold) -> [CompressionConfig; 3] {
    let key = CompressionConfig {
        fold,
        criterion: Criterion::KeyKey,
        group_rule: GroupRule::Unanimous,
        ..Default::default()
    };
    let paper = CompressionConfig {
        fold,
        ..Default::default()
    };
    let window = CompressionConfig {
        window: 2,
        ..key.clone()
    };
    [paper, key, window]
}

/// All tokens are alike, and the first ones are hidden: none of them comes back inside its neighbour.
#[test]
fn a_hidden_token_stays_hidden() -> Result<()> {
    for dtype in DTYPES {
        for fold in [Fold::PairSum, Fold::Mean, Fold::Drop] {
            for config in merging(fold) {
                for padding in 1..4 {
                    let tokens = padding + 1;
                    let same = Tensor::new(&[1f64, 0.0], &CPU)?
                        .broadcast_as((1, 1, tokens, 2))?
                        .to_dtype(dtype)?;
                    let mut data = vec![100.0; 2 * padding];
                    data.extend([1.0, 2.0]);
                    let v = Tensor::from_vec(data, (1, 1, tokens, 2), &CPU)?.to_dtype(dtype)?;
                    let mut bias = vec![f32::NEG_INFINITY; padding];
                    bias.push(0.0);
                    let bias = Tensor::from_vec(bias, tokens, &CPU)?;
                    let on = (MergeStrategy::Similarity, &config);
                    let same = same.contiguous()?;
                    for output in [
                        layer(on.0, on.1, &bias)?.forward(&same, &same, &v)?,
                        cached([&same, &same, &v], on, &bias, 1)?,
                        cached([&same, &same, &v], on, &bias, tokens)?,
                    ] {
                        let rows = values(&output)?;
                        let what = format!("{dtype:?} {config:?} after {padding}");
                        assert_eq!(rows[2 * padding..], [1.0, 2.0], "{what}");
                        assert!(rows[..2 * padding].iter().all(|x| *x == 0.0), "{what}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// Hidden tokens beside -inf are refused, under any criterion; a cache is then unchanged.
#[test]
fn hidden_tokens_beside_minus_infinity_are_refused() -> Result<()> {
    let tokens = 6;
    let same = Tensor::ones((1, 2, tokens, 4), DType::F32, &CPU)?;
    let mut entries = vec![0f32; tokens];
    entries[0] = f32::NEG_INFINITY;
    let bias = Tensor::from_vec(entries, tokens, &CPU)?;
    for fold in [Fold::PairSum, Fold::Mean, Fold::Drop] {
        for config in merging(fold) {
            let refused = |result: candle_core::Result<Tensor>| {
                let message = result.unwrap_err().to_string();
                let parts = ["expected no -inf", "row 0, column 0", "segment", "MergeStrategy::Off"];
                assert!(parts.iter().all(|part| message.contains(part)), "{config:?}: {message}");
            };
            let on = MergeStrategy::Similarity;
            refused(layer(on, &config, &bias)?.forward(&same, &same, &same));
            let bits = Tensor::zeros((1, 2, tokens - 1), DType::U8, &CPU)?;
            let none = MergePlan::from_indicators(&bits, &config)?;
            attend(&same, &same, &same, &none, &under(bias.clone()))?;
            let bits = Tensor::from_vec(vec![0u8, 0, 0, 0, 0, 0, 0, 1, 0, 0], (1, 2, tokens - 1), &CPU)?;
            let own = MergePlan::from_indicators(&bits, &config)?;
            refused(attend(&same, &same, &same, &own, &under(bias.clone())));
            // Only heads that hide tokens are checked.
            let per_head = Tensor::stack(&[&bias, &bias.zeros_like()?], 0)?.reshape((2, 1, tokens))?;
            attend(&same, &same, &same, &own, &under(per_head))?;

            let mut cache = CompressedKvCache::new(HeadStrategies::uniform(on), config.clone(), Default::default())?;
            let rows = |start: usize, count: usize| same.narrow(2, start, count);
            cache.append_and_attend(&rows(0, 4)?, &rows(0, 4)?, &rows(0, 4)?, &Default::default())?;
            let mut other = cache.clone();
            let part = |start: usize, count: usize| bias.narrow(0, 0, start + count);
            let message = cache.append_and_attend(&rows(4, 2)?, &rows(4, 2)?, &rows(4, 2)?, &under(part(4, 2)?));
            assert!(message.unwrap_err().to_string().contains("segment"), "{config:?}");
            assert_eq!(cache.seq_len(), 4);
            let [got, expected] = [&mut cache, &mut other].map(|cache| {
                let x = rows(4, 2).unwrap();
                values(&cache.append_and_attend(&x, &x, &x, &Default::default()).unwrap()).unwrap()
            });
            assert_eq!(got, expected);
        }
    }
    Ok(())
}

/// A causal mask as a bias adds nothing to causality: it changes no bit, with and without merging.
#[test]
fn a_causal_mask_is_not_in_the_way_of_merging() -> Result<()> {
    let tokens = 80;
    let qkv = Shape(2, 4, 2, tokens, 16).qkv(9, DType::F32)?;
    let causal = |i: usize| {
        if i % tokens > i / tokens {
            f32::NEG_INFINITY
        } else {
            0.0
        }
    };
    let mask = Tensor::from_vec((0..tokens * tokens).map(causal).collect(), (tokens, tokens), &CPU)?;
    for fold in [Fold::PairSum, Fold::Mean, Fold::Drop] {
        let config = CompressionConfig {
            fold,
            similarity_threshold: 0.4,
            ..CompressionConfig::pretrained()
        };
        let plain = CompressedAttention::new(
            HeadStrategies::uniform(MergeStrategy::Similarity),
            config.clone(),
            Default::default(),
        )?;
        let (expected, plan) = plain.forward_with_plan(&qkv[0], &qkv[1], &qkv[2])?;
        assert!(plan.stats()?.hidden > 0);
        let got = layer(MergeStrategy::Similarity, &config, &mask)?.forward(&qkv[0], &qkv[1], &qkv[2])?;
        assert_close(&format!("{fold:?}"), &got, &expected, 1e-6, 1e-6)?;
        assert!(got.i((0, 0, 0))?.sum_all()?.to_scalar::<f32>()?.is_finite());
    }
    Ok(())
}
