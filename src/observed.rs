//! Observed mass on the tensors of one call: the scores behind [`Criterion::ObservedMass`](crate::Criterion), and the
//! decisions made of them.

#[cfg(doc)]
use crate::config::Criterion;
use crate::config::{AttentionOptions, CompressionConfig, HeadStrategies};
use crate::cpu::observe::{threshold, Local, ObserveInput};
use crate::cpu::{Accumulator, Element, Rows};
use crate::plan::{cpu_slice, not_on_cpu};
use crate::problem::{Problem, RowLayout};
use candle_core::{bail, DType, Device, Result, Tensor};

/// The scores that [`Criterion::ObservedMass`] compares with a KV head's threshold: f32 (f64 for f64 inputs) of shape
/// (B, Hk, N - 1 - window), or no tokens where N is at most `window`. Entry t is the attention that token t was given by
/// the rows of the second half of its window, summed over the group's query heads, times the norm of its value. Later
/// tokens are not decided yet; the first `sinks` have a score that nothing reads. Thresholds are quantiles of these.
///
/// Query (B, H, N, D), key and value (B, Hk, N, D), or with their axes in the order of [`AttentionOptions::layout`]:
/// f64, f32, f16 or bf16, any strides with a contiguous last axis. Of `config`, the window and the sinks are read; of
/// `options`, the layout and the scale. O(N·(window + sinks)·D) per query head. No gradient.
///
/// # Errors
/// Shapes, dtypes or devices that do not fit together or are not supported, another criterion, or settings that it does
/// not know.
pub fn observed_mass(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Tensor> {
    let [q, k, v] = &options.layout.turned_all([q, k, v])?;
    let problem = options.layout.explained(Problem::new(q, k, v))?;
    config.check(options.causal)?;
    options.check()?;
    if !config.criterion.observes() {
        bail!(
            "criterion: expected Criterion::ObservedMass, got {:?}; the others compare neighbours and have no scores",
            config.criterion
        )
    }
    if !q.device().is_cpu() {
        return not_on_cpu(q.device());
    }
    let call = Call {
        problem,
        tensors: [q, k, v],
        local: local(&problem, config, options),
    };
    match problem.dtype {
        DType::F64 => call.scores::<f64>(),
        DType::F16 => call.scores::<half::f16>(),
        DType::BF16 => call.scores::<half::bf16>(),
        _ => call.scores::<f32>(),
    }
}

/// The merge indicators (B, H, N-1), 0 or 1, of checked tensors and settings.
pub(crate) fn indicators(
    problem: Problem,
    tensors: [&Tensor; 3],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Vec<u8>> {
    let call = Call {
        problem,
        tensors,
        local: local(&problem, config, options),
    };
    match problem.dtype {
        DType::F64 => call.indicators::<f64>(strategies, config),
        DType::F16 => call.indicators::<half::f16>(strategies, config),
        DType::BF16 => call.indicators::<half::bf16>(strategies, config),
        _ => call.indicators::<f32>(strategies, config),
    }
}

fn local(problem: &Problem, config: &CompressionConfig, options: &AttentionOptions) -> Local {
    Local {
        window: config.window,
        sinks: config.sinks,
        scale: options.scale(problem.head_dim),
    }
}

struct Call<'a> {
    problem: Problem,
    tensors: [&'a Tensor; 3],
    local: Local,
}

impl Call<'_> {
    fn with_input<T: Element, R>(&self, body: impl FnOnce(&ObserveInput<T>) -> Result<R>) -> Result<R> {
        let [q, k, v] = self.tensors.map(Tensor::storage_and_layout);
        body(&ObserveInput::<T> {
            q: Rows::new(cpu_slice(&q.0)?, RowLayout::new(q.1)),
            k: Rows::new(cpu_slice(&k.0)?, RowLayout::new(k.1)),
            v: Rows::new(cpu_slice(&v.0)?, RowLayout::new(v.1)),
            problem: self.problem,
            local: self.local,
        })
    }

    fn scores<T: Element>(&self) -> Result<Tensor> {
        let Problem { batch, kv_heads, .. } = self.problem;
        self.with_input::<T, _>(|input| {
            let shape = (batch, kv_heads, input.decided());
            Tensor::from_vec(input.scores(|_, _| true), shape, &Device::Cpu)
        })
    }

    fn indicators<T: Element>(&self, strategies: &HeadStrategies, config: &CompressionConfig) -> Result<Vec<u8>> {
        let Problem { batch, kv_heads, .. } = self.problem;
        let (group, pairs) = (self.problem.group(), self.problem.pairs());
        let mut bits = vec![0; batch * self.problem.heads * pairs];
        let least = |batch: usize, kv_head: usize| {
            let heads = kv_head * group..(kv_head + 1) * group;
            threshold(heads.map(|head| strategies.test(config, batch, head)))
        };
        self.with_input::<T, _>(|input| {
            let (decided, scores) = (input.decided(), input.scores(|b, kv_head| least(b, kv_head).is_some()));
            if decided == 0 {
                return Ok(());
            }
            for (index, (scores, bits)) in scores.chunks(decided).zip(bits.chunks_mut(group * pairs)).enumerate() {
                let Some(least) = least(index / kv_heads, index % kv_heads) else {
                    continue;
                };
                let least = T::Acc::of(least);
                for bits in bits.chunks_mut(pairs) {
                    for (token, (bit, score)) in bits.iter_mut().zip(scores).enumerate() {
                        *bit = u8::from(token >= self.local.sinks && *score < least);
                    }
                }
            }
            Ok(())
        })?;
        Ok(bits)
    }
}
