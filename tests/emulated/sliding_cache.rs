//! The sliding window in a cache under the emulator: any chunks give the rows of one call, lists are as long as on the
//! CPU, memory is bounded, and caches move.

use crate::common::caches::{chunked as chunked_on_cpu, part, strategies};
use crate::common::files::TempFile;
use crate::common::inputs::{assert_close, values, Shape};
use crate::common::kernels::chunked;
use crate::common::settings::{config, reference_rows};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::emulation::EmulatedCache;
use candle_sfattention::{
    AttentionOptions, CompressedKvCache, CompressionConfig, Criterion, Dropout, Fold, GroupRule, MergeStrategy,
};

const CPU: Device = Device::Cpu;
const SHAPE: Shape = Shape(2, 4, 2, 150, 16);
const FOLDS: [Fold; 3] = [Fold::PairSum, Fold::Mean, Fold::Drop];
const CHUNKS: [&[usize]; 3] = [&[1], &[3, 70], &[150]];

fn slides(length: usize) -> AttentionOptions {
    AttentionOptions {
        sliding_window: Some(length),
        ..Default::default()
    }
}

/// The same with all other options.
fn slides_beside(length: usize) -> Result<AttentionOptions> {
    let Shape(_, heads, _, tokens, _) = SHAPE;
    let bias = (0..tokens * tokens).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0);
    Ok(AttentionOptions {
        bias: Some(Tensor::from_iter(bias, &CPU)?.reshape((tokens, tokens))?),
        dropout: Some(Dropout { p: 0.2, seed: 5 }),
        softcap: Some(3.0),
        sink_logits: Some(Tensor::from_iter((0..heads).map(|head| head as f32 - 1.0), &CPU)?),
        ..slides(length)
    })
}

/// Windows on both sides of each sliding one; every fold and criterion meets some of them.
fn configs() -> Vec<CompressionConfig> {
    let mut configs = Vec::new();
    for (index, window) in [0, 1, 6, 7, 70].into_iter().enumerate() {
        let (one, other) = (FOLDS[index % 3], FOLDS[(index + 1) % 3]);
        configs.push(config(one, window, Criterion::KeyKey));
        configs.push(config(other, window, Criterion::QueryKey));
    }
    configs.extend([6, 70].map(|window| config(Fold::Drop, window, Criterion::ObservedMass)));
    configs.push(CompressionConfig {
        group_rule: GroupRule::PerQueryHead,
        ..config(Fold::Mean, 5, Criterion::QueryKey)
    });
    configs
}

/// The reference's rows of the whole sequence.
fn exact(qkv: &[Tensor; 3], kind: u8, config: &CompressionConfig, options: &AttentionOptions) -> Result<Tensor> {
    reference_rows(qkv, &strategies(kind, &SHAPE, config)?, config, options)
}

fn on_cpu(kind: u8, config: &CompressionConfig) -> Result<CompressedKvCache> {
    let strategies = strategies(kind, &SHAPE, config)?;
    Ok(CompressedKvCache::new(strategies, config.clone(), Default::default())?)
}

fn emulated(qkv: &[Tensor; 3], kind: u8, config: &CompressionConfig) -> Result<EmulatedCache> {
    let strategies = strategies(kind, &SHAPE, config)?;
    Ok(EmulatedCache::new(qkv, &strategies, config, &Default::default())?)
}

fn any_chunks(dtype: DType, tolerance: f64) -> Result<()> {
    let qkv = SHAPE.qkv(1, dtype)?;
    for (index, config) in configs().into_iter().enumerate() {
        for (at, length) in [1, 2, 7, 64, 5000].into_iter().enumerate() {
            let kind = [0, 2, 3][(index + at) % 3];
            let whole = exact(&qkv, kind, &config, &slides(length))?;
            let chunks = CHUNKS[(index + at / 3) % 3];
            let what = format!("{dtype:?} {config:?} kind {kind} L {length} chunks {chunks:?}");
            let mut cache = emulated(&qkv, kind, &config)?;
            let got = chunked(&mut cache, &qkv, &slides(length), chunks)?;
            assert_close(&what, &got, &whole, tolerance, tolerance)?;
            let mut plain = on_cpu(kind, &config)?;
            chunked_on_cpu(&mut plain, &qkv, chunks, |_, _| Ok(slides(length)))?;
            assert_eq!(cache.lens()?, plain.lens(), "{what}");
            let (used, allocated) = cache.bytes()?;
            assert!(used <= allocated, "{what}: {used} of {allocated} bytes");
        }
    }
    Ok(())
}

