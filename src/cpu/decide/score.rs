//! Deciding by a score: a token is hidden where its score is below the threshold of its KV head.

use crate::config::{HeadTest, MergeStrategy};
use crate::cpu::number::element::Accumulator;

/// The test of the scores of one KV head.
#[derive(Clone, Copy)]
pub(crate) struct ScoreTest<A> {
    threshold: A,
    sinks: usize,
}

impl<A: Accumulator> ScoreTest<A> {
    /// From the tests of the KV head's query heads, which must all agree: the least of their thresholds. None where a
    /// head is off.
    pub fn of(tests: impl IntoIterator<Item = HeadTest>, sinks: usize) -> Option<Self> {
        let least = |least: f64, test: HeadTest| match test.strategy {
            MergeStrategy::Off => None,
            MergeStrategy::Similarity | MergeStrategy::Difference => Some(least.min(test.threshold)),
        };
        let least = tests.into_iter().try_fold(f64::INFINITY, least)?;
        Some(Self {
            threshold: A::of(least),
            sinks,
        })
    }

    /// Whether the token is hidden once it has left the window. Strict, and never for NaN.
    #[inline]
    pub fn hides(&self, token: usize, score: A) -> bool {
        token >= self.sinks && score < self.threshold
    }
}
