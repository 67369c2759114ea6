//! The KV cache on a GPU: any chunking gives the rows of attention over the whole sequence, lists are as long as on the
//! CPU, and calls that it refuses. Without a GPU each test prints that it is skipped.

use crate::common::budget::Side;
use crate::common::caches::{part, part_options, strategies};
use crate::common::device::gpu;
use crate::common::files::{Contents, TempFile};
use crate::common::inputs::{assert_close, laid_out, values, Memory, Shape};
use crate::common::judge::{largest, largest_error, Expected, Shares};
use crate::common::layers::{on_both, Placed};
use crate::common::segments::{configs, numbers, segments, with, SHAPE};
use crate::common::settings::{settings, Setting};
use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::{
    AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, HeadStrategies, MergeRule, MergeStrategy,
};

const SHAPES: [Shape; 5] = [
    Shape(2, 3, 1, 59, 16),
    Shape(1, 4, 2, 97, 72),
    Shape(1, 2, 2, 140, 64),
    Shape(1, 1, 1, 67, 256),
    Shape(1, 8, 2, 300, 128),
];

/// The settings of the table that a cache takes.
fn cached() -> Vec<Setting> {
    let causal = |setting: &Setting| (setting.options)(&SHAPES[0]).causal;
    let part = std::env::var("SFA_CASE").unwrap_or_default();
    let all = settings().into_iter().filter(|setting| setting.name.contains(&part));
    all.filter(|setting| causal(setting) && setting.config.rule == MergeRule::Causal)
        .collect()
}

fn on(device: &Device, qkv: &[Tensor; 3]) -> Result<[Tensor; 3]> {
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(|x| x.to_device(device));
    Ok([q?, k?, v?])
}

/// Appends chunks of these lengths, repeated until all tokens are in.
fn chunked(cache: &mut CompressedKvCache, qkv: &[Tensor; 3], chunks: &[usize]) -> Result<Tensor> {
    chunked_with(cache, qkv, &AttentionOptions::default(), chunks)
}

/// The same with options for the whole sequence.
fn chunked_with(
    cache: &mut CompressedKvCache,
    qkv: &[Tensor; 3],
    options: &AttentionOptions,
    chunks: &[usize],
) -> Result<Tensor> {
    let (tokens, mut start, mut outputs) = (qkv[0].dim(2)?, 0, Vec::new());
    for chunk in chunks.iter().cycle() {
        let count = (*chunk).min(tokens - start);
        if count == 0 {
            break;
        }
        let [q, k, v] = part(qkv, start, count)?;
        let options = part_options(options, start, count)?;
        outputs.push(cache.append_and_attend(&q, &k, &v, &options)?);
        start += count;
    }
    Ok(Tensor::cat(&outputs, 2)?)
}

fn check_table(dtype: DType, memory: Memory) -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let most = std::env::var("SFA_TOKENS").ok().and_then(|most| most.parse().ok());
    let (mut checked, mut shares) = (0, Shares::default());
    for setting in cached() {
        for (seed, shape) in SHAPES.iter().enumerate() {
            if most.is_some_and(|most: usize| shape.3 > most) {
                continue;
            }
            let options = (setting.options)(shape);
            let qkv = shape.qkv(seed as u64, dtype)?;
            let expected = Expected::new(Side::Cuda, &qkv, &qkv[0], &setting, &options)?;
            let strategies = setting.strategies(shape)?;
            let new = || CompressedKvCache::new(strategies.clone(), setting.config.clone(), Default::default());
            let mut on_cpu = new()?;
            on_cpu.append_and_attend(&qkv[0], &qkv[1], &qkv[2], &options)?;
            let bias = options.bias.as_ref().map(|bias| bias.to_device(&device));
            let options = AttentionOptions {
                bias: bias.transpose()?,
                ..options
            };
            let qkv = laid_out(&on(&device, &qkv)?, memory)?;
            for chunks in [&[1][..], &[shape.3], &[40, 1, 7]] {
                let what = format!("{} {shape:?} {dtype:?} chunks {chunks:?}", setting.name);
                let mut cache = new()?;
                let got = chunked_with(&mut cache, &qkv, &options, chunks)?;
                expected.check_output(&what, &got, &mut shares)?;
                ensure!(cache.lens() == on_cpu.lens(), "{what}: other lengths than on the CPU");
                ensure!(
                    cache.seq_len() == shape.3 && cache.bytes() <= cache.bytes_allocated(),
                    "{what}"
                );
                checked += 1;
            }
        }
    }
    println!("{dtype:?}: {checked} caches");
    // A part of the table need not come near the allowance.
    let part = ["SFA_CASE", "SFA_TOKENS"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    match part {
        true => Ok(()),
        false => shares.report(),
    }
}

