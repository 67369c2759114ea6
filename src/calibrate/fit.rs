//! [`ProbeFitter`]: a probe by ridge regression of the logarithm of the harm on keys.

use super::harm::HarmInput;
use super::histogram::Histogram;
use super::probe::{KeyProbe, LayerProbe};
use super::shape::ModelShape;
use crate::config::AttentionOptions;
use crate::problem::Problem;
use candle_core::{bail, DType, Result, Tensor};
use nalgebra::{DMatrix, DVector};

/// The share of a head's harms below the number that is added to each harm before its logarithm is taken.
const FLOOR: f64 = 0.1;
/// The ridge per sample: the factor on the squared weights of standardised keys.
const RIDGE: f64 = 1e-3;

/// One window of one layer, as it reaches the attention.
#[derive(Clone, Copy, Debug)]
pub struct ProbeSample<'a> {
    /// The layer, from 0.
    pub layer: usize,
    /// (1, H, N, D), rotated.
    pub q: &'a Tensor,
    /// (1, Hk, N, D), rotated.
    pub k: &'a Tensor,
    /// (1, Hk, N, D).
    pub v: &'a Tensor,
    /// (1, Hk, N, D): the keys that the probe will read, before rotary embedding.
    pub probed: &'a Tensor,
    /// The output projection's weight, (hidden, H·D).
    pub projection: &'a Tensor,
    /// The stream at the layer's input, (1, N, hidden).
    pub stream: &'a Tensor,
}

/// Fits a [`KeyProbe`] without training the model: ridge regression, in f64, of the logarithm of each token's *harm* on
/// its key. The harm of hiding token t for a KV head is the sum over its query heads and over the rows i beyond t's
/// window of `((a / max(1 - a, 1e-3)) / ‖x‖)² · ‖W (o - v)‖²`: a is row i's weight on t, o its output, W the head's
/// part of the output projection and x the stream at row i. It is the squared error of the layer's output, relative to
/// the stream, when only t is hidden.
///
/// Samples are given twice, in any order: to [`Self::observe`], then to [`ProbeRegression::add`]. Memory does not grow
/// with the samples; a call takes O(N·D) memory and O(N²·D) time on the tensors' device. Source: this crate.
#[derive(Clone, Debug)]
pub struct ProbeFitter {
    model: ModelShape,
    options: AttentionOptions,
    sinks: usize,
    window: usize,
    /// Harms by layer, then by KV head.
    harms: Vec<Vec<Histogram>>,
}

/// The second pass of a [`ProbeFitter`].
#[derive(Clone, Debug)]
pub struct ProbeRegression {
    fitter: ProbeFitter,
    /// By layer, then by KV head.
    moments: Vec<Vec<Moments>>,
}

/// The sums of a regression of y on x, with floor f: y = ln(harm + f).
#[derive(Clone, Debug)]
struct Moments {
    floor: f64,
    count: f64,
    /// Σ y and Σ y².
    y: [f64; 2],
    /// Σ x, Σ x·y, (D).
    x: DVector<f64>,
    xy: DVector<f64>,
    /// Σ x·xᵀ, (D, D).
    xx: DMatrix<f64>,
}

impl ProbeFitter {
    /// Starts the first pass, for a model of shape `model` whose tokens are left out once `window` rows have seen them,
    /// but for the first `sinks`. `options` are those of its attention: scale and softcap.
    ///
    /// # Errors
    /// A model shape or options that have no meaning, attention that is not causal, options that change what a row
    /// sees.
    pub fn new(model: ModelShape, window: usize, sinks: usize, options: AttentionOptions) -> Result<Self> {
        model.check()?;
        options.check()?;
        let AttentionOptions {
            causal,
            bias,
            sliding_window,
            segments,
            sink_logits,
            ..
        } = &options;
        if !causal || bias.is_some() || sliding_window.is_some() || segments.is_some() || sink_logits.is_some() {
            bail!(
                "options: expected causal attention over all tokens for a probe, got a bias, a sliding window, \
                 segments, sink logits or attention that is not causal; give scale, softcap and layout only"
            )
        }
        Ok(Self {
            options,
            sinks,
            window,
            harms: vec![vec![Histogram::new(); model.kv_heads]; model.layers],
            model,
        })
    }

