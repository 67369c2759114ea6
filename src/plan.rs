//! [`MergePlan`]: which tokens of which heads are hidden, and what that saves.

use crate::config::{AttentionOptions, CompressionConfig, Criterion, HeadStrategies};
use crate::cpu::bias::{Apart, BiasView};
use crate::cpu::decide::{self, DecideInput};
use crate::cpu::{Element, Rows};
use crate::observed;
use crate::problem::{Problem, RowLayout};
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, DType, Device, Layout, Result, Storage, Tensor};

/// Which tokens are folded into their right neighbours, per batch row and query head. Made once per call, from the
/// tensors or from the caller's own bits, and then given to [`crate::attend`]. The decisions carry no gradient.
#[derive(Clone, Debug)]
pub struct MergePlan {
    /// u8 (B, H, N-1), contiguous.
    indicators: Tensor,
    config: CompressionConfig,
    /// Whether [`Self::new`] decided, so that under [`crate::GroupRule::Unanimous`] a KV head's query heads agree.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    decided: bool,
    /// Whether it is known without reading the indicators that nothing is hidden.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    hides_nothing: bool,
}

/// How much a plan hides. A pair is two neighbouring tokens of one query head of one batch row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergeStats {
    /// B·H·(N-1): all pairs, each of which can hide one token.
    pub pairs: usize,
    /// How many tokens are hidden, over all heads.
    pub hidden: usize,
    /// The same per batch row and query head: `per_head[b][h]`.
    pub per_head: Vec<Vec<usize>>,
}

impl MergeStats {
    /// Hidden tokens over pairs, 0 to 1; 0 where there is no pair.
    pub fn hidden_ratio(&self) -> f64 {
        self.hidden as f64 / self.pairs.max(1) as f64
    }
}

impl MergePlan {
    /// Decides from query (B, H, N, D), key and value (B, Hk, N, D), or with their axes in the order of
    /// [`AttentionOptions::layout`]: f64, f32, f16 or bf16, any strides with a contiguous last axis. Cosines and masses
    /// are computed in f32 (f64 for f64). O(N·D) per head; under [`Criterion::ObservedMass`] O(N·(window + sinks)·D).
    ///
    /// Under [`MergeRule::Causal`](crate::MergeRule) two neighbours merge only where the later token's row sees both. A bias of
    /// -inf so keeps padding apart from text, and packed documents from each other.
    ///
    /// # Errors
    /// Shapes, dtypes, devices or settings that do not fit together; each message says what was expected, what came
    /// and what to do.
    pub fn new(
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        strategies: &HeadStrategies,
        config: &CompressionConfig,
        options: &AttentionOptions,
    ) -> Result<Self> {
        let [q, k, v] = &options.layout.turned_all([q, k, v])?;
        let problem = options.layout.explained(Problem::new(q, k, v))?;
        problem.check_settings(strategies, config, options)?;
        Ok(Self {
            indicators: decide(&problem, [q, k, v], strategies, config, options)?,
            config: config.clone(),
            decided: true,
            hides_nothing: strategies.all_off(),
        })
    }

    /// Takes the caller's own merge indicators: u8 (B, H, N-1) in either [`AttentionOptions::layout`], 1 where token t
    /// is folded into t+1. Of `config`, only the fold and the window are read from here on.
    ///
    /// # Errors
    /// Another dtype or rank, a value that is not 0 or 1, or a configuration that has no meaning.
    pub fn from_indicators(indicators: &Tensor, config: &CompressionConfig) -> Result<Self> {
        config.check(true)?;
        if indicators.dtype() != DType::U8 {
            bail!(
                "indicators: expected dtype u8, got {:?}; convert them with to_dtype",
                indicators.dtype()
            )
        }
        if indicators.rank() != 3 {
            bail!(
                "indicators: expected shape (batch, heads, tokens - 1), got {:?}; give one bit per pair of neighbours",
                indicators.dims()
            )
        }
        let bits = indicators.flatten_all()?.to_vec1::<u8>()?;
        if let Some(bad) = bits.iter().find(|bit| **bit > 1) {
            bail!("indicators: expected 0 or 1, got {bad}; write 1 where a token is folded into the next one")
        }
        Ok(Self {
            indicators: indicators.detach().contiguous()?,
            config: config.clone(),
            decided: false,
            hides_nothing: bits.iter().all(|bit| *bit == 0),
        })
    }

    /// The merge indicators, u8 (B, H, N-1) in either [`AttentionOptions::layout`]: 1 where token t is folded into t+1
    /// and its column is hidden.
    pub fn indicators(&self) -> &Tensor {
        &self.indicators
    }

    /// The settings this plan was made with.
    pub fn config(&self) -> &CompressionConfig {
        &self.config
    }

    /// Counts the hidden tokens. On a GPU this waits for the device.
    ///
    /// # Errors
    /// Those of reading the indicators.
    pub fn stats(&self) -> Result<MergeStats> {
        let rows = self.indicators.to_vec3::<u8>()?;
        let count = |head: &Vec<u8>| head.iter().map(|bit| usize::from(*bit)).sum();
        let per_head: Vec<Vec<usize>> = rows.iter().map(|heads| heads.iter().map(count).collect()).collect();
        Ok(MergeStats {
            pairs: self.indicators.elem_count(),
            hidden: per_head.iter().flatten().sum(),
            per_head,
        })
    }

