//! Settings in the files that this crate writes. A call's settings may leave fields out; a file that lacks one is damaged,
//! and a default in its place would change what the file means.

use super::strategies::{HeadTables, Table};
use super::{CompressionConfig, Criterion, Fold, GroupRule, HeadStrategies, LossNormalizer, MergeRule, MergeStrategy};
use serde::{Deserialize, Deserializer, Serialize};

/// Every field of [`CompressionConfig`], all of them required.
#[derive(Serialize, Deserialize)]
#[serde(remote = "CompressionConfig", deny_unknown_fields)]
pub(crate) struct WholeConfig {
    similarity_threshold: f64,
    difference_threshold: f64,
    max_merge_level: usize,
    rule: MergeRule,
    group_rule: GroupRule,
    criterion: Criterion,
    fold: Fold,
    sinks: usize,
    window: usize,
    loss_factor: f64,
    loss_normalizer: LossNormalizer,
}

/// [`HeadStrategies`] that say whether there are thresholds.
#[derive(Deserialize)]
#[serde(remote = "HeadTables", deny_unknown_fields)]
pub(crate) struct WholeStrategies {
    strategies: Table<MergeStrategy>,
    #[serde(deserialize_with = "present")]
    thresholds: Option<Table<f64>>,
}

impl WholeStrategies {
    pub fn read<'de, D: Deserializer<'de>>(source: D) -> Result<HeadStrategies, D::Error> {
        let tables = Self::deserialize(source)?;
        tables.try_into().map_err(serde::de::Error::custom)
    }
}

/// What may be `null` but not left out.
pub(crate) fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(source: D) -> Result<Option<T>, D::Error> {
    Option::deserialize(source)
}
