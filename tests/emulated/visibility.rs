//! What a row may see, under the emulator: segments, fewer queries than keys, and values of another size, forward and
//! gradients against the f64 reference. Sliding windows are in `sliding_window.rs`, caches in `sliding_cache.rs`.

use crate::common::inputs::Shape;
use crate::common::judge::differentiate;
use crate::common::kernels::Kernels;
use crate::common::settings::Setting;
use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_sfattention::emulation;
use candle_sfattention::{AttentionOptions, Dropout, Fold, MergePlan, MergeStrategy};

use super::exact::{all_options, bits, setting, slides, Exact, CPU};

/// Output and gradients of a composed call against the reference.
fn composes(
    what: &str,
    qkv: &[Tensor; 3],
    setting: &Setting,
    bits: &Tensor,
    options: &AttentionOptions,
    kernels: Kernels,
) -> Result<()> {
    let plan = MergePlan::from_indicators(bits, &setting.config)?;
    let expected = Exact::new(qkv, bits, &setting.config, options)?;
    let got = kernels.run(|| {
        differentiate(qkv, &expected.grad, |q, k, v| {
            Ok(emulation::composed([q, k, v], &plan, options)?)
        })
    })?;
    expected.check(what, [&got[0], &got[1], &got[2], &got[3]], qkv[0].dtype())
}

/// Heads that are off, and folds with and without a window.
fn folded() -> Vec<Setting> {
    vec![
        setting(MergeStrategy::Off, Fold::Drop, 0),
        setting(MergeStrategy::Similarity, Fold::Mean, 5),
        setting(MergeStrategy::Similarity, Fold::Drop, 9),
        setting(MergeStrategy::Similarity, Fold::PairSum, 0),
    ]
}

/// Plain options, a sliding window, and one with all other options.
fn each_options(shape: &Shape) -> Result<[AttentionOptions; 3]> {
    let all = AttentionOptions {
        sliding_window: Some(30),
        ..all_options(shape)?
    };
    Ok([AttentionOptions::default(), slides(11), all])
}

/// Values that are smaller and larger than keys, and sizes that no kernel has.
#[test]
fn values_of_another_size() -> Result<()> {
    for (seed, (shape, value_dim)) in [
        (Shape(2, 2, 1, 59, 64), 24),
        (Shape(1, 4, 2, 97, 24), 96),
        (Shape(1, 2, 2, 70, 20), 59),
        (Shape(1, 2, 1, 2, 8), 1),
    ]
    .into_iter()
    .enumerate()
    {
        let Shape(batch, heads, kv_heads, tokens, _) = shape;
        for dtype in [DType::F32, DType::BF16] {
            let [q, k, _] = shape.qkv(seed as u64, dtype)?;
            let [_, _, v] = Shape(batch, heads, kv_heads, tokens, value_dim).qkv(seed as u64 + 1, dtype)?;
            let qkv = [q, k, v];
            for (index, setting) in folded().into_iter().enumerate() {
                let options = &each_options(&shape)?[(index + seed) % 3];
                let bits = bits(&qkv, &setting, options)?;
                let kernels = Kernels::ALL[if options.bias.is_some() { 0 } else { index % 3 }];
                let what = format!("{:?} {shape:?} {value_dim} {dtype:?} {kernels:?}", setting.config.fold);
                composes(&what, &qkv, &setting, &bits, options, kernels)?;
            }
        }
    }
    Ok(())
}

/// The last rows of a causal call: their bias and dropout are those of the whole call's last rows.
#[test]
fn fewer_queries_than_keys() -> Result<()> {
    for (seed, (shape, counts)) in [
        (Shape(1, 2, 1, 2, 32), [1, 1]),
        (Shape(2, 4, 2, 97, 24), [1, 58]),
        (Shape(1, 2, 1, 300, 64), [65, 140]),
        (Shape(1, 1, 1, 140, 128), [7, 80]),
        (Shape(1, 1, 1, 150, 256), [1, 70]),
    ]
    .into_iter()
    .enumerate()
    {
        for dtype in [DType::F32, DType::F16] {
            let [q, k, v] = shape.qkv(seed as u64, dtype)?;
            for (index, setting) in folded().into_iter().take(3).enumerate() {
                let queries = counts[index % 2];
                let last = |x: &Tensor, axis| x.narrow(axis, x.dim(axis)? - queries, queries);
                let whole = &each_options(&shape)?[(index + seed) % 3];
                let options = AttentionOptions {
                    bias: whole.bias.as_ref().map(|bias| last(bias, 1)).transpose()?,
                    ..whole.clone()
                };
                let qkv = [last(&q, 2)?, k.clone(), v.clone()];
                let bits = bits(&qkv, &setting, &options)?;
                let strategies = setting.strategies(&shape)?;
                let decided = emulation::decide([&qkv[0], &k, &v], &strategies, &setting.config, &options)?;
                assert_eq!(decided.to_vec3::<u8>()?, bits.to_vec3::<u8>()?);
                let kernels = Kernels::ALL[if options.bias.is_some() { 0 } else { (index + seed) % 3 }];
                let what = format!("{:?} {shape:?} {queries} {dtype:?} {kernels:?}", setting.config.fold);
                composes(&what, &qkv, &setting, &bits, &options, kernels)?;
            }
        }
    }
    Ok(())
}