#[test]
fn table_f32() -> Result<()> {
    check_table(DType::F32, Memory::Fused)
}

#[test]
fn table_f16() -> Result<()> {
    check_table(DType::F16, Memory::HeadMajor)
}

#[test]
fn table_bf16() -> Result<()> {
    check_table(DType::BF16, Memory::TokenMajor)
}

/// Longer than a block's share and past several growths, against the CPU's cache on the same values in f32.
#[test]
fn long_decoding_agrees_with_the_cpu() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    for (shape, strategy) in [
        (Shape(2, 8, 2, 3000, 128), MergeStrategy::Similarity),
        (Shape(1, 8, 8, 2500, 64), MergeStrategy::Off),
        (Shape(1, 16, 1, 1500, 64), MergeStrategy::Similarity),
    ] {
        for dtype in [DType::F32, DType::BF16] {
            let config = CompressionConfig {
                similarity_threshold: 0.35,
                ..CompressionConfig::pretrained()
            };
            let qkv = shape.qkv(3, dtype)?;
            let single = |x: &Tensor| x.to_dtype(DType::F32);
            let wide = [single(&qkv[0])?, single(&qkv[1])?, single(&qkv[2])?];
            let new = || CompressedKvCache::new(HeadStrategies::uniform(strategy), config.clone(), Default::default());
            let (mut expected_cache, mut cache) = (new()?, new()?);
            let chunks: Vec<usize> = [shape.3 - 200].into_iter().chain([1; 200]).collect();
            let expected = chunked(&mut expected_cache, &wide, &chunks)?;
            let on_gpu = on(&device, &qkv)?;
            let got = chunked(&mut cache, &on_gpu, &chunks)?;
            let again = chunked(&mut new()?, &on_gpu, &chunks)?;
            ensure!(
                values(&got)? == values(&again)?,
                "{shape:?} {dtype:?}: another run gave other bits"
            );
            ensure!(
                cache.lens() == expected_cache.lens(),
                "{shape:?} {dtype:?}: other lengths"
            );
            let tail = |x: &Tensor| x.narrow(2, shape.3 - 200, 200)?.to_device(&Device::Cpu)?.contiguous();
            let (got, expected) = (tail(&got)?, tail(&expected)?);
            let (error, most) = (largest_error(&got, &expected)?, largest(&expected)?);
            // Folded keys are rounded to the dtype, weights are not.
            let allowed = if dtype == DType::F32 { 1e-5 } else { 2f64.powi(-6) };
            println!(
                "{shape:?} {dtype:?}: error {error:.2e} of {most:.2e}; {} bytes, {} allocated, {} dense",
                cache.bytes(),
                cache.bytes_allocated(),
                cache.bytes_dense()
            );
            ensure!(error <= allowed * most.max(1.0), "{shape:?} {dtype:?}: error {error:e}");
        }
    }
    Ok(())
}

