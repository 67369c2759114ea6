//! Segments in a cache: each batch row goes on as if it were alone, with tokens of its own number.

use crate::common::caches::{chunked, part, strategies};
use crate::common::files::{Contents, TempFile};
use crate::common::inputs::{assert_close, values};
use crate::common::saved::{bits, saved, through_a_file};
use crate::common::segments::{configs, numbers, segments, with, SHAPE};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    compressed_attention, AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Dropout,
    HeadStrategies, MergeStrategy, TensorLayout,
};

fn cache(config: &CompressionConfig) -> Result<CompressedKvCache> {
    let strategies = strategies(3, &SHAPE, config)?;
    Ok(CompressedKvCache::new(strategies, config.clone(), Default::default())?)
}

/// Any chunks give the rows of one call, and zeros for padding.
#[test]
fn any_chunks_are_one_call() -> Result<()> {
    let numbers = numbers();
    for (dtype, tolerance) in [
        (DType::F32, 2e-5),
        (DType::F64, 1e-12),
        (DType::F16, 4e-3),
        (DType::BF16, 3e-2),
    ] {
        let qkv = SHAPE.qkv(1, dtype)?;
        for (config, options) in configs() {
            let whole = with(segments(&numbers, 0, 90)?, &options);
            let heads = strategies(3, &SHAPE, &config)?;
            let expected = compressed_attention(&qkv[0], &qkv[1], &qkv[2], &heads, &config, &whole)?.output;
            for chunks in [&[1usize][..], &[7], &[90], &[35, 1, 20]] {
                let mut cache = cache(&config)?;
                let got = chunked(&mut cache, &qkv, chunks, |start, count| {
                    Ok(with(segments(&numbers, start, count)?, &options))
                })?;
                let what = format!("{dtype:?} {config:?} {:?} {chunks:?}", options.sliding_window);
                assert_close(&what, &got, &expected, tolerance, tolerance)?;
                assert_eq!(cache.seq_len(), 90, "{what}");
                let padded = values(&got.narrow(0, 3, 1)?)?;
                assert!(padded.iter().all(|x| *x == 0.0), "{what}");
                assert!(cache.lens()[3].iter().all(|entries| *entries == 0), "{what}");
                assert!(cache.lens()[2].iter().all(|entries| *entries == 1), "{what}");
            }
        }
    }
    Ok(())
}

/// A padded batch of prompts, then single tokens without segments: bit for bit each prompt alone, in entries, too.
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
            let mut batch = cache(&config)?;
            let [q, k, v] = part(&prompts, 0, longest)?;
            let rows = batch.append_and_attend(&q, &k, &v, &with(Tensor::new(mask, &Device::Cpu)?, &options))?;
            let mut alone = Vec::new();
            for (index, length) in lengths.iter().enumerate() {
                let start = if left { longest - length } else { 0 };
                let one = |x: &Tensor, start, count| x.narrow(0, index, 1).unwrap().narrow(2, start, count).unwrap();
                let mut own = cache(&config)?;
                let [q, k, v] = [0, 1, 2].map(|i| one(&prompts[i], start, *length));
                let expected = own.append_and_attend(&q, &k, &v, &options)?;
                assert_eq!(
                    bits(&one(&rows, start, *length))?,
                    bits(&expected)?,
                    "{config:?} {left} {index}"
                );
                alone.push(own);
            }
            let mut loaded = through_a_file(&batch)?;
            batch.index_select(&Tensor::new(&[3u32, 2, 1, 0], &Device::Cpu)?)?;
            batch.index_select(&Tensor::new(&[3u32, 2, 1, 0], &Device::Cpu)?)?;
            for token in 30..45 {
                let [q, k, v] = part(&prompts, token, 1)?;
                let got = batch.append_and_attend(&q, &k, &v, &options)?;
                assert_eq!(bits(&loaded.append_and_attend(&q, &k, &v, &options)?)?, bits(&got)?);
                for (index, own) in alone.iter_mut().enumerate() {
                    let one = |x: &Tensor| x.narrow(0, index, 1).unwrap();
                    let expected = own.append_and_attend(&one(&q), &one(&k), &one(&v), &options)?;
                    assert_eq!(bits(&one(&got))?, bits(&expected)?, "{config:?} {left} {index} {token}");
                    assert_eq!(batch.lens()[index], own.lens()[0], "{config:?} {left} {index} {token}");
                    assert_eq!(loaded.lens()[index], own.lens()[0]);
                }
            }
            assert_eq!(batch.bytes(), alone.iter().map(CompressedKvCache::bytes).sum::<usize>());
        }
    }
    Ok(())
}

