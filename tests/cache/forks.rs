//! Forks: caches that share what they store, and continue alone.

use crate::common::caches::{part, plain};
use crate::common::inputs::Shape;
use crate::common::saved::{assert_go_on_alike, bits, through_a_file};
use crate::common::settings::{config, settings};
use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_sfattention::{CacheOptions, CompressedKvCache, Criterion, Fold, HeadStrategies, MergeStrategy};

fn append(cache: &mut CompressedKvCache, qkv: &[Tensor; 3], start: usize, count: usize) -> Result<Tensor> {
    let [q, k, v] = &part(qkv, start, count)?;
    Ok(cache.append_and_attend(q, k, v, &plain(start, count)?)?)
}

/// The calls of one cache, and what it computed: forks at many places, each with tokens of its own.
#[test]
fn forks_equal_fresh_caches_bit_for_bit() -> Result<()> {
    // More entries than a short piece, and a tile that crosses the border of two pieces.
    let shape = Shape(1, 4, 2, 900, 16);
    for (index, setting) in settings().into_iter().enumerate() {
        let strategies = setting.strategies(&shape)?;
        let new = || CompressedKvCache::new(strategies.clone(), setting.config.clone(), Default::default());
        let options = (setting.options)(&shape);
        let extras = options.bias.is_some() || options.dropout.is_some() || !options.causal;
        if new().is_err() || extras {
            continue;
        }
        for storage in [DType::F32, DType::BF16] {
            let qkv = shape.qkv(index as u64, storage)?;
            let own = shape.qkv(100 + index as u64, storage)?;
            // Each is a prompt, how the parent goes on, and the fork's own calls.
            for (prompt, parent, calls) in [
                (611, &[1usize, 1][..], &[1usize, 1, 1, 40, 1][..]),
                (37, &[200], &[1, 300, 1]),
                (300, &[1, 299, 1], &[7, 1, 70, 1]),
            ] {
                let mut origin = new()?;
                append(&mut origin, &qkv, 0, prompt)?;
                let mut fork = origin.fork();
                let mut at = prompt;
                for count in parent {
                    append(&mut origin, &qkv, at, *count)?;
                    at += count;
                }
                let mut fresh = new()?;
                append(&mut fresh, &qkv, 0, prompt)?;
                let mut at = prompt;
                for count in calls {
                    let expected = append(&mut fresh, &own, at, *count)?;
                    let got = append(&mut fork, &own, at, *count)?;
                    let name = format!("{} {storage:?} {prompt} {at}", setting.name);
                    assert_eq!(bits(&got)?, bits(&expected)?, "{name}");
                    // A fork of a fork, which is dropped at once.
                    let mut second = fork.fork();
                    append(&mut second, &qkv, at, 1)?;
                    at += count;
                }
                assert_go_on_alike([&mut fresh, &mut fork], &own, at, &[1, 33])?;
                let mut loaded = through_a_file(&fork)?;
                assert_eq!(loaded.bytes(), fork.bytes());
                assert_eq!(loaded.lens(), fork.lens());
                let [q, k, v] = &part(&qkv, 0, 1)?;
                let expected = fork.append_and_attend(q, k, v, &Default::default())?;
                let got = loaded.append_and_attend(q, k, v, &Default::default())?;
                assert_eq!(bits(&got)?, bits(&expected)?, "{}: loaded", setting.name);
            }
        }
    }
    Ok(())
}

/// Where every token is kept, a fork's own memory is that of its own tokens: it does not grow with the prompt.
#[test]
fn a_forks_own_memory_does_not_grow_with_the_prompt() -> Result<()> {
    let own = |prompt: usize| -> Result<usize> {
        let shape = Shape(1, 2, 1, prompt + 100, 32);
        let qkv = shape.qkv(1, DType::F32)?;
        let strategies = HeadStrategies::uniform(MergeStrategy::Off);
        let config = config(Fold::Mean, 32, Criterion::KeyKey);
        let mut cache = CompressedKvCache::new(strategies, config, CacheOptions::default())?;
        append(&mut cache, &qkv, 0, prompt)?;
        let mut fork = cache.fork();
        for token in prompt..prompt + 100 {
            append(&mut fork, &qkv, token, 1)?;
        }
        Ok(fork.bytes_allocated() - fork.bytes_shared())
    };
    assert_eq!(own(8192)?, own(1024)?);
    Ok(())
}

/// A cache that was taken apart from its forks, or whose rows were, shares nothing and goes on as before.
#[test]
fn unshared_caches_go_on_alone() -> Result<()> {
    let shape = Shape(1, 2, 1, 700, 16);
    let qkv = shape.qkv(1, DType::F32)?;
    let config = config(Fold::Mean, 32, Criterion::KeyKey);
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let mut cache = CompressedKvCache::new(strategies, config, CacheOptions::default())?;
    cache.unshare()?;
    append(&mut cache, &qkv, 0, 600)?;
    let mut fork = cache.fork();
    assert!(fork.bytes_shared() > 0);
    fork.unshare()?;
    assert_eq!((fork.bytes_shared(), cache.bytes_shared()), (0, 0));
    let mut rows = cache.fork();
    rows.index_select(&Tensor::new(&[0u32, 0], &candle_core::Device::Cpu)?)?;
    rows.unshare()?;
    assert_eq!((rows.bytes_shared(), cache.bytes_shared()), (0, 0));
    let expected = bits(&append(&mut cache, &qkv, 600, 40)?)?;
    assert_eq!(bits(&append(&mut fork, &qkv, 600, 40)?)?, expected);
    for mut row in rows.split()? {
        assert_eq!(bits(&append(&mut row, &qkv, 600, 40)?)?, expected);
    }
    Ok(())
}

/// A thousand forks of a prompt hold its entries once, and their own tokens beside them.
#[test]
fn a_thousand_forks_hold_the_prompt_once() -> Result<()> {
    let (tokens, shape) = (8192, Shape(1, 2, 1, 8192 + 4, 32));
    let qkv = shape.qkv(1, DType::F32)?;
    let config = config(Fold::Mean, 32, Criterion::KeyKey);
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let mut prompt = CompressedKvCache::new(strategies, config, CacheOptions::default())?;
    append(&mut prompt, &qkv, 0, tokens)?;
    let one = prompt.bytes_allocated();
    let forks: Vec<_> = (0..1000).map(|_| prompt.fork()).collect();
    // Nothing but pointers until a fork appends.
    assert!(forks.iter().all(|fork| fork.bytes_shared() == one));
    let mut own = 0;
    for mut fork in forks {
        for token in tokens..tokens + 4 {
            append(&mut fork, &qkv, token, 1)?;
        }
        own += fork.bytes_allocated() - fork.bytes_shared();
        assert!(fork.bytes_shared() > one * 9 / 10);
    }
    // A window twice over, the chain, and room for 64 entries: no share of the 8192 tokens.
    let row = 2 * 32 * 4 + 8;
    assert!(own <= 1000 * (66 + 2 * 33 + 8) * row, "{} bytes a fork", own / 1000);
    Ok(())
}
