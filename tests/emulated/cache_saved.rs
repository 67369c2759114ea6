//! Caches of the emulator that move to the CPU, into a file and back, and that forget their last tokens. On the
//! emulator they continue bit for bit, on the CPU within the same rules.

use crate::common::budget::Side;
use crate::common::caches::{part, part_options, with_thresholds};
use crate::common::files::{Contents, TempFile};
use crate::common::inputs::{values, Shape};
use crate::common::judge::{Expected, Shares};
use crate::common::settings::{settings, Setting};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::emulation::EmulatedCache;
use candle_sfattention::{CacheOptions, CompressedKvCache, HeadStrategies, MergeRule, MergeStrategy};

const SHAPES: [Shape; 3] = [Shape(2, 3, 1, 59, 16), Shape(1, 4, 2, 97, 72), Shape(1, 2, 2, 110, 64)];

fn cached() -> Vec<Setting> {
    let causal = |setting: &Setting| (setting.options)(&SHAPES[0]).causal;
    let all = settings().into_iter();
    all.filter(|setting| causal(setting) && setting.config.rule == MergeRule::Causal)
        .collect()
}

/// Every number as its bits, with one NaN for all NaNs.
fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    let bits = |x: f64| if x.is_nan() { f64::NAN } else { x }.to_bits();
    Ok(values(tensor)?.into_iter().map(bits).collect())
}

fn through_a_file(cache: &EmulatedCache, dtype: DType) -> Result<(EmulatedCache, Contents)> {
    let file = TempFile::new();
    cache.to_cpu()?.save(&file.0)?;
    let loaded = CompressedKvCache::load(&file.0, &Device::Cpu)?;
    let back = EmulatedCache::from_cpu(&loaded, &CacheOptions::default(), dtype)?;
    Ok((back, Contents::read(&file.0)?))
}

/// Appends tokens `start..` of `qkv`, chunk by chunk, with each chunk's options.
fn go_on(
    take: &mut dyn FnMut([Tensor; 3], &candle_sfattention::AttentionOptions) -> Result<Tensor>,
    qkv: &[Tensor; 3],
    setting: &Setting,
    shape: &Shape,
    mut start: usize,
    chunks: &[usize],
) -> Result<Vec<Tensor>> {
    let (options, mut outputs) = ((setting.options)(shape), Vec::new());
    for chunk in chunks {
        let options = part_options(&options, start, *chunk)?;
        outputs.push(take(part(qkv, start, *chunk)?, &options)?);
        start += chunk;
    }
    Ok(outputs)
}

/// The saved window, or open chain, has a token that is not finite.
#[test]
fn a_saved_cache_goes_on_bit_for_bit() -> Result<()> {
    for setting in cached() {
        for (seed, (shape, dtype, bad)) in [
            (&SHAPES[0], DType::F32, Some((1, 35))),
            (&SHAPES[1], DType::BF16, None),
            (&SHAPES[2], DType::F16, None),
            (&SHAPES[0], DType::F32, Some((2, 38))),
        ]
        .into_iter()
        .enumerate()
        {
            let mut qkv = shape.qkv(seed as u64, dtype)?;
            if let Some((part, token)) = bad {
                let mut data = qkv[part].flatten_all()?.to_vec1::<f32>()?;
                data[token * shape.4 + 3] = f32::NAN;
                qkv[part] = Tensor::from_vec(data, qkv[part].dims(), &Device::Cpu)?;
            }
            let strategies = setting.strategies(shape)?;
            let what = format!("{} {shape:?} {dtype:?}", setting.name);
            for before in [&[1usize][..], &[2, 1], &[40, 1, 1], &[30, 9, 4]] {
                let mut cache = EmulatedCache::new(&qkv, &strategies, &setting.config, &Default::default())?;
                let taken = before.iter().sum();
                let mut first = |qkv: [Tensor; 3], options: &_| cache.append(&qkv, Some(options))?.context("rows");
                go_on(&mut first, &qkv, &setting, shape, 0, before).with_context(|| what.clone())?;
                let (mut loaded, _) = through_a_file(&cache, dtype).with_context(|| what.clone())?;
                assert_eq!(loaded.lens()?, cache.lens()?, "{what} {before:?}");
                assert_eq!(loaded.bytes()?.0, cache.bytes()?.0, "{what} {before:?}");
                let after = [1, 1, 6, 1];
                let mut on = |qkv: [Tensor; 3], options: &_| cache.append(&qkv, Some(options))?.context("rows");
                let expected = go_on(&mut on, &qkv, &setting, shape, taken, &after)?;
                let mut on = |qkv: [Tensor; 3], options: &_| loaded.append(&qkv, Some(options))?.context("rows");
                let got = go_on(&mut on, &qkv, &setting, shape, taken, &after)?;
                for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    assert_eq!(bits(got)?, bits(expected)?, "{what} {before:?}, chunk {index}");
                }
                assert_eq!(loaded.lens()?, cache.lens()?, "{what} {before:?}");
                // A second file shows any difference that the rows did not.
                let (_, first) = through_a_file(&cache, dtype)?;
                let (_, second) = through_a_file(&loaded, dtype)?;
                assert!(first == second, "{what} {before:?}: other files");
            }
        }
    }
    Ok(())
}

