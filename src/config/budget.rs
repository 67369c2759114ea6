//! The law of a cache's budget: when a list drops entries, and how many.

use candle_core::{bail, Result};

/// The most tokens between two evictions. Each moves all entries of a list, and a chunk is attended to in parts of this
/// length.
const LONGEST_PERIOD: usize = 64;

/// The budget of one list.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ListBudget {
    /// The most entries: closed chains, the open one, raw tokens of the window.
    pub entries: usize,
    /// First tokens, which are never dropped.
    pub sinks: usize,
    /// Raw tokens.
    pub window: usize,
}

impl ListBudget {
    /// Refuses a budget that leaves no entry to drop beside sinks, window, the open chain and the newest closed one.
    pub fn check(entries: usize, sinks: usize, window: usize) -> Result<()> {
        let least = sinks.saturating_add(window).saturating_add(3);
        if entries < least {
            bail!(
                "budget: expected at least {least} entries, {sinks} sinks and a window of {window} tokens and 3 more, \
                 got {entries}; raise it, or lower sinks and window"
            )
        }
        Ok(())
    }

    /// The number of tokens between two evictions: an eighth of what may be dropped.
    pub fn period(&self) -> usize {
        ((self.entries - self.window - self.sinks - 1) / 8).clamp(1, LONGEST_PERIOD)
    }

    /// The closed chains that an eviction leaves. Until the next one, each token closes one more at most.
    pub fn closed(&self) -> usize {
        self.entries - self.window - 1 - self.period()
    }

    /// Whether a list drops entries when it has this many tokens. Only the number of tokens decides, so that it does
    /// not matter how they came.
    pub fn is_due(&self, tokens: usize) -> bool {
        tokens.is_multiple_of(self.period())
    }

    /// The rows of `scores`, one number for each closed chain with its last token, that an eviction drops: the lowest
    /// scores, of equal ones the oldest. Sinks stay, and the newest chain, whose end says where the open one begins.
    pub fn dropped(&self, chains: &[(usize, f32)]) -> Vec<usize> {
        let excess = chains.len().saturating_sub(self.closed());
        let older = &chains[..chains.len().saturating_sub(1)];
        let mut rows: Vec<usize> = (0..older.len()).filter(|row| older[*row].0 >= self.sinks).collect();
        // NaN stays: a row that sees a broken token says so.
        let score = |row: &usize| match older[*row].1 {
            score if score.is_nan() => f32::INFINITY,
            score => score,
        };
        rows.sort_by(|a, b| score(a).total_cmp(&score(b)));
        rows.truncate(excess);
        rows.sort_unstable();
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::ListBudget;

    /// Whatever the sizes, a list between two evictions keeps within its budget.
    #[test]
    fn a_period_fits_into_the_budget() {
        for (sinks, window) in [(0, 0), (4, 32), (0, 7), (9, 0)] {
            for entries in (sinks + window + 3..sinks + window + 40).chain([1000, 4096]) {
                let budget = ListBudget { entries, sinks, window };
                assert!(ListBudget::check(entries, sinks, window).is_ok());
                assert_eq!(budget.closed() + budget.period() + 1 + window, entries);
                assert!(budget.closed() > sinks, "{budget:?}");
                assert!((1..=64).contains(&budget.period()));
            }
            assert!(ListBudget::check(sinks + window + 2, sinks, window).is_err());
        }
    }

    #[test]
    fn the_lowest_go_and_the_protected_stay() {
        let budget = ListBudget {
            entries: 2 + 1 + 3 + 1,
            sinks: 2,
            window: 0,
        };
        assert_eq!((budget.period(), budget.closed()), (1, 5));
        let chains = [
            (0, -9.0),
            (1, -9.0),
            (4, 0.5),
            (5, f32::NAN),
            (7, 0.2),
            (9, 0.5),
            (10, -9.0),
        ];
        assert_eq!(budget.dropped(&chains), [2, 4]);
        assert_eq!(budget.dropped(&chains[..5]), [0usize; 0]);
    }
}
