//! Chooses each head's strategy and threshold from sample queries, keys and values, so that a target share of the
//! tokens is hidden at the least error of the layers' outputs.
//!
//! Samples are given twice, window by window and layer by layer, in any order. In the first pass a [`Calibrator`]
//! counts each head's scores, whose quantiles become candidate thresholds. In the second pass a [`Measurement`] sums,
//! per candidate, the tokens that it hides and the error of the output. [`Measurement::policy`] then spends one global
//! budget over all heads of all layers. It goes down the lower convex hulls of the heads' errors, always where the next
//! hidden token costs least. This is the minimum of error + λ·entries kept for the λ that meets the target. Memory does
//! not grow with the samples, and the result depends on the samples and settings only.
//!
//! A policy's thresholds are fixed numbers, so attention stays causal: nothing is chosen at run time.

mod choose;
#[cfg(feature = "fit")]
mod fit;
#[cfg(feature = "fit")]
mod harm;
mod histogram;
mod output_error;
mod pass;
mod policy;
mod probe;
mod shape;

#[cfg(feature = "fit")]
pub use fit::{ProbeFitter, ProbeRegression, ProbeSample};
pub use policy::{CalibrationFigures, LayerPolicy, Policy, PolicyOptions};

pub use probe::KeyProbe;
pub(crate) use probe::LayerScorer;
pub use shape::ModelShape;

#[cfg(doc)]
use crate::config::MergeRule;
use crate::config::{
    AttentionOptions, CompressionConfig, Criterion, GroupRule, HeadStrategies, MergeStrategy, TensorLayout,
};
use crate::op::attend;
use crate::plan::MergePlan;
use candle_core::{bail, Result, Tensor};
use choose::Candidate;
use histogram::Histogram;
use output_error::OutputError;
use pass::PassSettings;

/// The first pass through the samples: each head's scores.
#[derive(Clone, Debug)]
pub struct Calibrator {
    settings: PassSettings,
    ratios: Vec<f64>,
    /// Scores by layer, strategy and unit.
    scores: Vec<Vec<Vec<Histogram>>>,
}

/// The second pass: the hidden tokens and the error of each candidate.
#[derive(Clone, Debug)]
pub struct Measurement {
    settings: PassSettings,
    /// Candidates by layer, strategy and ratio, then by unit.
    candidates: Vec<Vec<Vec<Candidate>>>,
    /// The number of tokens that could be hidden (`eligible`) and of all pairs, over all layers and units.
    eligible: usize,
    pairs: usize,
    windows: usize,
    tokens: usize,
}

impl Calibrator {
    /// Starts the first pass, for a model of shape `model` with its attention's settings and `options`: scale, bias,
    /// softcap, sink logits and layout. `ratios` are the shares of hidden tokens to try, between 0 and 1; every
    /// head may also stay off. Under [`Criterion::ObservedMass`] and [`Criterion::Given`] a share counts the
    /// tokens that have left the window, else all tokens; sinks are never counted.
    ///
    /// # Errors
    /// Settings that have no meaning, [`MergeRule::Reference`], whose decisions depend on one another, an invalid model
    /// shape, and ratios outside of 0 to 1.
    pub fn new(
        model: ModelShape,
        config: CompressionConfig,
        options: AttentionOptions,
        ratios: &[f64],
    ) -> Result<Self> {
        config.check(options.causal)?;
        options.check()?;
        if options.segments.is_some() {
            bail!("segments: expected None for calibration, got some; add each segment as a sample of its own")
        }
        model.check()?;
        if !config.rule.is_causal() {
            bail!(
                "rule: expected MergeRule::Causal for calibration, got {:?}; its heads decide together, use Causal",
                config.rule
            )
        }
        let inside = |ratio: &f64| *ratio > 0.0 && *ratio < 1.0;
        if ratios.is_empty() || !ratios.iter().all(inside) {
            bail!("ratios: expected shares between 0 and 1, got {ratios:?}; give some as 0.25, 0.5 and 0.75")
        }
        let strategies = match config.criterion {
            // Scores do not read the strategy.
            Criterion::ObservedMass | Criterion::Given => vec![MergeStrategy::Similarity],
            Criterion::QueryKey | Criterion::KeyKey => vec![MergeStrategy::Similarity, MergeStrategy::Difference],
        };
        let settings = PassSettings {
            model,
            heads_per_unit: match config.group_rule {
                GroupRule::Unanimous => model.heads / model.kv_heads,
                GroupRule::PerQueryHead => 1,
            },
            strategies,
            config,
            layout: options.layout,
            options: AttentionOptions {
                layout: TensorLayout::HeadsFirst,
                ..options
            },
        };
        let per_layer = vec![vec![Histogram::new(); settings.units()]; settings.strategies.len()];
        Ok(Self {
            scores: vec![per_layer; model.layers],
            ratios: ratios.to_vec(),
            settings,
        })
    }

