//! Deciding by observed mass: the attention that the rows of a token's window gave it.

use candle_core::{bail, Result};

use super::{dot, norm, Array4, Axes, Indicators};
#[cfg(doc)]
use crate::config::Criterion;
use crate::config::{AttentionOptions, CompressionConfig, HeadStrategies};

/// L(i): the columns that row `row` looks at, `{t <= i : i - t < window or t < sinks}`.
pub fn local_columns(row: usize, window: usize, sinks: usize) -> Vec<usize> {
    (0..=row).filter(|t| row - t < window || *t < sinks).collect()
}

/// The rows whose weights count for `token`: the second half of its window, where some rows may not have come yet.
pub fn observing_rows(token: usize, window: usize) -> std::ops::Range<usize> {
    token + window / 2..token.saturating_add(window)
}

/// p̂(i, t) for each t of `columns`: the softmax of `scale · q[i] · k[t]` over them, without bias and dropout.
pub fn local_weights(query: &[f64], keys: &[&[f64]], scale: f64) -> Vec<f64> {
    let logits: Vec<f64> = keys.iter().map(|key| scale * dot(query, key)).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

/// `score[t] = A[t] · ‖v[t]‖` of the tokens that can be decided, t + window + 1 <= N - 1, per batch row and KV head:
/// `A[t]` is the sum of [`local_weights`] over the group's query heads and [`observing_rows`].
///
/// # Errors
/// Shapes or settings that do not fit together, or another criterion than [`Criterion::ObservedMass`].
pub fn observed_mass(
    q: &Array4,
    k: &Array4,
    v: &Array4,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Vec<Vec<Vec<f64>>>> {
    let sizes = check(q, k, v, config, options)?;
    let (window, scale) = (config.window, options.scale(q.dims[3]));
    let decided = sizes.pairs().saturating_sub(window);
    let group = sizes.heads / sizes.kv_heads;
    let mut scores = vec![vec![vec![0.0; decided]; sizes.kv_heads]; sizes.batch];
    for (batch, kv_head) in (0..sizes.batch).flat_map(|b| (0..sizes.kv_heads).map(move |h| (b, h))) {
        let mass = &mut scores[batch][kv_head];
        for row in 0..sizes.tokens {
            let columns = local_columns(row, window, config.sinks);
            let keys: Vec<&[f64]> = columns.iter().map(|&t| k.row(batch, kv_head, t)).collect();
            for head in kv_head * group..(kv_head + 1) * group {
                let weights = local_weights(q.row(batch, head, row), &keys, scale);
                for (&token, weight) in columns.iter().zip(weights) {
                    if token < decided && observing_rows(token, window).contains(&row) {
                        mass[token] += weight;
                    }
                }
            }
        }
        for (token, score) in mass.iter_mut().enumerate() {
            *score *= norm(v.row(batch, kv_head, token));
        }
    }
    Ok(scores)
}

/// The tokens that merge under [`Criterion::ObservedMass`], for q of shape (B, H, N, D), k and v of shape
/// (B, Hk, N, D): all tokens that can be decided, are no sinks, and score below the threshold of every query head of
/// their group. Each of [`AttentionOptions::segments`] decides alone.
///
/// # Errors
/// Shapes, strategies or settings that do not fit together, or another criterion.
pub fn observed_indicators(
    q: &Array4,
    k: &Array4,
    v: &Array4,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Indicators> {
    let sizes = check(q, k, v, config, options)?;
    config.check_strategies(strategies)?;
    strategies.check(sizes.batch, sizes.heads)?;
    if let Some(segments) = super::segments::read(options.segments.as_ref(), [sizes.batch, sizes.tokens])? {
        let dims = [sizes.batch, sizes.heads, sizes.pairs()];
        let bits = vec![false; dims.iter().product()];
        let mut whole = Indicators { dims, bits };
        for segment in &segments {
            let [q, k, v] = [q, k, v].map(|x| x.cut(segment));
            let (strategies, options) = (strategies.of_row(segment.batch), options.alone(segment, None)?);
            whole.paste(
                segment,
                &observed_indicators(&q, &k, &v, &strategies, config, &options)?,
            );
        }
        return Ok(whole);
    }
    let scores = observed_mass(q, k, v, config, options)?;
    Ok(indicators_of_scores(&scores, sizes, |batch, head, t, score| {
        let test = strategies.test(config, batch, head);
        t >= config.sinks && !test.strategy.is_off() && score < test.threshold
    }))
}

/// The bits of scores per batch row and KV head: token t is hidden where `below(batch, head, t, score)` holds for every
/// query head of its group. A token without a score is not hidden.
fn indicators_of_scores(
    scores: &[Vec<Vec<f64>>],
    sizes: Axes,
    below: impl Fn(usize, usize, usize, f64) -> bool,
) -> Indicators {
    let group = sizes.heads / sizes.kv_heads;
    let mut bits = Vec::new();
    for (batch, head) in sizes.batch_heads() {
        let kv_head = sizes.kv_head(head);
        let voters = kv_head * group..(kv_head + 1) * group;
        let scores = &scores[batch][kv_head];
        bits.extend((0..sizes.pairs()).map(|t| {
            let score = scores.get(t);
            score.is_some_and(|score| voters.clone().all(|voter| below(batch, voter, t, *score)))
        }));
    }
    Indicators {
        dims: [sizes.batch, sizes.heads, sizes.pairs()],
        bits,
    }
}

/// The tokens that merge under [`Criterion::Given`], for scores `[batch][kv_head][token]` of one segment a batch row:
/// `m[t] = 1` where `s[t]` lies below the threshold of every query head of the group, t >= `sinks`, and
/// t + `window` + 1 <= N - 1. Scores and thresholds are rounded to f32 first; NaN is never below.
///
/// # Errors
/// Scores, strategies or settings that do not fit together, or another criterion.
pub fn given_indicators(
    scores: &[Vec<Vec<f64>>],
    heads: usize,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
) -> Result<Indicators> {
    config.check(true)?;
    config.check_strategies(strategies)?;
    if !config.criterion.takes_scores() {
        bail!(
            "criterion: expected Given, got {:?}; reference::indicators decides by neighbours",
            config.criterion
        )
    }
    let first = scores.first().map_or(&[][..], Vec::as_slice);
    let (kv_heads, tokens) = (first.len(), first.first().map_or(0, Vec::len));
    let alike = |rows: &Vec<Vec<f64>>| rows.len() == kv_heads && rows.iter().all(|row| row.len() == tokens);
    if tokens == 0 || !heads.is_multiple_of(kv_heads) || !scores.iter().all(alike) {
        bail!(
            "scores: expected one row of tokens for each KV head of each batch row, with KV heads that divide the \
             {heads} query heads, got {kv_heads} heads of {tokens} tokens in the first; give one score per token"
        )
    }
    strategies.check(scores.len(), heads)?;
    let sizes = Axes {
        batch: scores.len(),
        heads,
        kv_heads,
        tokens,
        queries: tokens,
        first_row: 0,
    };
    Ok(indicators_of_scores(scores, sizes, |batch, head, t, score| {
        let test = strategies.test(config, batch, head);
        let left = t + config.window + 1 < tokens;
        t >= config.sinks && left && !test.strategy.is_off() && (score as f32) < test.threshold as f32
    }))
}

fn check(q: &Array4, k: &Array4, v: &Array4, config: &CompressionConfig, options: &AttentionOptions) -> Result<Axes> {
    config.check(options.causal)?;
    if !config.criterion.observes() {
        bail!(
            "criterion: expected ObservedMass, got {:?}; reference::indicators decides by the others",
            config.criterion
        )
    }
    v.check("v")?;
    if v.dims[..3] != k.dims[..3] {
        bail!(
            "v: expected the shape of k {:?}, got {:?}; give one row per token and KV head",
            k.dims,
            v.dims
        )
    }
    Axes::new(q, k)
}
