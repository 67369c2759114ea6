//! Values of another size than keys: forward, gradients and caches against the reference and against each other.

use crate::common::again::on_every_instruction_set;
use crate::common::caches::{chunked, part_options, strategies};
use crate::common::files::TempFile;
use crate::common::inputs::{assert_close, laid_out, values, Memory, Shape};
use crate::common::judge::differentiate;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{
    attend, AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Criterion, Dropout, Fold,
    HeadStrategies, MergePlan, MergeStrategy,
};

const CPU: Device = Device::Cpu;

/// Each with the size of values: smaller and larger ones, sizes that fill no register, one number.
const SHAPES: [(Shape, usize); 7] = [
    (Shape(1, 1, 1, 1, 32), 59),
    (Shape(2, 2, 1, 2, 59), 32),
    (Shape(1, 4, 2, 59, 32), 59),
    (Shape(2, 2, 1, 97, 64), 128),
    (Shape(1, 4, 1, 257, 48), 32),
    (Shape(1, 2, 2, 129, 59), 1),
    (Shape(1, 1, 1, 300, 20), 77),
];

/// Query and key of the shape, and values of their own size.
fn inputs((shape, value_dim): (Shape, usize), seed: u64, dtype: DType) -> Result<[Tensor; 3]> {
    let Shape(batch, heads, kv_heads, tokens, _) = shape;
    let [q, k, _] = shape.qkv(seed, dtype)?;
    let [_, _, v] = Shape(batch, heads, kv_heads, tokens, value_dim).qkv(seed + 1, dtype)?;
    Ok([q, k, v])
}

/// Every fold, with and without a window, one criterion that reads values, and heads that are off.
fn configs() -> Vec<(MergeStrategy, CompressionConfig)> {
    let merging = |fold, window| CompressionConfig {
        fold,
        window,
        similarity_threshold: 0.35,
        ..CompressionConfig::pretrained()
    };
    let mut configs = vec![
        (MergeStrategy::Off, CompressionConfig::default()),
        (MergeStrategy::Similarity, CompressionConfig::calibrated()),
    ];
    for fold in [Fold::PairSum, Fold::Mean, Fold::Drop] {
        configs.extend([0, 9].map(|window| (MergeStrategy::Similarity, merging(fold, window))));
    }
    configs
}

fn options(shape: &Shape, kind: usize) -> Result<AttentionOptions> {
    let &Shape(_, heads, _, tokens, _) = shape;
    let bias = (0..tokens * tokens).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0);
    Ok(match kind {
        0 => AttentionOptions::default(),
        1 => AttentionOptions {
            bias: Some(Tensor::from_iter(bias, &CPU)?.reshape((tokens, tokens))?),
            softcap: Some(7.0),
            ..Default::default()
        },
        _ => AttentionOptions {
            dropout: Some(Dropout { p: 0.2, seed: 5 }),
            sink_logits: Some(Tensor::ones(heads, DType::F32, &CPU)?),
            ..Default::default()
        },
    })
}