    /// The settings whose thresholds are looked for.
    pub fn config(&self) -> &CompressionConfig {
        &self.settings.config
    }

    /// Counts the scores of one window in one layer. Query (1, H, N, D), key and value (1, Hk, N, D), or with their
    /// axes in the order of the options' layout, as they reach the attention; N >= 2.
    ///
    /// # Errors
    /// Tensors of another shape than the model's, a window of one token, or as [`MergePlan::new`].
    pub fn observe(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        self.observe_with(layer, [q, k, v], None)
    }

    /// [`Self::observe`] under [`Criterion::Given`], with the window's scores, f32 (1, Hk, N).
    ///
    /// # Errors
    /// As [`Self::observe`], another criterion, or scores of another shape.
    pub fn observe_scored(&mut self, layer: usize, qkv: [&Tensor; 3], scores: &Tensor) -> Result<()> {
        self.observe_with(layer, qkv, Some(scores))
    }

    fn observe_with(&mut self, layer: usize, qkv: [&Tensor; 3], given: Option<&Tensor>) -> Result<()> {
        let [q, k, v] = &self.settings.checked(layer, qkv)?;
        self.settings.check_given(k, given)?;
        for (strategy, histograms) in self.settings.strategies.iter().zip(&mut self.scores[layer]) {
            let scores = self.settings.scores(*strategy, [q, k, v], given)?;
            for (histogram, scores) in histograms.iter_mut().zip(scores) {
                histogram.extend(&scores);
            }
        }
        Ok(())
    }

    /// Turns the shares to try into each head's thresholds.
    ///
    /// # Errors
    /// A layer without counted tokens: no window was given, or none was long enough.
    pub fn measure(&self) -> Result<Measurement> {
        let candidates_of = |(layer, by_strategy): (usize, &Vec<Vec<Histogram>>)| {
            let mut candidates = Vec::new();
            for (strategy, units) in self.settings.strategies.iter().zip(by_strategy) {
                for ratio in &self.ratios {
                    let candidate = |unit: &Histogram| match unit.quantile(*ratio) {
                        Some(threshold) => Ok(Candidate::new(*strategy, threshold)),
                        None => bail!(
                            "calibration: expected scores of layer {layer}, got none; observe windows of more tokens \
                             than window and sinks"
                        ),
                    };
                    candidates.push(units.iter().map(candidate).collect::<Result<Vec<_>>>()?);
                }
            }
            Ok(candidates)
        };
        let layers = self.scores.iter().enumerate();
        Ok(Measurement {
            candidates: layers.map(candidates_of).collect::<Result<_>>()?,
            settings: self.settings.clone(),
            eligible: 0,
            pairs: 0,
            windows: 0,
            tokens: 0,
        })
    }
}

impl Measurement {
    /// Adds, for every candidate, the tokens that it hides in one window of one layer and the squared error of the
    /// layer's output. Query (1, H, N, D), key and value (1, Hk, N, D), or as in [`Calibrator::observe`]. The error is
    /// taken after the output projection `projection` (hidden, H·D) if given, else per head. `weight` is a factor on
    /// the error. Errors of different layers are added up; 1 over the mean square of the layer's own output makes them
    /// comparable.
    ///
    /// # Errors
    /// As [`Calibrator::observe`], a projection of another shape, a weight that is not positive.
    pub fn add(&mut self, layer: usize, qkv: [&Tensor; 3], projection: Option<&Tensor>, weight: f64) -> Result<()> {
        self.add_with(layer, (qkv, None), projection, weight)
    }

    /// [`Self::add`] under [`Criterion::Given`], with the window's scores, f32 (1, Hk, N).
    ///
    /// # Errors
    /// As [`Self::add`], another criterion, or scores of another shape.
    pub fn add_scored(
        &mut self,
        layer: usize,
        (qkv, scores): ([&Tensor; 3], &Tensor),
        projection: Option<&Tensor>,
        weight: f64,
    ) -> Result<()> {
        self.add_with(layer, (qkv, Some(scores)), projection, weight)
    }