/// To the other device and back: the rows of both parts are those of attention over all tokens.
#[test]
fn caches_change_places() -> Result<()> {
    let mut shares = Shares::default();
    for setting in cached() {
        for (seed, shape) in SHAPES.iter().enumerate() {
            for dtype in [DType::F32, DType::BF16] {
                let options = (setting.options)(shape);
                let qkv = shape.qkv(seed as u64, dtype)?;
                let expected = Expected::new(Side::Cuda, &qkv, &qkv[0], &setting, &options)?;
                let strategies = setting.strategies(shape)?;
                let new = || CompressedKvCache::new(strategies.clone(), setting.config.clone(), Default::default());
                let mut whole = new()?;
                whole.append_and_attend(&qkv[0], &qkv[1], &qkv[2], &options)?;
                let what = format!("{} {shape:?} {dtype:?}", setting.name);
                for first in [1, 20, 50] {
                    let (chunks, rest) = ([first], [1, 3, shape.3 - first - 4]);
                    let mut on_cpu = new()?;
                    let mut take =
                        |[q, k, v]: [Tensor; 3], options: &_| Ok(on_cpu.append_and_attend(&q, &k, &v, options)?);
                    let mut rows = go_on(&mut take, &qkv, &setting, shape, 0, &chunks)?;
                    let mut moved = EmulatedCache::from_cpu(&on_cpu, &Default::default(), dtype)?;
                    assert_eq!(moved.lens()?, on_cpu.lens(), "{what} from the CPU at {first}");
                    let mut take = |qkv: [Tensor; 3], options: &_| moved.append(&qkv, Some(options))?.context("rows");
                    rows.extend(go_on(&mut take, &qkv, &setting, shape, first, &rest)?);
                    expected.check_output(
                        &format!("{what} from the CPU at {first}"),
                        &Tensor::cat(&rows, 2)?,
                        &mut shares,
                    )?;
                    assert_eq!(moved.lens()?, whole.lens(), "{what} from the CPU at {first}");

                    let mut cache = EmulatedCache::new(&qkv, &strategies, &setting.config, &Default::default())?;
                    let mut take = |qkv: [Tensor; 3], options: &_| cache.append(&qkv, Some(options))?.context("rows");
                    let mut rows = go_on(&mut take, &qkv, &setting, shape, 0, &chunks)?;
                    let mut moved = cache.to_cpu()?;
                    assert_eq!(moved.lens(), cache.lens()?, "{what} to the CPU at {first}");
                    let mut take =
                        |[q, k, v]: [Tensor; 3], options: &_| Ok(moved.append_and_attend(&q, &k, &v, options)?);
                    rows.extend(go_on(&mut take, &qkv, &setting, shape, first, &rest)?);
                    expected.check_output(
                        &format!("{what} to the CPU at {first}"),
                        &Tensor::cat(&rows, 2)?,
                        &mut shares,
                    )?;
                    assert_eq!(moved.lens(), whole.lens(), "{what} to the CPU at {first}");
                }
            }
        }
    }
    shares.report()
}

