//! A bias of columns that have left a row's window: the CPU path against the f64 reference, with its gradient.

use crate::common::inputs::{assert_close, values, Shape};
use crate::common::settings::reference_bits;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{
    attend, AttentionOptions, CompressedKvCache, CompressionConfig, Criterion, Dropout, Fold, GroupRule,
    HeadStrategies, MergePlan, MergeStrategy,
};

const CPU: Device = Device::Cpu;

/// One token, and more than a block; head sizes that fill no register; GQA and MQA.
const SHAPES: [Shape; 5] = [
    Shape(1, 2, 1, 1, 8),
    Shape(2, 2, 1, 2, 16),
    Shape(1, 4, 2, 59, 20),
    Shape(2, 3, 1, 97, 32),
    Shape(1, 2, 2, 257, 16),
];

/// From 0 to -6, and 0.3 here and there: a gate only lowers logits, but any number is a bias.
fn bias(shape: &Shape, dtype: DType) -> Result<Tensor> {
    let &Shape(batch, _, kv_heads, tokens, _) = shape;
    let entry = |i: usize| match i % 11 {
        0 => 0.3,
        _ => -((i * 37 % 101) as f64) / 17.0,
    };
    let entries: Vec<f64> = (0..batch * kv_heads * tokens).map(entry).collect();
    Ok(Tensor::from_vec(entries, (batch, kv_heads, tokens), &CPU)?.to_dtype(dtype)?)
}

fn config(fold: Fold, window: usize) -> CompressionConfig {
    CompressionConfig {
        similarity_threshold: 0.4,
        criterion: Criterion::KeyKey,
        group_rule: GroupRule::Unanimous,
        fold,
        window,
        sinks: 1,
        ..Default::default()
    }
}

/// The options of one case: all that may stand beside a column bias.
fn options(shape: &Shape, case: usize) -> Result<AttentionOptions> {
    let &Shape(batch, heads, _, tokens, _) = shape;
    let plain = AttentionOptions::default();
    Ok(match case {
        0 => plain,
        1 => AttentionOptions {
            softcap: Some(3.0),
            sink_logits: Some(Tensor::arange(0f32, heads as f32, &CPU)?),
            ..plain
        },
        2 => AttentionOptions {
            sliding_window: Some(23),
            softmax_scale: Some(0.5),
            ..plain
        },
        3 => AttentionOptions {
            dropout: Some(Dropout { p: 0.3, seed: 5 }),
            bias: Some((Tensor::arange(0f32, (heads * tokens) as f32, &CPU)?.sin()?).reshape((heads, 1, tokens))?),
            ..plain
        },
        _ => {
            let row = |batch: usize| (0..tokens).map(move |t| (t * 3 / (tokens + 1) + batch) as u32);
            let numbers: Vec<u32> = (0..batch).flat_map(row).collect();
            AttentionOptions {
                segments: Some(Tensor::from_vec(numbers, (batch, tokens), &CPU)?),
                ..plain
            }
        }
    })
}