fn agrees(dtype: DType, tolerance: f64, memory: Memory) -> Result<()> {
    for (index, (strategy, config)) in configs().into_iter().enumerate() {
        for (seed, case) in SHAPES.into_iter().enumerate() {
            let (shape, value_dim) = case;
            let strategies = strategies(strategy as u8, &shape, &config)?;
            let options = options(&shape, (index + seed) % 3)?;
            let qkv = inputs(case, seed as u64, dtype)?;
            let what = format!("{strategy:?} {:?} {} {case:?} {dtype:?}", config.fold, config.window);
            let [q, k, v] = &qkv;
            let array = |x: &Tensor| Array4::from_tensor(x);
            let (aq, ak, av) = (array(q)?, array(k)?, array(v)?);
            let plan = MergePlan::new(q, k, v, &strategies, &config, &options)?;
            let bits = match config.criterion {
                Criterion::ObservedMass => {
                    reference::observed_indicators(&aq, &ak, &av, &strategies, &config, &options)?
                }
                Criterion::KeyKey | Criterion::QueryKey | Criterion::Given => {
                    reference::indicators_under(&aq, &ak, &strategies, &config, options.bias.as_ref())?
                }
            };
            assert_eq!(
                bits.to_tensor(&CPU)?.to_vec3::<u8>()?,
                plan.indicators().to_vec3::<u8>()?,
                "{what}"
            );
            let [_, _, grad] = Shape(shape.0, shape.1, shape.1, shape.3, value_dim).qkv(9, dtype)?;
            let given = match memory {
                Memory::Fused => qkv.clone(),
                memory => laid_out(&qkv, memory)?,
            };
            let got = differentiate(&given, &grad, |q, k, v| Ok(attend(q, k, v, &plan, &options)?))?;
            assert_eq!(got[0].dims(), grad.dims(), "{what}");
            let grad = array(&grad)?;
            let output = reference::attention(&aq, &ak, &av, &bits, &config, &options)?;
            let (dq, dk, dv) = reference::attention_gradients(&aq, &ak, &av, &grad, &bits, &config, &options)?;
            for (name, got, expected) in [
                ("output", &got[0], output),
                ("dq", &got[1], dq),
                ("dk", &got[2], dk),
                ("dv", &got[3], dv),
            ] {
                let expected = expected.to_tensor(DType::F64, &CPU)?;
                let largest = values(&expected)?.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
                assert_close(
                    &format!("{what} {name}"),
                    got,
                    &expected,
                    tolerance * largest,
                    tolerance,
                )?;
            }
        }
    }
    Ok(())
}

#[test]
fn f64_agrees_with_the_reference() -> Result<()> {
    agrees(DType::F64, 1e-12, Memory::TokenMajor)
}

#[test]
fn f32_agrees_with_the_reference() -> Result<()> {
    agrees(DType::F32, 2e-5, Memory::HeadMajor)
}

#[test]
fn halves_agree_with_the_reference() -> Result<()> {
    agrees(DType::F16, 3e-3, Memory::HeadMajor)?;
    agrees(DType::BF16, 2e-2, Memory::TokenMajor)
}

#[test]
fn every_instruction_set_agrees() -> Result<()> {
    on_every_instruction_set(module_path!(), &["f32_agrees_with_the_reference"])
}

