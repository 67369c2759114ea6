//! Scores that the caller gives: decisions against the reference, and in a cache for any chunking.

use crate::common::caches::{part, part_options, strategies};
use crate::common::inputs::{assert_close, Shape};
use crate::common::saved::{bits, through_a_file};
use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{
    attend, observed_mass, AttentionOptions, CompressedAttention, CompressedKvCache, CompressionConfig, Criterion,
    HeadStrategies, MergePlan, MergeStrategy,
};
use rand::{rngs::StdRng, Rng, SeedableRng};

const SHAPE: Shape = Shape(2, 6, 2, 70, 16);
const WINDOWS: [(usize, usize); 5] = [(0, 0), (1, 3), (7, 2), (33, 80), (69, 0)];

fn config(window: usize, sinks: usize) -> CompressionConfig {
    CompressionConfig {
        criterion: Criterion::Given,
        window,
        sinks,
        ..CompressionConfig::calibrated()
    }
}

/// Scores from 0 to 8, some of them infinite or NaN, or equal to a threshold.
fn scores(shape: &Shape, seed: u64) -> Result<Tensor> {
    let &Shape(batch, _, kv_heads, tokens, _) = shape;
    let mut rng = StdRng::seed_from_u64(seed);
    let one = |_| match rng.random_range(0..20) {
        0 => f32::NAN,
        1 => f32::NEG_INFINITY,
        2 => f32::INFINITY,
        3 => 2.0,
        _ => rng.random_range(0f32..8.0),
    };
    let scores = (0..batch * kv_heads * tokens).map(one).collect::<Vec<_>>();
    Ok(Tensor::from_vec(scores, (batch, kv_heads, tokens), &Device::Cpu)?)
}

/// A threshold for each query head, from 2 on.
fn thresholds(shape: &Shape) -> Result<Tensor> {
    let heads = Tensor::arange(0u32, shape.1 as u32, &Device::Cpu)?.to_dtype(DType::F64)?;
    Ok((heads.affine(0.7, 2.0))?)
}

fn similar(shape: &Shape) -> Result<HeadStrategies> {
    Ok(HeadStrategies::uniform(MergeStrategy::Similarity).with_thresholds(&thresholds(shape)?)?)
}

fn rows(scores: &Tensor) -> Result<Vec<Vec<Vec<f64>>>> {
    Ok(scores.to_dtype(DType::F64)?.to_vec3()?)
}

fn reference_bits(
    scores: &Tensor,
    heads: usize,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
) -> Result<Tensor> {
    let found = reference::given_indicators(&rows(scores)?, heads, strategies, config)?;
    let bits = found.bits.iter().map(|bit| u8::from(*bit)).collect::<Vec<_>>();
    let [batch, heads, pairs] = found.dims;
    Ok(Tensor::from_vec(bits, (batch, heads, pairs), &Device::Cpu)?)
}

#[test]
fn decisions_agree_with_the_reference() -> Result<()> {
    for tokens in [1, 2, 59, 257] {
        let shape = Shape(3, 6, 2, tokens, 8);
        let scores = scores(&shape, tokens as u64)?;
        for (window, sinks) in WINDOWS {
            for kind in 0..5 {
                let config = config(window, sinks);
                let strategies = match strategies(kind, &shape, &config)?.all_off() {
                    true => strategies(kind, &shape, &config)?,
                    false => strategies(kind, &shape, &config)?.with_thresholds(&thresholds(&shape)?)?,
                };
                let plan = MergePlan::from_scores(&scores, &strategies, &config, true)?;
                let expected = reference_bits(&scores, 6, &strategies, &config)?;
                let got = plan.indicators().to_vec3::<u8>()?;
                assert_eq!(
                    got,
                    expected.to_vec3::<u8>()?,
                    "{tokens} tokens, window {window}, strategies {kind}"
                );
                if kind == 0 && tokens > window + sinks + 50 {
                    assert!(
                        plan.stats()?.hidden_ratio() > 0.15,
                        "{:?}",
                        plan.stats()?.hidden_ratio()
                    );
                }
            }
        }
    }
    Ok(())
}

