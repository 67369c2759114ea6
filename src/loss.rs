//! The compression loss: its value, the sums that it is made of, and its gradient.

mod ranks;

#[cfg(doc)]
use crate::config::Criterion;
use crate::config::{AttentionOptions, CompressionConfig, HeadStrategies, LossNormalizer, Segment};
use crate::cpu::decide::cosine::DecideInput;
use crate::cpu::decide::loss::{loss_gradients, loss_sums, LossSums};
use crate::cpu::number::element::Element;
use crate::cpu::number::rows::RowGrid;
#[cfg(feature = "cuda")]
use crate::cuda::tensors::LossCall;
use crate::problem::Problem;
use crate::storage::{not_on_cpu, on_cpu, visit_storages, QueryKeyVisitor};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{bail, CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

/// The sums S, M and P that the loss is made of, over the query heads that are not off. Where a model's heads or batch
/// rows are split over ranks, add the ranks' [`Self::sums`] and take [`Self::over_ranks`] before [`Self::loss`].
#[derive(Clone, Debug)]
pub struct CompressionLossTerms {
    /// S: the sum of `(1 - cos)²` over the pairs of similarity heads and of `cos²` over the pairs of difference heads.
    /// A scalar, f32 (f64 for f64 inputs), differentiable.
    pub squared: Tensor,
    /// M: the number of pairs that qualify, before any run rule and without regard to sinks. A scalar of the same
    /// dtype, without gradient.
    pub merged: Tensor,
    /// P: the number of pairs.
    pub pairs: usize,
}

impl CompressionLossTerms {
    /// `factor * (S / Z - M / P)`, where Z is M (or P where M is 0) or P, by `normalizer`; 0 where P is 0.
    ///
    /// # Errors
    /// An error of candle's scalar arithmetic.
    pub fn loss(&self, factor: f64, normalizer: LossNormalizer) -> Result<Tensor> {
        if self.pairs == 0 {
            return self.squared.zeros_like();
        }
        let pairs = self.pairs as f64;
        let merged_share = (&self.merged / pairs)?;
        let squared = match normalizer {
            LossNormalizer::Pairs => (&self.squared / pairs)?,
            LossNormalizer::Merged => {
                let some = self.merged.gt(0.0)?;
                let all = (self.merged.ones_like()? * pairs)?;
                (&self.squared / some.where_cond(&self.merged, &all)?)?
            }
        };
        (squared - merged_share)? * factor
    }
}

/// The compression loss of query (B, H, N, D) and key (B, Hk, N, D): a scalar, f32 (f64 for f64 inputs), with gradients
/// for both. The axes have this order under any [`AttentionOptions::layout`]: give it `transpose(1, 2)` of tensors with
/// tokens first. `None` where N = 1, and under [`Criterion::ObservedMass`], which judges no pairs; 0 where every head
/// is off. Source: the paper (whose published code computes the loss without a gradient).
///
/// # Errors
/// As [`compression_loss_terms`].
pub fn compression_loss(
    q: &Tensor,
    k: &Tensor,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
) -> Result<Option<Tensor>> {
    match compression_loss_terms(q, k, strategies, config)? {
        Some(terms) => Ok(Some(terms.loss(config.loss_factor, config.loss_normalizer)?)),
        None => Ok(None),
    }
}

/// [`compression_loss`] of segments (see [`AttentionOptions::segments`]), u32 (B, N): pairs across two segments, and
/// padding, are no pairs. 0 where no segment has a pair.
///
/// # Errors
/// As [`compression_loss_terms_in_segments`].
pub fn compression_loss_in_segments(
    q: &Tensor,
    k: &Tensor,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    segments: &Tensor,
) -> Result<Option<Tensor>> {
    match compression_loss_terms_in_segments(q, k, strategies, config, segments)? {
        Some(terms) => Ok(Some(terms.loss(config.loss_factor, config.loss_normalizer)?)),
        None => Ok(None),
    }
}

/// The terms of [`compression_loss_in_segments`].
///
/// # Errors
/// As [`compression_loss_terms`]; segments of another dtype or shape, or a number that comes back after another one.
pub fn compression_loss_terms_in_segments(
    q: &Tensor,
    k: &Tensor,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    segments: &Tensor,
) -> Result<Option<CompressionLossTerms>> {
    let options = AttentionOptions {
        segments: Some(segments.clone()),
        ..Default::default()
    };
    let segments = Problem::of_pair(q, k)?.segments(&options)?;
    terms_of(q, k, strategies, config, segments)
}

/// The terms of [`compression_loss`] of query (B, H, N, D) and key (B, Hk, N, D), to be reduced over ranks first.
/// `None` where N = 1 and under [`Criterion::ObservedMass`]. Only the criterion and the thresholds of `config` are
/// read.
///
/// # Errors
/// Shapes, dtypes, devices or settings that do not fit together or are not supported.
pub fn compression_loss_terms(
    q: &Tensor,
    k: &Tensor,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
) -> Result<Option<CompressionLossTerms>> {
    terms_of(q, k, strategies, config, None)
}

fn terms_of(
    q: &Tensor,
    k: &Tensor,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    segments: Option<Vec<Segment>>,
) -> Result<Option<CompressionLossTerms>> {
    let problem = Problem::of_pair(q, k)?;
    config.check(true)?;
    config.check_strategies(strategies)?;
    strategies.check(problem.batch, problem.heads)?;
    if !(q.device().is_cpu() || cfg!(feature = "cuda") && q.device().is_cuda()) {
        return not_on_cpu(q.device());
    }
    if problem.tokens == 1 || !config.criterion.compares_pairs() {
        return Ok(None);
    }
    let active = |batch: usize| {
        let on = |head: &usize| !strategies.test(config, batch, *head).strategy.is_off();
        (0..problem.heads).filter(on).count()
    };
    let pairs = match &segments {
        None => (0..problem.batch).map(active).sum::<usize>() * problem.pairs(),
        Some(segments) => {
            let pairs = segments
                .iter()
                .map(|segment| active(segment.batch) * segment.pairs().tokens.len());
            pairs.sum()
        }
    };
    let op = LossSumsOp {
        problem,
        strategies: strategies.clone(),
        config: config.clone(),
        segments: None,
    };
    let sums = match segments {
        Some(segments) if !q.device().is_cpu() => sums_of_each(q, k, &op, &segments)?,
        segments => q.apply_op2(k, LossSumsOp { segments, ..op })?,
    };
    Ok(Some(CompressionLossTerms {
        squared: sums.get(0)?,
        merged: sums.get(1)?.detach(),
        pairs,
    }))
}

/// The sums [S, M] of segments whose sums are computed one after the other, on any device. `op` is that of the whole
/// call.
fn sums_of_each(q: &Tensor, k: &Tensor, op: &LossSumsOp, segments: &[Segment]) -> Result<Tensor> {
    let dtype = if op.problem.dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    };
    let mut sums = Tensor::zeros(2, dtype, q.device())?;
    for segment in segments.iter().filter(|segment| segment.tokens.len() > 1) {
        let mine = |x: &Tensor| {
            let row = x.narrow(0, segment.batch, 1)?;
            row.narrow(2, segment.tokens.start, segment.tokens.len())
        };
        let alone = LossSumsOp {
            problem: op.problem.alone(segment),
            strategies: op.strategies.of_row(segment.batch),
            config: op.config.clone(),
            segments: None,
        };
        sums = (sums + mine(q)?.apply_op2(&mine(k)?, alone)?)?;
    }
    Ok(sums)
}

