//! The custom op behind [`attend`]: it checks, matches the dtype and the device, and calls the device's path.

use crate::config::{AttentionOptions, CompressionConfig, HeadStrategies, Segment};
use crate::cpu::attend::backward::{backward, Gradients};
use crate::cpu::attend::forward::forward;
use crate::cpu::attend::input::{BackwardInput, ColumnBias, ForwardInput};
use crate::cpu::number::bias::sinks_in_base_2;
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::rows::RowGrid;
#[cfg(feature = "cuda")]
use crate::cuda::operands::Part;
#[cfg(feature = "cuda")]
use crate::cuda::tensors::TensorCall;
use crate::loss::{compression_loss, compression_loss_in_segments};
use crate::plan::MergePlan;
use crate::problem::{Problem, RowLayout};
use crate::storage::{bias_view, cpu_slice, not_on_cpu};
use candle_core::backend::BackendStorage;
use candle_core::{
    bail, CpuStorage, CudaStorage, CustomOp3, DType, Device, Error, Layout, Result, Shape, Storage, Tensor,
};
use column_bias::{ColumnBiasGradient, FoundGradients};
use sinks::{KeptTensors, SinkGradient};
use std::sync::{Arc, PoisonError};

mod column_bias;
#[cfg(any(feature = "cuda", feature = "cuda-emu"))]
pub(crate) mod composed;
mod sinks;

/// The results of [`compressed_attention`].
#[derive(Clone, Debug)]
pub struct CompressedAttentionOutput {
    /// The output (B, H, N, D), or in the order of [`AttentionOptions::layout`]; in the dtype of the query.
    pub output: Tensor,
    /// The compression loss, a scalar; `None` where N = 1.
    pub compression_loss: Option<Tensor>,
    /// The plan: the tokens that were hidden.
    pub plan: MergePlan,
}

/// Decides, attends and computes the compression loss in one call: [`MergePlan::new`], [`attend`],
/// [`compression_loss`]. Query (B, H, N, D), key and value (B, Hk, N, D), output (B, H, N, D), or with their axes in
/// the order of [`AttentionOptions::layout`].
///
/// # Errors
/// As these three functions, and fewer queries than keys, for which there is no loss.
pub fn compressed_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<CompressedAttentionOutput> {
    let plan = MergePlan::new(q, k, v, strategies, config, options)?;
    let (heads_q, heads_k) = (options.layout.turned(q)?, options.layout.turned(k)?);
    if heads_q.dim(2)? != heads_k.dim(2)? {
        bail!(
            "query: expected the queries of all tokens for the compression loss, got query {:?} and key {:?}; use \
             MergePlan::new and attend, which compute no loss",
            q.dims(),
            k.dims()
        )
    }
    let compression_loss = match &options.segments {
        None => compression_loss(&heads_q, &heads_k, strategies, config)?,
        Some(segments) => compression_loss_in_segments(&heads_q, &heads_k, strategies, config, segments)?,
    };
    Ok(CompressedAttentionOutput {
        output: attend(q, k, v, &plan, options)?,
        compression_loss,
        plan,
    })
}

