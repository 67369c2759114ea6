//! Observed mass on the tensors of one call: the scores behind [`Criterion::ObservedMass`](crate::Criterion), and the
//! decisions by these scores.

mod given;

use crate::config::{AttentionOptions, CompressionConfig, Criterion, HeadStrategies, Segment};
use crate::cpu::decide::cosine;
use crate::cpu::decide::cosine::DecideInput;
use crate::cpu::decide::observe::{Local, ObserveInput};
use crate::cpu::decide::score::ScoreTest;
use crate::cpu::number::bias::Apart;
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::rows::RowGrid;
use crate::plan::{without_scores, MergePlan};
use crate::problem::{Problem, RowLayout};
use crate::storage::{bias_view, cpu_slice, not_on_cpu, on_cpu, QueryKeyVisitor};
use candle_core::{bail, DType, Device, Result, Tensor};

impl MergePlan {
    /// Decides from query (B, H, N, D), key and value (B, Hk, N, D), or with their axes in the order of
    /// [`AttentionOptions::layout`]: f64, f32, f16 or bf16, any strides with a contiguous last axis. Cosines and masses
    /// are computed in f32 (f64 for f64). O(N·D) per head; under [`Criterion::ObservedMass`] O(N·(window + sinks)·D).
    ///
    /// Under [`MergeRule::Causal`](crate::MergeRule) two neighbours merge only where the later token's row sees both.
    /// So a bias of -inf keeps padding apart from text, and packed documents from each other. Each of
    /// [`AttentionOptions::segments`] decides alone: pairs across two of them do not merge, and `sinks`, `window` and
    /// the runs count inside a segment.
    ///
    /// With fewer queries than keys, (B, H, Nq, D), query j is row N - Nq + j. Then [`Criterion::KeyKey`] decides, or
    /// every head is off, or the caller does by [`Self::from_indicators`].
    ///
    /// # Errors
    /// Shapes, dtypes, devices or settings that do not fit together; each message says what was expected, what was
    /// given and what to do.
    pub fn new(
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        strategies: &HeadStrategies,
        config: &CompressionConfig,
        options: &AttentionOptions,
    ) -> Result<Self> {
        let [q, k, v] = &options.layout.turned_all([q, k, v])?;
        let problem = options.layout.explained(Problem::of_rows([q, k, v], options.causal))?;
        problem.check_settings(strategies, config, options)?;
        let (fewer, segments) = (problem.queries != problem.tokens, problem.segments(options)?);
        if strategies.all_off() && (fewer || config.criterion.takes_scores()) {
            let shape = (problem.batch, problem.heads, problem.pairs());
            let none = Tensor::zeros(shape, DType::U8, q.device())?;
            return Ok(Self::decided(none, config, true));
        }
        if fewer {
            check_fewer_queries(&problem, config, options)?;
        }
        let indicators = match segments {
            None => decide(&problem, [q, k, v], strategies, config, options)?,
            Some(segments) => decide_alone(&problem, [q, k, v], strategies, config, (options, &segments))?,
        };
        Ok(Self::decided(indicators, config, strategies.all_off()))
    }
}

/// Refuses decisions that a part of the queries cannot make.
fn check_fewer_queries(problem: &Problem, config: &CompressionConfig, options: &AttentionOptions) -> Result<()> {
    let Problem { queries, tokens, .. } = problem;
    if !options.causal {
        bail!(
            "strategies: expected MergeStrategy::Off for every head where {queries} queries see all {tokens} keys, got \
             a head that merges; use HeadStrategies::uniform(MergeStrategy::Off)"
        )
    }
    if config.criterion.reads_queries() {
        bail!(
            "criterion: expected KeyKey with {queries} queries and {tokens} keys, got {:?}, which reads the query of \
             every token; use KeyKey, or MergePlan::from_indicators with your own bits",
            config.criterion
        )
    }
    Ok(())
}

/// The indicators (B, H, N-1) of segments that decide alone; 0 between two segments and in padding.
fn decide_alone(
    problem: &Problem,
    qkv: [&Tensor; 3],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    (options, segments): (&AttentionOptions, &[Segment]),
) -> Result<Tensor> {
    let sizes = [problem.heads, problem.pairs(), 1];
    let mut bits = vec![0u8; problem.batch * problem.heads * problem.pairs()];
    let bias = problem.bias(options)?;
    for segment in segments.iter().filter(|segment| segment.tokens.len() > 1) {
        let [q, k, v] = qkv.map(|x| {
            let row = x.narrow(0, segment.batch, 1)?;
            row.narrow(2, segment.tokens.start, segment.tokens.len())
        });
        let strategies = strategies.of_row(segment.batch);
        let options = options.alone(segment, bias.as_ref())?;
        let alone = decide(&problem.alone(segment), [&q?, &k?, &v?], &strategies, config, &options)?;
        let alone = alone.flatten_all()?.to_vec1::<u8>()?;
        segment.pairs().paste(&alone, &mut bits, sizes);
    }
    Tensor::from_vec(bits, (problem.batch, problem.heads, problem.pairs()), qkv[0].device())
}

/// The indicators (B, H, N-1) on the tensors' device.
fn decide(
    problem: &Problem,
    [q, k, v]: [&Tensor; 3],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        return crate::cuda::tensors::decide(problem, [q, k, v], strategies, config, options);
    }
    if !q.device().is_cpu() {
        return not_on_cpu(q.device());
    }
    let problem = *problem;
    let bits = match config.criterion {
        Criterion::ObservedMass => observed_indicators(problem, [q, k, v], strategies, config, options)?,
        Criterion::Given => return without_scores(),
        Criterion::QueryKey | Criterion::KeyKey => on_cpu(
            q,
            k,
            Decide {
                problem,
                strategies,
                config,
                bias: problem.bias(options)?.as_ref(),
            },
        )?,
    };
    Tensor::from_vec(bits, (problem.batch, problem.heads, problem.pairs()), q.device())
}