/// Scores by a view, and scores that carry a gradient, decide like any others.
#[test]
fn views_and_variables_are_scores() -> Result<()> {
    let (scores, strategies, config) = (scores(&SHAPE, 5)?, similar(&SHAPE)?, config(3, 1));
    let expected = MergePlan::from_scores(&scores, &strategies, &config, true)?;
    let by_token = scores.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
    for other in [by_token, Var::from_tensor(&scores)?.as_tensor().clone()] {
        let plan = MergePlan::from_scores(&other, &strategies, &config, true)?;
        assert_eq!(
            plan.indicators().to_vec3::<u8>()?,
            expected.indicators().to_vec3::<u8>()?
        );
    }
    Ok(())
}

/// Scores of observed mass decide what the criterion of that name does.
#[test]
fn observed_mass_is_a_score() -> Result<()> {
    let [q, k, v] = SHAPE.qkv(3, DType::F32)?;
    let observed = CompressionConfig {
        window: 9,
        sinks: 2,
        ..CompressionConfig::calibrated()
    };
    let strategies = strategies(0, &SHAPE, &observed)?;
    let expected = MergePlan::new(&q, &k, &v, &strategies, &observed, &Default::default())?;
    let decided = observed_mass(&q, &k, &v, &observed, &Default::default())?;
    let scores = decided.pad_with_zeros(2, 0, 10)?;
    let plan = MergePlan::from_scores(&scores, &strategies, &config(9, 2), true)?;
    assert_eq!(
        plan.indicators().to_vec3::<u8>()?,
        expected.indicators().to_vec3::<u8>()?
    );
    assert!(plan.stats()?.hidden > 0);
    Ok(())
}

/// Appends chunks of these lengths in turn.
fn chunked(
    cache: &mut CompressedKvCache,
    (qkv, scores): (&[Tensor; 3], &Tensor),
    chunks: &[usize],
    options: &AttentionOptions,
    mut between: impl FnMut(&mut CompressedKvCache, usize) -> Result<()>,
) -> Result<Tensor> {
    let (mut outputs, mut start, tokens) = (Vec::new(), 0, scores.dim(2)?);
    for chunk in chunks.iter().cycle() {
        let count = (*chunk).min(tokens - start);
        if count == 0 {
            break;
        }
        let ([q, k, v], scores) = (part(qkv, start, count)?, scores.narrow(2, start, count)?);
        let options = part_options(options, start, count)?;
        outputs.push(cache.append_and_attend_scored(&q, &k, &v, &scores, &options)?);
        start += count;
        between(cache, start)?;
    }
    Ok(Tensor::cat(&outputs, 2)?)
}

/// Any chunks give the rows of a plan by all scores, and keep the entries that it keeps.
#[test]
fn any_chunking_is_one_call() -> Result<()> {
    let (scores, strategies) = (scores(&SHAPE, 11)?, similar(&SHAPE)?);
    for (dtype, tolerance) in [
        (DType::F64, 1e-12),
        (DType::F32, 2e-5),
        (DType::F16, 4e-3),
        (DType::BF16, 3e-2),
    ] {
        let qkv = SHAPE.qkv(2, dtype)?;
        for ((window, sinks), sliding_window) in WINDOWS.into_iter().zip([None, Some(9), Some(20), None, Some(1)]) {
            let (config, options) = (
                config(window, sinks),
                AttentionOptions {
                    sliding_window,
                    ..Default::default()
                },
            );
            let plan = MergePlan::from_scores(&scores, &strategies, &config, true)?;
            let expected = attend(&qkv[0], &qkv[1], &qkv[2], &plan, &options)?;
            for chunks in [&[1usize][..], &[70], &[9], &[33, 1, 1, 12]] {
                let mut cache = CompressedKvCache::new(strategies.clone(), config.clone(), Default::default())?;
                let kept = |cache: &mut CompressedKvCache, seen: usize| -> Result<()> {
                    if sliding_window.is_some() {
                        return Ok(());
                    }
                    let seen_scores = scores.narrow(2, 0, seen)?;
                    let plan = MergePlan::from_scores(&seen_scores, &strategies, &config, true)?;
                    for (lens, hidden) in cache.lens().iter().zip(plan.stats()?.per_head) {
                        let kept: Vec<_> = hidden.iter().step_by(3).map(|hidden| seen - hidden).collect();
                        assert_eq!(*lens, kept, "{seen} tokens in chunks of {chunks:?}, window {window}");
                    }
                    Ok(())
                };
                let got = chunked(&mut cache, (&qkv, &scores), chunks, &options, kept)?;
                let what = format!("{dtype:?}, window {window} of {sliding_window:?}, chunks {chunks:?}");
                assert_close(&what, &got, &expected, tolerance, tolerance)?;
            }
        }
    }
    Ok(())
}

