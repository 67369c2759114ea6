//! [`CompressionConfig`]: the method's parameters, its presets, and its checks.

use super::{Criterion, Fold, GroupRule, HeadStrategies, LossNormalizer, MergeRule, MergeStrategy};
use candle_core::{bail, Result};
use serde::{Deserialize, Serialize};

/// The method's parameters. [`Default`] gives the paper's values under the causal rule.
///
/// ```
/// use candle_sfattention::{CompressionConfig, Fold};
/// let config = CompressionConfig { fold: Fold::Mean, window: 32, ..Default::default() };
/// config.check(true)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CompressionConfig {
    /// A pair of a [`MergeStrategy::Similarity`] head qualifies when `1 - cos` is below this. Default 2e-4 (paper).
    pub similarity_threshold: f64,
    /// A pair of a [`MergeStrategy::Difference`] head qualifies when `|cos|` is below this. Default 0.0175 (paper).
    pub difference_threshold: f64,
    /// The most tokens that may be hidden in one run, at least 1. Default 20 (paper).
    pub max_merge_level: usize,
    /// Default [`MergeRule::Causal`].
    pub rule: MergeRule,
    /// Default [`GroupRule::PerQueryHead`].
    pub group_rule: GroupRule,
    /// Default [`Criterion::QueryKey`] (paper).
    pub criterion: Criterion,
    /// Default [`Fold::PairSum`] (paper).
    pub fold: Fold,
    /// The first `sinks` tokens are never hidden. Default 0.
    pub sinks: usize,
    /// The last `window` tokens before a row, itself included, are attended raw; folding starts to their left.
    /// Default 0: each row sees its own folded token. Needs causal attention.
    pub window: usize,
    /// Factor on the compression loss. Default 1.
    pub loss_factor: f64,
    /// Default [`LossNormalizer::Merged`] (paper).
    pub loss_normalizer: LossNormalizer,
}

impl Default for CompressionConfig {
    fn default() -> Self {
        Self {
            similarity_threshold: 2e-4,
            difference_threshold: 0.0175,
            max_merge_level: 20,
            rule: MergeRule::Causal,
            group_rule: GroupRule::PerQueryHead,
            criterion: Criterion::QueryKey,
            fold: Fold::PairSum,
            sinks: 0,
            window: 0,
            loss_factor: 1.0,
            loss_normalizer: LossNormalizer::Merged,
        }
    }
}

impl CompressionConfig {
    /// Parity with the published Python reference: the default values under [`MergeRule::Reference`].
    pub fn reference() -> Self {
        Self {
            rule: MergeRule::Reference,
            ..Self::default()
        }
    }

    /// For stock checkpoints that were never trained with merging: running means of similar keys, decided once per KV
    /// head; the first 4 tokens and the last 32 stay unchanged. Use it with [`MergeStrategy::Similarity`].
    pub fn pretrained() -> Self {
        Self {
            fold: Fold::Mean,
            criterion: Criterion::KeyKey,
            similarity_threshold: 0.1,
            sinks: 4,
            window: 32,
            max_merge_level: 5,
            group_rule: GroupRule::Unanimous,
            ..Self::default()
        }
    }

    /// For stock checkpoints with a calibrated [`Policy`](crate::Policy), which gives the thresholds. Tokens with
    /// little attention from their window's rows are left out, decided once per KV head; the first 4 tokens and the
    /// last 32 stay unchanged.
    pub fn calibrated() -> Self {
        Self {
            fold: Fold::Drop,
            criterion: Criterion::ObservedMass,
            ..Self::pretrained()
        }
    }

    /// The threshold of a head that has none of its own; infinity for [`MergeStrategy::Off`], which reads none.
    pub fn default_threshold(&self, strategy: MergeStrategy) -> f64 {
        match strategy {
            MergeStrategy::Similarity => self.similarity_threshold,
            MergeStrategy::Difference => self.difference_threshold,
            MergeStrategy::Off => f64::INFINITY,
        }
    }

