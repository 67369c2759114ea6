//! The enums that a caller chooses from, and what each variant implies.

use candle_core::{bail, Result};
use serde::{Deserialize, Serialize};

/// The test by which one head decides whether a token resembles its neighbour. Source: the paper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MergeStrategy {
    /// A pair qualifies when `1 - cos < threshold`: the two vectors point the same way. Code 0 in a strategy tensor.
    Similarity,
    /// A pair qualifies when `|cos| < threshold`: the two vectors are nearly orthogonal. Code 1 in a strategy tensor.
    Difference,
    /// No pair qualifies: the head computes ordinary attention. Code 2 in a strategy tensor.
    Off,
}

impl MergeStrategy {
    /// Every strategy, in the order of its code in a strategy tensor.
    pub const ALL: [Self; 3] = [Self::Similarity, Self::Difference, Self::Off];

    /// The code of this strategy in a strategy tensor: 0, 1 or 2.
    pub fn code(self) -> u32 {
        self as u32
    }

    /// Whether a head merges nothing.
    #[inline]
    pub const fn is_off(self) -> bool {
        match self {
            Self::Off => true,
            Self::Similarity | Self::Difference => false,
        }
    }

    pub(super) fn from_code(code: i64) -> Result<Self> {
        match usize::try_from(code).ok().and_then(|code| Self::ALL.get(code)) {
            Some(strategy) => Ok(*strategy),
            None => bail!(
                "strategy tensor: expected the codes 0 (similarity), 1 (difference) or 2 (off), got {code}; \
                 write them with MergeStrategy::code"
            ),
        }
    }
}

/// The rule that selects pairs to merge among the qualifying ones. See [`crate::reference`] for both as scalar code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MergeRule {
    /// One left-to-right scan per head. A token joins the run that ends at its left neighbour when it also qualifies
    /// against the run's first token and the run is shorter than `max_merge_level`. A bit depends on tokens up to its
    /// right neighbour only, so prefill and step-by-step decoding agree. Source: this crate.
    Causal,
    /// The rule of the published Python reference, bit for bit. **Not causal**: a row can depend on tokens up to four
    /// places to its right, and all heads and batch rows of one call influence each other. It has no cache.
    Reference,
}

impl MergeRule {
    /// Whether no row depends on a later token, so that a KV cache can keep the decisions.
    #[inline]
    pub const fn is_causal(self) -> bool {
        match self {
            Self::Causal => true,
            Self::Reference => false,
        }
    }
}

/// How the query heads that share one KV head decide. Source: this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupRule {
    /// Every query head decides for itself, as if keys and values had been repeated.
    PerQueryHead,
    /// One decision per KV head: a pair merges only when every query head of the group passes every test. A KV cache
    /// can drop tokens only under this rule, or with as many KV heads as query heads.
    Unanimous,
}

impl GroupRule {
    /// Whether the query heads of a KV head share one decision, and so one list of a KV cache.
    #[inline]
    pub const fn heads_agree(self) -> bool {
        match self {
            Self::Unanimous => true,
            Self::PerQueryHead => false,
        }
    }
}

/// The quantity by which a pair is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Criterion {
    /// `cos(q[t+1], k[t])`. Source: the paper.
    QueryKey,
    /// `cos(k[t+1], k[t])`; it does not read the queries. Source: this crate.
    KeyKey,
    /// The attention that the rows of a token's window gave it, times the norm of its value: a token with little
    /// attention is left out once it has left the window. Needs a `window` of at least 2, [`Fold::Drop`],
    /// [`GroupRule::Unanimous`], and a threshold of its own for every head that is not off, as scores depend on the
    /// model. It reads neither the strategy of such heads nor `max_merge_level`, and has no compression loss. For
    /// pretrained models. Source: this crate. See [`crate::reference::observed_mass`].
    ObservedMass,
    /// A score per token and KV head that the caller gives: low means that later rows will not miss the token. It is
    /// left out, once it has left the window, where its score is below the threshold of its KV head. A decision is
    /// known as the token comes. Needs [`Fold::Drop`], [`GroupRule::Unanimous`], and a threshold of its own for every
    /// head that is not off; any window. It reads neither the strategy of such heads nor `max_merge_level`, and has no
    /// compression loss. Scores go to [`crate::MergePlan::from_scores`] and to
    /// [`crate::CompressedKvCache::append_and_attend_scored`]. Source: this crate. See
    /// [`crate::reference::given_indicators`].
    Given,
}

