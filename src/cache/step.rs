//! One call of the cache: matches the dtypes, and checks everything before anything changes.

use super::call::TokenCall;
use super::segments::{run_apart, RowRun};
use super::{CacheSizes, Lists, ListsOf, State};
use crate::config::AttentionOptions;
use crate::cpu::cache::list::{Decided, List};
use crate::cpu::cache::range::{largest_in, largest_of};
use crate::cpu::cache::step::Step;
use crate::cpu::decide::heads::ListHeads;
use crate::cpu::number::bias::sinks_in_base_2;
use crate::cpu::number::element::Element;
use crate::cpu::number::rows::RowGrid;
use crate::problem::{bias_as, Problem, RowLayout};
use crate::storage::{self, cpu_slice, not_on_cpu};
use candle_core::{bail, CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Runs one call on checked tensors; an error leaves `state` as it was.
pub(super) fn step(
    state: &mut State,
    problem: &Problem,
    call: &TokenCall,
    attend: bool,
    max_entries: Option<usize>,
) -> Result<Option<Tensor>> {
    let ([q, k, v], options) = (&call.qkv, call.options.as_ref());
    if state.sizes != CacheSizes::of(problem) {
        bail!(
            "query and key: expected the cache's batch, heads, KV heads and head_dim {:?}, got {:?}; reset() the cache \
             for other shapes",
            state.sizes,
            CacheSizes::of(problem)
        )
    }
    let sliding_window = state.sliding_window_for(options)?;
    let runs = state.runs(problem, options)?;
    let total = state.seq_len + problem.tokens;
    let accumulator = if problem.dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    };
    let full = [problem.batch, problem.heads, problem.tokens, total];
    let bias = match options {
        Some(options) => {
            options.check()?;
            problem.check_sinks(options)?;
            bias_view(options.bias.as_ref(), full, accumulator)?
        }
        None => None,
    };
    let sinks = match options {
        Some(options) => problem.sinks(options)?,
        None => None,
    };
    let storage = state.lists.dtype();
    // Halves beside lists of another dtype are widened here: code for each pair of dtypes would be half as much again.
    let inner = match problem.dtype == storage {
        true => storage,
        false => accumulator,
    };
    let [q, k, v] = [q.to_dtype(inner)?, k.to_dtype(inner)?, v.to_dtype(inner)?];
    let stored = [k.to_dtype(storage)?, v.to_dtype(storage)?];
    let call = CpuCall {
        problem,
        given: [&k, &v],
        tensors: [&q, &stored[0], &stored[1]],
        scores: call.scores.as_ref(),
        options,
        attend: attend && options.is_some(),
        bias,
        sinks,
        max_entries,
        runs: runs.as_ref().filter(|runs| !runs.alike).map(|runs| &runs.runs[..]),
        sliding_window: sliding_window.unwrap_or(usize::MAX),
    };
    let output = match &mut state.lists {
        Lists::F64(lists) => call.run::<f64, f64>(lists),
        Lists::F32(lists) => call.run::<f32, f32>(lists),
        Lists::F16(lists) if inner == storage => call.run::<half::f16, half::f16>(lists),
        Lists::F16(lists) => call.run::<f32, half::f16>(lists),
        Lists::BF16(lists) if inner == storage => call.run::<half::bf16, half::bf16>(lists),
        Lists::BF16(lists) => call.run::<f32, half::bf16>(lists),
    }?;
    state.seq_len = total;
    if options.is_some() {
        state.sliding_window = Some(sliding_window);
        // Lists of batch rows that were padding alone.
        let sliding_window = sliding_window.unwrap_or(usize::MAX);
        each!(&mut state.lists, lists => for (_, list) in lists {
            if list.settings.sliding_window != sliding_window {
                list.slide_now(sliding_window);
            }
        });
    }
    if let Some(runs) = runs.filter(|runs| state.places.is_some() || !runs.one_segment()) {
        state.places = Some(runs.places);
    }
    output.map(|output| output.to_dtype(problem.dtype)).transpose()
}

/// [`step`] of lists that keep to a budget: in parts, after which some list drops entries.
pub(super) fn step_in_parts(
    state: &mut Arc<State>,
    problem: &Problem,
    call: &TokenCall,
    attend: bool,
    max_entries: Option<usize>,
) -> Result<Option<Tensor>> {
    let cuts = state.turns(problem, call.options.as_ref())?;
    let before = (cuts.len() > 1).then(|| state.clone());
    let (mut rows, mut start) = (Vec::new(), 0);
    for end in cuts {
        let part = call.part(start..end)?;
        match step(Arc::make_mut(state), &part.problem()?, &part, attend, max_entries) {
            Ok(output) => rows.extend(output),
            Err(error) => {
                if let Some(before) = before {
                    *state = before;
                }
                return Err(error);
            }
        }
        each!(&mut Arc::make_mut(state).lists, lists => lists.par_iter_mut().for_each(|(_, list)| list.keep_budget()));
        start = end;
    }
    match rows.len() {
        0 => Ok(None),
        1 => Ok(rows.pop()),
        _ => Tensor::cat(&rows, 2).map(Some),
    }
}

