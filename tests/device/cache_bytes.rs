//! Closed chains in 8 bits on a GPU: the rows of the CPU's cache, which rounds alike, and the same codes in files.
//! Without a GPU each test prints that it is skipped.

use crate::common::caches::{part, strategies};
use crate::common::device::gpu;
use crate::common::inputs::{assert_close, Shape};
use crate::common::saved::bits;
use crate::common::settings::config;
use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    CacheOptions, CompressedKvCache, CompressionConfig, Criterion, Fold, HeadStrategies, MergeStrategy, Storage,
};

fn cases(shape: &Shape) -> Result<Vec<(CompressionConfig, HeadStrategies)>> {
    let mut cases = Vec::new();
    for (criterion, fold, window) in [
        (Criterion::KeyKey, Fold::Mean, 5),
        (Criterion::QueryKey, Fold::PairSum, 4),
        (Criterion::ObservedMass, Fold::Drop, 6),
    ] {
        let config = config(fold, window, criterion);
        let strategies = strategies(0, shape, &config)?;
        cases.push((config, strategies));
    }
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    cases.push((config(Fold::Drop, 8, Criterion::KeyKey), off));
    Ok(cases)
}

fn append(cache: &mut CompressedKvCache, qkv: &[Tensor; 3], device: &Device, at: [usize; 2]) -> Result<Tensor> {
    let [q, k, v] = part(qkv, at[0], at[1])?;
    let [q, k, v] = [q, k, v].map(|x| x.to_device(device));
    Ok(cache
        .append_and_attend(&q?, &k?, &v?, &Default::default())?
        .to_device(&Device::Cpu)?)
}

#[test]
fn rows_are_those_of_the_cpu() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    for storage in [Storage::I8, Storage::F8E4M3] {
        for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
            for shape in [
                Shape(2, 3, 1, 700, 64),
                Shape(1, 8, 2, 700, 128),
                Shape(1, 2, 2, 300, 72),
                Shape(1, 2, 1, 300, 256),
            ] {
                for (number, (config, strategies)) in cases(&shape)?.into_iter().enumerate() {
                    let name = format!("{storage} {dtype:?} {shape:?} case {number}");
                    let options = CacheOptions {
                        storage: Some(storage),
                        ..Default::default()
                    };
                    let new = || CompressedKvCache::new(strategies.clone(), config.clone(), options.clone());
                    let (mut on_cpu, mut on_gpu, qkv) = (new()?, new()?, shape.qkv(number as u64, dtype)?);
                    let chunks = [200, 1, 1, 60, 1, 1, 1, 20].iter().cycle();
                    let mut start = 0;
                    for count in chunks.take(8) {
                        let expected = append(&mut on_cpu, &qkv, &Device::Cpu, [start, *count])?;
                        let got = append(&mut on_gpu, &qkv, &device, [start, *count])?;
                        assert_close(&name, &got, &expected, tolerance, tolerance)?;
                        start += count;
                    }
                    ensure!(on_gpu.lens() == on_cpu.lens(), "{name}: other lengths");
                    ensure!(on_gpu.bytes() <= on_gpu.bytes_allocated(), "{name}: bytes");
                    // By way of the CPU the cache goes on with the same bits, and so does a fork.
                    let mut moved = on_gpu.to_device(&Device::Cpu)?.to_device(&device)?;
                    let mut fork = on_gpu.fork();
                    for count in [1, 8, 1] {
                        let expected = bits(&append(&mut on_gpu, &qkv, &device, [start, count])?)?;
                        for other in [&mut moved, &mut fork] {
                            let got = bits(&append(other, &qkv, &device, [start, count])?)?;
                            ensure!(got == expected, "{name}: {count} at {start}");
                        }
                        start += count;
                    }
                }
            }
        }
    }
    Ok(())
}
