//! Segments in the KV cache's kernels under the emulator: each batch row goes on as if it were alone, with tokens of
//! its own number, and with the entries that the CPU keeps.

use crate::common::caches::{chunked as chunked_on_cpu, part, part_options, strategies};
use crate::common::files::TempFile;
use crate::common::inputs::{assert_close, laid_out, values, Memory, Shape};
use crate::common::kernels::chunked;
use crate::common::saved::{bits, through_a_file};
use crate::common::segments::{configs, numbers, segments, with, SHAPE};
use crate::common::settings::reference_rows;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::emulation::EmulatedCache;
use candle_sfattention::{
    AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Criterion, Dropout, Fold, HeadStrategies,
    MergeStrategy,
};

const CPU: Device = Device::Cpu;

fn emulated(qkv: &[Tensor; 3], config: &CompressionConfig) -> Result<EmulatedCache> {
    let strategies = strategies(3, &SHAPE, config)?;
    Ok(EmulatedCache::new(qkv, &strategies, config, &Default::default())?)
}

fn on_cpu(config: &CompressionConfig) -> Result<CompressedKvCache> {
    let strategies = strategies(3, &SHAPE, config)?;
    Ok(CompressedKvCache::new(strategies, config.clone(), Default::default())?)
}

/// One batch row of tokens `start..start + count`.
fn one(qkv: &[Tensor; 3], row: usize, start: usize, count: usize) -> Result<[Tensor; 3]> {
    let [q, k, v] = part(qkv, start, count)?;
    Ok([q.narrow(0, row, 1)?, k.narrow(0, row, 1)?, v.narrow(0, row, 1)?])
}

fn append(cache: &mut EmulatedCache, qkv: &[Tensor; 3], options: &AttentionOptions) -> Result<Tensor> {
    cache.append(qkv, Some(options))?.context("rows")
}

/// Any chunks give the rows of the reference's one call, and zeros for padding; entries are the CPU's.
fn any_chunks(dtype: DType, tolerance: f64, memory: Memory) -> Result<()> {
    let (numbers, qkv) = (numbers(), SHAPE.qkv(1, dtype)?);
    for (config, options) in configs() {
        let whole = with(segments(&numbers, 0, 90)?, &options);
        let expected = reference_rows(&qkv, &strategies(3, &SHAPE, &config)?, &config, &whole)?;
        for chunks in [&[1usize][..], &[7], &[90], &[35, 1, 20]] {
            let what = format!("{dtype:?} {config:?} {:?} {chunks:?}", options.sliding_window);
            let mut cache = emulated(&qkv, &config)?;
            let got = chunked(&mut cache, &laid_out(&qkv, memory)?, &whole, chunks).with_context(|| what.clone())?;
            assert_close(&what, &got, &expected, tolerance, tolerance)?;
            let padded = values(&got.narrow(0, 3, 1)?)?;
            assert!(padded.iter().all(|x| *x == 0.0), "{what}");
            let mut plain = on_cpu(&config)?;
            chunked_on_cpu(&mut plain, &qkv, chunks, |start, count| {
                part_options(&whole, start, count)
            })?;
            assert_eq!(cache.lens()?, plain.lens(), "{what}");
            assert!(cache.lens()?[2].iter().all(|entries| *entries == 1), "{what}");
            let (used, allocated) = cache.bytes()?;
            assert!(used <= allocated, "{what}: {used} of {allocated} bytes");
        }
    }
    Ok(())
}

#[test]
fn any_chunks_in_f32_are_one_call() -> Result<()> {
    any_chunks(DType::F32, 3e-5, Memory::Fused)
}

#[test]
fn any_chunks_in_halves_are_one_call() -> Result<()> {
    any_chunks(DType::F16, 5e-3, Memory::TokenMajor)?;
    any_chunks(DType::BF16, 4e-2, Memory::HeadMajor)
}