/// A finished row is padding from then on, and others go on; a new number starts anew.
#[test]
fn rows_end_and_begin() -> Result<()> {
    let qkv = SHAPE.qkv(3, DType::F32)?;
    let (config, options) = configs().swap_remove(5);
    let mut cache = cache(&config)?;
    let [q, k, v] = part(&qkv, 0, 20)?;
    cache.append_and_attend(&q, &k, &v, &options)?;
    let before = cache.lens();
    for token in 20..30 {
        let [q, k, v] = part(&qkv, token, 1)?;
        let numbers = Tensor::new(&[[0u32], [1], [7], [1]], &Device::Cpu)?;
        let rows = cache.append_and_attend(&q, &k, &v, &with(numbers, &options))?;
        assert!(values(&rows.narrow(0, 0, 1)?)?.iter().all(|x| *x == 0.0));
        assert!(values(&rows.narrow(0, 1, 1)?)?.iter().any(|x| *x != 0.0));
        if token == 20 {
            let expected = Tensor::cat(&[&v.narrow(0, 2, 1)?.narrow(1, 0, 1)?; 2], 1)?;
            let got = rows.narrow(0, 2, 1)?.narrow(1, 0, 2)?;
            assert_close("a first token is its value", &got, &expected, 1e-6, 1e-6)?;
        }
    }
    assert_eq!(cache.lens()[0], before[0]);
    assert!(cache.lens()[2].iter().all(|entries| *entries <= 10));
    assert_eq!(cache.seq_len(), 30);
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
    let bias: Vec<f32> = (0..4 * 90 * 90)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0)
        .collect();
    let bias = Tensor::from_vec(bias, (1, 4, 90, 90), &Device::Cpu)?;
    for (config, options) in configs() {
        let options = AttentionOptions {
            bias: Some(bias.clone()),
            dropout: Some(Dropout { p: 0.2, seed: 3 }),
            ..options
        };
        let heads = strategies(3, &SHAPE, &config)?;
        let whole = with(segments(&numbers, 0, 90)?, &options);
        let expected = compressed_attention(&qkv[0], &qkv[1], &qkv[2], &heads, &config, &whole)?.output;
        for chunks in [&[1usize][..], &[35, 1, 20]] {
            let got = chunked(&mut cache(&config)?, &qkv, chunks, |start, count| {
                let bias = bias.narrow(2, start, count)?.narrow(3, 0, start + count)?;
                let options = AttentionOptions {
                    bias: Some(bias),
                    ..options.clone()
                };
                Ok(with(segments(&numbers, start, count)?, &options))
            })?;
            assert_close(&format!("{config:?} {chunks:?}"), &got, &expected, 2e-5, 2e-5)?;
        }
    }
    let mut cache = cache(&configs()[0].0)?;
    let [q, k, v] = part(&qkv, 0, 4)?;
    let right = Tensor::new(&[[1u32, 1, 0, 0]; 4], &Device::Cpu)?;
    cache.append_and_attend(&q, &k, &v, &with(right, &AttentionOptions::default()))?;
    let options = AttentionOptions {
        bias: Some(bias.narrow(2, 0, 4)?.narrow(3, 0, 8)?),
        ..Default::default()
    };
    let message = cache.append_and_attend(&q, &k, &v, &options).unwrap_err().to_string();
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
    let mut cache = CompressedKvCache::new(off, CompressionConfig::default(), options)?;
    let [q, k, v] = part(&qkv, 0, 15)?;
    cache.append_and_attend(&q, &k, &v, &Default::default())?;
    let before = (cache.lens(), format!("{cache:?}"));
    let plain = AttentionOptions::default();
    let [q, k, v] = part(&qkv, 15, 10)?;
    let twice = [vec![1u32; 4], vec![2; 6]].concat();
    for rows in [
        vec![vec![1; 10]; 4],
        vec![twice.clone(), vec![3; 10], vec![0; 10], vec![1; 10]],
    ] {
        let message = cache.append_and_attend(&q, &k, &v, &with(Tensor::new(rows, &Device::Cpu)?, &plain));
        assert!(message.unwrap_err().to_string().contains("max_entries"));
        assert_eq!((cache.lens(), format!("{cache:?}")), before);
    }
    let back = Tensor::new(vec![[vec![1u32; 4], vec![2; 3], vec![1; 3]].concat(); 4], &Device::Cpu)?;
    let message = cache
        .append_and_attend(&q, &k, &v, &with(back, &plain))
        .unwrap_err()
        .to_string();
    assert!(message.contains("got 1 again at token 7"), "{message}");
    let short = Tensor::new(vec![vec![1u32; 9]; 4], &Device::Cpu)?;
    let message = cache
        .append_and_attend(&q, &k, &v, &with(short, &plain))
        .unwrap_err()
        .to_string();
    assert!(message.contains("(4, 10)"), "{message}");
    assert_eq!((cache.lens(), format!("{cache:?}")), before);
    let fits = vec![twice, vec![3; 10], vec![0; 10], vec![2; 10]];
    let [q, k, v] = [q, k, v].map(|x| x.transpose(1, 2).unwrap());
    let options = AttentionOptions {
        layout: TensorLayout::TokensFirst,
        ..with(Tensor::new(fits, &Device::Cpu)?, &plain)
    };
    cache.append_and_attend(&q, &k, &v, &options)?;
    assert_eq!(cache.lens(), [vec![6; 2], vec![10; 2], vec![15; 2], vec![10; 2]]);
    let message = cache.truncate(20).unwrap_err().to_string();
    assert!(message.contains("with segments"), "{message}");
    cache.truncate(0)?;
    cache.append_and_attend(
        &q,
        &k,
        &v,
        &AttentionOptions {
            segments: None,
            ..options
        },
    )?;
    Ok(())
}

