//! A cache's budget: which closed chains a list drops, and attention without them.

use candle_core::{bail, Result};

use super::attend::{attention_without, Dropped};
use super::merge::pair_cosine;
use super::{Array4, Axes, Indicators};
use crate::config::{AttentionOptions, CompressionConfig, HeadStrategies, ListBudget, MergeStrategy};

/// What a pair decision leaves as a token's score, (B, H, N): `max over the heads that decide together of
/// (1 - c[t]) / threshold`, or `|c[t]| / threshold` for difference: how far the token was from being folded into its
/// right neighbour. The last token, and a NaN, have the score infinity.
///
/// # Errors
/// Shapes or settings that do not fit together.
pub fn pair_scores(
    q: &Array4,
    k: &Array4,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
) -> Result<Vec<Vec<Vec<f64>>>> {
    let sizes = Axes::of_rows(q, k, true)?;
    strategies.check(sizes.batch, sizes.heads)?;
    let group = sizes.heads / sizes.kv_heads;
    let own = |batch: usize, head: usize, t: usize| {
        let test = strategies.test(config, batch, head);
        let c = pair_cosine((q, k), config.criterion, (batch, head, head / group), (t + 1, t));
        let distance = match test.strategy {
            MergeStrategy::Similarity => 1.0 - c,
            MergeStrategy::Difference => c.abs(),
            MergeStrategy::Off => 0.0,
        };
        distance / test.threshold
    };
    let of_token = |batch: usize, head: usize, t: usize| {
        if t + 1 == sizes.tokens {
            return f64::INFINITY;
        }
        let heads = match config.group_rule.heads_agree() {
            true => head / group * group..(head / group + 1) * group,
            false => head..head + 1,
        };
        let scores = heads.map(|head| own(batch, head, t));
        scores.fold(f64::NEG_INFINITY, |most, score| {
            if score.is_nan() {
                f64::INFINITY
            } else {
                most.max(score)
            }
        })
    };
    let of_head = |batch, head| (0..sizes.tokens).map(|t| of_token(batch, head, t)).collect();
    let of_row = |batch| (0..sizes.heads).map(|head| of_head(batch, head)).collect();
    Ok((0..sizes.batch).map(of_row).collect())
}

/// For each token of one list, the number of tokens from which on no row sees it as a closed chain; `usize::MAX` for
/// ever. `scores` are those of the tokens, `bits` the list's, `window` its own: 0 where a head is off.
///
/// With n tokens, the closed chains end at the tokens t < n - 1 - window whose bit is 0. Every `period = clamp((budget
/// - window - sinks - 1) / 8, 1, 64)` tokens, all but `budget - window - 1 - period` of them are dropped: the lowest
/// scores, compared in f32, of equal ones the oldest; never the first `sinks` tokens, never the newest chain.
pub fn evictions(bits: &[bool], scores: &[f64], budget: usize, sinks: usize, window: usize) -> Vec<usize> {
    let budget = ListBudget {
        entries: budget,
        sinks,
        window,
    };
    let mut dropped_at = vec![usize::MAX; scores.len()];
    for tokens in (1..=scores.len()).filter(|tokens| budget.is_due(*tokens)) {
        let edge = tokens.saturating_sub(1 + window);
        let closed = (0..edge).filter(|t| !bits[*t] && dropped_at[*t] == usize::MAX);
        let chains: Vec<(usize, f32)> = closed.map(|t| (t, scores[t] as f32)).collect();
        for row in budget.dropped(&chains) {
            dropped_at[chains[row].0] = tokens;
        }
    }
    dropped_at
}

/// [`super::attention`] of a causal call whose lists keep to a budget. `scores` are (B, H, N), equal for the heads that
/// share a list; a list with a head that is off drops its oldest tokens, whatever they are.
///
/// # Errors
/// As [`super::attention`], a call that is not causal, segments, or a budget that leaves nothing to drop.
pub fn attention_under_budget(
    (q, k, v): (&Array4, &Array4, &Array4),
    indicators: &Indicators,
    (scores, budget): (&[Vec<Vec<f64>>], usize),
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Array4> {
    if !options.causal || options.segments.is_some() {
        bail!("budget: expected a causal call without segments, got another; give each segment a call of its own")
    }
    ListBudget::check(budget, config.sinks, config.window)?;
    let sizes = Axes::of_rows(q, k, true)?;
    let group = sizes.heads / sizes.kv_heads;
    let dropped = |batch: usize, head: usize| {
        let heads = match config.group_rule.heads_agree() {
            true => head / group * group..(head / group + 1) * group,
            false => head..head + 1,
        };
        let off = heads
            .into_iter()
            .any(|head| strategies.test(config, batch, head).strategy.is_off());
        let ages: Vec<f64> = (0..sizes.tokens).map(|t| t as f64).collect();
        let bits = indicators.head(batch, head);
        match off {
            true => evictions(bits, &ages, budget, config.sinks, 0),
            false => evictions(bits, &scores[batch][head], budget, config.sinks, config.window),
        }
    };
    let dropped: Dropped = (0..sizes.batch)
        .map(|batch| (0..sizes.heads).map(|head| dropped(batch, head)).collect())
        .collect();
    attention_without((q, k, v), indicators, &dropped, config, options)
}