/// A padded batch of prompts, then single tokens without segments: bit for bit each prompt alone, in entries and bytes,
/// too; also after a file, and after batch rows changed their order.
#[test]
fn a_padded_batch_is_each_prompt_alone() -> Result<()> {
    let lengths = [30usize, 1, 17, 24];
    let longest = 30;
    for (config, options) in configs() {
        for left in [true, false] {
            let prompts = SHAPE.qkv(2, DType::F32)?;
            let row = |length: &usize| -> Vec<u32> {
                let inside = |t: usize| if left { t >= longest - length } else { t < *length };
                (0..longest).map(|t| u32::from(inside(t))).collect()
            };
            let mask: Vec<Vec<u32>> = lengths.iter().map(row).collect();
            let mut batch = emulated(&prompts, &config)?;
            let mask = with(Tensor::new(mask, &CPU)?, &options);
            let rows = append(&mut batch, &part(&prompts, 0, longest)?, &mask)?;
            let mut alone = Vec::new();
            for (index, length) in lengths.iter().enumerate() {
                let start = if left { longest - length } else { 0 };
                let prompt = one(&prompts, index, start, *length)?;
                let mut own = emulated(&prompt, &config)?;
                let expected = append(&mut own, &prompt, &options)?;
                let got = rows.narrow(0, index, 1)?.narrow(2, start, *length)?;
                assert_eq!(bits(&got)?, bits(&expected)?, "{config:?} {left} {index}");
                alone.push(own);
            }
            let file = TempFile::new();
            batch.to_cpu()?.save(&file.0)?;
            let loaded = CompressedKvCache::load(&file.0, &CPU)?;
            let mut loaded = EmulatedCache::from_cpu(&loaded, &Default::default(), DType::F32)?;
            let mut batch = batch.select(&[3, 2, 1, 0])?.select(&[3, 2, 1, 0])?;
            for token in 30..45 {
                let new = part(&prompts, token, 1)?;
                let got = append(&mut batch, &new, &options)?;
                assert_eq!(bits(&append(&mut loaded, &new, &options)?)?, bits(&got)?);
                for (index, own) in alone.iter_mut().enumerate() {
                    let expected = append(own, &one(&prompts, index, token, 1)?, &options)?;
                    let what = format!("{config:?} {left} {index} {token}");
                    assert_eq!(bits(&got.narrow(0, index, 1)?)?, bits(&expected)?, "{what}");
                    assert_eq!(batch.lens()?[index], own.lens()?[0], "{what}");
                    assert_eq!(loaded.lens()?[index], own.lens()?[0], "{what}");
                }
            }
            let alone: Vec<usize> = alone.iter().map(|own| Ok(own.bytes()?.0)).collect::<Result<_>>()?;
            assert_eq!(batch.bytes()?.0, alone.iter().sum::<usize>());
        }
    }
    Ok(())
}

/// Strategies and thresholds per batch row stay with their rows where these are taken apart, change their order and
/// start anew.
#[test]
fn rows_keep_their_tests() -> Result<()> {
    let qkv = SHAPE.qkv(3, DType::F32)?;
    for (config, options) in configs() {
        let codes = (0..4 * 4).map(|i| (i * 5 % 7 % 3) as u32).collect::<Vec<_>>();
        let codes = Tensor::from_vec(codes, (4, 4), &CPU)?;
        let strategies = crate::common::caches::with_thresholds(HeadStrategies::from_tensor(&codes)?, &SHAPE, &config)?;
        let mut cache = EmulatedCache::new(&qkv, &strategies, &config, &Default::default())?;
        let mut plain = CompressedKvCache::new(strategies, config.clone(), Default::default())?;
        let (order, mut start) = ([2usize, 0, 3, 1], 0);
        for (count, numbers) in [
            (20, [vec![0; 5], vec![1; 15]].concat()),
            (30, [vec![1; 9], vec![0; 2], vec![2; 19]].concat()),
            (3, vec![3; 3]),
        ] {
            let rows = (0..4).map(|row| match row {
                1 => vec![1u32; count],
                3 => numbers
                    .iter()
                    .rev()
                    .map(|n| u32::from(*n != 0) * (4 - n + start as u32))
                    .collect(),
                _ => numbers.clone(),
            });
            let options = with(Tensor::new(rows.collect::<Vec<_>>(), &CPU)?, &options);
            let new = part(&qkv, start, count)?;
            let got = append(&mut cache, &new, &options)?;
            let expected = plain.append_and_attend(&new[0], &new[1], &new[2], &options)?;
            let what = format!("{config:?} at {start}");
            assert_close(&what, &got, &expected, 3e-5, 3e-5)?;
            assert_eq!(cache.lens()?, plain.lens(), "{what}");
            cache = cache.select(&order)?;
            plain.index_select(&Tensor::new(&order.map(|row| row as u32), &CPU)?)?;
            start += count;
        }
    }
    Ok(())
}

