//! The compression loss: the distance of each head's pairs from its strategy's target.

use candle_core::{Result, Tensor};

use super::merge::{norm, pair_cosine, qualifies, unit, NORM_FLOOR};
use super::{add_scaled, Array4, Axes};
use crate::config::{CompressionConfig, HeadStrategies, LossNormalizer, MergeStrategy, Segment};

/// The sums that the loss is made of, over every pair of every query head that is not off. Ranks of a tensor-parallel
/// model add their sums before they call [`Self::value`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossTerms {
    /// S: the sum of `(1 - c)²` over similarity heads and of `c²` over difference heads.
    pub squared: f64,
    /// M: the number of pairs that qualify, before any run rule and without sinks.
    pub merged: usize,
    /// P: the number of pairs.
    pub pairs: usize,
}

impl LossTerms {
    /// Z: M if it is not 0, else P; or always P.
    pub fn divisor(&self, normalizer: LossNormalizer) -> usize {
        match normalizer {
            LossNormalizer::Merged if self.merged > 0 => self.merged,
            LossNormalizer::Merged | LossNormalizer::Pairs => self.pairs,
        }
    }

    /// `factor · (S / Z - M / P)`, or 0 when there is no pair because every head is off.
    pub fn value(&self, factor: f64, normalizer: LossNormalizer) -> f64 {
        if self.pairs == 0 {
            return 0.0;
        }
        let (z, p) = (self.divisor(normalizer) as f64, self.pairs as f64);
        factor * (self.squared / z - self.merged as f64 / p)
    }
}

/// The terms, or `None` for fewer than two tokens and under a criterion that compares no pairs.
///
/// # Errors
/// Shapes, strategies or settings that do not fit together.
pub fn compression_loss(
    q: &Array4,
    k: &Array4,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
) -> Result<Option<LossTerms>> {
    let sizes = check(q, k, strategies, config)?;
    if sizes.pairs() == 0 || !config.criterion.compares_pairs() {
        return Ok(None);
    }
    let mut terms = LossTerms::default();
    for (batch, head) in sizes.batch_heads() {
        let test = strategies.test(config, batch, head);
        if test.strategy.is_off() {
            continue;
        }
        for t in 0..sizes.pairs() {
            let at = (batch, head, sizes.kv_head(head));
            let c = pair_cosine((q, k), config.criterion, at, (t + 1, t));
            terms.squared += distance(test.strategy, c).powi(2);
            terms.merged += usize::from(qualifies(test, c));
            terms.pairs += 1;
        }
    }
    Ok(Some(terms))
}

/// The number that the loss squares: `c - 1` for similarity, `c` for difference.
fn distance(strategy: MergeStrategy, c: f64) -> f64 {
    match strategy {
        MergeStrategy::Similarity => c - 1.0,
        MergeStrategy::Difference => c,
        MergeStrategy::Off => 0.0,
    }
}

/// The loss's gradients with respect to q (B, H, N, D) and k (B, Hk, N, D), with M and P constant. Zero where there is
/// no loss.
///
/// # Errors
/// Shapes, strategies or settings that do not fit together.
pub fn compression_loss_gradients(
    q: &Array4,
    k: &Array4,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
) -> Result<(Array4, Array4)> {
    match compression_loss(q, k, strategies, config)? {
        Some(terms) => gradients_over(q, k, strategies, config, terms.divisor(config.loss_normalizer)),
        None => Ok((Array4::zeros(q.dims), Array4::zeros(k.dims))),
    }
}

/// The terms of segments, u32 (B, N) (see [`AttentionOptions::segments`](crate::AttentionOptions::segments)): the sums
/// of all of them. `None` as in [`compression_loss`].
///
/// # Errors
/// As [`compression_loss`], or segments of another shape or whose numbers come back.
pub fn compression_loss_in_segments(
    q: &Array4,
    k: &Array4,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    segments: &Tensor,
) -> Result<Option<LossTerms>> {
    let sizes = check(q, k, strategies, config)?;
    if sizes.pairs() == 0 || !config.criterion.compares_pairs() {
        return Ok(None);
    }
    let mut all = LossTerms::default();
    for segment in Segment::read(segments, [sizes.batch, sizes.tokens])? {
        let strategies = strategies.of_row(segment.batch);
        let alone = compression_loss(&q.cut(&segment), &k.cut(&segment), &strategies, config)?.unwrap_or_default();
        all.squared += alone.squared;
        all.merged += alone.merged;
        all.pairs += alone.pairs;
    }
    Ok(Some(all))
}

/// The gradients of the loss of segments.
///
/// # Errors
/// As [`compression_loss_in_segments`].
pub fn compression_loss_gradients_in_segments(
    q: &Array4,
    k: &Array4,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    segments: &Tensor,
) -> Result<(Array4, Array4)> {
    let (mut dq, mut dk) = (Array4::zeros(q.dims), Array4::zeros(k.dims));
    let Some(terms) = compression_loss_in_segments(q, k, strategies, config, segments)? else {
        return Ok((dq, dk));
    };
    let divisor = terms.divisor(config.loss_normalizer);
    for segment in Segment::read(segments, [q.dims[0], q.dims[2]])? {
        let strategies = strategies.of_row(segment.batch);
        let alone = gradients_over(&q.cut(&segment), &k.cut(&segment), &strategies, config, divisor)?;
        dq.paste(&segment, &alone.0);
        dk.paste(&segment, &alone.1);
    }
    Ok((dq, dk))
}

/// `loss_factor / divisor` times the gradients of S.
fn gradients_over(
    q: &Array4,
    k: &Array4,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    divisor: usize,
) -> Result<(Array4, Array4)> {
    let (mut dq, mut dk) = (Array4::zeros(q.dims), Array4::zeros(k.dims));
    let sizes = Axes::new(q, k)?;
    let factor = config.loss_factor / divisor as f64;
    for (batch, head) in sizes.batch_heads() {
        let strategy = strategies.test(config, batch, head).strategy;
        if strategy.is_off() {
            continue;
        }
        let kv_head = sizes.kv_head(head);
        for t in 0..sizes.pairs() {
            let (left, d_left) = match config.criterion.pairs_keys() {
                true => (k.row(batch, kv_head, t + 1), dk.row_mut(batch, kv_head, t + 1)),
                false => (q.row(batch, head, t + 1), dq.row_mut(batch, head, t + 1)),
            };
            let right = k.row(batch, kv_head, t);
            let c = super::cosine(left, right);
            let g = factor * 2.0 * distance(strategy, c);
            add_scaled(d_left, g, &cosine_gradient(left, right, c));
            add_scaled(dk.row_mut(batch, kv_head, t), g, &cosine_gradient(right, left, c));
        }
    }
    Ok((dq, dk))
}

/// `∂cos(a, b)/∂a = (w - c·u) / ‖a‖` with the unit vectors u of a and w of b. Below the floor a is divided by a
/// constant, and the projection `c·u` is no part of the gradient.
fn cosine_gradient(a: &[f64], b: &[f64], c: f64) -> Vec<f64> {
    let length = norm(a);
    let mut gradient = unit(b);
    if length >= NORM_FLOOR {
        add_scaled(&mut gradient, -c, &unit(a));
    }
    gradient.iter_mut().for_each(|x| *x /= length.max(NORM_FLOOR));
    gradient
}

fn check(q: &Array4, k: &Array4, strategies: &HeadStrategies, config: &CompressionConfig) -> Result<Axes> {
    config.check(true)?;
    config.check_strategies(strategies)?;
    let sizes = Axes::new(q, k)?;
    strategies.check(sizes.batch, sizes.heads)?;
    Ok(sizes)
}