/// Attention over the columns that `plan` leaves. Query (B, H, N, D), key and value (B, Hk, N, D), output (B, H, N, D),
/// or with their axes in the order of [`AttentionOptions::layout`]. The output has the query's dtype (sums in f32, or
/// f64 for f64; one rounding at the end). Hidden tokens keep their output row. Memory beyond the output is O(N·D); no
/// N×N matrix is formed.
///
/// Values may have a size of their own, (B, Hk, N, Dv), with an output (B, H, N, Dv), as in multi-head latent
/// attention; products in bf16 pairs do not serve them. There may be fewer queries than keys, (B, H, Nq, D), with an
/// output of that shape: query j is row N - Nq + j of a causal call. [`Fold::PairSum`](crate::Fold) folds the query
/// before the first one too, so that it then takes plans that hide nothing only. Without causality any number of
/// queries sees all keys, where every head is off.
///
/// Differentiable in query, key, value and sink logits, for every fold, window, bias, softcap and dropout; the
/// decisions are constants. The gradients have the shapes and dtypes of their tensors, keep O(N·D) memory besides them,
/// and do not depend on the number of threads. The bias gets no gradient.
///
/// Each of [`AttentionOptions::segments`] is attended to alone, one after the other; rows of padding are zeros with
/// zero gradients.
///
/// A row is NaN throughout when its query or any column that it sees is not finite; other rows are not affected. A row
/// whose columns all have a bias of -inf is zeros and sends no gradient. A finite bias of any size, the dtype's least
/// number included, is finite.
///
/// With the feature `cuda`, tensors on a CUDA device may be f32, f16 and bf16, with a D that is a multiple of 8 up to
/// 256 and rows that start at multiples of 8 elements; no call waits for the device. The same call gives the same bits,
/// except for gradients there without [`AttentionOptions::deterministic`].
///
/// # Errors
/// Shapes, dtypes or devices that do not fit together or are not supported, or a plan made for other shapes, or with
/// a hidden token at the end of a segment. On the
/// CPU, a bias of -inf at a column that a row would see, in a head that hides tokens: a bias does not tell apart the
/// tokens that were folded together. On CUDA there is no such check, since it would mean waiting for the device.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, plan: &MergePlan, options: &AttentionOptions) -> Result<Tensor> {
    let [q, k, v] = &options.layout.turned_all([q, k, v])?;
    let problem = options.layout.explained(Problem::of_rows([q, k, v], options.causal))?;
    problem.check_options(options)?;
    plan.check(&problem, options.causal)?;
    if !(q.device().is_cpu() || cfg!(feature = "cuda") && q.device().is_cuda()) {
        return not_on_cpu(q.device());
    }
    let segments = problem.segments(options)?;
    if let Some(segments) = &segments {
        plan.check_segments(segments)?;
    }
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        options.refuse_column_bias()?;
        return options
            .layout
            .turned(&composed::attend([q, k, v], plan, options, &composed::on_cuda)?);
    }
    let op = CompressedAttentionOp {
        segments,
        bias: problem.bias(options)?,
        sinks: problem.sinks(options)?,
        ..CompressedAttentionOp::new(problem, [q, k, v], plan, options)
    };
    let (sinks, kept) = (op.sinks.clone().unwrap_or_default(), Arc::clone(&op.kept));
    let column_bias = ColumnBiasGradient::new(&op, [q, k, v]);
    let output = q.apply_op3(k, v, op)?;
    let output = column_bias.over(output, options)?;
    let output = SinkGradient { problem, sinks, kept }.over(output, options)?;
    options.layout.turned(&output)
}

/// Attention for one plan. It holds no tensor of the graph it is part of, so it cannot keep that graph alive.
#[derive(Clone)]
struct CompressedAttentionOp {
    problem: Problem,
    plan: MergePlan,
    options: AttentionOptions,
    /// None where each batch row is one segment.
    segments: Option<Vec<Segment>>,
    /// The bias in the accumulator's dtype, as a (B, H, Nq, N) view.
    bias: Option<Tensor>,
    /// The sink logits (H), on the CPU.
    sinks: Option<Vec<f64>>,
    /// The sink logits (H) in f32, on a GPU.
    #[cfg(feature = "cuda")]
    device_sinks: Option<Tensor>,
    #[cfg(feature = "cuda")]
    part: Part,
    /// Whether a gradient may be asked for.
    tracked: bool,
    /// The tensors that the backward pass needs besides the output, where `tracked`; they have no graph. Each row's
    /// log-sum-exp (base 2), (B, H, N), on the CPU as two numbers (B, H, N, 2). On CUDA, where gradients gain by it,
    /// also the rounding error of the output, (B, H, N, D).
    kept: KeptTensors,
    /// The gradients that the op of a column bias has found.
    found: FoundGradients,
}

impl CompressedAttentionOp {
    /// A call without segments, bias and sinks.
    fn new(problem: Problem, qkv: [&Tensor; 3], plan: &MergePlan, options: &AttentionOptions) -> Self {
        let (sinks, column_bias) = (options.sink_logits.as_ref(), options.column_bias.as_ref());
        let others = sinks.into_iter().chain(column_bias);
        Self {
            problem,
            plan: plan.clone(),
            tracked: qkv.into_iter().chain(others).any(Tensor::track_op),
            options: AttentionOptions {
                sink_logits: sinks.map(Tensor::detach),
                column_bias: column_bias.map(Tensor::detach),
                ..options.clone()
            },
            segments: None,
            bias: None,
            sinks: None,
            #[cfg(feature = "cuda")]
            device_sinks: None,
            #[cfg(feature = "cuda")]
            part: Part::default(),
            kept: KeptTensors::default(),
            found: FoundGradients::default(),
        }
    }

