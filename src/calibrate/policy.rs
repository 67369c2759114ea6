//! [`Policy`]: the result of calibration, as JSON.

use super::probe::KeyProbe;
use super::shape::ModelShape;
use crate::config::shard::kv_heads_of;
use crate::config::whole::WholeConfig;
use crate::config::{CompressionConfig, GroupRule, HeadStrategies, MergeStrategy};
use candle_core::{bail, Device, Error, Result, Tensor};
use serde::{Deserialize, Serialize};

/// The format that a policy file names.
const FORMAT: &str = "candle-sfattention policy 1";
/// One layer's choices. An entry is for a unit: a KV head under [`GroupRule::Unanimous`], else a query head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerPolicy {
    /// The strategies. Under [`Criterion::ObservedMass`](crate::Criterion::ObservedMass) only off differs from the
    /// others.
    pub strategies: Vec<MergeStrategy>,
    /// The thresholds; not read where the strategy is off.
    pub thresholds: Vec<f64>,
    /// Hidden tokens in the samples, as a share of the tokens that could be hidden.
    pub hidden_ratios: Vec<f64>,
    /// The squared error of the output, summed over the samples.
    pub errors: Vec<f64>,
}

/// The figures of a calibration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationFigures {
    /// The wanted share of hidden tokens, of the tokens that could be hidden.
    pub target: f64,
    /// The share that was hidden, of the tokens that could be hidden.
    pub hidden_ratio: f64,
    /// The share of all pairs of neighbours, as [`MergeStats::hidden_ratio`](crate::MergeStats::hidden_ratio) counts
    /// it.
    pub hidden_ratio_of_all: f64,
    /// The squared errors of all layers, summed.
    pub error: f64,
    /// The number of sample windows.
    pub windows: usize,
    /// The number of tokens in the sample windows.
    pub tokens: usize,
}

/// The parts of a [`Policy`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyOptions {
    /// The caller's name for the model's weights.
    pub fingerprint: String,
    /// The model shape that the policy fits.
    pub model: ModelShape,
    /// The settings that the thresholds are for; the file must name all of them.
    #[serde(with = "WholeConfig")]
    pub config: CompressionConfig,
    /// One per layer.
    pub layers: Vec<LayerPolicy>,
    /// The probe whose scores the thresholds are for, under [`Criterion::Given`](crate::Criterion::Given).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<KeyProbe>,
    /// The figures of the calibration.
    pub calibration: CalibrationFigures,
}

/// Strategies and thresholds for every head of one model. Its JSON is checked as it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "PolicyFile", into = "PolicyFile")]
pub struct Policy(PolicyOptions);

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyFile {
    format: String,
    policy: PolicyOptions,
}

impl From<Policy> for PolicyFile {
    fn from(policy: Policy) -> Self {
        Self {
            format: FORMAT.into(),
            policy: policy.0,
        }
    }
}

impl TryFrom<PolicyFile> for Policy {
    type Error = Error;

    fn try_from(file: PolicyFile) -> Result<Self> {
        if file.format != FORMAT {
            bail!(
                "format: expected {FORMAT:?}, got {:?}; calibrate with this version",
                file.format
            )
        }
        Self::new(file.policy)
    }
}

impl Policy {
    /// Checks that the parts fit together.
    ///
    /// # Errors
    /// Settings that have no meaning, a model with no heads or with more than 65,536 heads or numbers per head, another
    /// number of layers or entries than the model has, thresholds that are not finite.
    pub fn new(parts: PolicyOptions) -> Result<Self> {
        parts.model.check()?;
        parts.config.check(true)?;
        if parts.layers.len() != parts.model.layers {
            bail!(
                "layers: expected {}, got {}; give one per layer of the model",
                parts.model.layers,
                parts.layers.len()
            )
        }
        if let Some(probe) = &parts.probe {
            if !parts.config.criterion.takes_scores() {
                bail!(
                    "probe: expected none under Criterion::{:?}, got one; set the criterion to Given",
                    parts.config.criterion
                )
            }
            probe.check(&parts.model)?;
        }
        let policy = Self(parts);
        let units = policy.0.model.heads / policy.heads_per_entry();
        for (index, layer) in policy.0.layers.iter().enumerate() {
            let lens = [
                layer.strategies.len(),
                layer.thresholds.len(),
                layer.hidden_ratios.len(),
                layer.errors.len(),
            ];
            if lens != [units; 4] {
                bail!(
                    "layer {index}: expected {units} entries in each list, got {lens:?}; give one per head that decides"
                )
            }
            check_finite(&format!("layer {index}: thresholds"), &layer.thresholds)?;
        }
        Ok(policy)
    }