/// A cache that is saved and loaded between any two tokens, or filled without rows, goes on bit for bit.
#[test]
fn a_saved_cache_goes_on() -> Result<()> {
    let (scores, strategies, qkv) = (scores(&SHAPE, 4)?, similar(&SHAPE)?, SHAPE.qkv(2, DType::F32)?);
    for (window, sinks) in WINDOWS {
        let config = config(window, sinks);
        let new = || CompressedKvCache::new(strategies.clone(), config.clone(), Default::default());
        let plain = AttentionOptions::default();
        let expected = chunked(&mut new()?, (&qkv, &scores), &[1], &plain, |_, _| Ok(()))?;
        let through = chunked(&mut new()?, (&qkv, &scores), &[1], &plain, |cache, _| {
            *cache = through_a_file(cache)?;
            Ok(())
        })?;
        assert_eq!(bits(&through)?, bits(&expected)?, "window {window}");
        let mut filled = new()?;
        let [_, k, v] = part(&qkv, 0, 69)?;
        filled.append_scored(&k, &v, &scores.narrow(2, 0, 69)?, 6)?;
        let ([q, k, v], last) = (part(&qkv, 69, 1)?, scores.narrow(2, 69, 1)?);
        let row = filled.append_and_attend_scored(&q, &k, &v, &last, &plain)?;
        assert_eq!(bits(&row)?, bits(&expected.narrow(2, 69, 1)?)?, "window {window}");
    }
    Ok(())
}

/// Each segment decides alone: its rows are those of its own plan, in one call and in a cache.
#[test]
fn segments_decide_alone() -> Result<()> {
    let (scores, strategies, config, qkv) = (
        scores(&SHAPE, 6)?,
        similar(&SHAPE)?,
        config(5, 2),
        SHAPE.qkv(8, DType::F32)?,
    );
    let [q, k, v] = &qkv;
    let row = |runs: &[(u32, usize)]| {
        runs.iter()
            .flat_map(|(number, count)| vec![*number; *count])
            .collect::<Vec<_>>()
    };
    let segments = Tensor::new(
        vec![row(&[(1, 30), (4, 40)]), row(&[(0, 10), (2, 59), (0, 1)])],
        &Device::Cpu,
    )?;
    let options = AttentionOptions {
        segments: Some(segments.clone()),
        ..Default::default()
    };
    let plan = MergePlan::from_scores_in_segments(&scores, &strategies, &config, &segments)?;
    let whole = attend(q, k, v, &plan, &options)?;
    for (batch, start, count) in [(0, 0, 30), (0, 30, 40), (1, 10, 59)] {
        let cut = |x: &Tensor| x.narrow(0, batch, 1)?.narrow(2, start, count);
        let alone = MergePlan::from_scores(&cut(&scores)?, &strategies, &config, true)?;
        assert!(alone.stats()?.hidden > 20);
        let expected = attend(&cut(q)?, &cut(k)?, &cut(v)?, &alone, &Default::default())?;
        assert_close("a segment", &cut(&whole)?, &expected, 1e-6, 1e-6)?;
    }
    for chunks in [&[1usize][..], &[13], &[70]] {
        let mut cache = CompressedKvCache::new(strategies.clone(), config.clone(), Default::default())?;
        let got = chunked(&mut cache, (&qkv, &scores), chunks, &options, |_, _| Ok(()))?;
        assert_close("in a cache", &got, &whole, 2e-5, 2e-5)?;
    }
    Ok(())
}

/// With a plan by given scores the gradients are those of the reference.
#[test]
fn gradients_pass_by_the_hidden() -> Result<()> {
    let shape = Shape(1, 4, 2, 40, 8);
    let (scores, strategies, config) = (scores(&shape, 9)?, similar(&shape)?, config(3, 1));
    let [q, k, v] = shape.qkv(1, DType::F64)?.map(|x| Var::from_tensor(&x));
    let (q, k, v) = (q?, k?, v?);
    let plan = MergePlan::from_scores(&scores, &strategies, &config, true)?;
    let output = attend(&q, &k, &v, &plan, &Default::default())?;
    let grads = output.sqr()?.sum_all()?.backward()?;
    let arrays = [&q, &k, &v].map(|x| Array4::from_tensor(x.as_tensor()));
    let [rq, rk, rv] = arrays;
    let indicators = reference::given_indicators(&rows(&scores)?, 4, &strategies, &config)?;
    let upstream = Array4::from_tensor(&(output * 2.0)?)?;
    let plain = AttentionOptions::default();
    let expected = reference::attention_gradients(&rq?, &rk?, &rv?, &upstream, &indicators, &config, &plain)?;
    for (name, var, expected) in [("q", &q, &expected.0), ("k", &k, &expected.1), ("v", &v, &expected.2)] {
        let got = grads.get(var.as_tensor()).unwrap();
        assert_close(name, got, &expected.to_tensor(DType::F64, &Device::Cpu)?, 1e-10, 1e-10)?;
    }
    Ok(())
}

