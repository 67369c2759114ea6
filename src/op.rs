//! The custom op behind [`attend`]: it checks, matches the dtype and the device, and calls the device's path.

use crate::config::{AttentionOptions, CompressionConfig, HeadStrategies, Segment};
#[cfg(feature = "cuda")]
use crate::cuda::operands::Part;
#[cfg(feature = "cuda")]
use crate::cuda::tensors::TensorCall;
use crate::loss::{compression_loss, compression_loss_in_segments};
use crate::plan::MergePlan;
use crate::problem::Problem;
use crate::storage::not_on_cpu;
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Tensor};
use column_bias::{Differentiable, FoundGradients, OpGradients};
use sinks::{KeptTensors, SinkGradient};
use std::sync::Arc;

pub(crate) mod column_bias;
#[cfg(any(feature = "cuda", feature = "cuda-emu"))]
pub(crate) mod composed;
mod on_cpu;
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
/// Differentiable in query, key, value, sink logits and column bias, for every fold, window, bias, softcap and dropout;
/// the decisions are constants. The gradients have the shapes and dtypes of their tensors, keep O(N·D) memory besides
/// them, and do not depend on the number of threads. The bias gets no gradient.
///
/// Each of [`AttentionOptions::segments`] is attended to alone, one after the other; rows of padding are zeros with
/// zero gradients.
///
/// A row is NaN throughout when its query or any column that it sees is not finite; other rows are not affected. A row
/// whose columns all have a bias of -inf is zeros and sends no gradient. A finite bias of any size, the dtype's least
/// number included, is finite.
///
/// With the feature `cuda`, tensors on a CUDA device may be f32, f16 and bf16, with a D that is a multiple of 8 up to
/// 256 and rows that start at multiples of 8 elements; only a call with segments waits for the device. The same call
/// gives the same bits, except for gradients there without [`AttentionOptions::deterministic`].
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
    let output = column_bias::apply([q, k, v], op, options)?;
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
    /// The column bias (B, Hk, N) in f32, on a GPU.
    #[cfg(feature = "cuda")]
    device_column_bias: Option<Tensor>,
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
            device_column_bias: None,
            #[cfg(feature = "cuda")]
            part: Part::default(),
            kept: KeptTensors::default(),
            found: FoundGradients::default(),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_call(&self) -> TensorCall<'_> {
        TensorCall {
            problem: self.problem,
            plan: &self.plan,
            options: &self.options,
            bias: self.bias.as_ref(),
            sinks: self.device_sinks.as_ref(),
            column_bias: self.device_column_bias.as_ref(),
            part: self.part,
        }
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
        let [dq, dk, dv] = column_bias::found_or(&self.found, || self.gradients([q, k, v], output, grad_output))?;
        Ok((Some(dq), Some(dk), Some(dv)))
    }
}

impl Differentiable for CompressedAttentionOp {
    fn found(&self) -> &FoundGradients {
        &self.found
    }

    fn gradients(&self, qkv: [&Tensor; 3], output: &Tensor, grad_output: &Tensor) -> Result<OpGradients> {
        let grad_output = &grad_output.contiguous()?;
        #[cfg(feature = "cuda")]
        if qkv[0].device().is_cuda() {
            // A narrowed gradient is contiguous but does not start at the start of its buffer.
            let grad_output = match grad_output.layout().start_offset() {
                0 => grad_output.clone(),
                _ => grad_output.force_contiguous()?,
            };
            let (gradients, column_bias) = self.cuda_call().backward(qkv, output, self.kept()?, &grad_output)?;
            let like = |(found, bias): (Tensor, &Tensor)| found.to_dtype(bias.dtype());
            let column_bias = column_bias.zip(self.options.column_bias.as_ref()).map(like);
            return Ok((gradients, column_bias.transpose()?));
        }
        self.cpu_gradients(qkv, output, grad_output)
    }
}