/// Any chunks give the rows of the whole call, in every storage; a saved cache goes on bit for bit.
#[test]
fn caches_agree_with_the_whole_call() -> Result<()> {
    for (dtype, storage, tolerance) in [
        (DType::F32, None, 2e-5),
        (DType::F64, None, 1e-12),
        (DType::BF16, None, 3e-2),
        (DType::F32, Some(DType::F16), 5e-3),
    ] {
        for (strategy, config) in configs() {
            for (seed, case) in SHAPES.into_iter().enumerate() {
                let (shape, value_dim) = case;
                // Rounded keys and values may be decided otherwise.
                if storage.is_some() && config.criterion.observes() {
                    continue;
                }
                let strategies = strategies(strategy as u8, &shape, &config)?;
                let mut qkv = inputs(case, seed as u64, dtype)?;
                if let Some(storage) = storage {
                    for x in &mut qkv {
                        *x = x.to_dtype(storage)?.to_dtype(dtype)?;
                    }
                }
                let [q, k, v] = &qkv;
                for kind in [0, 1] {
                    let options = options(&shape, kind)?;
                    let plan = MergePlan::new(q, k, v, &strategies, &config, &options)?;
                    let expected = attend(q, k, v, &plan, &options)?;
                    for chunks in [&[1][..], &[40, 1, 1, 90], &[1000]] {
                        let what = format!("{strategy:?} {:?} {case:?} {dtype:?} {chunks:?}", config.fold);
                        let options_of = CacheOptions {
                            storage: storage.map(TryInto::try_into).transpose()?,
                            ..Default::default()
                        };
                        let mut cache = CompressedKvCache::new(strategies.clone(), config.clone(), options_of)?;
                        let got = chunked(&mut cache, &qkv, chunks, |start, count| {
                            part_options(&options, start, count)
                        })?;
                        assert_close(&what, &got, &expected, tolerance, tolerance)?;
                        let Shape(batch, _, kv_heads, tokens, dim) = shape;
                        let size = storage.unwrap_or(dtype).size_in_bytes();
                        let dense = batch * kv_heads * tokens * (dim + value_dim) * size;
                        assert_eq!(cache.bytes_dense(), dense, "{what}");
                        let file = TempFile::new();
                        cache.save(&file.0)?;
                        let mut loaded = CompressedKvCache::load(&file.0, &CPU)?;
                        let next = [q.narrow(2, 0, 1)?, k.narrow(2, 0, 1)?, v.narrow(2, 0, 1)?];
                        let [a, b] = [&mut cache, &mut loaded].map(|cache| {
                            let [q, k, v] = &next;
                            cache.append_and_attend(q, k, v, &Default::default())
                        });
                        assert_eq!(values(&a?)?, values(&b?)?, "{what}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// A cache refuses values of another size than its own, and stays as it was; one that never merges can be cut back.
#[test]
fn a_cache_keeps_its_value_size() -> Result<()> {
    let case = (Shape(1, 2, 1, 30, 16), 8);
    let [q, k, v] = inputs(case, 1, DType::F32)?;
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let mut cache = CompressedKvCache::new(off, CompressionConfig::default(), Default::default())?;
    cache.append_and_attend(&q, &k, &v, &Default::default())?;
    let message = cache
        .append_and_attend(&q, &k, &k, &Default::default())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("value_dim: Some(8)") && message.contains("value_dim: None"),
        "{message}"
    );
    assert_eq!(cache.seq_len(), 30);
    cache.truncate(20)?;
    let again = [q.narrow(2, 20, 10)?, k.narrow(2, 20, 10)?, v.narrow(2, 20, 10)?];
    let mut once = CompressedKvCache::new(cache.strategies().clone(), cache.config().clone(), Default::default())?;
    let whole = once.append_and_attend(&q, &k, &v, &Default::default())?;
    let got = cache.append_and_attend(&again[0], &again[1], &again[2], &Default::default())?;
    assert_close("after a cut", &got, &whole.narrow(2, 20, 10)?, 1e-5, 1e-5)?;
    Ok(())
}

/// Values of another size in segments: rows and gradients are those of each segment alone.
#[test]
fn segments_are_each_alone() -> Result<()> {
    for value_dim in [5, 24] {
        let case = (Shape(2, 4, 2, 60, 16), value_dim);
        let (config, qkv) = (CompressionConfig::pretrained(), inputs(case, 3, DType::F64)?);
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        let [_, _, grad] = Shape(2, 4, 4, 60, value_dim).qkv(9, DType::F64)?;
        let numbers = |first: u32| (0..60u32).map(move |t| if t < first { 1u32 } else { 2 });
        let options = AttentionOptions {
            segments: Some(Tensor::from_vec(
                numbers(25).chain(numbers(40)).collect(),
                (2, 60),
                &CPU,
            )?),
            ..Default::default()
        };
        let run = |qkv: &[Tensor; 3], grad: &Tensor, options: &AttentionOptions| {
            differentiate(qkv, grad, |q, k, v| {
                let plan = MergePlan::new(q, k, v, &strategies, &config, options)?;
                Ok(attend(q, k, v, &plan, options)?)
            })
        };
        let whole = run(&qkv, &grad, &options)?;
        for (batch, start, count) in [(0, 0, 25), (0, 25, 35), (1, 0, 40), (1, 40, 20)] {
            let cut = |x: &Tensor| x.narrow(0, batch, 1)?.narrow(2, start, count);
            let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(cut);
            let alone = run(&[q?, k?, v?], &cut(&grad)?, &Default::default())?;
            for (name, (whole, alone)) in ["output", "dq", "dk", "dv"].into_iter().zip(whole.iter().zip(&alone)) {
                assert_close(
                    &format!("{name}, {value_dim}, {batch}, {start}"),
                    &cut(whole)?,
                    alone,
                    1e-12,
                    1e-12,
                )?;
            }
        }
    }
    Ok(())
}