fn refused<T>(result: candle_core::Result<T>, parts: &[&str]) {
    let error = result.err().expect("an error").to_string();
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}

#[test]
fn scores_that_do_not_fit_are_refused() -> Result<()> {
    let (good, strategies, given) = (scores(&SHAPE, 0)?, similar(&SHAPE)?, config(4, 0));
    let [q, k, v] = &SHAPE.qkv(0, DType::F32)?;
    let plan = |scores: &Tensor, config: &CompressionConfig| MergePlan::from_scores(scores, &strategies, config, true);
    refused(
        plan(&good, &CompressionConfig::calibrated()),
        &["expected Criterion::Given with scores, got ObservedMass"],
    );
    refused(
        plan(&good.to_dtype(DType::F64)?, &given),
        &["scores: expected f32", "got F64"],
    );
    refused(
        plan(&good.flatten_to(1)?, &given),
        &["scores: expected shape (batch, kv_heads, tokens), got [4, 70]"],
    );
    refused(
        plan(&good.reshape((1, 4, 70))?, &given),
        &["divide the 6 query heads", "got 4"],
    );
    let uncalibrated = HeadStrategies::uniform(MergeStrategy::Similarity);
    refused(
        MergePlan::from_scores(&good, &uncalibrated, &given, true),
        &["thresholds: expected one per head"],
    );
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    refused(
        MergePlan::from_scores(&good, &off, &given, true),
        &["strategies: expected a strategy or a threshold per"],
    );
    refused(
        MergePlan::from_scores(&good, &strategies, &config(0, 0), false),
        &["expected causal attention"],
    );
    let means = CompressionConfig {
        fold: candle_sfattention::Fold::Mean,
        ..given.clone()
    };
    refused(
        plan(&good, &means),
        &[
            "Criterion::Given: expected causal attention, fold Drop",
            "got fold Mean",
        ],
    );
    refused(
        MergePlan::new(q, k, v, &strategies, &given, &Default::default()),
        &["scores: expected a score per token"],
    );
    let module = CompressedAttention::new(strategies.clone(), given.clone(), Default::default())?;
    refused(module.forward(q, k, v), &["scores: expected a score per token"]);
    assert_eq!(module.forward_scored(q, k, v, &good)?.dims(), q.dims());

    let mut cache = CompressedKvCache::new(strategies.clone(), given, Default::default())?;
    refused(
        cache.append_and_attend(q, k, v, &Default::default()),
        &["scores: expected a score per token"],
    );
    refused(cache.append(q, k, v), &["scores: expected a score per token"]);
    refused(
        cache.append_without_queries(k, v, 6),
        &["scores: expected a score per token"],
    );
    let short = good.narrow(2, 0, 69)?;
    refused(
        cache.append_and_attend_scored(q, k, v, &short, &Default::default()),
        &["scores: expected f32 of shape", "(2, 2, 70)", "[2, 2, 69]"],
    );
    assert_eq!(cache.seq_len(), 0);
    let mut other = CompressedKvCache::new(strategies, CompressionConfig::calibrated(), Default::default())?;
    refused(
        other.append_and_attend_scored(q, k, v, &good, &Default::default()),
        &["scores: expected none under Criterion::ObservedMass"],
    );
    Ok(())
}

#[test]
fn heads_that_are_all_off_need_no_scores() -> Result<()> {
    let config = config(4, 0);
    let [q, k, v] = &SHAPE.qkv(0, DType::F32)?;
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let plan = MergePlan::new(q, k, v, &off, &config, &Default::default())?;
    assert_eq!(plan.stats()?.hidden, 0);
    let expected = attend(q, k, v, &plan, &Default::default())?;
    let mut cache = CompressedKvCache::new(off, config, Default::default())?;
    let got = cache.append_and_attend(q, k, v, &Default::default())?;
    assert_close("off", &got, &expected, 1e-6, 1e-6)?;
    Ok(())
}