    fn cpu<T: Element>(&self, qkv: [(&[T], &Layout); 3]) -> Result<(CpuStorage, Shape)> {
        let Problem {
            batch,
            heads,
            queries,
            value_dim,
            ..
        } = self.problem;
        let mut log_sum_exp = vec![[T::Acc::ZERO; 2]; if self.tracked { batch * heads * queries } else { 0 }];
        let run = |segment: Option<&Segment>, log_sum_exp: &mut [[T::Acc; 2]]| {
            self.with_input(qkv, segment, |input| {
                input.check_bias()?;
                Ok(forward(input, self.tracked.then_some(log_sum_exp)))
            })
        };
        let output = match &self.segments {
            None => run(None, &mut log_sum_exp)?,
            Some(segments) => {
                let mut output = vec![T::zero(); batch * heads * queries * value_dim];
                for segment in segments {
                    let rows = if self.tracked { heads * segment.tokens.len() } else { 0 };
                    let mut part_log_sum_exp = vec![[T::Acc::ZERO; 2]; rows];
                    let part =
                        run(Some(segment), &mut part_log_sum_exp).map_err(|error| in_segment(segment, &error))?;
                    segment.paste(&part, &mut output, [heads, queries, value_dim]);
                    segment.paste(&part_log_sum_exp, &mut log_sum_exp, [heads, queries, 1]);
                }
                output
            }
        };
        if self.tracked {
            let kept = Tensor::from_vec(log_sum_exp.into_flattened(), (batch, heads, queries, 2), &Device::Cpu)?;
            self.kept.get_or_init(|| vec![kept]);
        }
        Ok((
            T::to_cpu_storage_owned(output),
            Shape::from((batch, heads, queries, value_dim)),
        ))
    }