/// Beams: repeated rows continue independently, and a clone does not see the tokens that the original appends.
#[test]
fn rows_and_clones_go_their_own_ways() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let shape = Shape(2, 4, 2, 120, 32);
    for setting in cached() {
        let qkv = shape.qkv(4, DType::F32)?;
        let rows = Tensor::new(&[1u32, 0, 1], &Device::Cpu)?;
        let run = |device: &Device| -> Result<[Tensor; 3]> {
            let strategies = setting.strategies(&shape)?;
            let mut cache = CompressedKvCache::new(strategies, setting.config.clone(), Default::default())?;
            let qkv = on(device, &qkv)?;
            let first = chunked(&mut cache, &part(&qkv, 0, 100)?, &[100])?;
            let mut copy = cache.clone();
            let second = chunked(&mut cache, &part(&qkv, 100, 20)?, &[1])?;
            ensure!((copy.seq_len(), cache.seq_len()) == (100, 120));
            copy.index_select(&rows)?;
            let next = part(&qkv, 100, 20)?;
            let rows = rows.to_device(device)?;
            let picked = [&next[0], &next[1], &next[2]].map(|x| x.contiguous()?.index_select(&rows, 0));
            let [q, k, v] = picked;
            Ok([first, second, chunked(&mut copy, &[q?, k?, v?], &[1])?])
        };
        let (got, expected) = (run(&device)?, run(&Device::Cpu)?);
        for (got, expected) in got.iter().zip(&expected) {
            assert_close(setting.name, got, expected, 2e-5, 2e-5)?;
        }
    }
    Ok(())
}

/// A whole layer, prompt and tokens, on both devices.
#[test]
fn a_layer_decodes_alike() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let run = |Placed { layer, xs, .. }: &Placed| -> Result<Tensor> {
        let mut cache = layer.attention().new_cache(Default::default())?;
        let mut outputs = vec![layer.forward_cached(&xs.narrow(1, 0, 100)?, &mut cache)?];
        for token in 100..150 {
            outputs.push(layer.forward_cached(&xs.narrow(1, token, 1)?, &mut cache)?);
        }
        Ok(Tensor::cat(&outputs, 1)?)
    };
    let [on_cpu, on_gpu] = on_both(&CompressionConfig::pretrained(), false, &device)?;
    let (got, expected) = (run(&on_gpu)?, run(&on_cpu)?);
    let most = largest(&expected)?;
    Ok(assert_close("layer", &got, &expected, 2e-4 * most, 2e-4)?)
}

/// Unsupported calls are refused with a remedy and change nothing.
#[test]
fn refusals_say_what_to_do() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let new =
        |options: CacheOptions| CompressedKvCache::new(strategies.clone(), CompressionConfig::pretrained(), options);
    let cpu = Shape(1, 2, 1, 90, 16).qkv(0, DType::F32)?;
    let qkv = on(&device, &cpu)?;
    let add = |cache: &mut CompressedKvCache, qkv: &[Tensor; 3], options: &AttentionOptions| {
        cache.append_and_attend(&qkv[0], &qkv[1], &qkv[2], options)
    };
    let refused = |result: candle_core::Result<Tensor>, part: &str| match result {
        Ok(_) => panic!("expected an error with {part:?}"),
        Err(error) => assert!(error.to_string().contains(part), "expected {part:?} in {error}"),
    };
    let plain = AttentionOptions::default();
    let mut cache = new(CacheOptions::default())?;
    add(&mut cache, &qkv, &plain)?;
    let bias = AttentionOptions {
        bias: Some(Tensor::zeros((1, 1, 90, 179), DType::F32, &device)?),
        ..Default::default()
    };
    refused(add(&mut cache, &qkv, &bias), "bias: expected a shape");
    refused(add(&mut cache, &cpu, &plain), "device: expected the cache's");
    let narrow = on(&device, &Shape(1, 2, 1, 90, 8).qkv(0, DType::F32)?)?;
    refused(add(&mut cache, &narrow, &plain), "KV heads and head_dim");
    let double = on(&device, &Shape(1, 2, 1, 9, 16).qkv(0, DType::F64)?)?;
    refused(add(&mut cache, &double, &plain), "storage: expected f64");
    assert!(cache
        .truncate(50)
        .expect_err("truncated")
        .to_string()
        .contains("a cache that merges"));
    let path = std::env::temp_dir().join(format!("sfattention-none-{}.safetensors", std::process::id()));
    assert!(CompressedKvCache::load(&path, &device).is_err());
    let mut exact = new(CacheOptions::default())?;
    add(&mut exact, &Shape(1, 2, 1, 90, 16).qkv(0, DType::F64)?, &plain)?;
    let error = exact.to_device(&device).expect_err("f64 on CUDA").to_string();
    assert!(error.contains("f32, f16 or bf16 for a cache on CUDA"), "{error}");
    assert_eq!(cache.seq_len(), 90);
    cache.reset();
    add(&mut cache, &cpu, &plain)?;
    refused(add(&mut cache, &qkv, &plain), "device: expected the cache's");
    let few = CacheOptions {
        max_entries: Some(20),
        ..Default::default()
    };
    refused(add(&mut new(few)?, &qkv, &plain), "max_entries");
    refused(
        add(&mut new(CacheOptions::default())?, &double, &plain),
        "f32, f16 or bf16 on CUDA",
    );
    // A gradient of the result is refused, as on the CPU.
    let var = Var::from_tensor(&qkv[0])?;
    let output = new(CacheOptions::default())?.append_and_attend(&var, &qkv[1], &qkv[2], &plain)?;
    assert!(output.sum_all()?.backward().is_err());
    Ok(())
}