/// query, key -> [S, M]; only S has a gradient.
struct LossSumsOp {
    problem: Problem,
    strategies: HeadStrategies,
    config: CompressionConfig,
    /// None where each batch row is one segment.
    segments: Option<Vec<Segment>>,
}

impl LossSumsOp {
    #[cfg(feature = "cuda")]
    fn cuda_call(&self) -> LossCall<'_> {
        LossCall {
            problem: self.problem,
            strategies: &self.strategies,
            config: &self.config,
        }
    }

    fn input<'a, T: Element>(&'a self, q: RowGrid<'a, T>, k: RowGrid<'a, T>) -> DecideInput<'a, T> {
        DecideInput {
            apart: None,
            q,
            k,
            problem: self.problem,
            strategies: &self.strategies,
            config: &self.config,
        }
    }

    /// The input of one segment alone, with the strategies of its batch row.
    fn alone<'a, T: Element>(
        &'a self,
        q: RowGrid<'a, T>,
        k: RowGrid<'a, T>,
        segment: &Segment,
        strategies: &'a HeadStrategies,
    ) -> DecideInput<'a, T> {
        let (batch, first) = (segment.batch, segment.tokens.start);
        DecideInput {
            q: q.from(batch, first),
            k: k.from(batch, first),
            problem: self.problem.alone(segment),
            strategies,
            ..self.input(q, k)
        }
    }
}

struct Forward<'a>(&'a LossSumsOp);

impl QueryKeyVisitor for Forward<'_> {
    type Output = (CpuStorage, Shape);

    fn visit<T: Element>(self, q: RowGrid<T>, k: RowGrid<T>) -> Result<Self::Output> {
        let sums = match &self.0.segments {
            None => loss_sums(&self.0.input(q, k)),
            Some(segments) => segments.iter().fold(LossSums::default(), |all, segment| {
                let strategies = self.0.strategies.of_row(segment.batch);
                all.plus(&loss_sums(&self.0.alone(q, k, segment, &strategies)))
            }),
        };
        let (squared, merged) = (sums.squared, sums.merged as f64);
        let storage = match self.0.problem.dtype {
            DType::F64 => CpuStorage::F64(vec![squared, merged]),
            _ => CpuStorage::F32(vec![squared as f32, merged as f32]),
        };
        Ok((storage, Shape::from(2)))
    }
}

