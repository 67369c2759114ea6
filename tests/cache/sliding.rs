//! The sliding window in a cache: any chunks give the rows of one call, and entries that no later row sees are gone.

use crate::common::caches::{chunked, part, part_options, strategies};
use crate::common::files::{Contents, TempFile};
use crate::common::inputs::{assert_close, Shape};
use crate::common::saved::{bits, saved, through_a_file};
use crate::common::settings::config;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    compressed_attention, AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Criterion, Fold,
    GroupRule, MergeStrategy,
};

const SHAPE: Shape = Shape(2, 4, 2, 150, 16);
const FOLDS: [Fold; 3] = [Fold::PairSum, Fold::Mean, Fold::Drop];
const CHUNKS: [&[usize]; 4] = [&[1], &[7], &[3, 70], &[150]];

fn slides(length: usize) -> AttentionOptions {
    AttentionOptions {
        sliding_window: Some(length),
        ..Default::default()
    }
}

/// Every fold and criterion, on both sides of each sliding window.
fn configs() -> Vec<CompressionConfig> {
    let mut configs = Vec::new();
    for window in [0, 1, 6, 7, 70] {
        for fold in FOLDS {
            configs.push(config(fold, window, Criterion::KeyKey));
            configs.push(config(fold, window, Criterion::QueryKey));
        }
        if window > 1 {
            configs.push(config(Fold::Drop, window, Criterion::ObservedMass));
        }
    }
    configs.push(CompressionConfig {
        group_rule: GroupRule::PerQueryHead,
        ..config(Fold::Mean, 5, Criterion::QueryKey)
    });
    configs
}

fn cache(kind: u8, config: &CompressionConfig) -> Result<CompressedKvCache> {
    let strategies = strategies(kind, &SHAPE, config)?;
    Ok(CompressedKvCache::new(strategies, config.clone(), Default::default())?)
}

/// No list keeps more than L entries, and no more bytes than these, their state and an edge take.
fn assert_bounded(what: &str, cache: &CompressedKvCache, length: usize) {
    let window = cache.config().window;
    let lists: Vec<usize> = cache.lens().concat();
    let most = lists.iter().max().copied().unwrap_or(0);
    assert!(most <= length, "{what}: {most} entries");
    let row = SHAPE.4 * 8;
    // Keys, values, token and size; bits and masses of the window; the open chain, sinks, queries and run.
    let bound = length * (2 * row + 12) + 9 * window + 16 * row;
    assert!(cache.bytes() <= lists.len() * bound, "{what}: {} bytes", cache.bytes());
}

