//! Decisions so close to their threshold that rounding may change them.

use super::case::Case;
use super::exact::part;
use candle_core::{DType, Result};
use candle_sfattention::reference::{cosine, observed_mass, Array4};
use candle_sfattention::{AttentionOptions, Criterion, HeadStrategies, MergeRule, MergeStrategy};

/// Whether any test of a decision is within rounding of its threshold.
pub fn any(
    case: &Case,
    [q, k, v]: [&Array4; 3],
    strategies: &HeadStrategies,
    options: &AttentionOptions,
) -> Result<bool> {
    let group = case.heads / case.kv_heads;
    let margin = if case.dtype == DType::F64 { 1e-9 } else { 1e-5 };
    if case.config.criterion.observes() {
        return observed([q, k, v], case, strategies, options, margin);
    }
    let reach = match case.config.rule {
        MergeRule::Causal => case.config.max_merge_level.min(case.tokens),
        MergeRule::Reference => 5,
    };
    for batch in 0..case.batch {
        for head in 0..case.heads {
            let test = strategies.test(&case.config, batch, head);
            for right in 1..case.tokens {
                let a = match case.config.criterion {
                    Criterion::QueryKey => q.row(batch, head, right),
                    // The last two have no pairs.
                    Criterion::KeyKey | Criterion::ObservedMass | Criterion::Given => k.row(batch, head / group, right),
                };
                for left in right.saturating_sub(reach + 1)..right {
                    let c = cosine(a, k.row(batch, head / group, left));
                    let distance = match test.strategy {
                        MergeStrategy::Similarity => 1.0 - c - test.threshold,
                        MergeStrategy::Difference => c.abs() - test.threshold,
                        MergeStrategy::Off => f64::INFINITY,
                    };
                    if distance.abs() < margin {
                        return Ok(true);
                    }
                }
            }
        }
    }
    Ok(false)
}

/// Whether a score is within its logits' rounding of the threshold.
fn observed(
    [q, k, v]: [&Array4; 3],
    case: &Case,
    strategies: &HeadStrategies,
    options: &AttentionOptions,
    margin: f64,
) -> Result<bool> {
    let largest = |x: &Array4| {
        x.data
            .iter()
            .filter(|x| x.is_finite())
            .fold(0.0, |most: f64, x| most.max(x.abs()))
    };
    let logit = options.scale(case.dim).abs() * largest(q) * largest(k) * case.dim as f64;
    let group = case.heads / case.kv_heads;
    for (batch, tokens) in case.seen.parts([case.batch, case.tokens]) {
        let [q, k, v] = [q, k, v].map(|x| part(x, batch..batch + 1, tokens.clone()));
        let scores = observed_mass(&q, &k, &v, &case.config, options)?;
        for head in 0..case.heads {
            let threshold = strategies.test(&case.config, batch, head).threshold;
            let near = |score: &f64| (score - threshold).abs() < margin * (1.0 + score) * (1.0 + logit);
            if scores[0][head / group].iter().any(near) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
