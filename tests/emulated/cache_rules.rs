//! Values of another size than keys in the KV cache's kernels under the emulator: any chunks give the reference's rows,
//! lists are as long as on the CPU, and caches move.

use crate::common::caches::{chunked as chunked_on_cpu, part, part_options, strategies};
use crate::common::files::TempFile;
use crate::common::inputs::{assert_close, laid_out, values, Memory, Shape};
use crate::common::kernels::chunked;
use crate::common::saved::bits;
use crate::common::settings::{config, reference_rows};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::emulation::EmulatedCache;
use candle_sfattention::{
    AttentionOptions, CompressedKvCache, CompressionConfig, Criterion, Dropout, Fold, GroupRule, HeadStrategies,
    MergeStrategy,
};

const CPU: Device = Device::Cpu;
const FOLDS: [Fold; 3] = [Fold::PairSum, Fold::Mean, Fold::Drop];

/// Each with the size of values: smaller and larger ones, in every size of the kernels and in shares of 1, 2 and 4.
const CASES: [(Shape, usize); 5] = [
    (Shape(2, 4, 2, 70, 16), 40),
    (Shape(1, 3, 1, 59, 72), 24),
    (Shape(1, 2, 2, 97, 64), 136),
    (Shape(1, 8, 2, 66, 192), 128),
    (Shape(1, 4, 1, 61, 8), 256),
];

fn inputs((shape, value_dim): (Shape, usize), seed: u64, dtype: DType) -> Result<[Tensor; 3]> {
    let Shape(batch, heads, kv_heads, tokens, _) = shape;
    let [q, k, _] = shape.qkv(seed, dtype)?;
    let [_, _, v] = Shape(batch, heads, kv_heads, tokens, value_dim).qkv(seed + 1, dtype)?;
    Ok([q, k, v])
}

/// Every fold under every criterion that takes it, with windows of 0 to more than all tokens.
fn configs() -> Vec<CompressionConfig> {
    let mut configs = Vec::new();
    for (index, window) in [0, 1, 6, 30, 5000].into_iter().enumerate() {
        configs.push(config(FOLDS[index % 3], window, Criterion::KeyKey));
        configs.push(config(FOLDS[(index + 1) % 3], window, Criterion::QueryKey));
    }
    configs.extend([6, 32].map(|window| config(Fold::Drop, window, Criterion::ObservedMass)));
    configs.extend([Fold::PairSum, Fold::Mean].map(|fold| CompressionConfig {
        group_rule: GroupRule::PerQueryHead,
        ..config(fold, 5, Criterion::QueryKey)
    }));
    configs
}

/// Plain options, a sliding window, and all options together.
fn options(shape: &Shape, kind: usize) -> Result<AttentionOptions> {
    let &Shape(_, heads, _, tokens, _) = shape;
    let plain = AttentionOptions {
        sliding_window: (kind == 1).then_some(11),
        softmax_scale: (kind == 1).then_some(0.3),
        ..Default::default()
    };
    if kind < 2 {
        return Ok(plain);
    }
    let bias = (0..tokens * tokens).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0);
    Ok(AttentionOptions {
        bias: Some(Tensor::from_iter(bias, &CPU)?.reshape((tokens, tokens))?),
        dropout: Some(Dropout { p: 0.2, seed: 5 }),
        softcap: Some(3.0),
        sink_logits: Some(Tensor::from_iter((0..heads).map(|head| head as f32 - 1.0), &CPU)?),
        sliding_window: Some(30),
        ..plain
    })
}

fn on_cpu(strategies: &HeadStrategies, config: &CompressionConfig) -> Result<CompressedKvCache> {
    Ok(CompressedKvCache::new(
        strategies.clone(),
        config.clone(),
        Default::default(),
    )?)
}

fn emulated(qkv: &[Tensor; 3], strategies: &HeadStrategies, config: &CompressionConfig) -> Result<EmulatedCache> {
    Ok(EmulatedCache::new(qkv, strategies, config, &Default::default())?)
}