impl Criterion {
    /// Whether a token is judged by a cosine with its neighbour. Only such a criterion reads the strategies of heads
    /// that are not off and `max_merge_level`, has a compression loss, and lets no pair merge that a bias of -inf keeps
    /// apart.
    #[inline]
    pub const fn compares_pairs(self) -> bool {
        match self {
            Self::QueryKey | Self::KeyKey => true,
            Self::ObservedMass | Self::Given => false,
        }
    }

    /// Whether a pair's left side is a key, and not a query.
    #[inline]
    pub(crate) const fn pairs_keys(self) -> bool {
        match self {
            Self::KeyKey => true,
            Self::QueryKey => false,
            // They have no pairs.
            Self::ObservedMass | Self::Given => false,
        }
    }

    /// Whether a token is judged by the attention that the rows of its window gave it, once it has left the window.
    #[inline]
    pub const fn observes(self) -> bool {
        match self {
            Self::ObservedMass => true,
            Self::QueryKey | Self::KeyKey | Self::Given => false,
        }
    }

    /// Whether a token is judged by a score that the caller gives.
    #[inline]
    pub const fn takes_scores(self) -> bool {
        match self {
            Self::Given => true,
            Self::QueryKey | Self::KeyKey | Self::ObservedMass => false,
        }
    }

    /// Whether decisions depend on the queries.
    #[inline]
    pub const fn reads_queries(self) -> bool {
        match self {
            Self::QueryKey | Self::ObservedMass => true,
            Self::KeyKey | Self::Given => false,
        }
    }

    /// Whether decisions depend on the values.
    #[inline]
    pub const fn reads_values(self) -> bool {
        match self {
            Self::ObservedMass => true,
            Self::QueryKey | Self::KeyKey | Self::Given => false,
        }
    }

    /// Whether every head that is not off needs a threshold of its own, because scores depend on the model.
    #[inline]
    pub const fn needs_thresholds(self) -> bool {
        match self {
            Self::ObservedMass | Self::Given => true,
            Self::QueryKey | Self::KeyKey => false,
        }
    }
}

/// How merging changes keys and values (and, for [`Fold::PairSum`], queries).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fold {
    /// The token plus its hidden left neighbour, both raw, so that a chain does not accumulate; queries are folded the
    /// same way. For models trained with it. Source: the paper.
    PairSum,
    /// The running mean of the chain, which enters the softmax with `ln n` for its `n` tokens. For pretrained models.
    /// Source: this crate.
    Mean,
    /// The hidden token is left out. For pretrained models; the cheapest. Source: this crate.
    Drop,
}

impl Fold {
    /// Whether a column stands for the `n` tokens of its chain: it enters the softmax with `ln n`.
    #[inline]
    pub const fn has_sizes(self) -> bool {
        match self {
            Self::Mean => true,
            Self::PairSum | Self::Drop => false,
        }
    }

    /// Whether a query becomes the sum of itself and its hidden left neighbour.
    #[inline]
    pub const fn folds_queries(self) -> bool {
        match self {
            Self::PairSum => true,
            Self::Mean | Self::Drop => false,
        }
    }

    /// Whether a hidden token's key and value are part of its right neighbour's.
    #[inline]
    pub const fn keeps_hidden(self) -> bool {
        match self {
            Self::PairSum | Self::Mean => true,
            Self::Drop => false,
        }
    }

    /// Whether a folded key or value is the sum of itself and its raw left neighbour, which may exceed the storage
    /// dtype.
    #[inline]
    pub(crate) const fn sums_pairs(self) -> bool {
        match self {
            Self::PairSum => true,
            Self::Mean | Self::Drop => false,
        }
    }

    /// Whether a folded token depends on its whole chain, so that the chain is walked from its first token on.
    #[inline]
    pub(crate) const fn walks_chains(self) -> bool {
        match self {
            Self::Mean => true,
            Self::PairSum | Self::Drop => false,
        }
    }
}

/// The divisor of the squared terms of the compression loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossNormalizer {
    /// The number of qualifying pairs, or of all pairs if none qualifies. It explodes when only a few pairs qualify.
    /// Source: the paper.
    Merged,
    /// The number of all pairs: bounded. Source: this crate.
    Pairs,
}
