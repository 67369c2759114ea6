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
mod policy;
mod probe;
mod shape;

#[cfg(feature = "fit")]
pub use fit::{ProbeFitter, ProbeRegression, ProbeSample};
pub use policy::{CalibrationFigures, LayerPolicy, Policy, PolicyOptions};

pub use probe::KeyProbe;
pub use shape::ModelShape;

#[cfg(doc)]
use crate::config::MergeRule;
use crate::config::{
    AttentionOptions, CompressionConfig, Criterion, GroupRule, HeadStrategies, MergeStrategy, TensorLayout,
};
use crate::decide::observed_mass;
use crate::op::attend;
use crate::plan::{without_scores, MergePlan};
use crate::problem::Problem;
use candle_core::{bail, DType, Result, Tensor, D};
use choose::Candidate;
use histogram::Histogram;

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

/// The settings of both passes. A unit decides as one: a KV head under [`GroupRule::Unanimous`], else a query head.
#[derive(Clone, Debug)]
struct PassSettings {
    model: ModelShape,
    config: CompressionConfig,
    /// The options with heads first, for any layout of the caller.
    options: AttentionOptions,
    layout: TensorLayout,
    strategies: Vec<MergeStrategy>,
    /// Query heads in a unit.
    heads_per_unit: usize,
}

impl PassSettings {
    fn units(&self) -> usize {
        self.model.heads / self.heads_per_unit
    }

    /// Query, key and value with their heads first.
    fn checked(&self, layer: usize, qkv: [&Tensor; 3]) -> Result<[Tensor; 3]> {
        let tensors = self.layout.turned_all(qkv)?;
        let [q, k, v] = &tensors;

        let ModelShape {
            layers,
            heads,
            kv_heads,
            head_dim,
        } = self.model;
        let fits = |x: &Tensor, heads: usize| matches!(*x.dims(), [1, h, _, d] if (h, d) == (heads, head_dim));
        if layer >= layers || !fits(q, heads) || !fits(k, kv_heads) {
            bail!(
                "calibration: expected query (1, {heads}, N, {head_dim}) and key (1, {kv_heads}, N, {head_dim}) of a \
                 layer below {layers}, got {:?} and {:?} of layer {layer}; give one window of one layer at a time",
                q.dims(),
                k.dims()
            )
        }
        let problem = self.layout.explained(Problem::new(q, k, v))?;
        if problem.value_dim != head_dim {
            bail!(
                "calibration: expected values of the keys' head_dim {head_dim}, got {}; pad the smaller ones \
                 with zeros by pad_with_zeros",
                problem.value_dim
            )
        }
        if problem.tokens < 2 {
            bail!("calibration: expected windows of at least 2 tokens, got 1 in layer {layer}; leave such a window out")
        }
        Ok(tensors)
    }

    /// Refuses scores that are missing, too many, or of another shape than (1, Hk, N).
    fn check_given(&self, k: &Tensor, given: Option<&Tensor>) -> Result<()> {
        let Some(scores) = given else {
            return match self.config.criterion.takes_scores() {
                true => without_scores(),
                false => Ok(()),
            };
        };
        if !self.config.criterion.takes_scores() {
            bail!(
                "scores: expected none under Criterion::{:?}, got some; set the criterion to Given",
                self.config.criterion
            )
        }
        if scores.dims() != &k.dims()[..3] || scores.dtype() != DType::F32 {
            bail!(
                "scores: expected f32 of shape (1, KV heads, tokens) = {:?}, got {:?} of shape {:?}; give one score \
                 per token and KV head",
                &k.dims()[..3],
                scores.dtype(),
                scores.dims()
            )
        }
        Ok(())
    }

    /// The scores, `(units, tokens)` in f32, of the tokens that may be hidden; a hidden token's score is below its
    /// threshold.
    fn scores(
        &self,
        strategy: MergeStrategy,
        [q, k, v]: [&Tensor; 3],
        given: Option<&Tensor>,
    ) -> Result<Vec<Vec<f32>>> {
        let scores = match self.config.criterion {
            Criterion::ObservedMass => observed_mass(q, k, v, &self.config, &self.options)?,
            Criterion::QueryKey | Criterion::KeyKey => self.distances(strategy, q, k)?,
            Criterion::Given => match given {
                Some(scores) => {
                    let decided = (k.dim(2)? - 1).saturating_sub(self.config.window);
                    scores.narrow(2, 0, decided)?
                }
                None => return without_scores(),
            },
        };
        let scores = scores.squeeze(0)?.to_dtype(DType::F32)?;
        let tokens = scores.dim(1)?;
        let sinks = self.config.sinks.min(tokens);
        let rows = scores.narrow(1, sinks, tokens - sinks)?;
        (0..rows.dim(0)?).map(|unit| rows.get(unit)?.to_vec1()).collect()
    }

