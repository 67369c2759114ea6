//! The state of a cache on the CPU, and how its first call makes it.

use super::segments::RowPlace;
use super::CompressedKvCache;
use crate::config::AttentionOptions;
use crate::cpu::cache::list::List;
use crate::cpu::cache::settings::ListSettings;
use crate::cpu::decide::heads::ListHeads;
use crate::cpu::number::element::Element;
use crate::problem::Problem;
use candle_core::{DType, Result};
use serde::{Deserialize, Serialize};

/// Everything that the first call fixes or that later calls change.
#[derive(Clone)]
pub(crate) struct State {
    pub sizes: CacheSizes,
    pub seq_len: usize,
    /// The sliding window of the calls that attended; None before the first of them.
    pub sliding_window: Option<Option<usize>>,
    /// Where each batch row stands, once segments were given.
    pub places: Option<Vec<RowPlace>>,
    pub lists: Lists,
}

impl State {
    /// The sliding window of a call with these options, or without attending.
    ///
    /// # Errors
    /// Another one than in the calls before.
    pub(super) fn sliding_window_for(&self, options: Option<&AttentionOptions>) -> Result<Option<usize>> {
        match options {
            Some(options) => options.sliding_window_after(self.sliding_window),
            None => Ok(self.sliding_window.flatten()),
        }
    }
}

/// The shapes that the first call fixed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CacheSizes {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// The size of values where it is another than that of keys. Files leave it out where it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_dim: Option<usize>,
}

impl CacheSizes {
    pub fn of(problem: &Problem) -> Self {
        Self {
            batch: problem.batch,
            heads: problem.heads,
            kv_heads: problem.kv_heads,
            head_dim: problem.head_dim,
            value_dim: (problem.value_dim != problem.head_dim).then_some(problem.value_dim),
        }
    }

    /// The size of values.
    pub fn values(&self) -> usize {
        self.value_dim.unwrap_or(self.head_dim)
    }
}

pub(crate) type ListsOf<S> = Vec<(ListHeads, List<S>)>;

/// All lists, batch-major, by storage dtype.
#[derive(Clone)]
pub(crate) enum Lists {
    F64(ListsOf<f64>),
    F32(ListsOf<f32>),
    F16(ListsOf<half::f16>),
    BF16(ListsOf<half::bf16>),
}

impl Lists {
    pub fn dtype(&self) -> DType {
        match self {
            Self::F64(_) => DType::F64,
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::BF16(_) => DType::BF16,
        }
    }
}

impl CompressedKvCache {
    pub(super) fn first_state(&self, problem: &Problem, storage: DType) -> Result<State> {
        self.strategies.check(problem.batch, problem.heads)?;
        Ok(State {
            sizes: CacheSizes::of(problem),
            seq_len: 0,
            sliding_window: None,
            places: None,
            lists: match storage {
                DType::F64 => Lists::F64(self.new_lists(problem)),
                DType::F16 => Lists::F16(self.new_lists(problem)),
                DType::BF16 => Lists::BF16(self.new_lists(problem)),
                _ => Lists::F32(self.new_lists(problem)),
            },
        })
    }

    fn new_lists<S: Element>(&self, problem: &Problem) -> ListsOf<S> {
        let group = problem.group();
        let mut lists = Vec::new();
        for batch in 0..problem.batch {
            for kv_head in 0..problem.kv_heads {
                let heads = kv_head * group..(kv_head + 1) * group;
                let tests = |heads: std::ops::Range<usize>| -> Vec<_> {
                    heads
                        .map(|head| self.strategies.test(&self.config, batch, head))
                        .collect()
                };
                let all_off = tests(heads.clone()).iter().all(|test| test.strategy.is_off());
                let shared = self.config.group_rule.heads_agree() || all_off;
                let parts = if shared {
                    vec![heads]
                } else {
                    heads.map(|head| head..head + 1).collect()
                };
                for heads in parts {
                    let settings = ListSettings::new(tests(heads.clone()), &self.config)
                        .under(self.options.budget, self.options.storage);
                    let at = ListHeads { batch, kv_head, heads };
                    lists.push((at, List::new(settings, [problem.head_dim, problem.value_dim])));
                }
            }
        }
        lists
    }
}

/// Lists whose batch row i is the old row `rows[i]`.
pub(super) fn select<S: Element>(lists: &ListsOf<S>, rows: &[i64]) -> ListsOf<S> {
    let of_row = |(new, old): (usize, &i64)| {
        let old = *old as usize;
        let mine = lists.iter().filter(move |(at, _)| at.batch == old);
        mine.map(move |(at, list)| {
            (
                ListHeads {
                    batch: new,
                    ..at.clone()
                },
                list.clone(),
            )
        })
    };
    rows.iter().enumerate().flat_map(of_row).collect()
}