    /// Counts the harms of one window in one layer.
    ///
    /// # Errors
    /// Tensors of another shape than the model's, or an error of the device.
    pub fn observe(&mut self, sample: &ProbeSample) -> Result<()> {
        let harms = self.harms_of(sample)?;
        for (histogram, harms) in self.harms[sample.layer].iter_mut().zip(&harms) {
            histogram.extend(harms);
        }
        Ok(())
    }

    /// Ends the first pass.
    ///
    /// # Errors
    /// A layer without a token that could be hidden.
    pub fn regress(self) -> Result<ProbeRegression> {
        let dim = self.model.head_dim;
        let mut moments = Vec::with_capacity(self.harms.len());
        for (layer, harms) in self.harms.iter().enumerate() {
            let one = |histogram: &Histogram| match histogram.quantile(FLOOR) {
                Some(floor) => Ok(Moments::new(floor, dim)),
                None => bail!(
                    "probe: expected samples of layer {layer}, got none; observe windows of more tokens than window \
                     and sinks"
                ),
            };
            moments.push(harms.iter().map(one).collect::<Result<Vec<_>>>()?);
        }
        Ok(ProbeRegression { fitter: self, moments })
    }

    /// The harms, by KV head, of the tokens that can be hidden.
    fn harms_of(&self, sample: &ProbeSample) -> Result<Vec<Vec<f32>>> {
        let ModelShape {
            layers,
            heads,
            kv_heads,
            head_dim,
        } = self.model;
        let [q, k, v, probed] = [sample.q, sample.k, sample.v, sample.probed].map(|x| self.options.layout.turned(x));
        let (q, k, v, probed) = (q?, k?, v?, probed?);
        let problem = Problem::new(&q, &k, &v)?;
        let got = [
            problem.batch,
            problem.heads,
            problem.kv_heads,
            problem.head_dim,
            problem.value_dim,
        ];
        if sample.layer >= layers || got != [1, heads, kv_heads, head_dim, head_dim] || probed.dims() != k.dims() {
            bail!(
                "probe: expected query (1, {heads}, N, {head_dim}), key, value and probed key (1, {kv_heads}, N, \
                 {head_dim}) of a layer below {layers}, got {:?}, {:?}, {:?} and {:?} of layer {}; give one window of \
                 one layer at a time",
                q.dims(),
                k.dims(),
                v.dims(),
                probed.dims(),
                sample.layer
            )
        }
        let input = HarmInput {
            q: &q,
            k: &k,
            v: &v,
            projection: sample.projection,
            stream: sample.stream,
        };
        let harms = input.harm(&self.model, self.window, &self.options)?;
        let decided = harms.dim(1)?;
        let sinks = self.sinks.min(decided);
        harms.narrow(1, sinks, decided - sinks)?.to_vec2()
    }
}

impl ProbeRegression {
    /// Adds the tokens of one window in one layer.
    ///
    /// # Errors
    /// As [`ProbeFitter::observe`], or harms or keys that are not finite.
    pub fn add(&mut self, sample: &ProbeSample) -> Result<()> {
        let harms = self.fitter.harms_of(sample)?;
        let count = harms[0].len();
        if count == 0 {
            return Ok(());
        }
        let keys = self.fitter.options.layout.turned(sample.probed)?;
        let keys = keys
            .squeeze(0)?
            .narrow(1, self.fitter.sinks, count)?
            .to_dtype(DType::F64)?;
        for (kv_head, (moments, harms)) in self.moments[sample.layer].iter_mut().zip(harms).enumerate() {
            moments.add(&keys.get(kv_head)?.contiguous()?, &harms)?;
        }
        Ok(())
    }