/// Through a file at each step, and on the other device: rows, entries and files stay alike.
#[test]
fn caches_with_segments_change_places() -> Result<()> {
    let numbers = numbers();
    for (dtype, tolerance) in [(DType::F32, 3e-5), (DType::BF16, 4e-2)] {
        let qkv = SHAPE.qkv(6, dtype)?;
        for (config, options) in configs() {
            let mut cache = emulated(&qkv, &config)?;
            let mut plain = on_cpu(&config)?;
            for (index, start) in (0..90).step_by(15).enumerate() {
                let options = with(segments(&numbers, start, 15)?, &options);
                let new = part(&qkv, start, 15)?;
                let what = format!("{dtype:?} {config:?} at {start}");
                let expected = append(&mut cache, &new, &options)?;
                let close = plain.append_and_attend(&new[0], &new[1], &new[2], &options)?;
                assert_close(&what, &expected, &close, tolerance, tolerance)?;
                let mut moved = cache.to_cpu()?;
                assert_eq!((moved.lens(), moved.seq_len()), (plain.lens(), start + 15), "{what}");
                let mut back = EmulatedCache::from_cpu(&through_a_file(&moved)?, &Default::default(), dtype)?;
                assert_eq!(
                    (back.lens()?, back.bytes()?.0),
                    (cache.lens()?, cache.bytes()?.0),
                    "{what}"
                );
                let mut brought = EmulatedCache::from_cpu(&plain, &Default::default(), dtype)?;
                assert_eq!(brought.lens()?, plain.lens(), "{what}");
                if index == 5 {
                    break;
                }
                let next = with(segments(&numbers, start + 15, 4)?, &options);
                let new = part(&qkv, start + 15, 4)?;
                let mut own = cache.select(&[0, 1, 2, 3])?;
                let expected = append(&mut own, &new, &next)?;
                assert_eq!(bits(&append(&mut back, &new, &next)?)?, bits(&expected)?, "{what}");
                let got = append(&mut brought, &new, &next)?;
                assert_close(&what, &got, &expected, tolerance, tolerance)?;
                let got = moved.append_and_attend(&new[0], &new[1], &new[2], &next)?;
                assert_close(&what, &got, &expected, tolerance, tolerance)?;
                assert_eq!((moved.lens(), brought.lens()?), (own.lens()?, own.lens()?), "{what}");
            }
        }
    }
    Ok(())
}

/// Bias and dropout by the index of all appended tokens, where a segment has no padding in its midst.
#[test]
fn biases_go_by_all_tokens() -> Result<()> {
    let numbers = vec![
        [vec![1; 40], vec![2; 50]].concat(),
        [vec![0; 33], vec![1; 57]].concat(),
        vec![1; 90],
        [vec![8; 1], vec![9; 89]].concat(),
    ];
    let qkv = SHAPE.qkv(4, DType::F32)?;
    let bias = (0..4 * 4 * 90 * 90).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0);
    let bias = Tensor::from_iter(bias, &CPU)?.reshape((4, 4, 90, 90))?;
    for (config, options) in configs() {
        let options = AttentionOptions {
            bias: Some(bias.clone()),
            dropout: Some(Dropout { p: 0.2, seed: 3 }),
            softcap: Some(5.0),
            sink_logits: Some(Tensor::new(&[0.5f32, -1.0, 0.0, 2.0], &CPU)?),
            segments: Some(segments(&numbers, 0, 90)?),
            ..options
        };
        let expected = reference_rows(&qkv, &strategies(3, &SHAPE, &config)?, &config, &options)?;
        for chunks in [&[1usize][..], &[90], &[35, 1, 20]] {
            let got = chunked(&mut emulated(&qkv, &config)?, &qkv, &options, chunks)?;
            assert_close(&format!("{config:?} {chunks:?}"), &got, &expected, 3e-5, 3e-5)?;
        }
    }
    let mut cache = emulated(&qkv, &configs()[0].0)?;
    let right = Tensor::new(&[[1u32, 1, 0, 0]; 4], &CPU)?;
    append(&mut cache, &part(&qkv, 0, 4)?, &with(right, &Default::default()))?;
    let options = AttentionOptions {
        bias: Some(bias.narrow(2, 0, 4)?.narrow(3, 0, 8)?),
        ..Default::default()
    };
    let message = append(&mut cache, &part(&qkv, 0, 4)?, &options)
        .unwrap_err()
        .to_string();
    assert!(message.contains("padding before token 4 of batch row 0"), "{message}");
    Ok(())
}

