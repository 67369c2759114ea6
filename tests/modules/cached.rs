//! `forward_cached` against `forward` over the whole sequence, for any chunking, and its refusals.

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_nn::Module;
use candle_sfattention::{
    AttentionOptions, CacheOptions, CompressedAttention, CompressedSelfAttention, CompressionConfig, Dropout, Fold,
    GroupRule, HeadStrategies, MergeStrategy, SelfAttentionConfig,
};

use crate::common::inputs::assert_close;
use crate::{generous, random, rotary, trainable, uniform, LAYOUTS, SIZES, STRATEGIES};

/// Positions that [`rotary`] prepares.
const POSITIONS: usize = 40;

/// Shared and separate lists, with and without a window.
fn configs() -> [CompressionConfig; 3] {
    let unanimous = CompressionConfig {
        fold: Fold::Mean,
        group_rule: GroupRule::Unanimous,
        sinks: 2,
        window: 5,
        ..generous()
    };
    [
        generous(),
        unanimous.clone(),
        CompressionConfig { window: 0, ..unanimous },
    ]
}

fn layer(config: CompressionConfig, sizes: SelfAttentionConfig, dtype: DType) -> Result<CompressedSelfAttention> {
    let strategies = HeadStrategies::per_head(STRATEGIES.into());
    let attention = CompressedAttention::new(strategies, config, AttentionOptions::default())?;
    Ok(trainable(sizes, attention, dtype)?.0)
}

/// All rows of xs (B, N, hidden) through one cache, in chunks of these sizes; the last size repeats.
fn in_chunks(layer: &CompressedSelfAttention, xs: &Tensor, chunks: &[usize]) -> Result<Tensor> {
    let mut cache = layer.attention().new_cache(CacheOptions::default())?;
    let (mut rows, mut start, tokens) = (Vec::new(), 0, xs.dim(1)?);
    for chunk in chunks.iter().chain(std::iter::repeat(&chunks[chunks.len() - 1])) {
        let count = (*chunk).min(tokens - start);
        rows.push(layer.forward_cached(&xs.narrow(1, start, count)?, &mut cache)?);
        start += count;
        assert_eq!(cache.seq_len(), start);
        if start == tokens {
            break;
        }
    }
    Ok(Tensor::cat(&rows, 1)?)
}

#[test]
fn any_chunking_of_a_layer_gives_the_whole_sequences_rows() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
        for (config, layout) in configs()
            .into_iter()
            .flat_map(|c| LAYOUTS.map(|layout| (c.clone(), layout)))
        {
            let sizes = SelfAttentionConfig {
                rotary: rotary(layout),
                ..SIZES
            };
            let layer = layer(config, sizes, dtype)?;
            let xs = random(3, &[2, POSITIONS, SIZES.hidden_size], dtype)?;
            let whole = layer.forward(&xs)?;
            for chunks in [&[POSITIONS][..], &[1], &[7], &[31, 1], &[1, 20, 3]] {
                let what = format!("{dtype:?} {layout:?} {chunks:?} {:?}", layer.attention().config());
                assert_close(&what, &in_chunks(&layer, &xs, chunks)?, &whole, tolerance, tolerance)?;
            }
        }
    }
    Ok(())
}

#[test]
fn an_attentions_own_options_reach_the_cache() -> Result<()> {
    let options = AttentionOptions {
        softmax_scale: Some(0.7),
        dropout: Some(Dropout { p: 0.3, seed: 5 }),
        ..Default::default()
    };
    let attention = CompressedAttention::new(uniform(MergeStrategy::Similarity), generous(), options)?;
    let [q, k, v] = [(1, 4), (2, 2), (3, 2)].map(|(seed, heads)| random(seed, &[2, heads, 30, 6], DType::F64));
    let (q, k, v) = (q?, k?, v?);
    // The first call of a fresh module draws with the plain seed, and so does every cached call.
    let whole = attention.clone().forward(&q, &k, &v)?;
    let mut cache = attention.new_cache(CacheOptions::default())?;
    let mut rows = Vec::new();
    for (start, count) in [(0, 11), (11, 1), (12, 18)] {
        let part = |x: &Tensor| x.narrow(2, start, count);
        rows.push(attention.forward_cached(&part(&q)?, &part(&k)?, &part(&v)?, &mut cache)?);
    }
    assert_close("options", &Tensor::cat(&rows, 2)?, &whole, 1e-12, 1e-12)?;
    Ok(())
}

#[track_caller]
fn assert_refused<T>(result: candle_core::Result<T>, parts: &[&str]) {
    let message = result.err().expect("it was accepted").to_string();
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message}");
    }
}

#[test]
fn what_does_not_fit_is_refused_and_leaves_the_cache_as_it_was() -> Result<()> {
    let sizes = SelfAttentionConfig {
        rotary: rotary(LAYOUTS[1]),
        ..SIZES
    };
    let layer = layer(configs()[1].clone(), sizes, DType::F32)?;
    let mut cache = layer.attention().new_cache(CacheOptions::default())?;
    let input = |tokens, hidden| random(1, &[1, tokens, hidden], DType::F32);
    layer.forward_cached(&input(POSITIONS - 2, SIZES.hidden_size)?, &mut cache)?;
    for (tokens, hidden, parts) in [
        (
            3,
            SIZES.hidden_size,
            [
                "at most the rotary embedding's 40 positions, got 41",
                "raise max_tokens",
            ],
        ),
        (
            0,
            SIZES.hidden_size,
            ["expected at least one batch row and token", "skip the call"],
        ),
        (1, 13, ["expected shape (batch, tokens, 12)", "hidden_size"]),
    ] {
        assert_refused(layer.forward_cached(&input(tokens, hidden)?, &mut cache), &parts);
        assert_eq!(cache.seq_len(), POSITIONS - 2);
    }
    let two_rows = random(1, &[2, 1, SIZES.hidden_size], DType::F32)?;
    assert_refused(
        layer.forward_cached(&two_rows, &mut cache),
        &["cache's batch", "reset()"],
    );
    layer.forward_cached(&input(2, SIZES.hidden_size)?, &mut cache)?;
    Ok(())
}

#[test]
fn caches_of_other_settings_and_settings_without_a_cache_are_refused() -> Result<()> {
    let attention = |strategy, config, options| CompressedAttention::new(uniform(strategy), config, options);
    let mine = attention(MergeStrategy::Similarity, generous(), Default::default())?;
    let x = random(1, &[1, 2, 3, 4], DType::F32)?;
    for other in [
        attention(MergeStrategy::Off, generous(), Default::default())?,
        attention(MergeStrategy::Similarity, configs()[1].clone(), Default::default())?,
    ] {
        let mut cache = other.new_cache(CacheOptions::default())?;
        assert_refused(
            mine.forward_cached(&x, &x, &x, &mut cache),
            &["cache: expected", "new_cache"],
        );
    }
    let everything = AttentionOptions {
        causal: false,
        ..Default::default()
    };
    let sees_all = attention(MergeStrategy::Off, generous(), everything)?;
    assert_refused(sees_all.new_cache(CacheOptions::default()), &["causal: expected true"]);
    let reference = attention(
        MergeStrategy::Similarity,
        CompressionConfig::reference(),
        Default::default(),
    )?;
    assert_refused(
        reference.new_cache(CacheOptions::default()),
        &["expected MergeRule::Causal for a KV cache"],
    );
    Ok(())
}