#[test]
fn any_chunks_in_f32_are_one_call() -> Result<()> {
    any_chunks(DType::F32, 2e-5)
}

#[test]
fn any_chunks_in_halves_are_one_call() -> Result<()> {
    any_chunks(DType::F16, 4e-3)?;
    any_chunks(DType::BF16, 3e-2)
}

/// Beside a bias, dropout, a softcap and sinks.
#[test]
fn other_options_slide_too() -> Result<()> {
    let qkv = SHAPE.qkv(2, DType::F32)?;
    for (index, config) in configs().into_iter().enumerate() {
        let length = [2, 7, 64][index % 3];
        let options = slides_beside(length)?;
        let whole = exact(&qkv, 0, &config, &options)?;
        let mut cache = emulated(&qkv, 0, &config)?;
        let got = chunked(&mut cache, &qkv, &options, CHUNKS[index % 3])?;
        assert_close(&format!("{config:?} L {length}"), &got, &whole, 3e-5, 3e-5)?;
    }
    Ok(())
}

/// Lists take no more room with more tokens, whatever they hide; chunks and tokens one by one.
#[test]
fn memory_is_bounded() -> Result<()> {
    let shape = Shape(1, 1, 1, 500, 8);
    let qkv = shape.qkv(3, DType::F32)?;
    for (strategy, window, length) in [
        (MergeStrategy::Off, 3, 20),
        (MergeStrategy::Similarity, 3, 20),
        (MergeStrategy::Similarity, 40, 20),
    ] {
        let config = config(Fold::Mean, window, Criterion::KeyKey);
        let strategies = strategies(strategy as u8, &shape, &config)?;
        for chunks in [&[1][..], &[200, 1, 90]] {
            let mut cache = EmulatedCache::new(&qkv, &strategies, &config, &Default::default())?;
            chunked(&mut cache, &qkv, &slides(length), chunks)?;
            let what = format!("{strategy:?} window {window} chunks {chunks:?}");
            assert!(cache.lens()?[0][0] <= length, "{what}: {:?}", cache.lens()?);
            // Rows of keys, values, token and size: the window's, those in use and left behind, and room for more, in
            // pages of 64; and the state.
            let (row, most) = (2 * 8 * 4 + 8, 4 * 64 + window + 1);
            let (_, allocated) = cache.bytes()?;
            assert!(allocated <= most * row + 8 * 64, "{what}: {allocated} bytes");
        }
    }
    Ok(())
}

/// A window that comes after calls without attention, batch rows that move, and another window, which is refused.
#[test]
fn windows_come_late_and_rows_move() -> Result<()> {
    for (fold, window, length) in [
        (Fold::Mean, 3, 20),
        (Fold::Drop, 3, 4),
        (Fold::PairSum, 0, 1),
        (Fold::Mean, 30, 20),
    ] {
        let config = config(fold, window, Criterion::KeyKey);
        let qkv = SHAPE.qkv(4, DType::F32)?;
        let whole = exact(&qkv, 3, &config, &slides(length))?;
        let what = format!("{fold:?} {window} {length}");
        let mut cache = emulated(&qkv, 3, &config)?;
        cache.append(&part(&qkv, 0, 60)?, None)?;
        cache.append(&part(&qkv, 60, 1)?, None)?;
        let options = slides(length);
        let rest = chunked(&mut cache, &part(&qkv, 61, 20)?, &options, &[1, 4])?;
        assert_close(&what, &rest, &whole.narrow(2, 61, 20)?, 2e-5, 2e-5)?;
        let error = cache
            .append(&part(&qkv, 81, 1)?, Some(&slides(length + 1)))
            .unwrap_err();
        assert!(error.to_string().contains("sliding_window: expected"), "{error}");
        let mut turned = cache.select(&[1, 0, 1])?;
        let rows = Tensor::new(&[1u32, 0, 1], &CPU)?;
        let next: Vec<Tensor> = part(&qkv, 81, 1)?
            .iter()
            .map(|x| x.contiguous()?.index_select(&rows, 0))
            .collect::<candle_core::Result<_>>()?;
        let next: [Tensor; 3] = next.try_into().expect("three tensors");
        let got = turned.append(&next, Some(&options))?.expect("rows");
        let expected = whole.narrow(2, 81, 1)?.contiguous()?.index_select(&rows, 0)?;
        assert_close(&what, &got, &expected, 2e-5, 2e-5)?;
    }
    Ok(())
}