/// Rows, entries and bytes. Bytes are below those of a cache whose values or keys are padded to one size.
fn values_agree(dtype: DType, tolerance: f64, memory: Memory) -> Result<()> {
    let mut hidden = 0;
    for (index, config) in configs().into_iter().enumerate() {
        for (at, case) in CASES.into_iter().enumerate() {
            let (shape, value_dim) = case;
            let qkv = inputs(case, at as u64, dtype)?;
            let strategies = strategies([0, 0, 3, 2][(index + at) % 4], &shape, &config)?;
            let options = options(&shape, (index + 2 * at) % 3)?;
            let expected = reference_rows(&qkv, &strategies, &config, &options)?;
            let given = match memory {
                Memory::Fused => [
                    laid_out(&qkv, Memory::TokenMajor)?[0].clone(),
                    qkv[1].clone(),
                    qkv[2].clone(),
                ],
                memory => laid_out(&qkv, memory)?,
            };
            let mut bytes = 0;
            for chunks in [&[1][..], &[shape.3], &[31, 1, 8]] {
                let what = format!("{config:?} {case:?} {dtype:?} {chunks:?} {:?}", options.sliding_window);
                let mut cache = emulated(&given, &strategies, &config)?;
                let got = chunked(&mut cache, &given, &options, chunks).with_context(|| what.clone())?;
                let largest = values(&expected)?.iter().fold(1.0, |most: f64, x| most.max(x.abs()));
                assert_close(&what, &got, &expected, tolerance * largest, tolerance)?;
                let mut plain = on_cpu(&strategies, &config)?;
                chunked_on_cpu(&mut plain, &qkv, chunks, |start, count| {
                    part_options(&options, start, count)
                })?;
                assert_eq!(cache.lens()?, plain.lens(), "{what}");
                hidden += usize::from(plain.lens().concat().iter().any(|len| *len < shape.3));
                let (used, allocated) = cache.bytes()?;
                assert!(used <= allocated, "{what}: {used} of {allocated} bytes");
                bytes = used;
            }
            let pad = |x: &Tensor| x.pad_with_zeros(3, 0, shape.4.max(value_dim) - x.dim(3)?);
            let padded = [pad(&qkv[0])?, pad(&qkv[1])?, pad(&qkv[2])?];
            let mut wide = emulated(&padded, &strategies, &config)?;
            let scaled = AttentionOptions {
                softmax_scale: Some(options.softmax_scale.unwrap_or(1.0 / (shape.4 as f64).sqrt())),
                ..options.clone()
            };
            chunked(&mut wide, &padded, &scaled, &[shape.3])?;
            assert!(bytes < wide.bytes()?.0, "{config:?} {case:?}: {bytes} bytes");
        }
    }
    assert!(hidden > 100, "{hidden} caches hid anything");
    Ok(())
}

#[test]
fn values_of_their_own_size_in_f32() -> Result<()> {
    values_agree(DType::F32, 3e-5, Memory::Fused)
}

#[test]
fn values_of_their_own_size_in_halves() -> Result<()> {
    values_agree(DType::F16, 5e-3, Memory::TokenMajor)?;
    values_agree(DType::BF16, 4e-2, Memory::HeadMajor)
}

/// Through a file, to the CPU and back, in another order of rows: the cache goes on, on the emulator bit for bit. A
/// token of the saved window is not finite.
#[test]
fn values_of_their_own_size_move() -> Result<()> {
    for (index, config) in configs().into_iter().enumerate() {
        for (case, dtype, tolerance) in [
            (CASES[0], DType::F32, 3e-5),
            (CASES[1], DType::BF16, 4e-2),
            (CASES[2], DType::F32, 3e-5),
        ] {
            let (shape, value_dim) = case;
            let mut qkv = inputs(case, 7, dtype)?;
            let mut data = values(&qkv[2])?;
            data[38 * value_dim + 3] = f64::NAN;
            qkv[2] = Tensor::from_vec(data, qkv[2].dims(), &CPU)?.to_dtype(dtype)?;
            let strategies = strategies([0, 3, 2][index % 3], &shape, &config)?;
            let options = options(&shape, index % 2)?;
            for first in [1, 40, 50] {
                let what = format!("{config:?} {case:?} {dtype:?} at {first}");
                let rest = part(&qkv, first, 9)?;
                let mut cache = emulated(&qkv, &strategies, &config)?;
                chunked(&mut cache, &part(&qkv, 0, first)?, &options, &[first.max(5) - 4, 1])?;
                let file = TempFile::new();
                cache.to_cpu()?.save(&file.0)?;
                let mut moved = CompressedKvCache::load(&file.0, &CPU)?;
                assert_eq!(moved.lens(), cache.lens()?, "{what}");
                let mut back = EmulatedCache::from_cpu(&moved, &Default::default(), dtype)?;
                assert_eq!(
                    (back.lens()?, back.bytes()?.0),
                    (cache.lens()?, cache.bytes()?.0),
                    "{what}"
                );
                let rows: Vec<usize> = (0..shape.0).rev().collect();
                let mut turned = cache.select(&rows)?.select(&rows)?;
                let expected = chunked(&mut cache, &rest, &options, &[1, 3])?;
                for again in [&mut back, &mut turned] {
                    let got = chunked(again, &rest, &options, &[1, 3])?;
                    assert_eq!(bits(&got)?, bits(&expected)?, "{what}");
                }
                let close = chunked_on_cpu(&mut moved, &rest, &[1, 3], |_, _| Ok(options.clone()))?;
                for (got, close) in values(&expected)?.into_iter().zip(values(&close)?) {
                    assert_eq!(got.is_nan(), close.is_nan(), "{what}");
                    let error = (got - close).abs();
                    assert!(
                        close.is_nan() || error <= tolerance * close.abs().max(1.0),
                        "{what}: {got} {close}"
                    );
                }
                assert_eq!(moved.lens(), cache.lens()?, "{what}");
            }
        }
    }
    Ok(())
}