    fn add_with(
        &mut self,
        layer: usize,
        (qkv, given): ([&Tensor; 3], Option<&Tensor>),
        projection: Option<&Tensor>,
        weight: f64,
    ) -> Result<()> {
        let settings = &self.settings;
        let [q, k, v] = &settings.checked(layer, qkv)?;
        settings.check_given(k, given)?;
        if !(weight.is_finite() && weight > 0.0) {
            bail!("weight: expected a positive number, got {weight}; 1 weighs all layers alike")
        }
        let errors = OutputError::new(settings, projection)?;
        let off = HeadStrategies::uniform(MergeStrategy::Off);
        let run = |strategies: &HeadStrategies| -> Result<(Tensor, MergePlan)> {
            let plan = match given.filter(|_| !strategies.all_off()) {
                Some(scores) => MergePlan::from_scores(scores, strategies, &settings.config, true)?,
                None => MergePlan::new(q, k, v, strategies, &settings.config, &settings.options)?,
            };
            Ok((attend(q, k, v, &plan, &settings.options)?, plan))
        };
        let (dense, _) = run(&off)?;
        for candidates in &mut self.candidates[layer] {
            let thresholds = candidates.iter().map(|candidate| candidate.threshold);
            let strategy = candidates
                .first()
                .map_or(MergeStrategy::Off, |candidate| candidate.strategy);
            let (output, plan) = run(&settings.heads(strategy, thresholds, q)?)?;
            let hidden = plan.stats()?.per_head.concat();
            let units = errors.per_unit(&(output - &dense)?)?;
            for (unit, (candidate, error)) in candidates.iter_mut().zip(units).enumerate() {
                candidate.hidden += hidden[unit * settings.heads_per_unit];
                candidate.error += weight * error;
            }
        }
        let tokens = q.dim(2)?;
        let undecided = match settings.config.criterion {
            Criterion::ObservedMass | Criterion::Given => settings.config.window,
            Criterion::QueryKey | Criterion::KeyKey => 0,
        };
        let eligible = (tokens - 1)
            .saturating_sub(undecided)
            .saturating_sub(settings.config.sinks);
        self.eligible += eligible * settings.units();
        self.pairs += (tokens - 1) * settings.units();
        if layer == 0 {
            self.windows += 1;
            self.tokens += tokens;
        }
        Ok(())
    }

    /// The policy that hides the share `target` of the tokens that can be hidden, over all layers, at the least summed
    /// error. `fingerprint` is the caller's name for the model. Under [`Criterion::ObservedMass`] the tokens that can
    /// be hidden are the tokens that have left the window, so that the share holds at any length.
    ///
    /// # Errors
    /// No samples, errors that are not finite, or a target that no choice of candidates reaches.
    pub fn policy(&self, target: f64, fingerprint: &str) -> Result<Policy> {
        if !(0.0..=1.0).contains(&target) {
            bail!("target: expected a share from 0 to 1, got {target}; 0.5 hides half of the tokens")
        }
        if self.eligible == 0 {
            bail!("calibration: expected samples, got none; add each window's queries, keys and values")
        }
        let wanted = target * self.eligible as f64;
        let units = self.settings.units();
        // Layer-major, then by unit.
        let mut table: Vec<Vec<Candidate>> = Vec::with_capacity(self.candidates.len() * units);
        for layer in &self.candidates {
            table.extend((0..units).map(|unit| layer.iter().map(|candidates| candidates[unit]).collect()));
        }
        let chosen = choose::choose(&table, wanted)?;
        let hidden: usize = chosen.iter().map(|candidate| candidate.hidden).sum();
        let per_unit = self.eligible as f64 / table.len() as f64;
        let layers = chosen.chunks(units).map(|units| LayerPolicy {
            strategies: units.iter().map(|unit| unit.strategy).collect(),
            thresholds: units.iter().map(|unit| unit.threshold).collect(),
            hidden_ratios: units.iter().map(|unit| unit.hidden as f64 / per_unit).collect(),
            errors: units.iter().map(|unit| unit.error).collect(),
        });
        Policy::new(PolicyOptions {
            fingerprint: fingerprint.to_string(),
            model: self.settings.model,
            config: self.settings.config.clone(),
            layers: layers.collect(),
            probe: None,
            calibration: CalibrationFigures {
                target,
                hidden_ratio: hidden as f64 / self.eligible as f64,
                hidden_ratio_of_all: hidden as f64 / self.pairs as f64,
                error: chosen.iter().map(|candidate| candidate.error).sum(),
                windows: self.windows,
                tokens: self.tokens,
            },
        })
    }
}