/// To a file, to the CPU and back: each goes on within its window, with the entries that the CPU keeps.
#[test]
fn caches_change_places() -> Result<()> {
    let qkv = SHAPE.qkv(5, DType::F32)?;
    for (index, config) in configs().into_iter().enumerate() {
        let (length, kind) = ([2, 7, 64][index % 3], [0, 2, 3][index / 2 % 3]);
        let (options, what) = (slides(length), format!("{config:?} kind {kind} L {length}"));
        let whole = exact(&qkv, kind, &config, &options)?;
        for first in [5, 90] {
            let rest = part(&qkv, first, 30)?;
            let expected = whole.narrow(2, first, 30)?;
            let mut cache = emulated(&qkv, kind, &config)?;
            chunked(&mut cache, &part(&qkv, 0, first)?, &options, &[first - 2, 1])?;
            let file = TempFile::new();
            cache.to_cpu()?.save(&file.0)?;
            let mut moved = CompressedKvCache::load(&file.0, &CPU)?;
            assert_eq!(moved.lens(), cache.lens()?, "{what} to the CPU at {first}");
            let mut back = EmulatedCache::from_cpu(&moved, &Default::default(), DType::F32)?;
            assert_eq!(moved.lens(), back.lens()?, "{what} back at {first}");
            for cache in [&mut cache, &mut back] {
                let got = chunked(cache, &rest, &options, &[1, 7])?;
                assert_close(&what, &got, &expected, 2e-5, 2e-5)?;
            }
            let got = chunked_on_cpu(&mut moved, &rest, &[1, 7], |_, _| Ok(options.clone()))?;
            assert_close(&what, &got, &expected, 2e-5, 2e-5)?;
            assert_eq!(moved.lens(), back.lens()?, "{what} later");

            let mut plain = on_cpu(kind, &config)?;
            chunked_on_cpu(&mut plain, &part(&qkv, 0, first)?, &[first - 2, 1], |_, _| {
                Ok(options.clone())
            })?;
            let mut moved = EmulatedCache::from_cpu(&plain, &Default::default(), DType::F32)?;
            assert_eq!(moved.lens()?, plain.lens(), "{what} from the CPU at {first}");
            let got = chunked(&mut moved, &rest, &options, &[3, 1])?;
            assert_close(&what, &got, &expected, 2e-5, 2e-5)?;
        }
    }
    Ok(())
}

/// Lists that never merge are cut back exactly, to tokens whose window is kept.
#[test]
fn lists_are_cut_back_inside_the_window() -> Result<()> {
    let qkv = SHAPE.qkv(6, DType::F32)?;
    for (window, length) in [(0, 30), (3, 30), (40, 20)] {
        let (config, options) = (config(Fold::Mean, window, Criterion::KeyKey), slides(length));
        let whole = exact(&qkv, 2, &config, &options)?;
        for first in [25, 90] {
            let mut cache = emulated(&qkv, 2, &config)?;
            chunked(&mut cache, &part(&qkv, 0, first)?, &options, &[first - 10, 1])?;
            assert!(cache.truncate(first)?);
            // The columns of the row after these tokens are still there: a list keeps some that have just left.
            let kept = first - 1;
            let exact = cache.truncate(kept)?;
            let start = if exact { kept } else { first };
            let got = chunked(&mut cache, &part(&qkv, start, 12)?, &options, &[1, 5])?;
            let what = format!("window {window} L {length} at {first}, cut {exact}");
            assert_close(&what, &got, &whole.narrow(2, start, 12)?, 2e-5, 2e-5)?;
            assert!(values(&got)?.iter().all(|x| x.is_finite()), "{what}");
        }
    }
    Ok(())
}
