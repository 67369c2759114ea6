//! One budget over all heads: the least error for a number of hidden tokens.

use crate::config::MergeStrategy;
use candle_core::{bail, Result};

/// One choice for one unit: a strategy with its threshold, and the tokens that it hid and its error so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub strategy: MergeStrategy,
    pub threshold: f64,
    pub hidden: usize,
    pub error: f64,
}

impl Candidate {
    pub fn new(strategy: MergeStrategy, threshold: f64) -> Self {
        Self {
            strategy,
            threshold,
            hidden: 0,
            error: 0.0,
        }
    }

    /// Hides nothing and costs nothing.
    const OFF: Self = Self {
        strategy: MergeStrategy::Off,
        threshold: 0.0,
        hidden: 0,
        error: 0.0,
    };
}

/// Chooses one candidate (or off) per unit. Together they hide `wanted` tokens at the least summed error on the units'
/// lower convex hulls. Equal prices go to the first unit.
pub(super) fn choose(units: &[Vec<Candidate>], wanted: f64) -> Result<Vec<Candidate>> {
    if let Some(bad) = units.iter().flatten().find(|candidate| !candidate.error.is_finite()) {
        bail!(
            "calibration: expected finite errors, got {}; the samples hold NaN or infinity",
            bad.error
        )
    }
    let hulls: Vec<Vec<Candidate>> = units.iter().map(|candidates| lower_hull(candidates)).collect();
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (unit, hull) in hulls.iter().enumerate() {
        for (index, step) in hull.windows(2).enumerate() {
            steps.push((price(&step[0], &step[1]), unit, index + 1));
        }
    }
    // A hull's prices rise, so that its steps stay in order.
    steps.sort_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut chosen = vec![0; units.len()];
    let mut hidden = 0;
    for (_, unit, index) in steps {
        if hidden as f64 >= wanted {
            break;
        }
        hidden += hulls[unit][index].hidden - hulls[unit][chosen[unit]].hidden;
        chosen[unit] = index;
    }
    if wanted > hidden as f64 {
        let most: usize = hulls
            .iter()
            .filter_map(|hull| hull.last())
            .map(|last| last.hidden)
            .sum();
        bail!(
            "target: expected at most the {most} tokens that the largest ratio hides, got {wanted}; lower the target \
             or try larger ratios"
        )
    }
    Ok(hulls.iter().zip(chosen).map(|(hull, index)| hull[index]).collect())
}

/// Error per token hidden.
fn price(from: &Candidate, to: &Candidate) -> f64 {
    (to.error - from.error) / (to.hidden - from.hidden) as f64
}

/// The candidates, and off, that are best at some price: each hides more than the one before, at a rising price.
fn lower_hull(candidates: &[Candidate]) -> Vec<Candidate> {
    let mut sorted = vec![Candidate::OFF];
    sorted.extend(candidates.iter().filter(|candidate| candidate.hidden > 0));
    sorted.sort_by(|a, b| a.hidden.cmp(&b.hidden).then(a.error.total_cmp(&b.error)));
    sorted.dedup_by_key(|candidate| candidate.hidden);
    let mut hull: Vec<Candidate> = Vec::new();
    for candidate in sorted {
        while let [.., before, last] = hull.as_slice() {
            if price(before, &candidate) > price(before, last) {
                break;
            }
            hull.pop();
        }
        hull.push(candidate);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(hidden: usize, error: f64) -> Candidate {
        Candidate {
            hidden,
            error,
            ..Candidate::new(MergeStrategy::Similarity, 1.0)
        }
    }

    fn hidden(units: &[Vec<Candidate>], wanted: f64) -> Vec<usize> {
        choose(units, wanted).unwrap().iter().map(|c| c.hidden).collect()
    }

    #[test]
    fn the_budget_goes_where_it_costs_least() {
        let cheap = vec![candidate(10, 1.0), candidate(20, 3.0), candidate(30, 30.0)];
        let dear = vec![candidate(10, 5.0), candidate(20, 11.0), candidate(30, 18.0)];
        let units = [dear, cheap];
        assert_eq!(hidden(&units, 0.0), [0, 0]);
        assert_eq!(hidden(&units, 10.0), [0, 10]);
        assert_eq!(hidden(&units, 11.0), [0, 20]);
        assert_eq!(hidden(&units, 50.0), [30, 20]);
        assert_eq!(hidden(&units, 60.0), [30, 30]);
        let message = choose(&units, 61.0).unwrap_err().to_string();
        assert!(
            message.contains("at most the 60") && message.contains("lower the target"),
            "{message}"
        );
    }

    /// A candidate above the line between its neighbours is never chosen, nor one that costs more and hides as much.
    #[test]
    fn hulls_are_convex() {
        let hull = lower_hull(&[
            candidate(10, 6.0),
            candidate(20, 8.0),
            candidate(20, 9.0),
            candidate(0, 4.0),
        ]);
        assert_eq!(
            hull.iter().map(|c| (c.hidden, c.error)).collect::<Vec<_>>(),
            [(0, 0.0), (20, 8.0)]
        );
    }

    #[test]
    fn errors_that_are_no_numbers_are_refused() {
        assert!(choose(&[vec![candidate(1, f64::NAN)]], 0.0).is_err());
    }
}