/// A refused call changes no row, whether it goes on or starts anew.
#[test]
fn a_refused_call_changes_nothing() -> Result<()> {
    let qkv = SHAPE.qkv(5, DType::F32)?;
    let options = CacheOptions {
        max_entries: Some(20),
        ..Default::default()
    };
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let mut cache = EmulatedCache::new(&qkv, &off, &CompressionConfig::default(), &options)?;
    let plain = AttentionOptions::default();
    append(&mut cache, &part(&qkv, 0, 15)?, &plain)?;
    let new = part(&qkv, 15, 10)?;
    let twice = [vec![1u32; 4], vec![2; 6]].concat();
    // The last row has too many tokens.
    let ends = vec![twice.clone(), vec![3; 10], vec![0; 10], vec![1; 10]];
    for together in [true, false] {
        if !together {
            // Rows are apart from here on.
            let numbers = Tensor::new(&[[4u32], [1], [1], [1]], &CPU)?;
            append(&mut cache, &part(&qkv, 15, 1)?, &with(numbers, &plain))?;
        }
        let state = |cache: &EmulatedCache| -> Result<_> { Ok((cache.lens()?, cache.bytes()?, bits_of(cache)?)) };
        let before = state(&cache)?;
        let message = append(&mut cache, &new, &with(Tensor::new(ends.clone(), &CPU)?, &plain));
        let message = message.unwrap_err().to_string();
        assert!(message.contains("max_entries"), "{message}");
        let slides = AttentionOptions {
            sliding_window: Some(3),
            ..with(Tensor::new(ends.clone(), &CPU)?, &plain)
        };
        let message = append(&mut cache, &new, &slides).unwrap_err().to_string();
        assert!(message.contains("sliding_window: expected"), "{message}");
        let back = Tensor::new(vec![[vec![1u32; 4], vec![2; 3], vec![1; 3]].concat(); 4], &CPU)?;
        let message = append(&mut cache, &new, &with(back, &plain)).unwrap_err().to_string();
        assert!(message.contains("got 1 again at token 7"), "{message}");
        assert!(state(&cache)? == before, "{together}");
    }
    let fits = vec![twice, vec![3; 10], vec![0; 10], vec![2; 10]];
    append(&mut cache, &new, &with(Tensor::new(fits, &CPU)?, &plain))?;
    assert_eq!(cache.lens()?, [vec![6; 2], vec![10; 2], vec![16; 2], vec![10; 2]]);
    Ok(())
}

/// The keys and values that a cache holds, as its next row sees them.
fn bits_of(cache: &EmulatedCache) -> Result<Vec<u64>> {
    let new = one(&SHAPE.qkv(9, DType::F32)?, 0, 0, 1)?;
    let mut rows = Vec::new();
    for row in 0..4 {
        rows.extend(bits(&append(&mut cache.select(&[row])?, &new, &Default::default())?)?);
    }
    Ok(rows)
}

/// Given scores, and values of another size than keys.
#[test]
fn scores_and_values_go_with_their_segments() -> Result<()> {
    let numbers = numbers();
    let Shape(batch, heads, kv_heads, tokens, _) = SHAPE;
    let [q, k, _] = SHAPE.qkv(7, DType::F32)?;
    let scores = (0..batch * kv_heads * tokens).map(|i| (i * 35 % 17) as f32 / 4.0);
    let scores = Tensor::from_iter(scores, &CPU)?.reshape((batch, kv_heads, tokens))?;
    let thresholds = Tensor::from_vec(vec![2.2f64; heads], heads, &CPU)?;
    let given = HeadStrategies::uniform(MergeStrategy::Similarity).with_thresholds(&thresholds)?;
    for (value_dim, chunks) in [(16, &[1usize][..]), (48, &[90]), (8, &[35, 1, 20])] {
        let [_, _, v] = Shape(batch, heads, kv_heads, tokens, value_dim).qkv(8, DType::F32)?;
        let qkv = [q.clone(), k.clone(), v];
        let config = CompressionConfig {
            criterion: Criterion::Given,
            fold: Fold::Drop,
            window: 4,
            sinks: 1,
            ..CompressionConfig::calibrated()
        };
        let mut cache = EmulatedCache::new(&qkv, &given, &config, &Default::default())?;
        let mut plain = CompressedKvCache::new(given.clone(), config, Default::default())?;
        let mut start = 0;
        for count in chunks.iter().cycle() {
            let count = (*count).min(tokens - start);
            if count == 0 {
                break;
            }
            let (new, scores) = (part(&qkv, start, count)?, scores.narrow(2, start, count)?);
            let options = with(segments(&numbers, start, count)?, &AttentionOptions::default());
            let got = cache.append_scored(&new, Some(&scores), Some(&options))?;
            let expected = plain.append_and_attend_scored(&new[0], &new[1], &new[2], &scores, &options)?;
            let what = format!("{value_dim} {chunks:?} at {start}");
            assert_close(&what, &got.context("rows")?, &expected, 3e-5, 3e-5)?;
            assert_eq!(cache.lens()?, plain.lens(), "{what}");
            start += count;
        }
        for (config, options) in configs().into_iter().step_by(4) {
            let whole = with(segments(&numbers, 0, 90)?, &options);
            let expected = reference_rows(&qkv, &strategies(3, &SHAPE, &config)?, &config, &whole)?;
            let got = chunked(&mut emulated(&qkv, &config)?, &qkv, &whole, chunks)?;
            assert_close(&format!("{value_dim} {config:?}"), &got, &expected, 3e-5, 3e-5)?;
        }
    }
    Ok(())
}

