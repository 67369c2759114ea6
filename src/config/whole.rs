//! Settings in the files that this crate writes. A call's settings may leave fields out. A file that lacks a field is
//! damaged, and a default in the field's place would change the file's meaning.

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

/// [`HeadStrategies`] that name whether there are thresholds.
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

/// Deserialises a field that may be `null` but not left out.
pub(crate) fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(source: D) -> Result<Option<T>, D::Error> {
    Option::deserialize(source)
}