    fn heads_per_entry(&self) -> usize {
        match self.0.config.group_rule {
            GroupRule::Unanimous => self.0.model.heads / self.0.model.kv_heads,
            GroupRule::PerQueryHead => 1,
        }
    }

    /// The parts of the policy.
    pub fn parts(&self) -> &PolicyOptions {
        &self.0
    }

    /// Each layer's strategies, for a model of this shape and [`Self::parts`]' settings.
    ///
    /// # Errors
    /// A model of another shape.
    pub fn head_strategies(&self, model: &ModelShape) -> Result<Vec<HeadStrategies>> {
        if *model != self.0.model {
            bail!(
                "policy: expected a model of {model:?}, got a policy for {:?}; calibrate this model",
                self.0.model
            )
        }
        self.strategies()
    }

    fn strategies(&self) -> Result<Vec<HeadStrategies>> {
        let repeats = self.heads_per_entry();
        let layer = |layer: &LayerPolicy| -> Result<HeadStrategies> {
            let strategies = layer.strategies.iter().flat_map(|s| std::iter::repeat_n(*s, repeats));
            let thresholds = layer.thresholds.iter().flat_map(|t| std::iter::repeat_n(*t, repeats));
            let thresholds: Vec<f64> = thresholds.collect();
            HeadStrategies::per_head(strategies.collect()).with_thresholds(&Tensor::new(thresholds, &Device::Cpu)?)
        };
        self.0.layers.iter().map(layer).collect()
    }

    /// The policy of the heads of rank `rank` of `world`, for a model whose heads are split over ranks. Its
    /// [`PolicyOptions::model`] has H / world query heads and Hk / world KV heads. The entries of each layer, and the
    /// KV heads of the probe, are those of [`HeadStrategies::shard`]. The fingerprint, the settings and the figures of
    /// the calibration stay those of the whole model.
    ///
    /// # Errors
    /// A rank that the world does not have, more ranks than KV heads, or KV heads that are no multiple of the ranks.
    pub fn shard(&self, rank: usize, world: usize) -> Result<Self> {
        let model = self.0.model;
        kv_heads_of(rank, world, model.kv_heads)?;
        let layer = |layer: &LayerPolicy| {
            let each = layer.strategies.len() / world;
            let own = rank * each..(rank + 1) * each;
            LayerPolicy {
                strategies: layer.strategies[own.clone()].to_vec(),
                thresholds: layer.thresholds[own.clone()].to_vec(),
                hidden_ratios: layer.hidden_ratios[own.clone()].to_vec(),
                errors: layer.errors[own].to_vec(),
            }
        };
        let probe = self.0.probe.as_ref().map(|probe| probe.shard(rank, world));
        Self::new(PolicyOptions {
            model: ModelShape {
                heads: model.heads / world,
                kv_heads: model.kv_heads / world,
                ..model
            },
            layers: self.0.layers.iter().map(layer).collect(),
            probe: probe.transpose()?,
            ..self.0.clone()
        })
    }

    /// Reads JSON.
    ///
    /// # Errors
    /// Text that is no policy, or a policy whose parts do not fit together.
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|error| {
            Error::msg(format!(
                "policy: expected JSON that Policy::to_json wrote, got {error}; calibrate again"
            ))
        })
    }

    /// Writes JSON, which reads back as the same policy, to the last bit.
    ///
    /// # Errors
    /// Figures that are not finite.
    pub fn to_json(&self) -> Result<String> {
        let PolicyOptions {
            layers, calibration, ..
        } = &self.0;
        for (index, layer) in layers.iter().enumerate() {
            check_finite(&format!("layer {index}: hidden_ratios"), &layer.hidden_ratios)?;
            check_finite(&format!("layer {index}: errors"), &layer.errors)?;
        }
        for (name, figure) in [
            ("target", calibration.target),
            ("hidden_ratio", calibration.hidden_ratio),
            ("hidden_ratio_of_all", calibration.hidden_ratio_of_all),
            ("error", calibration.error),
        ] {
            check_finite(&format!("calibration: {name}"), &[figure])?;
        }
        serde_json::to_string_pretty(self).map_err(Error::wrap)
    }
}

/// JSON has finite numbers only.
fn check_finite(what: &str, numbers: &[f64]) -> Result<()> {
    match numbers.iter().find(|x| !x.is_finite()) {
        Some(bad) => bail!("{what}: expected finite numbers, got {bad}; calibrate on samples that are finite"),
        None => Ok(()),
    }
}