/// Lists that never merge are cut back, and given scores decide, as on the CPU.
#[test]
fn values_of_their_own_size_are_cut_back_and_scored() -> Result<()> {
    for (window, case) in [0, 3, 40].into_iter().zip(CASES) {
        let (shape, qkv) = (case.0, inputs(case, 3, DType::F32)?);
        let (off, config) = (
            HeadStrategies::uniform(MergeStrategy::Off),
            config(Fold::Mean, window, Criterion::KeyKey),
        );
        let whole = reference_rows(&qkv, &off, &config, &Default::default())?;
        let mut cache = emulated(&qkv, &off, &config)?;
        chunked(&mut cache, &part(&qkv, 0, 55)?, &Default::default(), &[30, 1])?;
        assert!(cache.truncate(37)?);
        let got = chunked(&mut cache, &part(&qkv, 37, 12)?, &Default::default(), &[1, 5])?;
        assert_close(&format!("{case:?}"), &got, &whole.narrow(2, 37, 12)?, 3e-5, 3e-5)?;

        let given = CompressionConfig {
            criterion: Criterion::Given,
            fold: Fold::Drop,
            ..config
        };
        let Shape(batch, _, kv_heads, tokens, _) = shape;
        let scores = (0..batch * kv_heads * tokens).map(|i| (i * 35 % 17) as f32 / 4.0);
        let scores = Tensor::from_iter(scores, &CPU)?.reshape((batch, kv_heads, tokens))?;
        let thresholds = Tensor::from_vec(vec![2.2f64; shape.1], shape.1, &CPU)?;
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity).with_thresholds(&thresholds)?;
        let (mut cache, mut plain) = (emulated(&qkv, &strategies, &given)?, on_cpu(&strategies, &given)?);
        for (start, count) in [(0, 40), (40, 1), (41, 9)] {
            let new = part(&qkv, start, count)?;
            let scores = scores.narrow(2, start, count)?;
            let options = AttentionOptions::default();
            let got = cache
                .append_scored(&new, Some(&scores), Some(&options))?
                .context("rows")?;
            let [q, k, v] = &new;
            let expected = plain.append_and_attend_scored(q, k, v, &scores, &options)?;
            assert_close(&format!("{case:?} scored at {start}"), &got, &expected, 3e-5, 3e-5)?;
        }
        assert_eq!(cache.lens()?, plain.lens());
        assert!(plain.lens()[0][0] < 45 || window == 40, "{:?}", plain.lens());
    }
    Ok(())
}

/// Sizes of values that the kernels do not take.
#[test]
fn sizes_without_kernels_are_refused() -> Result<()> {
    for (value_dim, got) in [(12, "got 12"), (264, "got 264")] {
        let qkv = inputs((Shape(1, 2, 1, 4, 16), value_dim), 1, DType::F32)?;
        let off = HeadStrategies::uniform(MergeStrategy::Off);
        let Err(error) = EmulatedCache::new(&qkv, &off, &Default::default(), &Default::default()) else {
            anyhow::bail!("taken: {value_dim}")
        };
        let error = error.to_string();
        assert!(error.contains("value: expected") && error.contains(got), "{error}");
    }
    Ok(())
}