/// The rows (B, H, 1, Dv) of checked queries (B, H, 1, D) at the place of the last token.
pub(super) fn attend_again(state: &State, problem: &Problem, q: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    options.check()?;
    problem.check_sinks(options)?;
    state.sliding_window_for(Some(options))?;
    let sinks = problem.sinks(options)?;
    let q = q.to_dtype(match state.lists.dtype() {
        storage if storage == problem.dtype => storage,
        DType::F64 => DType::F64,
        _ => DType::F32,
    })?;
    let again = Again {
        problem,
        q: &q,
        options,
        sinks,
    };
    let same = q.dtype() == state.lists.dtype();
    let output = match &state.lists {
        Lists::F64(lists) => again.run::<f64, f64>(lists),
        Lists::F32(lists) => again.run::<f32, f32>(lists),
        Lists::F16(lists) if same => again.run::<half::f16, half::f16>(lists),
        Lists::F16(lists) => again.run::<f32, half::f16>(lists),
        Lists::BF16(lists) if same => again.run::<half::bf16, half::bf16>(lists),
        Lists::BF16(lists) => again.run::<f32, half::bf16>(lists),
    }?;
    output.to_dtype(problem.dtype)
}

/// The arguments of [`attend_again`], in the dtype of the queries.
struct Again<'a> {
    problem: &'a Problem,
    q: &'a Tensor,
    options: &'a AttentionOptions,
    sinks: Option<Vec<f64>>,
}

impl Again<'_> {
    fn run<Q: Element<Acc = S::Acc>, S: Element>(&self, lists: &ListsOf<S>) -> Result<Tensor> {
        let (storage, layout) = self.q.storage_and_layout();
        let sinks = self.sinks.as_deref().map(sinks_in_base_2);
        let Problem {
            batch,
            heads,
            head_dim,
            value_dim,
            ..
        } = *self.problem;
        // The lists hold the keys and values.
        let none = RowGrid::new(&[], RowLayout::new(layout));
        let step = Step::<Q, S> {
            q: RowGrid::new(cpu_slice(&storage)?, RowLayout::new(layout)),
            k: none,
            v: none,
            count: 1,
            heads,
            head_dim,
            value_dim,
            scale: self.options.scale(head_dim),
            sliding_window: usize::MAX,
            softcap: self.options.softcap,
            dropout: None,
            start: 0,
            bias: None,
            sinks: sinks.as_deref(),
            scores: None,
        };
        Tensor::from_vec(step.again(lists), (batch, heads, 1, value_dim), &Device::Cpu)
    }
}

pub(super) fn bias_view(bias: Option<&Tensor>, full: [usize; 4], dtype: DType) -> Result<Option<Tensor>> {
    let Some(bias) = bias else { return Ok(None) };
    if bias.broadcast_as(&full).is_err() {
        bail!(
            "bias: expected a shape that broadcasts to (batch, heads, new tokens, all tokens) = {full:?}, got {:?}; \
             use size 1 for the axes it does not depend on",
            bias.dims()
        )
    }
    Ok(Some(bias_as(bias, dtype)?.broadcast_as(&full)?))
}