/// Output and gradients are those of the reference, for every fold, window and option; the query, key and value get the
/// gradients that they get without a tracked bias.
#[test]
fn it_agrees_with_the_reference() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 1e-4), (DType::BF16, 6e-2)] {
        for (seed, shape) in SHAPES.iter().enumerate() {
            for (index, fold) in [Fold::Drop, Fold::Mean, Fold::PairSum].into_iter().enumerate() {
                for (at, window) in [0, 1, 6, 300].into_iter().enumerate() {
                    for case in (0..5).filter(|case| dtype == DType::F64 || (case + index + at) % 5 == seed) {
                        check(shape, &config(fold, window), case, (dtype, tolerance))?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn check(shape: &Shape, config: &CompressionConfig, case: usize, (dtype, tolerance): (DType, f64)) -> Result<()> {
    let what = format!(
        "{shape:?} {:?} window {} case {case} {dtype:?}",
        config.fold, config.window
    );
    let qkv = shape.qkv(7, dtype)?;
    let [_, _, grad] = Shape(shape.0, shape.1, shape.1, shape.3, shape.4).qkv(9, dtype)?;
    let bias_dtype = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let bias = bias(shape, bias_dtype)?;
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let mut options = options(shape, case)?;
    let plan = MergePlan::new(&qkv[0], &qkv[1], &qkv[2], &strategies, config, &options)?;
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
    let (q, k, v, upstream) = (q?, k?, v?, Array4::from_tensor(&grad)?);
    let bits = reference_bits([&q, &k, &v], &strategies, config, &options)?;
    options.column_bias = Some(bias.clone());
    let output = reference::attention(&q, &k, &v, &bits, config, &options)?;
    let (dq, dk, dv) = reference::attention_gradients(&q, &k, &v, &upstream, &bits, config, &options)?;
    let d_bias = reference::column_bias_gradients(&q, &k, &v, &upstream, &bits, config, &options)?;
    let expected = [output, dq, dk, dv].map(|x| x.to_tensor(DType::F64, &CPU));

    let tracked = Var::from_tensor(&bias)?;
    options.column_bias = Some(tracked.as_tensor().clone());
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Var::from_tensor);
    let (q, k, v) = (q?, k?, v?);
    let got = attend(&q, &k, &v, &plan, &options)?;
    let store = (&got * &grad)?.sum_all()?.backward()?;
    let gradient = |var: &Var| store.get(var.as_tensor()).context("no gradient");
    let all = [&got, gradient(&q)?, gradient(&k)?, gradient(&v)?];
    for (name, (got, expected)) in ["output", "dq", "dk", "dv"]
        .into_iter()
        .zip(all.into_iter().zip(expected))
    {
        assert_close(&format!("{what}: {name}"), got, &expected?, tolerance, tolerance)?;
    }
    let got = gradient(&tracked)?;
    assert_eq!((got.dims(), got.dtype()), (bias.dims(), bias_dtype), "{what}");
    let d_bias = Tensor::from_vec(d_bias, bias.dims(), &CPU)?;
    assert_close(&format!("{what}: bias"), got, &d_bias, tolerance, tolerance)?;

    // The bias alone has a gradient, too; and without a tracked one the others are the same bits.
    let alone = attend(&qkv[0], &qkv[1], &qkv[2], &plan, &options)?;
    let store = (&alone * &grad)?.sum_all()?.backward()?;
    let alone = store.get(tracked.as_tensor()).context("no gradient")?;
    assert_eq!(values(alone)?, values(got)?, "{what}");
    options.column_bias = Some(bias);
    let store = (attend(&q, &k, &v, &plan, &options)? * &grad)?.sum_all()?.backward()?;
    for (var, expected) in [&q, &k, &v].into_iter().zip(&all[1..]) {
        assert_eq!(
            values(store.get(var.as_tensor()).context("no gradient")?)?,
            values(expected)?,
            "{what}"
        );
    }
    Ok(())
}

/// The gradient is the slope of the output by finite differences, of tokens that are hidden or never leave the window
/// 0.
#[test]
fn its_gradient_is_a_slope() -> Result<()> {
    let shape = Shape(1, 4, 2, 30, 8);
    let [q, k, v] = shape.qkv(1, DType::F64)?;
    let [_, _, grad] = Shape(1, 4, 4, 30, 8).qkv(2, DType::F64)?;
    let config = config(Fold::Drop, 4);
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let plan = MergePlan::new(&q, &k, &v, &strategies, &config, &Default::default())?;
    let start = bias(&shape, DType::F64)?;
    let value = |bias: &Tensor| -> Result<(Tensor, f64)> {
        let options = AttentionOptions {
            column_bias: Some(bias.clone()),
            ..Default::default()
        };
        let sum = (attend(&q, &k, &v, &plan, &options)? * &grad)?.sum_all()?;
        Ok((sum.clone(), sum.to_scalar::<f64>()?))
    };
    let var = Var::from_tensor(&start)?;
    let gradient = values(
        value(var.as_tensor())?
            .0
            .backward()?
            .get(var.as_tensor())
            .context("no gradient")?,
    )?;
    let (start, hidden) = (values(&start)?, plan.indicators().to_vec3::<u8>()?);
    let step = 1e-5;
    for index in 0..60 {
        let moved = |by: f64| -> Result<f64> {
            let mut numbers = start.clone();
            numbers[index] += by;
            Ok(value(&Tensor::from_vec(numbers, (1, 2, 30), &CPU)?)?.1)
        };
        let slope = (moved(step)? - moved(-step)?) / (2.0 * step);
        assert!(
            (slope - gradient[index]).abs() < 1e-7,
            "{index}: {slope} and {}",
            gradient[index]
        );
        let (kv_head, token) = (index / 30, index % 30);
        let outside = token + 4 + 1 > 29 || hidden[0][2 * kv_head][token] == 1;
        assert_eq!(outside, gradient[index] == 0.0, "{index}");
    }
    Ok(())
}

/// Minus infinity is hiding: the rows are those of a plan that drops the tokens.
#[test]
fn a_faded_token_is_a_dropped_one() -> Result<()> {
    let shape = Shape(1, 2, 1, 80, 16);
    let [q, k, v] = shape.qkv(3, DType::F32)?;
    let config = config(Fold::Drop, 5);
    let hidden: Vec<u8> = (0..79).map(|t| u8::from(t % 3 != 0)).collect();
    let bits = Tensor::new(vec![vec![hidden.clone(), hidden.clone()]], &CPU)?;
    let dropped = attend(
        &q,
        &k,
        &v,
        &MergePlan::from_indicators(&bits, &config)?,
        &Default::default(),
    )?;
    let nothing = MergePlan::from_indicators(&bits.zeros_like()?, &config)?;
    let faded: Vec<f32> = hidden
        .iter()
        .map(|bit| if *bit == 1 { f32::NEG_INFINITY } else { 0.0 })
        .chain([0.0])
        .collect();
    let options = AttentionOptions {
        column_bias: Some(Tensor::from_vec(faded, (1, 1, 80), &CPU)?),
        ..Default::default()
    };
    assert_close("faded", &attend(&q, &k, &v, &nothing, &options)?, &dropped, 1e-6, 1e-6)?;
    Ok(())
}

#[test]
fn biases_of_no_use_are_refused() -> Result<()> {
    let shape = Shape(1, 4, 2, 20, 8);
    let [q, k, v] = shape.qkv(0, DType::F32)?;
    let config = config(Fold::Drop, 4);
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let plan = MergePlan::new(&q, &k, &v, &strategies, &config, &Default::default())?;
    let with = |bias: Tensor| AttentionOptions {
        column_bias: Some(bias),
        ..Default::default()
    };
    let good = bias(&shape, DType::F32)?;
    for (options, part) in [
        (
            with(good.narrow(2, 0, 19)?),
            "column_bias: expected shape (batch, KV heads, tokens) = [1, 2, 20]",
        ),
        (
            with(good.flatten_all()?),
            "column_bias: expected floats of shape (batch, KV heads, tokens)",
        ),
        (with(good.to_dtype(DType::U32)?), "column_bias: expected floats"),
        (
            AttentionOptions {
                causal: false,
                ..with(good.clone())
            },
            "column_bias: expected causal attention",
        ),
    ] {
        let error = attend(&q, &k, &v, &plan, &options).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let mut cache = CompressedKvCache::new(strategies, config, Default::default())?;
    let error = cache
        .append_and_attend(&q, &k, &v, &with(good))
        .unwrap_err()
        .to_string();
    assert!(error.contains("column_bias: expected None for a KV cache"), "{error}");
    Ok(())
}