/// Through a file, a cache continues bit for bit on the same device, and to a rounding on the other kind of device.
#[test]
fn saved_caches_go_on() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let exactly = |x: &Tensor| -> Result<Vec<u64>> {
        let bits = |x: f64| if x.is_nan() { f64::NAN } else { x }.to_bits();
        Ok(values(x)?.into_iter().map(bits).collect())
    };
    let through = |cache: &CompressedKvCache, to: &Device| -> Result<(CompressedKvCache, Contents)> {
        let file = TempFile::new();
        cache.save(&file.0)?;
        Ok((CompressedKvCache::load(&file.0, to)?, Contents::read(&file.0)?))
    };
    let mut checked = 0;
    for setting in cached() {
        for (seed, (shape, dtype)) in [
            (Shape(2, 3, 1, 150, 16), DType::F32),
            (Shape(1, 8, 2, 300, 128), DType::BF16),
            (Shape(1, 4, 2, 170, 64), DType::F16),
        ]
        .iter()
        .enumerate()
        {
            let host = shape.qkv(seed as u64, *dtype)?;
            let strategies = setting.strategies(shape)?;
            let new = || CompressedKvCache::new(strategies.clone(), setting.config.clone(), Default::default());
            let what = format!("{} {shape:?} {dtype:?}", setting.name);
            for first in [1, 20, 100] {
                let (before, rest) = (part(&host, 0, first)?, part(&host, first, 50)?);
                let chunks = [1, 1, 40, 1];
                let (mut on_gpu, mut on_cpu) = (new()?, new()?);
                chunked(&mut on_gpu, &on(&device, &before)?, &[first])?;
                chunked(&mut on_cpu, &before, &[first])?;
                let (mut again, _) = through(&on_gpu, &device)?;
                let (mut down, _) = through(&on_gpu, &Device::Cpu)?;
                let (mut up, _) = through(&on_cpu, &device)?;
                for moved in [&again, &down, &up] {
                    ensure!(moved.lens() == on_gpu.lens(), "{what}: other lengths after {first}");
                }
                let rest_there = on(&device, &rest)?;
                let expected = chunked(&mut on_gpu, &rest_there, &chunks)?;
                let got = chunked(&mut again, &rest_there, &chunks)?;
                ensure!(
                    exactly(&got)? == exactly(&expected)?,
                    "{what}: other bits after {first}"
                );
                ensure!(
                    through(&again, &device)?.1 == through(&on_gpu, &device)?.1,
                    "{what}: another file after {first}"
                );
                let expected_on_cpu = chunked(&mut on_cpu, &rest, &chunks)?;
                let allowed = match dtype {
                    DType::F32 => 2e-5,
                    DType::F16 => 2f64.powi(-8),
                    _ => 2f64.powi(-5),
                };
                let down = chunked(&mut down, &rest, &chunks)?;
                let up = chunked(&mut up, &rest_there, &chunks)?;
                for moved in [&down, &up.to_device(&Device::Cpu)?] {
                    let most = largest(&expected_on_cpu)?.max(1.0);
                    let error = largest_error(moved, &expected_on_cpu)?;
                    ensure!(
                        error <= allowed * most,
                        "{what}: error {error:e} of {most:e} after {first}"
                    );
                }
                checked += 1;
            }
        }
    }
    println!("{checked} caches saved and loaded");
    Ok(())
}