/// A row of padding alone in the first call that attends slides with the others: a file holds what it keeps.
#[test]
fn a_row_of_padding_is_saved_before_it_slides() -> Result<()> {
    let qkv = SHAPE.qkv(8, DType::F32)?;
    for (config, options) in configs() {
        if options.sliding_window.is_none() {
            continue;
        }
        let mut original = cache(&config)?;
        let [q, k, v] = part(&qkv, 0, 40)?;
        original.append(&q, &k, &v)?;
        let [q, k, v] = part(&qkv, 40, 2)?;
        let numbers = Tensor::new(&[[0u32, 0], [1, 1], [1, 1], [1, 1]], &Device::Cpu)?;
        original.append_and_attend(&q, &k, &v, &with(numbers, &options))?;
        let mut loaded = through_a_file(&original)?;
        for token in 42..60 {
            let [q, k, v] = part(&qkv, token, 1)?;
            let expected = original.append_and_attend(&q, &k, &v, &options)?;
            let got = loaded.append_and_attend(&q, &k, &v, &options)?;
            assert_eq!(bits(&got)?, bits(&expected)?, "{config:?} at {token}");
        }
        assert_eq!(loaded.lens(), original.lens());
    }
    Ok(())
}

/// Files hold the places of rows, and are refused where they do not fit; without segments they hold none.
#[test]
fn files_hold_the_places() -> Result<()> {
    let numbers = numbers();
    let qkv = SHAPE.qkv(6, DType::F32)?;
    for (config, options) in configs() {
        let mut original = cache(&config)?;
        for start in (0..90).step_by(15) {
            let mut loaded = through_a_file(&original)?;
            assert_eq!((loaded.lens(), loaded.bytes()), (original.lens(), original.bytes()));
            let [q, k, v] = part(&qkv, start, 15)?;
            let options = with(segments(&numbers, start, 15)?, &options);
            let expected = original.append_and_attend(&q, &k, &v, &options)?;
            assert_eq!(
                bits(&loaded.append_and_attend(&q, &k, &v, &options)?)?,
                bits(&expected)?,
                "{config:?}"
            );
        }
        if options.sliding_window.is_none() && config.window == 6 {
            let file = TempFile::new();
            original.save(&file.0)?;
            type Tampering = (&'static str, fn(&mut Contents));
            let cases: [Tampering; 6] = [
                ("places", |c| c.set("/state/places", serde_json::json!([]))),
                ("places", |c| c.set("/state/places/0/number", 0)),
                ("places", |c| c.set("/state/places/0/start", 91)),
                ("lists", |c| c.set("/state/places", serde_json::Value::Null)),
                ("lists", |c| c.set("/state/lists/0/seq_len", 1)),
                ("lists", |c| c.set("/state/places/1/start", 89)),
            ];
            for (part, tamper) in cases {
                let mut contents = Contents::read(&file.0)?;
                tamper(&mut contents);
                let file = TempFile::new();
                contents.write(&file.0)?;
                let message = CompressedKvCache::load(&file.0, &Device::Cpu)
                    .expect_err("refused")
                    .to_string();
                assert!(message.contains(part) && message.contains("expected"), "{message}");
            }
        }
    }
    // Ones throughout say nothing: the cache stays as it was, and can be cut back.
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let mut plain = CompressedKvCache::new(off, CompressionConfig::default(), Default::default())?;
    let [q, k, v] = part(&qkv, 0, 15)?;
    let ones = with(
        Tensor::ones((4, 15), DType::U32, &Device::Cpu)?,
        &AttentionOptions::default(),
    );
    plain.append_and_attend(&q, &k, &v, &ones)?;
    plain.append_and_attend(&q, &k, &v, &ones)?;
    plain.truncate(20)?;
    assert_eq!(plain.lens(), vec![vec![20; 2]; 4]);
    let header = Contents::read(&saved(3)?.0)?.cache.to_string();
    assert!(!header.contains("places"), "{header}");
    Ok(())
}