/// Rows that see another sequence, where every head is off: fewer of them than keys, or more.
#[test]
fn all_rows_see_another_sequence() -> Result<()> {
    for (queries, tokens) in [(1, 59), (97, 31), (70, 257), (5, 1)] {
        for dtype in [DType::F32, DType::BF16] {
            let [q, _, _] = Shape(2, 4, 4, queries, 32).qkv(1, dtype)?;
            let [_, k, v] = Shape(2, 4, 2, tokens, 32).qkv(2, dtype)?;
            let bias = (0..queries * tokens).map(|i| (i % 7) as f32 / 3.0);
            let options = AttentionOptions {
                causal: false,
                softmax_scale: Some(0.3),
                bias: Some(Tensor::from_iter(bias, &CPU)?.reshape((queries, tokens))?),
                dropout: Some(Dropout { p: 0.2, seed: 5 }),
                ..Default::default()
            };
            let none = Tensor::zeros((2, 4, tokens - 1), DType::U8, &CPU)?;
            let (setting, what) = (&folded()[0], format!("{queries} of {tokens} {dtype:?}"));
            composes(&what, &[q, k, v], setting, &none, &options, Kernels::Plain)?;
        }
    }
    let [q, _, _] = Shape(1, 1, 1, 9, 8).qkv(1, DType::F32)?;
    let [_, k, v] = Shape(1, 1, 1, 4, 8).qkv(1, DType::F32)?;
    let plan = MergePlan::from_indicators(&Tensor::zeros((1, 1, 3), DType::U8, &CPU)?, &Default::default())?;
    let options = AttentionOptions {
        causal: false,
        ..slides(2)
    };
    let error = emulation::composed([&q, &k, &v], &plan, &options)
        .unwrap_err()
        .to_string();
    assert!(error.contains("9 queries and 4 keys"), "{error}");
    Ok(())
}

/// Packed documents, left and right padding, segments of one token, and a row of padding alone.
#[test]
fn segments_are_computed_alone() -> Result<()> {
    let numbers = |runs: &[&[(u32, usize)]]| -> Result<Tensor> {
        let row = |runs: &&[(u32, usize)]| {
            let numbers: Vec<u32> = runs.iter().flat_map(|(number, count)| vec![*number; *count]).collect();
            let count = numbers.len();
            Tensor::from_vec(numbers, (1, count), &CPU)
        };
        let rows: Vec<Tensor> = runs.iter().map(row).collect::<candle_core::Result<_>>()?;
        Ok(Tensor::cat(&rows, 0)?)
    };
    for (seed, segments) in [
        numbers(&[&[(1, 37), (2, 1), (3, 20), (0, 12)], &[(0, 9), (5, 61)], &[(0, 70)]])?,
        numbers(&[&[(1, 1), (2, 1), (0, 1), (3, 129)]])?,
    ]
    .into_iter()
    .enumerate()
    {
        let (batch, tokens) = segments.dims2()?;
        let shape = Shape(batch, 4, 2, tokens, 24);
        for (index, setting) in folded().into_iter().enumerate() {
            for dtype in [DType::F32, DType::BF16] {
                let options = AttentionOptions {
                    segments: Some(segments.clone()),
                    ..each_options(&shape)?[(index + seed) % 3].clone()
                };
                let qkv = shape.qkv(seed as u64, dtype)?;
                let bits = bits(&qkv, &setting, &options)?;
                let kernels = Kernels::ALL[if options.bias.is_some() { 0 } else { index % 3 }];
                let what = format!("{:?} {shape:?} {dtype:?} {kernels:?}", setting.config.fold);
                composes(&what, &qkv, &setting, &bits, &options, kernels)?;
            }
        }
    }
    Ok(())
}