/// If nothing merges, a cache can forget its last tokens, as on the CPU.
#[test]
fn truncated_caches_go_on() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let shape = Shape(2, 4, 2, 200, 64);
    for setting in cached() {
        let off = HeadStrategies::uniform(MergeStrategy::Off);
        let new = || CompressedKvCache::new(off.clone(), setting.config.clone(), Default::default());
        let host = shape.qkv(3, DType::F32)?;
        let qkv = on(&device, &host)?;
        for kept in [1, 60, 129, 150] {
            let (mut cache, mut fresh) = (new()?, new()?);
            chunked(&mut cache, &part(&qkv, 0, 150)?, &[150])?;
            let copy = cache.clone();
            cache.truncate(kept)?;
            ensure!((cache.seq_len(), copy.seq_len()) == (kept, 150), "{}", setting.name);
            chunked(&mut fresh, &part(&qkv, 0, kept)?, &[kept])?;
            ensure!(cache.lens() == fresh.lens(), "{}: {kept}", setting.name);
            let rest = part(&qkv, kept, 20)?;
            let (got, expected) = (chunked(&mut cache, &rest, &[1])?, chunked(&mut fresh, &rest, &[1])?);
            ensure!(values(&got)? == values(&expected)?, "{}: {kept}", setting.name);
        }
    }
    Ok(())
}

/// Segments, and values of another size than keys: the CPU's rows and entries, in chunks, and after a way through rows
/// apart and together.
#[test]
fn segments_and_values_of_another_size() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let numbers = numbers();
    for (index, (config, options)) in configs().into_iter().enumerate() {
        let (shape, heads) = (SHAPE, strategies(3, &SHAPE, &config)?);
        let Shape(batch, _, kv_heads, tokens, _) = shape;
        let [q, k, _] = shape.qkv(1, DType::F32)?;
        let [_, _, v] = Shape(batch, shape.1, kv_heads, tokens, [16, 40, 8][index % 3]).qkv(2, DType::F32)?;
        let (cpu, new) = ([q, k, v], || {
            CompressedKvCache::new(heads.clone(), config.clone(), Default::default())
        });
        let (mut cache, mut plain, mut start) = (new()?, new()?, 0);
        for count in [35, 1, 20, 1, 33] {
            let rows = part(&cpu, start, count)?;
            let given = segments(&numbers, start, count)?;
            let on_gpu = with(given.to_device(&device)?, &options);
            let [q, k, v] = on(&device, &rows)?;
            let got = cache.append_and_attend(&q, &k, &v, &on_gpu)?.to_device(&Device::Cpu)?;
            let expected = plain.append_and_attend(&rows[0], &rows[1], &rows[2], &with(given, &options))?;
            let what = format!("{config:?} at {start}");
            assert_close(&what, &got, &expected, 2e-4, 2e-4)?;
            assert_eq!(cache.lens(), plain.lens(), "{what}");
            assert!(cache.bytes() <= cache.bytes_allocated(), "{what}");
            if start % 2 == 1 {
                cache = CompressedKvCache::cat(&cache.split()?)?;
            }
            start += count;
        }
        let message = cache.truncate(40).expect_err("truncated").to_string();
        assert!(message.contains("with segments"), "{message}");
    }
    Ok(())
}
