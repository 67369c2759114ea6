//! The tokens that merge: the pair test, the two run rules, and the groups of heads that decide together.

use candle_core::{bail, Result, Tensor};

use super::bias::Bias;
use super::{dot, Array4, Axes, Indicators};
use crate::config::{
    AttentionOptions, CompressionConfig, Criterion, GroupRule, HeadStrategies, HeadTest, MergeRule, MergeStrategy,
    Segment,
};

/// The least length a vector is divided by, so that the cosine of a zero vector is 0.
pub const NORM_FLOOR: f64 = 1e-12;

/// `‖a‖`.
pub fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

/// `a / max(‖a‖, NORM_FLOOR)`.
pub fn unit(a: &[f64]) -> Vec<f64> {
    let length = norm(a).max(NORM_FLOOR);
    a.iter().map(|x| x / length).collect()
}

/// `cos(a, b)`, the dot product of the two [`unit()`] vectors: 0 for a zero vector, NaN for one with NaN or infinity.
pub fn cosine(a: &[f64], b: &[f64]) -> f64 {
    dot(&unit(a), &unit(b))
}

/// `1 - c < threshold` for similarity, `|c| < threshold` for difference; never for a head that is off, never for NaN.
pub fn qualifies(test: HeadTest, cosine: f64) -> bool {
    match test.strategy {
        MergeStrategy::Similarity => 1.0 - cosine < test.threshold,
        MergeStrategy::Difference => cosine.abs() < test.threshold,
        MergeStrategy::Off => false,
    }
}

/// The bits of one head under [`MergeRule::Causal`], for `pairs` = tokens - 1 and `crit(a, p)`, the pair test of token
/// `a` against the earlier token `p`.
///
/// A token is hidden when its right neighbour passes against it and, inside a run of hidden tokens, against the run's
/// first token, as long as the run has fewer than `max_merge_level` tokens. `crit` is asked about tokens up to `t + 1`
/// only when bit `t` is decided.
pub fn causal_rule(pairs: usize, max_merge_level: usize, crit: impl Fn(usize, usize) -> bool) -> Vec<bool> {
    let mut bits = Vec::with_capacity(pairs);
    let mut run = None;
    for t in 0..pairs {
        let bit = crit(t + 1, t)
            && match run {
                Some(start) => t - start < max_merge_level && crit(t + 1, start),
                None => true,
            };
        bits.push(bit);
        run = if bit { run.or(Some(t)) } else { None };
    }
    bits
}

/// The bits of **all** heads of a call under [`MergeRule::Reference`], one vector per head, for `crit(head, a, p)`.
///
/// Not causal: a bit can be cleared because of tokens to its right. And not separable: whether a lone first bit is
/// checked at all depends on whether any head of the call has two neighbouring bits.
pub fn reference_rule(
    heads: usize,
    tokens: usize,
    max_merge_level: usize,
    crit: impl Fn(usize, usize, usize) -> bool,
) -> Vec<Vec<bool>> {
    let pairs = tokens.saturating_sub(1);
    let levels = max_merge_level.min(pairs).min(5);
    // candidates(head, t, l) is M[t][l]: does token t also resemble the token l + 1 places to its right?
    let candidates = |head: usize, t: usize, l: usize| t + l + 1 < tokens && crit(head, t + l + 1, t);
    let mut bits: Vec<Vec<bool>> = (0..heads)
        .map(|head| (0..pairs).map(|t| candidates(head, t, 0)).collect())
        .collect();
    for _ in 0..2 * levels {
        let adjacent = |row: &Vec<bool>| row.windows(2).any(|pair| pair[0] && pair[1]);
        if !bits.iter().any(adjacent) {
            break;
        }
        let invalid: Vec<(usize, usize)> = (0..heads)
            .flat_map(|head| run_numbers(&bits[head]).map(move |(t, number)| (head, t, number)))
            .filter(|&(head, t, n)| n > levels || (1 <= n && n < levels && !candidates(head, t, n)))
            .map(|(head, t, _)| (head, t))
            .collect();
        if invalid.is_empty() {
            break;
        }
        for (head, t) in invalid {
            bits[head][t] = false
        }
    }
    bits
}

/// The set bits with their numbers: 1, 2, 3… in a run that starts at token 0, and 0, 1, 2… in every other run.
fn run_numbers(bits: &[bool]) -> impl Iterator<Item = (usize, usize)> + '_ {
    let mut next = 1;
    bits.iter().enumerate().filter_map(move |(t, &bit)| {
        let number = next;
        next = if bit { number + 1 } else { 0 };
        bit.then_some((t, number))
    })
}

/// The pair cosine of token `a` against the earlier token `p`: `cos(q[a], k[p])`, or `cos(k[a], k[p])` under
/// [`Criterion::KeyKey`].
pub(super) fn pair_cosine(
    (q, k): (&Array4, &Array4),
    criterion: Criterion,
    (batch, head, kv_head): (usize, usize, usize),
    (a, p): (usize, usize),
) -> f64 {
    let left = match criterion.pairs_keys() {
        true => k.row(batch, kv_head, a),
        false => q.row(batch, head, a),
    };
    cosine(left, k.row(batch, kv_head, p))
}