struct Decide<'a> {
    problem: Problem,
    strategies: &'a HeadStrategies,
    config: &'a CompressionConfig,
    bias: Option<&'a Tensor>,
}

impl QueryKeyVisitor for Decide<'_> {
    type Output = Vec<u8>;

    fn visit<T: Element>(self, q: RowGrid<T>, k: RowGrid<T>) -> Result<Vec<u8>> {
        let stored = self.bias.map(Tensor::storage_and_layout);
        let bias = match &stored {
            Some((storage, layout)) => Some(bias_view::<T::Acc>(storage, layout)?),
            None => None,
        };
        Ok(cosine::indicators(&DecideInput {
            q,
            k,
            apart: bias.map(|bias| Apart::new(bias, self.problem.first_row(true))),
            problem: self.problem,
            strategies: self.strategies,
            config: self.config,
        }))
    }
}

/// The scores that [`Criterion::ObservedMass`] compares with a KV head's threshold: f32 (f64 for f64 inputs) of shape
/// (B, Hk, N - 1 - window), or no tokens where N is at most `window`. Entry t is the attention to token t of the rows
/// in the second half of its window, summed over the group's query heads, times the norm of its value. Later tokens are
/// not decided yet. The scores of the first `sinks` tokens are never read. Thresholds are quantiles of these scores.
///
/// Query (B, H, N, D), key and value (B, Hk, N, D), or with their axes in the order of [`AttentionOptions::layout`]:
/// f64, f32, f16 or bf16, any strides with a contiguous last axis. Reads the window and the sinks of `config`, the
/// layout and the scale of `options`. O(N·(window + sinks)·D) per query head. No gradient.
///
/// # Errors
/// Shapes, dtypes or devices that do not fit together or are not supported, another criterion, or settings that it does
/// not support.
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
    if options.segments.is_some() {
        bail!(
            "segments: expected None for observed_mass, got some; give each segment its own call, its scores are apart"
        )
    }
    if !config.criterion.observes() {
        bail!(
            "criterion: expected Criterion::ObservedMass, got {:?}; the others compare neighbours and have no scores",
            config.criterion
        )
    }
    if !q.device().is_cpu() {
        return not_on_cpu(q.device());
    }
    let call = Observe {
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
fn observed_indicators(
    problem: Problem,
    tensors: [&Tensor; 3],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Vec<u8>> {
    let call = Observe {
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

struct Observe<'a> {
    problem: Problem,
    tensors: [&'a Tensor; 3],
    local: Local,
}

impl Observe<'_> {
    fn with_input<T: Element, R>(&self, body: impl FnOnce(&ObserveInput<T>) -> Result<R>) -> Result<R> {
        let [q, k, v] = self.tensors.map(Tensor::storage_and_layout);
        body(&ObserveInput::<T> {
            q: RowGrid::new(cpu_slice(&q.0)?, RowLayout::new(q.1)),
            k: RowGrid::new(cpu_slice(&k.0)?, RowLayout::new(k.1)),
            v: RowGrid::new(cpu_slice(&v.0)?, RowLayout::new(v.1)),
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
        let Problem {
            batch, heads, kv_heads, ..
        } = self.problem;
        let rule = ScoreRule {
            sizes: [batch, heads, kv_heads],
            pairs: self.problem.pairs(),
            strategies,
            config,
        };
        self.with_input::<T, _>(|input| {
            let scores = input.scores(|batch, kv_head| rule.test::<T::Acc>(batch, kv_head).is_some());
            Ok(rule.indicators(&scores, input.decided()))
        })
    }
}

/// Decisions by scores below the threshold of a KV head.
struct ScoreRule<'a> {
    /// B, H, Hk.
    sizes: [usize; 3],
    pairs: usize,
    strategies: &'a HeadStrategies,
    config: &'a CompressionConfig,
}

impl ScoreRule<'_> {
    fn test<A: Accumulator>(&self, batch: usize, kv_head: usize) -> Option<ScoreTest<A>> {
        let [_, heads, kv_heads] = self.sizes;
        let group = heads / kv_heads;
        let heads = kv_head * group..(kv_head + 1) * group;
        let tests = heads.map(|head| self.strategies.test(self.config, batch, head));
        ScoreTest::of(tests, self.config.sinks)
    }

    /// The indicators (B, H, N-1) of scores (B, Hk, `row`): the tokens that the last row has left behind are read.
    fn indicators<A: Accumulator>(&self, scores: &[A], row: usize) -> Vec<u8> {
        let ([batch, heads, kv_heads], pairs) = (self.sizes, self.pairs);
        let (group, mut bits) = (heads / kv_heads, vec![0; batch * heads * pairs]);
        let decided = row.min(pairs.saturating_sub(self.config.window));
        if decided == 0 {
            return bits;
        }
        for (index, (scores, bits)) in scores.chunks(row).zip(bits.chunks_mut(group * pairs)).enumerate() {
            let Some(test) = self.test(index / kv_heads, index % kv_heads) else {
                continue;
            };
            for bits in bits.chunks_mut(pairs) {
                for (token, (bit, score)) in bits.iter_mut().zip(&scores[..decided]).enumerate() {
                    *bit = u8::from(test.hides(token, *score));
                }
            }
        }
        bits
    }
}