    /// The probe, and how much of the variance of ln(harm) it explains, by layer and KV head.
    ///
    /// # Errors
    /// A layer without samples, or samples that are not finite.
    pub fn probe(&self) -> Result<(KeyProbe, Vec<Vec<f64>>)> {
        let (mut layers, mut explained) = (Vec::new(), Vec::new());
        for (index, moments) in self.moments.iter().enumerate() {
            let fits = moments
                .iter()
                .map(|moments| moments.fit(index))
                .collect::<Result<Vec<_>>>()?;
            layers.push(LayerProbe {
                weights: fits.iter().map(|fit| fit.weights.clone()).collect(),
                offsets: fits.iter().map(|fit| fit.offset).collect(),
            });
            explained.push(fits.iter().map(|fit| fit.explained).collect());
        }
        Ok((KeyProbe::try_from(layers)?, explained))
    }
}

/// One KV head's form, and the share of the variance that it explains.
struct Fit {
    weights: Vec<f32>,
    offset: f32,
    explained: f64,
}

impl Moments {
    fn new(floor: f64, dim: usize) -> Self {
        Self {
            floor,
            count: 0.0,
            y: [0.0; 2],
            x: DVector::zeros(dim),
            xy: DVector::zeros(dim),
            xx: DMatrix::zeros(dim, dim),
        }
    }

    /// Adds keys (tokens, D), f64, and their harms.
    fn add(&mut self, keys: &Tensor, harms: &[f32]) -> Result<()> {
        let (tokens, dim) = keys.dims2()?;
        let y: Vec<f64> = harms.iter().map(|harm| (f64::from(*harm) + self.floor).ln()).collect();
        self.count += tokens as f64;
        self.y[0] += y.iter().sum::<f64>();
        self.y[1] += y.iter().map(|y| y * y).sum::<f64>();
        let column = Tensor::from_vec(y, (tokens, 1), keys.device())?;
        let turned = keys.t()?.contiguous()?;
        self.x += DVector::from_vec(keys.sum(0)?.to_vec1()?);
        self.xy += DVector::from_vec(turned.matmul(&column)?.flatten_all()?.to_vec1()?);
        self.xx += DMatrix::from_vec(dim, dim, turned.matmul(keys)?.flatten_all()?.to_vec1()?);
        Ok(())
    }

    fn fit(&self, layer: usize) -> Result<Fit> {
        if self.count == 0.0 {
            bail!("probe: expected samples of layer {layer}, got none; add the windows that were observed")
        }
        let n = self.count;
        let (x, y) = (&self.x / n, self.y[0] / n);
        let covariance = &self.xx / n - &x * x.transpose();
        let with_y = &self.xy / n - &x * y;
        // A number that never changes has no weight.
        let deviations = covariance.diagonal().map(|variance| variance.max(1e-20).sqrt());
        let mut standard = covariance.clone();
        for (row, column) in (0..x.len()).flat_map(|row| (0..x.len()).map(move |column| (row, column))) {
            standard[(row, column)] /= deviations[row] * deviations[column];
        }
        for index in 0..x.len() {
            standard[(index, index)] += RIDGE;
        }
        let Some(cholesky) = standard.cholesky() else {
            bail!("probe: expected finite keys and harms in layer {layer}, got others; check the samples for NaN")
        };
        let weights = cholesky
            .solve(&with_y.component_div(&deviations))
            .component_div(&deviations);
        let variance = self.y[1] / n - y * y;
        // Var(y - w·x) = Var(y) - 2 w·cov(x, y) + w·cov(x)·w.
        let left = variance - 2.0 * weights.dot(&with_y) + weights.dot(&(&covariance * &weights));
        Ok(Fit {
            offset: (y - weights.dot(&x)) as f32,
            weights: weights.iter().map(|weight| *weight as f32).collect(),
            explained: 1.0 - left / variance.max(1e-300),
        })
    }
}
