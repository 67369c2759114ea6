//! The settings of both passes of a calibration, and the scores of one window.

use super::shape::ModelShape;
use crate::config::{AttentionOptions, CompressionConfig, Criterion, HeadStrategies, MergeStrategy, TensorLayout};
use crate::decide::observed_mass;
use crate::plan::without_scores;
use crate::problem::Problem;
use candle_core::{bail, DType, Device, Result, Tensor, D};

/// The settings of both passes. A unit decides as one: a KV head under [`GroupRule::Unanimous`], else a query head.
#[derive(Clone, Debug)]
pub(super) struct PassSettings {
    pub model: ModelShape,
    pub config: CompressionConfig,
    /// The options with heads first, for any layout of the caller.
    pub options: AttentionOptions,
    pub layout: TensorLayout,
    pub strategies: Vec<MergeStrategy>,
    /// Query heads in a unit.
    pub heads_per_unit: usize,
}

impl PassSettings {
    pub fn units(&self) -> usize {
        self.model.heads / self.heads_per_unit
    }

    /// Query, key and value with their heads first.
    pub fn checked(&self, layer: usize, qkv: [&Tensor; 3]) -> Result<[Tensor; 3]> {
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
    pub fn check_given(&self, k: &Tensor, given: Option<&Tensor>) -> Result<()> {
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
    pub fn scores(
        &self,
        strategy: MergeStrategy,
        [q, k, v]: [&Tensor; 3],
        given: Option<&Tensor>,
    ) -> Result<Vec<Vec<f32>>> {
        let scores = match self.config.criterion {
            Criterion::ObservedMass => {
                // The masses themselves are computed on the CPU only; a device computes the decisions.
                let [q, k, v] = [q, k, v].map(|x| x.to_device(&Device::Cpu));
                observed_mass(&q?, &k?, &v?, &self.config, &self.options)?
            }
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
    pub fn distances(&self, strategy: MergeStrategy, q: &Tensor, k: &Tensor) -> Result<Tensor> {
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
    pub fn heads(
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
