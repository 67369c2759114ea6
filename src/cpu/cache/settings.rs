//! The settings of one list of a KV cache, and what they imply.

use crate::config::{ByteCode, CompressionConfig, Criterion, Fold, HeadTest, ListBudget, Storage};

/// The settings of one list.
#[derive(Clone, Debug)]
pub(crate) struct ListSettings {
    pub tests: Vec<HeadTest>,
    pub criterion: Criterion,
    pub fold: Fold,
    pub sinks: usize,
    pub max_merge_level: usize,
    /// Tokens kept raw; 0 for a list that never merges.
    pub window: usize,
    /// L of the model's sliding window; [`usize::MAX`] for none.
    pub sliding_window: usize,
    pub budget: Option<ListBudget>,
    /// The code of closed chains in 8 bits.
    pub code: Option<ByteCode>,
}

impl ListSettings {
    /// `tests` are the tests of the query heads that share the list.
    pub fn new(tests: Vec<HeadTest>, config: &CompressionConfig) -> Self {
        let merges = tests.iter().all(|test| !test.strategy.is_off());
        Self {
            tests,
            criterion: config.criterion,
            fold: if merges { config.fold } else { Fold::Drop },
            sinks: config.sinks,
            max_merge_level: config.max_merge_level,
            window: if merges { config.window } else { 0 },
            sliding_window: usize::MAX,
            budget: None,
            code: None,
        }
    }

    /// The same settings under the options of a cache: a budget of entries, and their storage.
    pub fn under(self, budget: Option<usize>, storage: Option<Storage>) -> Self {
        let of = |entries| ListBudget {
            entries,
            sinks: self.sinks,
            window: self.window,
        };
        Self {
            budget: budget.map(of),
            code: storage.and_then(Storage::code),
            ..self
        }
    }

    pub fn merges(&self) -> bool {
        self.tests.iter().all(|test| !test.strategy.is_off())
    }

    /// Whether tokens are judged by the observed mass: the weights that the rows of their window gave them.
    pub fn observes(&self) -> bool {
        self.criterion.observes() && self.decides()
    }

    /// Whether tokens are judged by scores that the caller gives.
    pub fn takes_scores(&self) -> bool {
        self.criterion.takes_scores() && self.decides()
    }

    /// Whether tokens are judged by a test of neighbours.
    pub fn compares(&self) -> bool {
        self.criterion.compares_pairs() && self.decides()
    }

    /// Whether rows see folded tokens. Where none does, tokens leave the sliding window before they are folded.
    pub fn folds(&self) -> bool {
        self.window < self.sliding_window
    }

    /// Whether a decision has an effect: on columns, or on queries that are folded.
    pub fn decides(&self) -> bool {
        self.merges() && (self.folds() || self.fold.folds_queries())
    }

    /// The number of raw tokens that a row sees, its own included.
    pub fn near(&self) -> usize {
        self.window.min(self.sliding_window)
    }

    /// The number of raw tokens kept for the next row. Where tokens are folded, the oldest one is that row's edge.
    pub fn kept_raw(&self) -> usize {
        self.window.min(self.sliding_window - 1)
    }

    /// The first token that a row (a token index) sees.
    pub fn first_seen(&self, row: usize) -> usize {
        (row + 1).saturating_sub(self.sliding_window)
    }

    /// The most tokens that one run may hide.
    pub fn longest_run(&self) -> usize {
        match (self.merges(), self.criterion.compares_pairs()) {
            (false, _) => 0,
            (true, true) => self.max_merge_level,
            (true, false) => usize::MAX,
        }
    }
}