#[test]
fn any_chunks_are_one_call() -> Result<()> {
    for (dtype, tolerance) in [
        (DType::F32, 2e-5),
        (DType::F64, 1e-12),
        (DType::F16, 4e-3),
        (DType::BF16, 3e-2),
    ] {
        let qkv = SHAPE.qkv(1, dtype)?;
        for config in configs() {
            for kind in [0, 2, 3] {
                for length in [1, 2, 7, 64, 5000] {
                    let (strategies, options) = (strategies(kind, &SHAPE, &config)?, slides(length));
                    let whole = compressed_attention(&qkv[0], &qkv[1], &qkv[2], &strategies, &config, &options)?;
                    let chunks = if dtype == DType::F32 {
                        &CHUNKS[..]
                    } else {
                        &CHUNKS[1..3]
                    };
                    for chunks in chunks {
                        let what = format!("{dtype:?} {config:?} kind {kind} L {length} chunks {chunks:?}");
                        let mut cache = cache(kind, &config)?;
                        let got = chunked(&mut cache, &qkv, chunks, |_, _| Ok(options.clone()))?;
                        assert_close(&what, &got, &whole.output, tolerance, tolerance)?;
                        assert_bounded(&what, &cache, length);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Bias and dropout by absolute position, in rows that attend block by block.
#[test]
fn biases_follow_the_window() -> Result<()> {
    let qkv = SHAPE.qkv(2, DType::F32)?;
    let bias: Vec<f32> = (0..150 * 150).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0).collect();
    for length in [1, 7, 64] {
        let options = AttentionOptions {
            bias: Some(Tensor::from_slice(&bias, (1, 1, 150, 150), &Device::Cpu)?),
            dropout: Some(candle_sfattention::Dropout { p: 0.2, seed: 4 }),
            ..slides(length)
        };
        for config in [
            config(Fold::Mean, 5, Criterion::KeyKey),
            config(Fold::PairSum, 0, Criterion::KeyKey),
        ] {
            let strategies = strategies(0, &SHAPE, &config)?;
            let whole = compressed_attention(&qkv[0], &qkv[1], &qkv[2], &strategies, &config, &options)?;
            for chunks in CHUNKS {
                let got = chunked(&mut cache(0, &config)?, &qkv, chunks, |start, count| {
                    part_options(&options, start, count)
                })?;
                let what = format!("{:?} L {length} chunks {chunks:?}", config.fold);
                assert_close(&what, &got, &whole.output, 2e-5, 2e-5)?;
            }
        }
    }
    Ok(())
}

fn next(cache: &mut CompressedKvCache, qkv: &[Tensor; 3], start: usize, length: usize) -> Result<Tensor> {
    let [q, k, v] = part(qkv, start, 5)?;
    Ok(cache.append_and_attend(&q, &k, &v, &slides(length))?)
}

/// Saved, loaded, selected: the copy goes on bit for bit; only a cache that slides has the fields of it in its file.
#[test]
fn copies_go_on_alike() -> Result<()> {
    let qkv = SHAPE.qkv(3, DType::F32)?;
    for config in configs() {
        for length in [1, 2, 7, 64] {
            let mut cache = cache(3, &config)?;
            for start in (0..120).step_by(5) {
                if start % 20 == 0 && start > 0 {
                    let mut loaded = through_a_file(&cache)?;
                    let what = format!("{config:?} L {length} at {start}");
                    assert_eq!((loaded.lens(), loaded.bytes()), (cache.lens(), cache.bytes()), "{what}");
                    let mut mine = cache.clone();
                    mine.index_select(&Tensor::new(&[1u32, 0], &Device::Cpu)?)?;
                    mine.index_select(&Tensor::new(&[1u32, 0], &Device::Cpu)?)?;
                    let expected = bits(&next(&mut cache.clone(), &qkv, start, length)?)?;
                    for copy in [&mut loaded, &mut mine] {
                        assert_eq!(bits(&next(copy, &qkv, start, length)?)?, expected, "{what}");
                    }
                    let [q, k, v] = part(&qkv, start, 1)?;
                    assert!(
                        loaded.append_and_attend(&q, &k, &v, &slides(length + 1)).is_err(),
                        "{what}"
                    );
                }
                next(&mut cache, &qkv, start, length)?;
            }
        }
    }
    let old = saved(3)?;
    let header = Contents::read(&old.0)?.cache.to_string();
    for field in ["sliding_window", "kept_from"] {
        assert!(!header.contains(field), "{field} in {header}");
    }
    Ok(())
}

/// The first call that attends fixes L, in the file, too; a file without one leaves it open, since nothing has left.
#[test]
fn another_length_is_refused() -> Result<()> {
    let qkv = SHAPE.qkv(4, DType::F32)?;
    let config = config(Fold::Mean, 5, Criterion::KeyKey);
    let none = AttentionOptions::default();
    for (first, other) in [
        (slides(9), slides(8)),
        (slides(9), none.clone()),
        (none.clone(), slides(9)),
    ] {
        let mut cache = cache(0, &config)?;
        let [q, k, v] = part(&qkv, 0, 20)?;
        cache.append_and_attend(&q, &k, &v, &first)?;
        let message = cache.append_and_attend(&q, &k, &v, &other).unwrap_err().to_string();
        let parts = ["sliding_window: expected", "as in the calls before", "reset()"];
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        assert_eq!(cache.seq_len(), 20);
        let loaded = through_a_file(&cache)?.append_and_attend(&q, &k, &v, &other);
        match first.sliding_window {
            Some(_) => assert!(loaded.unwrap_err().to_string().contains("sliding_window")),
            None => drop(loaded?),
        }
        cache.append(&q, &k, &v)?;
        cache.reset();
        cache.append_and_attend(&q, &k, &v, &other)?;
    }
    Ok(())
}

/// Tokens that are appended before the first call that attends lose those outside then; later ones at once.
#[test]
fn a_cache_may_be_filled_first() -> Result<()> {
    let qkv = SHAPE.qkv(5, DType::F32)?;
    let [q, k, v] = part(&qkv, 0, 100)?;
    for config in configs() {
        for length in [1, 7, 64] {
            let strategies = strategies(0, &SHAPE, &config)?;
            let whole = compressed_attention(&qkv[0], &qkv[1], &qkv[2], &strategies, &config, &slides(length))?.output;
            let mut cache = cache(0, &config)?;
            cache.append(&q, &k, &v)?;
            let mut loaded = through_a_file(&cache)?;
            for cache in [&mut cache, &mut loaded] {
                let what = format!("{config:?} L {length}");
                let got = next(cache, &qkv, 100, length)?;
                assert_close(&what, &got, &whole.narrow(2, 100, 5)?, 2e-5, 2e-5)?;
                assert_bounded(&what, cache, length);
                let [q, k, v] = part(&qkv, 105, 20)?;
                cache.append(&q, &k, &v)?;
                assert_bounded(&what, cache, length);
                let got = next(cache, &qkv, 125, length)?;
                assert_close(&what, &got, &whole.narrow(2, 125, 5)?, 2e-5, 2e-5)?;
            }
        }
    }
    Ok(())
}

/// A limit counts the entries that stay; a refused call changes nothing.
#[test]
fn a_limit_counts_what_stays() -> Result<()> {
    let qkv = SHAPE.qkv(6, DType::F32)?;
    for (config, length) in configs()
        .iter()
        .flat_map(|config| [2, 7, 20].map(|length| (config, length)))
    {
        let with_limit = |max_entries| {
            let options = CacheOptions {
                max_entries: Some(max_entries),
                ..Default::default()
            };
            CompressedKvCache::new(strategies(0, &SHAPE, config)?, config.clone(), options).map_err(anyhow::Error::from)
        };
        let mut cache = with_limit(length)?;
        chunked(&mut cache, &qkv, &[50], |_, _| Ok(slides(length)))?;
        let most = cache.lens().concat().into_iter().max().unwrap_or(0);
        let [q, k, v] = &qkv;
        with_limit(most)?.append_and_attend(q, k, v, &slides(length))?;
        if most > 1 {
            let mut full = with_limit(most - 1)?;
            let message = full
                .append_and_attend(q, k, v, &slides(length))
                .unwrap_err()
                .to_string();
            assert!(message.contains("max_entries"), "{message}");
            assert_eq!(full.seq_len(), 0);
        }
    }
    Ok(())
}

/// A cache whose heads are off is cut back exactly, or not at all.
#[test]
fn what_has_left_is_not_cut_back_to() -> Result<()> {
    let qkv = SHAPE.qkv(7, DType::F32)?;
    let config = config(Fold::Mean, 5, Criterion::KeyKey);
    let off = strategies(
        MergeStrategy::ALL.iter().position(|s| s.is_off()).unwrap_or(2) as u8,
        &SHAPE,
        &config,
    )?;
    let length = 40;
    let mut cache = CompressedKvCache::new(off, config, Default::default())?;
    for start in (0..30).step_by(5) {
        next(&mut cache, &qkv, start, length)?;
    }
    let expected = bits(&next(&mut cache.clone(), &qkv, 30, length)?)?;
    next(&mut cache, &qkv, 30, length)?;
    let mut cut = cache.clone();
    cut.truncate(30)?;
    assert_eq!(bits(&next(&mut cut, &qkv, 30, length)?)?, expected);
    for start in (35..60).step_by(5) {
        next(&mut cache, &qkv, start, length)?;
    }
    let message = cache.truncate(45).unwrap_err().to_string();
    assert!(message.contains("left the sliding window"), "{message}");
    assert_eq!(cache.seq_len(), 60);
    cache.truncate(60)?;
    Ok(())
}

/// Files whose window or entries do not fit together.
#[test]
fn tampered_files_are_refused() -> Result<()> {
    let qkv = SHAPE.qkv(8, DType::F32)?;
    let mut cache = cache(0, &config(Fold::Mean, 3, Criterion::KeyKey))?;
    chunked(&mut cache, &qkv, &[30], |_, _| Ok(slides(40)))?;
    let saved = TempFile::new();
    cache.save(&saved.0)?;
    type Tampering = (&'static str, fn(&mut Contents));
    let cases: [Tampering; 5] = [
        ("sliding_window", |c| c.set("/state/sliding_window", 0)),
        ("0.tokens", |c| c.set("/state/sliding_window", 9)),
        ("0.tokens", |c| c.set("/state/lists/0/kept_from", 0)),
        ("0.tokens", |c| c.set("/state/lists/0/kept_from", 149)),
        ("0.tokens", |c| c.set("/state/sliding_window", serde_json::Value::Null)),
    ];
    for (part, tamper) in cases {
        let mut contents = Contents::read(&saved.0)?;
        tamper(&mut contents);
        let file = TempFile::new();
        contents.write(&file.0)?;
        let message = CompressedKvCache::load(&file.0, &Device::Cpu)
            .expect_err("refused")
            .to_string();
        assert!(message.contains(part) && message.contains("expected"), "{message}");
    }
    Ok(())
}