    #[cfg(feature = "cuda")]
    fn cuda_call(&self) -> TensorCall<'_> {
        TensorCall {
            problem: self.problem,
            plan: &self.plan,
            options: &self.options,
            bias: self.bias.as_ref(),
            sinks: self.device_sinks.as_ref(),
            part: self.part,
        }
    }

    /// Calls `body` with the input of the whole call, or of one segment alone.
    fn with_input<T: Element, R>(
        &self,
        [q, k, v]: [(&[T], &Layout); 3],
        segment: Option<&Segment>,
        body: impl FnOnce(&ForwardInput<T>) -> Result<R>,
    ) -> Result<R> {
        let indicators = self.plan.indicators().storage_and_layout();
        let bias = self.bias.as_ref().map(Tensor::storage_and_layout);
        let bias = match &bias {
            Some((storage, layout)) => Some(bias_view(storage, layout)?),
            None => None,
        };
        let sinks = self.sinks.as_deref().map(sinks_in_base_2);
        let column_bias = match &self.options.column_bias {
            Some(bias) => Some(column_bias_in_base_2::<T::Acc>(bias)?),
            None => None,
        };
        let bits = contiguous::<u8>(&indicators.0, indicators.1)?;
        let whole = ForwardInput {
            q: rows(q),
            k: rows(k),
            v: rows(v),
            problem: self.problem,
            bits,
            fold: self.plan.config().fold,
            window: self.plan.config().window,
            causal: self.options.causal,
            sliding_window: self.options.sliding_window.unwrap_or(usize::MAX),
            scale: self.options.scale(self.problem.head_dim),
            softcap: self.options.softcap,
            dropout: self.options.dropout,
            first: [0, 0],
            bias,
            sinks: sinks.as_deref(),
            column_bias: column_bias.as_deref().map(|bias| {
                let Problem { kv_heads, tokens, .. } = self.problem;
                ColumnBias::new(bias, [kv_heads, tokens])
            }),
        };
        let Some(segment) = segment else { return body(&whole) };
        let (batch, first) = (segment.batch, segment.tokens.start);
        body(&ForwardInput {
            q: whole.q.from(batch, first),
            k: whole.k.from(batch, first),
            v: whole.v.from(batch, first),
            problem: self.problem.alone(segment),
            bits: &segment.pairs().cut(bits, [self.problem.heads, self.problem.pairs(), 1]),
            first: [batch, first],
            bias: bias.map(|bias| bias.from(batch, first)),
            column_bias: whole.column_bias.map(|bias| bias.from(batch, first)),
            ..whole
        })
    }

    fn kept(&self) -> Result<&[Tensor]> {
        match self.kept.get() {
            Some(kept) => Ok(kept),
            None => bail!(
                "compressed-attention: expected the forward pass's log-sum-exp, got none; \
                 this is a defect of the crate, please report it"
            ),
        }
    }

    /// The gradients dq (B, H, Nq, D), dk (B, Hk, N, D) and dv (B, Hk, N, Dv), and that of the column bias (B, Hk, N),
    /// if there is one.
    fn cpu_bwd<T: Element>(
        &self,
        qkv: [&Tensor; 3],
        output: &Tensor,
        grad_output: &Tensor,
    ) -> Result<([Tensor; 3], Option<Tensor>)> {
        let log_sum_exp = self.kept()?[0].storage_and_layout();
        let tensors = [qkv[0], qkv[1], qkv[2], output, grad_output].map(Tensor::storage_and_layout);
        let mut slices = Vec::with_capacity(5);
        for (storage, layout) in &tensors {
            slices.push((cpu_slice::<T>(storage)?, *layout));
        }
        let [q, k, v, output, grad_output] = slices[..] else {
            bail!(
                "compressed-attention: expected 5 tensors, got {}; this is a defect of the crate",
                slices.len()
            )
        };
        let log_sum_exp = contiguous::<T::Acc>(&log_sum_exp.0, log_sum_exp.1)?.as_chunks().0;
        let run = |segment: Option<&Segment>, log_sum_exp: &[[T::Acc; 2]]| {
            let [batch, first] = segment.map_or([0, 0], |segment| [segment.batch, segment.tokens.start]);
            self.with_input([q, k, v], segment, |input| {
                Ok(backward(&BackwardInput {
                    forward: *input,
                    output: rows(output).from(batch, first),
                    grad_output: rows(grad_output).from(batch, first),
                    log_sum_exp,
                }))
            })
        };
        let Gradients {
            dq,
            dk,
            dv,
            column_bias,
        } = match &self.segments {
            None => run(None, log_sum_exp)?,
            Some(segments) => {
                let Problem {
                    heads,
                    kv_heads,
                    tokens,
                    head_dim,
                    ..
                } = self.problem;
                let zeros = |like: &Tensor| vec![T::zero(); like.elem_count()];
                let mut whole = Gradients {
                    dq: zeros(qkv[0]),
                    dk: zeros(qkv[1]),
                    dv: zeros(qkv[2]),
                    column_bias: match self.options.column_bias {
                        Some(_) => vec![T::Acc::ZERO; self.problem.batch * kv_heads * tokens],
                        None => Vec::new(),
                    },
                };
                for segment in segments {
                    let part = run(Some(segment), &segment.cut(log_sum_exp, [heads, tokens, 1]))?;
                    segment.paste(&part.dq, &mut whole.dq, [heads, tokens, head_dim]);
                    segment.paste(&part.dk, &mut whole.dk, [kv_heads, tokens, head_dim]);
                    segment.paste(&part.dv, &mut whole.dv, [kv_heads, tokens, self.problem.value_dim]);
                    if !part.column_bias.is_empty() {
                        segment.paste(&part.column_bias, &mut whole.column_bias, [kv_heads, tokens, 1]);
                    }
                }
                whole
            }
        };
        let like = |data: Vec<T>, tensor: &Tensor| Tensor::from_vec(data, tensor.dims(), &Device::Cpu);
        let column_bias = match &self.options.column_bias {
            Some(bias) => Some(Tensor::from_vec(column_bias, bias.dims(), &Device::Cpu)?.to_dtype(bias.dtype())?),
            None => None,
        };
        Ok(([like(dq, qkv[0])?, like(dk, qkv[1])?, like(dv, qkv[2])?], column_bias))
    }

    /// [`Self::cpu_bwd`] in the call's dtype.
    fn cpu_gradients(
        &self,
        qkv: [&Tensor; 3],
        output: &Tensor,
        grad_output: &Tensor,
    ) -> Result<([Tensor; 3], Option<Tensor>)> {
        match self.problem.dtype {
            DType::F64 => self.cpu_bwd::<f64>(qkv, output, grad_output),
            DType::F16 => self.cpu_bwd::<half::f16>(qkv, output, grad_output),
            DType::BF16 => self.cpu_bwd::<half::bf16>(qkv, output, grad_output),
            _ => self.cpu_bwd::<f32>(qkv, output, grad_output),
        }
    }
}