    /// Refuses values and combinations that have no meaning.
    ///
    /// # Errors
    /// A threshold or `loss_factor` that is not finite, `max_merge_level` of 0, counts over 2^32 - 1, a window without
    /// causal attention, and every setting that [`MergeRule::Reference`], [`Criterion::ObservedMass`] or
    /// [`Criterion::Given`] does not support.
    pub fn check(&self, causal: bool) -> Result<()> {
        for (name, value) in [
            ("similarity_threshold", self.similarity_threshold),
            ("difference_threshold", self.difference_threshold),
            ("loss_factor", self.loss_factor),
        ] {
            if !value.is_finite() {
                bail!("{name}: expected a finite number, got {value}; the defaults are CompressionConfig::default()")
            }
        }
        if self.max_merge_level == 0 {
            bail!("max_merge_level: expected at least 1, got 0; use MergeStrategy::Off to merge nothing")
        }
        let largest = u32::MAX as usize;
        if self.window > largest || self.sinks > largest || self.max_merge_level > largest {
            bail!(
                "window, sinks and max_merge_level: expected at most {largest}, got {}, {} and {}; a window of all \
                 tokens folds nothing",
                self.window,
                self.sinks,
                self.max_merge_level
            )
        }
        if !causal && self.window != 0 {
            bail!(
                "window: expected 0 for non-causal attention, got {}; set window to 0 or causal to true",
                self.window
            )
        }
        match self.rule {
            MergeRule::Causal => {}
            MergeRule::Reference => self.check_reference_rule()?,
        }
        match self.criterion {
            Criterion::QueryKey | Criterion::KeyKey => {}
            Criterion::ObservedMass => {
                self.check_dropping(causal, 2, "Criterion::KeyKey for everything it does not have")?
            }
            Criterion::Given => self.check_dropping(causal, 0, "MergePlan::from_indicators with bits of your own")?,
        }
        Ok(())
    }

    /// Refuses strategies without thresholds where the criterion has no default for them.
    ///
    /// # Errors
    /// [`Criterion::ObservedMass`] with a head that is not off and has no threshold of its own.
    pub fn check_strategies(&self, strategies: &HeadStrategies) -> Result<()> {
        let needed = self.criterion.needs_thresholds() && !strategies.all_off();
        if needed && !strategies.has_thresholds() {
            bail!(
                "thresholds: expected one per head for Criterion::{:?}, whose scores depend on the model, got none; \
                 calibrate them, or give them with HeadStrategies::with_thresholds",
                self.criterion
            )
        }
        Ok(())
    }

    /// Refuses everything that a criterion without pairs does not have; `window` is the least one it needs.
    fn check_dropping(&self, causal: bool, window: usize, instead: &str) -> Result<()> {
        let got = if !causal {
            "attention that is not causal".to_string()
        } else if self.fold.keeps_hidden() {
            format!("fold {:?}", self.fold)
        } else if !self.group_rule.heads_agree() {
            format!("group_rule {:?}", self.group_rule)
        } else if self.window < window {
            format!("window {}", self.window)
        } else {
            return Ok(());
        };
        bail!(
            "Criterion::{:?}: expected causal attention, fold Drop, group_rule Unanimous and a window of at least \
             {window}, got {got}; use {instead}",
            self.criterion
        )
    }

    fn check_reference_rule(&self) -> Result<()> {
        let published = match self.criterion {
            Criterion::QueryKey => true,
            Criterion::KeyKey | Criterion::ObservedMass | Criterion::Given => false,
        };
        let got = if !published {
            format!("criterion {:?}", self.criterion)
        } else if self.group_rule.heads_agree() {
            format!("group_rule {:?}", self.group_rule)
        } else if self.sinks != 0 {
            format!("sinks {}", self.sinks)
        } else if self.window != 0 {
            format!("window {}", self.window)
        } else {
            return Ok(());
        };
        bail!(
            "MergeRule::Reference: expected criterion QueryKey, group_rule PerQueryHead, sinks 0 and window 0, got \
             {got}; use MergeRule::Causal for everything the published reference does not have"
        )
    }
}