/// One checked call: query in Q, key and value in the storage dtype.
struct CpuCall<'a> {
    problem: &'a Problem,
    /// Key and value in Q.
    given: [&'a Tensor; 2],
    tensors: [&'a Tensor; 3],
    /// (B, Hk, new tokens, 1), f32, where the caller gives them.
    scores: Option<&'a Tensor>,
    options: Option<&'a AttentionOptions>,
    /// Whether rows are computed.
    attend: bool,
    bias: Option<Tensor>,
    /// Sink logits (H).
    sinks: Option<Vec<f64>>,
    max_entries: Option<usize>,
    /// The runs of each batch row, where they do not all go on alike.
    runs: Option<&'a [Vec<RowRun>]>,
    /// L of the model's sliding window; [`usize::MAX`] for none.
    sliding_window: usize,
}

impl CpuCall<'_> {
    fn run<Q: Element<Acc = S::Acc>, S: Element>(&self, lists: &mut ListsOf<S>) -> Result<Option<Tensor>> {
        if Q::DTYPE != S::DTYPE {
            self.check_given::<Q, S>()?;
        }
        let [q, k, v] = self.tensors.map(Tensor::storage_and_layout);
        let bias = self.bias.as_ref().map(Tensor::storage_and_layout);
        let bias = match &bias {
            Some((storage, layout)) => Some(storage::bias_view::<S::Acc>(storage, layout)?),
            None => None,
        };
        let scores = self.scores.map(Tensor::storage_and_layout);
        let scores = match &scores {
            Some((storage, layout)) => Some(RowGrid::new(cpu_slice::<f32>(storage)?, RowLayout::new(layout))),
            None => None,
        };
        let Problem {
            batch,
            heads,
            tokens,
            head_dim,
            value_dim,
            ..
        } = *self.problem;
        let sinks = self.sinks.as_deref().map(sinks_in_base_2);
        let step = Step::<Q, S> {
            q: RowGrid::new(cpu_slice(&q.0)?, RowLayout::new(q.1)),
            k: RowGrid::new(cpu_slice(&k.0)?, RowLayout::new(k.1)),
            v: RowGrid::new(cpu_slice(&v.0)?, RowLayout::new(v.1)),
            count: tokens,
            heads,
            head_dim,
            value_dim,
            scale: match self.options {
                Some(options) => options.scale(head_dim),
                None => AttentionOptions::default().scale(head_dim),
            },
            sliding_window: self.sliding_window,
            softcap: self.options.and_then(|options| options.softcap),
            dropout: self.options.and_then(|options| options.dropout),
            start: 0,
            bias,
            sinks: sinks.as_deref(),
            scores,
        };
        let output = match self.runs {
            None => {
                let decided = step.decide(lists);
                self.check(&step, lists, &decided)?;
                step.run(lists, decided, self.attend)
            }
            Some(runs) => run_apart(&step, lists, runs, |step, lists, decided| {
                self.check(step, lists, decided)
            })?,
        };
        let rows = || Tensor::from_vec(output, (batch, heads, tokens, value_dim), &Device::Cpu);
        self.attend.then(rows).transpose()
    }

    /// Refuses decisions about a step before it changes anything.
    fn check<Q: Element<Acc = S::Acc>, S: Element>(
        &self,
        step: &Step<Q, S>,
        lists: &[(ListHeads, List<S>)],
        decided: &[Decided<S>],
    ) -> Result<()> {
        let tokens = step.count;
        step.check_bias(lists, decided)?;
        if let Some(limit) = self.max_entries {
            let needed = lists.iter().zip(decided);
            let needed = needed
                .map(|((_, list), decided)| list.kept_after(tokens, decided, self.sliding_window))
                .max();
            if needed.is_some_and(|needed| needed > limit) {
                bail!(
                    "max_entries: expected at most {limit} entries in a list, got {needed:?} with the {tokens} new \
                     tokens; raise the limit, merge more, or reset()"
                )
            }
        }
        if let Some(sum) = step.too_large_sum(lists, decided) {
            bail!(
                "storage: expected sums of folded keys and values up to {:e}, the largest number of {:?}, got {sum:e}; \
                 {}, or use Fold::Mean or Fold::Drop",
                largest_of(S::DTYPE),
                S::DTYPE,
                match S::DTYPE {
                    DType::F16 => "set CacheOptions::storage to bf16 or f32",
                    _ => "scale keys and values down",
                }
            )
        }
        Ok(())
    }

    /// Refuses finite keys and values that the storage dtype cannot hold.
    fn check_given<Q: Element<Acc = S::Acc>, S: Element>(&self) -> Result<()> {
        let Problem {
            batch,
            kv_heads,
            tokens,
            ..
        } = *self.problem;
        for (name, tensor) in ["key", "value"].into_iter().zip(self.given) {
            let (storage, layout) = tensor.storage_and_layout();
            let rows = RowGrid::new(cpu_slice::<Q>(&storage)?, RowLayout::new(layout));
            let heads = (0..batch).flat_map(|row| (0..kv_heads).map(move |head| (row, head)));
            let largest = heads.fold(0.0, |largest: f64, (row, head)| {
                largest.max(largest_in(&rows.head(row, head), tokens))
            });
            if largest > largest_of(S::DTYPE) {
                bail!(
                    "{name}: expected numbers up to {:e}, the largest of the storage dtype {:?}, got {largest:e}; set \
                     CacheOptions::storage to {}",
                    largest_of(S::DTYPE),
                    S::DTYPE,
                    match S::DTYPE {
                        DType::F16 => "bf16 or f32",
                        _ => "f32",
                    }
                )
            }
        }
        Ok(())
    }
}

/// A finished result that joins the graph of tracked inputs, so that `backward()` through it fails instead of silently
/// giving no gradient.
pub(super) struct WithoutGradient(pub Tensor);

impl CustomOp3 for WithoutGradient {
    fn name(&self) -> &'static str {
        "compressed-kv-cache"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match &*self.0.storage_and_layout().0 {
            Storage::Cpu(storage) => Ok((storage.clone(), self.0.shape().clone())),
            other => not_on_cpu(&other.device()),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        match &*self.0.storage_and_layout().0 {
            Storage::Cuda(storage) => Ok((storage.try_clone(self.0.layout())?, self.0.shape().clone())),
            other => not_on_cpu(&other.device()),
        }
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        bail!(
            "compressed-kv-cache: expected a forward pass only, got backward(); a cache holds no graph, \
             train with attend or compressed_attention"
        )
    }
}