/// The tokens that merge, for q of shape (B, H, N, D) and k of shape (B, Hk, N, D).
///
/// # Errors
/// Shapes, strategies or settings that do not fit together, or [`Criterion::ObservedMass`], which reads the values,
/// too.
pub fn indicators(
    q: &Array4,
    k: &Array4,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
) -> Result<Indicators> {
    indicators_under(q, k, strategies, config, None)
}

/// [`indicators`] with a bias that broadcasts to (B, H, N, N): under [`MergeRule::Causal`] a pair (t, t + 1) qualifies
/// only where row t + 1 sees both tokens. So a token that the bias hides from a row does not reach it through its
/// neighbour. Under [`Criterion::KeyKey`] there may be fewer queries than keys, (B, H, Nq, D), with a bias of their
/// rows: rows before the first query's have none.
///
/// # Errors
/// As [`indicators`], or a bias of another shape.
pub fn indicators_under(
    q: &Array4,
    k: &Array4,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    bias: Option<&Tensor>,
) -> Result<Indicators> {
    config.check(true)?;
    match config.criterion {
        Criterion::QueryKey | Criterion::KeyKey => {}
        Criterion::ObservedMass => {
            bail!("criterion: expected QueryKey or KeyKey, got ObservedMass; use reference::observed_indicators")
        }
        Criterion::Given => {
            bail!("criterion: expected QueryKey or KeyKey, got Given; use reference::given_indicators")
        }
    }
    let sizes = match config.criterion.reads_queries() {
        true => Axes::new(q, k)?,
        false => Axes::of_rows(q, k, true)?,
    };
    strategies.check(sizes.batch, sizes.heads)?;
    let bias = bias.map(|bias| Bias::read(bias, sizes)).transpose()?;
    let seen = |batch: usize, head: usize, a: usize| {
        let bias = bias.as_ref();
        bias.is_none_or(|bias| bias.pair_is_seen([batch, head], a - 1))
    };
    let crit = |batch: usize, head: usize, a: usize, p: usize| {
        let at = (batch, head, sizes.kv_head(head));
        p >= config.sinks
            && qualifies(
                strategies.test(config, batch, head),
                pair_cosine((q, k), config.criterion, at, (a, p)),
            )
    };
    let per_head: Vec<Vec<bool>> = match config.rule {
        MergeRule::Reference => reference_rule(
            sizes.batch * sizes.heads,
            sizes.tokens,
            config.max_merge_level,
            |row, a, p| crit(row / sizes.heads, row % sizes.heads, a, p),
        ),
        MergeRule::Causal => sizes
            .batch_heads()
            .map(|(batch, head)| {
                let voters = voters(config.group_rule, sizes, head);
                causal_rule(sizes.pairs(), config.max_merge_level, |a, p| {
                    voters
                        .clone()
                        .all(|voter| seen(batch, voter, a) && crit(batch, voter, a, p))
                })
            })
            .collect(),
    };
    Ok(Indicators {
        dims: [sizes.batch, sizes.heads, sizes.pairs()],
        bits: per_head.concat(),
    })
}

/// [`indicators_under`] for the segments of [`AttentionOptions::segments`], u32 (B, N): each decides alone, and bits
/// between two segments and in padding are 0.
///
/// # Errors
/// As [`indicators_under`], or segments of another shape or whose numbers come back.
pub fn indicators_in_segments(
    q: &Array4,
    k: &Array4,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    bias: Option<&Tensor>,
    segments: &Tensor,
) -> Result<Indicators> {
    let sizes = Axes::new(q, k)?;
    strategies.check(sizes.batch, sizes.heads)?;
    let mut bits = Indicators {
        dims: [sizes.batch, sizes.heads, sizes.pairs()],
        bits: vec![false; sizes.batch * sizes.heads * sizes.pairs()],
    };
    let full = (sizes.batch, sizes.heads, sizes.tokens, sizes.tokens);
    let options = AttentionOptions::default();
    let bias = bias.map(|bias| bias.broadcast_as(full)).transpose()?;
    for segment in Segment::read(segments, [sizes.batch, sizes.tokens])? {
        let under = options.alone(&segment, bias.as_ref())?.bias;
        let strategies = strategies.of_row(segment.batch);
        let (q, k) = (q.cut(&segment), k.cut(&segment));
        bits.paste(
            &segment,
            &indicators_under(&q, &k, &strategies, config, under.as_ref())?,
        );
    }
    Ok(bits)
}

/// The query heads that must all agree before a bit of `head` is set: itself, or every head of its group.
fn voters(rule: GroupRule, sizes: Axes, head: usize) -> std::ops::Range<usize> {
    match rule {
        GroupRule::PerQueryHead => head..head + 1,
        GroupRule::Unanimous => {
            let group = sizes.heads / sizes.kv_heads;
            let first = sizes.kv_head(head) * group;
            first..first + group
        }
    }
}