/// Tokens appended without attending go on in each row's segment; a window that comes later holds for every row.
#[test]
fn appended_tokens_go_on_in_their_segments() -> Result<()> {
    let qkv = SHAPE.qkv(3, DType::F32)?;
    for (config, options) in configs() {
        let (mut cache, mut plain) = (emulated(&qkv, &config)?, on_cpu(&config)?);
        let mut both = |start, count, options: Option<AttentionOptions>| -> Result<()> {
            let new = part(&qkv, start, count)?;
            let [q, k, v] = &new;
            let got = cache.append(&new, options.as_ref())?;
            match &options {
                None => plain.append(q, k, v)?,
                Some(options) => {
                    let expected = plain.append_and_attend(q, k, v, options)?;
                    assert_close(
                        &format!("{config:?} at {start}"),
                        &got.context("rows")?,
                        &expected,
                        3e-5,
                        3e-5,
                    )?;
                }
            }
            assert_eq!(cache.lens()?, plain.lens(), "{config:?} at {start}");
            Ok(())
        };
        both(0, 20, None)?;
        // Without attending no segment begins, and no sliding window is known.
        let numbers = |row| -> Vec<u32> { (0..9).map(|t| [1, 2, u32::from(t > 3), 1][row]).collect() };
        let numbers = (0..4).map(numbers).collect::<Vec<_>>();
        both(20, 9, Some(with(Tensor::new(numbers, &CPU)?, &options)))?;
        both(29, 12, None)?;
        both(41, 1, None)?;
        both(42, 5, Some(options.clone()))?;
        both(47, 1, Some(options))?;
    }
    Ok(())
}

/// A batch row of padding alone in the first call that attends slides all the same: its next row sees its window only,
/// here, on the CPU, and after a move.
#[test]
fn a_row_of_padding_slides_too() -> Result<()> {
    let qkv = SHAPE.qkv(8, DType::F32)?;
    for (config, options) in configs()
        .into_iter()
        .filter(|(_, options)| options.sliding_window.is_some())
    {
        let (mut cache, mut plain) = (emulated(&qkv, &config)?, on_cpu(&config)?);
        let [q, k, v] = part(&qkv, 0, 40)?;
        plain.append(&q, &k, &v)?;
        cache.append(&[q, k, v], None)?;
        let new = part(&qkv, 40, 2)?;
        let numbers = with(Tensor::new(&[[0u32, 0], [1, 1], [1, 1], [1, 1]], &CPU)?, &options);
        plain.append_and_attend(&new[0], &new[1], &new[2], &numbers)?;
        append(&mut cache, &new, &numbers)?;
        let mut moved = EmulatedCache::from_cpu(&plain, &Default::default(), DType::F32)?;
        let mut back = cache.to_cpu()?;
        for token in 42..60 {
            let new = part(&qkv, token, 1)?;
            let expected = plain.append_and_attend(&new[0], &new[1], &new[2], &options)?;
            let what = format!("{config:?} at {token}");
            assert_close(&what, &append(&mut cache, &new, &options)?, &expected, 3e-5, 3e-5)?;
            assert_close(&what, &append(&mut moved, &new, &options)?, &expected, 3e-5, 3e-5)?;
            let got = back.append_and_attend(&new[0], &new[1], &new[2], &options)?;
            assert_close(&what, &got, &expected, 3e-5, 3e-5)?;
        }
        assert_eq!((cache.lens()?, moved.lens()?), (plain.lens(), plain.lens()));
    }
    Ok(())
}