/// A column bias in row-major order and the accumulator's dtype, in base 2.
fn column_bias_in_base_2<A: Accumulator>(bias: &Tensor) -> Result<Vec<A>> {
    let numbers = bias.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let in_base_2 = |x: f64| A::of(x * std::f64::consts::LOG2_E);
    Ok(numbers.into_iter().map(in_base_2).collect())
}

/// An error of one segment's call, whose rows and columns count from its first token.
fn in_segment(segment: &Segment, error: &Error) -> Error {
    let Segment { batch, tokens, .. } = segment;
    Error::msg(format!(
        "in the segment of batch row {batch} from token {} on: {error}",
        tokens.start
    ))
}

fn rows<'a, T>((data, layout): (&'a [T], &Layout)) -> RowGrid<'a, T> {
    RowGrid::new(data, RowLayout::new(layout))
}

fn contiguous<'a, T: candle_core::WithDType>(storage: &'a Storage, layout: &Layout) -> Result<&'a [T]> {
    match (storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => Ok(&storage.as_slice::<T>()?[start..end]),
        _ => bail!(
            "indicators: expected a contiguous tensor on the CPU, got strides {:?} on {:?}; \
             make the plan on the query's device",
            layout.stride(),
            storage.device().location()
        ),
    }
}

impl CustomOp3 for CompressedAttentionOp {
    fn name(&self) -> &'static str {
        "compressed-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use CpuStorage::{BF16, F16, F32, F64};
        match (q, k, v) {
            (F64(q), F64(k), F64(v)) => self.cpu([(q.as_slice(), q_layout), (k, k_layout), (v, v_layout)]),
            (F32(q), F32(k), F32(v)) => self.cpu([(q.as_slice(), q_layout), (k, k_layout), (v, v_layout)]),
            (F16(q), F16(k), F16(v)) => self.cpu([(q.as_slice(), q_layout), (k, k_layout), (v, v_layout)]),
            (BF16(q), BF16(k), BF16(v)) => self.cpu([(q.as_slice(), q_layout), (k, k_layout), (v, v_layout)]),
            // Problem has checked the dtypes.
            _ => bail!(
                "query, key and value: expected one dtype of f64, f32, f16 and bf16, got {:?}, {:?} and {:?}; \
                 convert them with to_dtype",
                q.dtype(),
                k.dtype(),
                v.dtype()
            ),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let stored = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let (output, kept) = self.cuda_call().forward(stored, self.tracked)?;
        if self.tracked {
            self.kept.get_or_init(|| kept);
        }
        Ok((output, q_layout.shape().clone()))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        bail!(
            "device: expected the CPU, got CUDA; this build has no CUDA kernels, enable the crate's feature `cuda` or \
             move the tensors with to_device(&Device::Cpu)"
        )
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        output: &Tensor,
        grad_output: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (qkv, grad_output) = ([q, k, v], &grad_output.contiguous()?);
        #[cfg(feature = "cuda")]
        if q.device().is_cuda() {
            // A narrowed gradient is contiguous but does not start at the start of its buffer.
            let grad_output = match grad_output.layout().start_offset() {
                0 => grad_output.clone(),
                _ => grad_output.force_contiguous()?,
            };
            let [dq, dk, dv] = self.cuda_call().backward(qkv, output, self.kept()?, &grad_output)?;
            return Ok((Some(dq), Some(dk), Some(dv)));
        }
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner).take();
        let [dq, dk, dv] = match found {
            Some(gradients) => gradients,
            None => self.cpu_gradients(qkv, output, grad_output)?.0,
        };
        Ok((Some(dq), Some(dk), Some(dv)))
    }
}