struct Backward<'a> {
    op: &'a LossSumsOp,
    upstream: f64,
}

impl QueryKeyVisitor for Backward<'_> {
    type Output = (Tensor, Tensor);

    fn visit<T: Element>(self, q: RowGrid<T>, k: RowGrid<T>) -> Result<Self::Output> {
        let Problem {
            batch,
            heads,
            kv_heads,
            tokens,
            head_dim,
            ..
        } = self.op.problem;
        let (dq, dk) = match &self.op.segments {
            None => loss_gradients(&self.op.input(q, k), self.upstream),
            Some(segments) => {
                let zeros = |heads: usize| vec![T::zero(); batch * heads * tokens * head_dim];
                let (mut dq, mut dk) = (zeros(heads), zeros(kv_heads));
                for segment in segments {
                    let strategies = self.op.strategies.of_row(segment.batch);
                    let part = loss_gradients(&self.op.alone(q, k, segment, &strategies), self.upstream);
                    segment.paste(&part.0, &mut dq, [heads, tokens, head_dim]);
                    segment.paste(&part.1, &mut dk, [kv_heads, tokens, head_dim]);
                }
                (dq, dk)
            }
        };
        let cpu = &candle_core::Device::Cpu;
        Ok((
            Tensor::from_vec(dq, (batch, heads, tokens, head_dim), cpu)?,
            Tensor::from_vec(dk, (batch, kv_heads, tokens, head_dim), cpu)?,
        ))
    }
}

impl CustomOp2 for LossSumsOp {
    fn name(&self) -> &'static str {
        "compression-loss"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        visit_storages(q, q_layout, k, k_layout, Forward(self))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((self.cuda_call().sums((q, q_layout), (k, k_layout))?, Shape::from(2)))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        _result: &Tensor,
        grad_result: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if q.device().is_cuda() {
            let [dq, dk] = self.cuda_call().gradients(q, k, grad_result)?;
            return Ok((Some(dq), Some(dk)));
        }
        let [upstream, _] = grad_result.to_dtype(DType::F64)?.to_vec1::<f64>()?[..] else {
            bail!(
                "compression-loss: expected a gradient of 2 elements, got {:?}; pass on one element for each of the \
                 two sums",
                grad_result.dims()
            )
        };
        let (dq, dk) = on_cpu(q, k, Backward { op: self, upstream })?;
        Ok((Some(dq), Some(dk)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::segments_from_lengths;
    use candle_core::{Device, Var};

    /// Segments one after the other have the sums and gradients of the op that takes all of them.
    #[test]
    fn segments_in_turn_have_the_sums_of_all() -> Result<()> {
        let numbers = |seed: usize, heads: usize| {
            let all = (0..2 * heads * 30 * 4).map(move |i| ((i * seed) % 101) as f64 / 50.0 - 1.0);
            Tensor::from_iter(all, &Device::Cpu)?.reshape((2, heads, 30, 4))
        };
        let (q, k) = (Var::from_tensor(&numbers(37, 4)?)?, Var::from_tensor(&numbers(53, 2)?)?);
        let rows = [segments_from_lengths(&[9, 1, 20], 30, &Device::Cpu)?, {
            segments_from_lengths(&[3, 20], 30, &Device::Cpu)?
        }];
        let options = AttentionOptions {
            segments: Some(Tensor::cat(&rows, 0)?),
            ..Default::default()
        };
        let problem = Problem::of_pair(&q, &k)?;
        let segments = problem.segments(&options)?;
        let op = |segments: Option<Vec<Segment>>| LossSumsOp {
            problem,
            strategies: HeadStrategies::uniform(crate::MergeStrategy::Similarity),
            config: CompressionConfig {
                similarity_threshold: 0.7,
                ..Default::default()
            },
            segments,
        };
        let whole = q.apply_op2(&k, op(segments.clone()))?;
        let each = sums_of_each(&q, &k, &op(None), &segments.unwrap_or_default())?;
        let (expected, got) = (whole.to_vec1::<f64>()?, each.to_vec1::<f64>()?);
        assert!(expected[0] > 0.0 && expected[1] > 0.0, "{expected:?}");
        for (got, expected) in got.iter().zip(&expected) {
            assert!((got - expected).abs() <= 1e-12 * expected, "{got} for {expected}");
        }
        let (expected, got) = (whole.get(0)?.backward()?, each.get(0)?.backward()?);
        for var in [&q, &k] {
            let of = |store: &candle_core::backprop::GradStore| -> Result<Vec<f64>> {
                store.get(var).map_or(Ok(Vec::new()), |x| x.flatten_all()?.to_vec1())
            };
            let (got, expected) = (of(&got)?, of(&expected)?);
            assert_eq!(got.len(), var.elem_count());
            for (got, expected) in got.iter().zip(&expected) {
                assert!((got - expected).abs() <= 1e-12, "{got} for {expected}");
            }
        }
        Ok(())
    }
}