    /// `1 - cos` or `|cos|` of all pairs, the largest over each unit's heads, which must all agree.
    fn distances(&self, strategy: MergeStrategy, q: &Tensor, k: &Tensor) -> Result<Tensor> {
        let unit_vectors = |x: &Tensor| -> Result<Tensor> {
            let x = x.to_dtype(DType::F32)?;
            let norms = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
            // Not `maximum`, which is generic: candle's kernels for every dtype would be compiled into this crate.
            x.broadcast_div(&norms.broadcast_maximum(&Tensor::new(1e-12f32, x.device())?)?)
        };
        let (pairs, group) = (k.dim(2)? - 1, self.model.heads / self.model.kv_heads);
        let (_, kv_heads, tokens, dim) = k.dims4()?;
        let right = unit_vectors(k)?.unsqueeze(2)?;
        let left = match self.config.criterion.pairs_keys() {
            true => right.clone(),
            false => unit_vectors(&q.contiguous()?)?.reshape((1, kv_heads, group, tokens, dim))?,
        };
        let cosines = left
            .narrow(3, 1, pairs)?
            .broadcast_mul(&right.narrow(3, 0, pairs)?)?
            .sum(D::Minus1)?;
        let distances = match strategy {
            MergeStrategy::Similarity => cosines.affine(-1.0, 1.0)?,
            // Off is never measured.
            MergeStrategy::Difference | MergeStrategy::Off => cosines.abs()?,
        };
        if self.heads_per_unit == group {
            return distances.max(2);
        }
        let all = distances.broadcast_as((1, kv_heads, group, pairs))?;
        all.contiguous()?.reshape((1, kv_heads * group, pairs))
    }

    /// One strategy for all heads, and a threshold per unit.
    fn heads(
        &self,
        strategy: MergeStrategy,
        thresholds: impl Iterator<Item = f64>,
        like: &Tensor,
    ) -> Result<HeadStrategies> {
        let repeat = |threshold| std::iter::repeat_n(threshold, self.heads_per_unit);
        let thresholds: Vec<f64> = thresholds.flat_map(repeat).collect();
        HeadStrategies::uniform(strategy).with_thresholds(&Tensor::new(thresholds, like.device())?)
    }
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

/// The squared error of a layer's output that each unit's heads cause alone.
struct OutputError<'a> {
    settings: &'a PassSettings,
    /// WᵀW of each unit's columns of the projection.
    grams: Option<Vec<Tensor>>,
}

impl<'a> OutputError<'a> {
    fn new(settings: &'a PassSettings, projection: Option<&Tensor>) -> Result<Self> {
        let Some(projection) = projection else {
            return Ok(Self { settings, grams: None });
        };
        let (columns, width) = (
            settings.model.heads * settings.model.head_dim,
            settings.heads_per_unit * settings.model.head_dim,
        );
        if projection.rank() != 2 || projection.dim(1)? != columns {
            bail!(
                "projection: expected shape (hidden, {columns}), one column per head and dimension, got {:?}; give the \
                 output projection's weight",
                projection.dims()
            )
        }
        let projection = projection.to_dtype(DType::F32)?;
        let gram = |unit: usize| -> Result<Tensor> {
            let part = projection.narrow(1, unit * width, width)?.contiguous()?;
            part.t()?.matmul(&part)
        };
        let grams = (0..settings.units()).map(gram).collect::<Result<_>>()?;
        Ok(Self {
            settings,
            grams: Some(grams),
        })
    }

    /// The squared error per unit of a difference of outputs (1, H, N, D).
    fn per_unit(&self, difference: &Tensor) -> Result<Vec<f64>> {
        let (heads, width) = (
            self.settings.heads_per_unit,
            self.settings.heads_per_unit * self.settings.model.head_dim,
        );
        let one = |unit: usize| -> Result<f64> {
            let part = difference.to_dtype(DType::F32)?.narrow(1, unit * heads, heads)?;
            let rows = part.squeeze(0)?.transpose(0, 1)?.contiguous()?;
            let rows = rows.reshape(((), width))?;
            let squares = match &self.grams {
                Some(grams) => (rows.matmul(&grams[unit])? * &rows)?,
                None => rows.sqr()?,
            };
            squares.sum_all()?.to_dtype(DType::F64)?.to_scalar()
        };
        (0..self.settings.units()).map(one).collect()
    }
}