/// Some heads are off, and batch rows have moved: each list keeps its own tests.
#[test]
fn moved_rows_keep_their_tests() -> Result<()> {
    let shape = Shape(3, 4, 2, 90, 32);
    let codes = Tensor::new(&[[0u32, 1, 2, 2], [1, 1, 0, 0], [0, 0, 2, 2]], &Device::Cpu)?;
    for setting in cached().iter().filter(|setting| setting.strategy != MergeStrategy::Off) {
        let strategies = with_thresholds(HeadStrategies::from_tensor(&codes)?, &shape, &setting.config)?;
        let qkv = shape.qkv(5, DType::F32)?;
        let rows = [2usize, 0, 0, 1];
        let moved =
            [&qkv[0], &qkv[1], &qkv[2]].map(|x| x.index_select(&Tensor::new(&[2u32, 0, 0, 1], &Device::Cpu)?, 0));
        let [q, k, v] = moved;
        let moved = [q?, k?, v?];
        let mut cache = EmulatedCache::new(&qkv, &strategies, &setting.config, &Default::default())?;
        cache.append(&part(&qkv, 0, 60)?, None)?;
        let mut cache = cache.select(&rows)?;
        let (mut loaded, _) = through_a_file(&cache, DType::F32)?;
        let mut on_cpu = cache.to_cpu()?;
        for start in 60..75 {
            let [q, k, v] = part(&moved, start, 1)?;
            let close = on_cpu.append_and_attend(&q, &k, &v, &Default::default())?;
            let new = [q, k, v];
            let expected = cache.append(&new, Some(&Default::default()))?.context("rows")?;
            let got = loaded.append(&new, Some(&Default::default()))?.context("rows")?;
            assert_eq!(bits(&got)?, bits(&expected)?, "{} at {start}", setting.name);
            for (close, got) in values(&close)?.into_iter().zip(values(&got)?) {
                assert!(
                    (close - got).abs() <= 2e-5,
                    "{} at {start}: {close} {got}",
                    setting.name
                );
            }
        }
        assert_eq!(loaded.lens()?, on_cpu.lens(), "{}", setting.name);
    }
    Ok(())
}

/// If nothing merges, a cache can forget its last tokens, and continues as one that never saw them.
#[test]
fn a_truncated_cache_goes_on_as_if_it_had_not_seen_the_rest() -> Result<()> {
    let shape = Shape(2, 4, 2, 90, 32);
    for setting in cached() {
        let qkv = shape.qkv(6, DType::F32)?;
        let none = HeadStrategies::uniform(MergeStrategy::Off);
        // Nothing merges here either: each group has a head that is off.
        let half = HeadStrategies::per_head([MergeStrategy::Similarity, MergeStrategy::Off].repeat(2));
        let half = with_thresholds(half, &shape, &setting.config)?;
        for (strategies, name) in [(&none, "off"), (&half, "half off")] {
            for (seen, kept) in [(70, 69), (70, 40), (70, 1), (70, 70), (20, 7), (60, 33), (60, 32)] {
                let what = format!("{} {name}: {kept} of {seen}", setting.name);
                let new = || EmulatedCache::new(&qkv, strategies, &setting.config, &Default::default());
                let (mut cache, mut fresh) = (new()?, new()?);
                cache.append(&part(&qkv, 0, seen)?, None)?;
                let exact = cache.truncate(kept)?;
                let unanimous = setting.config.group_rule == candle_sfattention::GroupRule::Unanimous;
                assert_eq!(exact, name == "off" || unanimous, "{what}");
                if !exact {
                    continue;
                }
                fresh.append(&part(&qkv, 0, kept)?, None)?;
                assert_eq!(cache.lens()?, fresh.lens()?, "{what}");
                for start in kept..kept + 8 {
                    let new = part(&qkv, start, 1)?;
                    let expected = fresh.append(&new, Some(&Default::default()))?.context("rows")?;
                    let got = cache.append(&new, Some(&Default::default()))?.context("rows")?;
                    assert_eq!(bits(&got)?, bits(&expected)?, "{what}, token {start}");
                }
                let mut on_cpu = cache.to_cpu()?;
                on_cpu.truncate(kept)?;
                assert_eq!(on_cpu.seq_len(), kept, "{what}");
            }
        }
    }
    Ok(())
}