    /// Whether nothing is known to be hidden; the indicators of a GPU are not read for it.
    #[cfg(feature = "cuda")]
    pub(crate) fn hides_nothing(&self) -> bool {
        self.hides_nothing
    }

    /// Whether the query heads of every KV head are known to agree.
    #[cfg(feature = "cuda")]
    pub(crate) fn heads_agree(&self) -> bool {
        self.decided && self.config.group_rule.heads_agree()
    }

    /// Refuses a plan that was made for other shapes, or whose window has no meaning without causality.
    pub(crate) fn check(&self, problem: &Problem, causal: bool) -> Result<()> {
        let expected = [problem.batch, problem.heads, problem.pairs()];
        if self.indicators.dims() != expected {
            bail!(
                "plan: expected indicators of shape {expected:?} (batch, heads, tokens - 1) for this query, got {:?}; \
                 make a plan for these tensors",
                self.indicators.dims()
            )
        }
        self.config.check(causal)
    }
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
        Criterion::ObservedMass => observed::indicators(problem, [q, k, v], strategies, config, options)?,
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

/// Something that reads a query and a key on the CPU, for any dtype.
pub(crate) trait QueryKeyVisitor {
    type Output;
    fn visit<T: Element>(self, q: Rows<T>, k: Rows<T>) -> Result<Self::Output>;
}

/// Runs `visitor` on the storages of a checked query and key.
pub(crate) fn on_cpu<V: QueryKeyVisitor>(q: &Tensor, k: &Tensor, visitor: V) -> Result<V::Output> {
    let ((q_storage, q_layout), (k_storage, k_layout)) = (q.storage_and_layout(), k.storage_and_layout());
    match (&*q_storage, &*k_storage) {
        (Storage::Cpu(q), Storage::Cpu(k)) => visit_storages(q, q_layout, k, k_layout, visitor),
        _ => not_on_cpu(q.device()),
    }
}

/// [`on_cpu`] for storages that candle has already taken apart.
pub(crate) fn visit_storages<V: QueryKeyVisitor>(
    q: &CpuStorage,
    q_layout: &Layout,
    k: &CpuStorage,
    k_layout: &Layout,
    visitor: V,
) -> Result<V::Output> {
    let (q_rows, k_rows) = (RowLayout::new(q_layout), RowLayout::new(k_layout));
    match (q, k) {
        (CpuStorage::F64(q), CpuStorage::F64(k)) => visitor.visit(Rows::new(q, q_rows), Rows::new(k, k_rows)),
        (CpuStorage::F32(q), CpuStorage::F32(k)) => visitor.visit(Rows::new(q, q_rows), Rows::new(k, k_rows)),
        (CpuStorage::F16(q), CpuStorage::F16(k)) => visitor.visit(Rows::new(q, q_rows), Rows::new(k, k_rows)),
        (CpuStorage::BF16(q), CpuStorage::BF16(k)) => visitor.visit(Rows::new(q, q_rows), Rows::new(k, k_rows)),
        // Problem has checked the dtypes.
        _ => bail!(
            "query and key: expected one dtype of f64, f32, f16 and bf16 for both, got {:?} and {:?}; \
             convert them with to_dtype",
            q.dtype(),
            k.dtype()
        ),
    }
}

pub(crate) fn cpu_slice<T: Element>(storage: &Storage) -> Result<&[T]> {
    match storage {
        Storage::Cpu(storage) => storage.as_slice::<T>(),
        other => not_on_cpu(&other.device()),
    }
}

/// A bias in the accumulator's dtype, as a view of four axes.
pub(crate) fn bias_view<'a, A: Element>(storage: &'a Storage, layout: &Layout) -> Result<BiasView<'a, A>> {
    let strides = layout.stride();
    Ok(BiasView {
        data: cpu_slice(storage)?,
        offset: layout.start_offset(),
        strides: [strides[0], strides[1], strides[2], strides[3]],
    })
}

pub(crate) fn not_on_cpu<R>(device: &Device) -> Result<R> {
    bail!(
        "device: expected the CPU, got {:?}; compressed attention has no kernels for it in this version, \
         move the tensors with to_device(&Device::Cpu)",
        device.location()
    )
}

struct Decide<'a> {
    problem: Problem,
    strategies: &'a HeadStrategies,
    config: &'a CompressionConfig,
    bias: Option<&'a Tensor>,
}

impl QueryKeyVisitor for Decide<'_> {
    type Output = Vec<u8>;

    fn visit<T: Element>(self, q: Rows<T>, k: Rows<T>) -> Result<Vec<u8>> {
        let stored = self.bias.map(Tensor::storage_and_layout);
        let bias = match &stored {
            Some((storage, layout)) => Some(bias_view::<T::Acc>(storage, layout)?),
            None => None,
        };
        Ok(decide::indicators(&DecideInput {
            q,
            k,
            apart: bias.map(|bias| Apart::new(bias, 0)),
            problem: self.problem,
            strategies: self.strategies,
            config: self.config,
        }))
    }
}
