//! The CUDA path on CPU tensors, for tests: the same launchers and kernels, under the emulator.

pub use attention::*;
pub use cache::*;
pub use composed::*;
pub use decode::*;

use crate::config::{AttentionOptions, CompressionConfig, Criterion, HeadStrategies};
use crate::cpu::number::element::Element;
use crate::cuda::attention::{lists, Attention};
use crate::cuda::decide::{indicators, reads_bias, DecideCall, ScoreCall};
use crate::cuda::fold::FoldCall;
use crate::cuda::on_gpu::{row_layout, Gpu, GpuElement, Kernel, Launch};
use crate::cuda::operands::{BiasBuffer, Part};
use crate::cuda::params::BrokenParams;
use crate::cuda::sizes::padded;
use crate::cuda::{loss, observe};
use crate::plan::without_scores;
use crate::problem::{bias_as, Problem, RowLayout};
use crate::storage::cpu_slice;
use candle_core::{bail, DType, Device, Result, Shape, Tensor};
use device::{EmuSlice, Emulator};

mod attention;
mod cache;
mod composed;
mod decode;
mod device;
mod spec;

/// Runs one of the kernels of `cuda/emu/broken.cu` over blocks of 64 threads; returns its output.
///
/// # Errors
/// An error that the emulator detects.
pub fn run_broken(name: &str, input: &[f32], blocks: usize) -> Result<Vec<f32>> {
    let gpu = Emulator;
    let params = BrokenParams { n: input.len() as u32 };
    let source = gpu.upload(input)?;
    let mut target = gpu.alloc::<f32>(input.len())?;
    let launch = Launch {
        grid: [blocks, 1, 1],
        threads: 64,
        shared_bytes: 256,
    };
    let kernel = Kernel::plain(name);
    let early = name.starts_with("broken_waits");
    gpu.launch(
        &if early { kernel.early() } else { kernel },
        launch,
        &[gpu.read(&source), gpu.write(&mut target), gpu.value(&params)],
    )?;
    target.download()
}

/// The kernels that this thread has launched so far.
pub fn launches() -> usize {
    device::launches()
}

/// Runs a closure whose launches take the kernels for warpgroups (wgmma), if there are such kernels. Up to `short`
/// tokens the kernels of small blocks run.
pub fn with_warpgroups<R>(short: usize, run: impl FnOnce() -> R) -> R {
    device::with_warpgroups(short, run)
}

/// A tensor in the emulator's memory.
pub(super) type Held<T> = (EmuSlice<T>, RowLayout);

pub(super) fn held<T: GpuElement + Element>(tensor: &Tensor) -> Result<Held<T>> {
    let (storage, layout) = tensor.storage_and_layout();
    Ok((Emulator.upload(cpu_slice::<T>(&storage)?)?, row_layout(layout)))
}

pub(super) fn borrow<T>(held: &Held<T>) -> (&EmuSlice<T>, RowLayout) {
    (&held.0, held.1)
}

/// Calls `$function::<T>` for the dtype of a tensor.
macro_rules! for_dtype {
    ($tensor:expr, $function:ident($($arg:expr),* $(,)?)) => {
        match $tensor.dtype() {
            DType::F16 => $function::<half::f16>($($arg),*),
            DType::BF16 => $function::<half::bf16>($($arg),*),
            DType::F32 => $function::<f32>($($arg),*),
            other => bail!("dtype: expected f32, f16 or bf16 on CUDA, got {other:?}; convert with to_dtype"),
        }
    };
}

/// The merge indicators (B, H, N-1) of the kernels.
///
/// # Errors
/// As [`crate::MergePlan::new`], or an error that the emulator detects.
pub fn decide(
    qkv: [&Tensor; 3],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Tensor> {
    for_dtype!(qkv[0], decide_as(qkv, strategies, config, options))
}

fn decide_as<T: GpuElement + Element>(
    [q, k, v]: [&Tensor; 3],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Tensor> {
    let problem = Problem::of_rows([q, k, v], options.causal)?;
    if problem.value_dim != problem.head_dim {
        let ([q, k, v], options) = padded([q, k, v], options)?;
        return decide_as::<T>([&q, &k, &v], strategies, config, &options);
    }
    let shape = (problem.batch, problem.heads, problem.pairs());
    if problem.pairs() == 0 {
        return Tensor::zeros(shape, DType::U8, &Device::Cpu);
    }
    let (q, k, v) = (held::<T>(q)?, held::<T>(k)?, held::<T>(v)?);
    let bias = options.bias.as_ref().filter(|_| reads_bias(config));
    let bias = bias.map(|bias| HeldBias::new(bias, &problem.bias_dims())).transpose()?;
    let call = DecideCall {
        problem,
        q: borrow(&q),
        k: borrow(&k),
        strategies,
        config,
        bias: bias.as_ref().map(HeldBias::view),
    };
    let bits = match config.criterion {
        Criterion::ObservedMass => observe::indicators(&Emulator, &call, borrow(&v), options.scale(problem.head_dim))?,
        Criterion::QueryKey | Criterion::KeyKey => indicators(&Emulator, &call)?,
        Criterion::Given => return without_scores(),
    };
    Tensor::from_vec(bits.download()?, shape, &Device::Cpu)
}

/// The merge indicators (B, H, N-1) of the kernel for scores (B, Hk, N), f32; H is that of the strategies, N at least
/// 2.
///
/// # Errors
/// Scores of another dtype or rank, or an error that the emulator detects.
pub fn decide_given(
    scores: &Tensor,
    heads: usize,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
) -> Result<Tensor> {
    let (batch, kv_heads, tokens) = scores.dims3()?;
    let call = ScoreCall {
        sizes: [batch, heads, kv_heads, tokens],
        strategies,
        config,
    };
    let scores = Emulator.upload(&scores.flatten_all()?.to_vec1::<f32>()?)?;
    let bits = call.indicators(&Emulator, &scores)?.download()?;
    Tensor::from_vec(bits, (batch, heads, tokens - 1), &Device::Cpu)
}

/// The attention kernels to run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Path {
    /// One thread per row.
    Spec,
    /// The kernels that a CUDA device runs.
    Fast,
}

/// Folds and attends: query (B, H, N, D), key and value (B, Hk, N, D), indicators u8 (B, H, N-1). With `shared` the
/// indicators of a KV head's query heads agree. Returns the output and each row's log-sum-exp in base 2, (B, H, N).
///
/// # Errors
/// As [`crate::attend`], or an error that the emulator detects.
pub fn fold_and_attend(
    qkv: [&Tensor; 3],
    bits: &Tensor,
    config: &CompressionConfig,
    options: &AttentionOptions,
    shared: bool,
    path: Path,
) -> Result<(Tensor, Tensor)> {
    for_dtype!(qkv[0], fold_and_attend_as(qkv, bits, config, options, shared, path))
}

fn fold_and_attend_as<T: GpuElement + Element>(
    qkv: [&Tensor; 3],
    bits: &Tensor,
    config: &CompressionConfig,
    options: &AttentionOptions,
    shared: bool,
    path: Path,
) -> Result<(Tensor, Tensor)> {
    let held = HeldCall::<T>::new(qkv, bits, options)?;
    let (problem, attention) = (held.problem, held.attention(config, options, shared));
    let attended = match path {
        Path::Spec => spec::forward(&Emulator, &attention.call(&attention.folded(&Emulator, false)?))?,
        Path::Fast => attention.forward(&Emulator, true)?,
    };
    let mut log_sum_exp = attended.saved()?.log_sum_exp.download()?;
    // The second half holds the rounding errors of the first.
    log_sum_exp.truncate(log_sum_exp.len() / 2);
    let shape = (problem.batch, problem.heads, problem.tokens);
    Ok((
        Tensor::from_vec(attended.output.download()?, qkv[0].dims(), &Device::Cpu)?,
        Tensor::from_vec(log_sum_exp, shape, &Device::Cpu)?,
    ))
}

/// The gradients of query, key and value for the sum of output · `grad_output`, as a CUDA device computes them.
///
/// # Errors
/// As [`fold_and_attend`].
pub fn attention_gradients(
    qkv: [&Tensor; 3],
    bits: &Tensor,
    config: &CompressionConfig,
    options: &AttentionOptions,
    shared: bool,
    grad_output: &Tensor,
) -> Result<[Tensor; 3]> {
    for_dtype!(
        qkv[0],
        attention_gradients_as(qkv, bits, config, options, shared, grad_output)
    )
}

fn attention_gradients_as<T: GpuElement + Element>(
    qkv: [&Tensor; 3],
    bits: &Tensor,
    config: &CompressionConfig,
    options: &AttentionOptions,
    shared: bool,
    grad_output: &Tensor,
) -> Result<[Tensor; 3]> {
    let call = HeldCall::<T>::new(qkv, bits, options)?;
    let attention = call.attention(config, options, shared);
    let attended = attention.forward(&Emulator, true)?;
    let (grad_output, _) = held::<T>(&grad_output.contiguous()?)?;
    let gradients = attention.backward(&Emulator, &attended.saved()?, &grad_output)?;
    let like = |slice: EmuSlice<T>, tensor: &Tensor| Tensor::from_vec(slice.download()?, tensor.dims(), &Device::Cpu);
    Ok([
        like(gradients.dq, qkv[0])?,
        like(gradients.dk, qkv[1])?,
        like(gradients.dv, qkv[2])?,
    ])
}

/// A bias in the emulator's memory, in f32 as a view of four axes.
pub(super) struct HeldBias(EmuSlice<f32>, usize, [usize; 4]);

impl HeldBias {
    pub(super) fn new(bias: &Tensor, dims: impl Into<Shape>) -> Result<Self> {
        let view = bias.to_dtype(DType::F32)?.broadcast_as(dims)?;
        let (storage, layout) = view.storage_and_layout();
        let strides = [0, 1, 2, 3].map(|axis| layout.stride()[axis]);
        let data = Emulator.upload(cpu_slice::<f32>(&storage)?)?;
        Ok(Self(data, layout.start_offset(), strides))
    }

    pub(super) fn view(&self) -> BiasBuffer<'_, Emulator> {
        BiasBuffer {
            data: &self.0,
            offset: self.1,
            strides: self.2,
        }
    }
}

/// A call's tensors in the emulator's memory.
struct HeldCall<T> {
    problem: Problem,
    q: Held<T>,
    k: Held<T>,
    v: Held<T>,
    bits: EmuSlice<u8>,
    bias: Option<HeldBias>,
    sinks: Option<EmuSlice<f32>>,
    column_bias: Option<EmuSlice<f32>>,
}

/// Sink logits in the emulator's memory.
fn held_sinks(options: &AttentionOptions) -> Result<Option<EmuSlice<f32>>> {
    let upload = |sinks: &Tensor| Emulator.upload(&bias_as(sinks, DType::F32)?.to_vec1::<f32>()?);
    options.sink_logits.as_ref().map(upload).transpose()
}

/// A column bias in the emulator's memory.
fn held_column_bias(options: &AttentionOptions) -> Result<Option<EmuSlice<f32>>> {
    let upload = |bias: &Tensor| Emulator.upload(&bias_as(bias, DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
    options.column_bias.as_ref().map(upload).transpose()
}

impl<T: GpuElement + Element> HeldCall<T> {
    fn new([q, k, v]: [&Tensor; 3], bits: &Tensor, options: &AttentionOptions) -> Result<Self> {
        let problem = Problem::new(q, k, v)?;
        let bias = options.bias.as_ref();
        let bias = bias.map(|bias| HeldBias::new(bias, &problem.bias_dims()));
        Ok(Self {
            problem,
            q: held(q)?,
            k: held(k)?,
            v: held(v)?,
            bits: Emulator.upload(&bits.flatten_all()?.to_vec1::<u8>()?)?,
            bias: bias.transpose()?,
            sinks: held_sinks(options)?,
            column_bias: held_column_bias(options)?,
        })
    }

    fn fold(&self, config: &CompressionConfig, shared: bool) -> FoldCall<'_, Emulator, T> {
        FoldCall {
            problem: self.problem,
            q: borrow(&self.q),
            k: borrow(&self.k),
            v: borrow(&self.v),
            bits: &self.bits,
            fold: config.fold,
            lists: lists(&self.problem, false, shared),
        }
    }

    fn attention<'a>(
        &'a self,
        config: &CompressionConfig,
        options: &'a AttentionOptions,
        shared: bool,
    ) -> Attention<'a, Emulator, T> {
        Attention {
            fold: self.fold(config, shared),
            dense: false,
            window: config.window,
            bias: self.bias.as_ref().map(HeldBias::view),
            sinks: self.sinks.as_ref(),
            column_bias: self.column_bias.as_ref(),
            options,
            part: Part::default(),
        }
    }
}

/// The sums [S, M] of the compression loss, and the gradients of S for query and key.
///
/// # Errors
/// As [`crate::compression_loss_terms`], or an error that the emulator detects.
pub fn loss(
    q: &Tensor,
    k: &Tensor,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
) -> Result<([f32; 2], [Tensor; 2])> {
    for_dtype!(q, loss_as(q, k, strategies, config))
}

fn loss_as<T: GpuElement + Element>(
    q: &Tensor,
    k: &Tensor,
    strategies: &HeadStrategies,
    config: &CompressionConfig,
) -> Result<([f32; 2], [Tensor; 2])> {
    let (problem, dims) = (Problem::of_pair(q, k)?, [q.dims().to_vec(), k.dims().to_vec()]);
    let (q, k) = (held::<T>(q)?, held::<T>(k)?);
    let call = DecideCall {
        problem,
        q: borrow(&q),
        k: borrow(&k),
        strategies,
        config,
        bias: None,
    };
    let [squared, merged] = loss::sums(&Emulator, &call)?.download()?[..] else {
        bail!("loss: expected two sums; this is a defect of the crate, please report it")
    };
    let [dq, dk] = loss::gradients(&Emulator, &call, &Emulator.upload(&[1.0, 0.0])?)?;
    let [q_dims, k_dims] = dims;
    Ok((
        [squared, merged],
        [
            Tensor::from_vec(dq.download()?, q_dims, &Device::Cpu)?,
            Tensor::from_vec(dk.download()?, k_dims, &Device::Cpu)?,
        ],
    ))
}

/// The gradients of columns and queries that [`unfold`] reads, all f32.
pub struct ColumnGradients<'a> {
    /// Gradients of far columns, (B, lists, N, D); past the last column nothing is read.
    pub far: &'a Tensor,
    /// Gradients of folded tokens, (B, lists, N, D).
    pub folded: &'a Tensor,
    /// Gradients of raw tokens, (B, lists, N, D).
    pub near: Option<&'a Tensor>,
    /// Gradients of folded queries, (B, H, N, D).
    pub queries: &'a Tensor,
}

/// Unfolds gradients: returns the gradients of keys (B, Hk, N, D) and of queries (B, H, N, D), in the dtype of `qkv`.
///
/// # Errors
/// An error that the emulator detects.
pub fn unfold(
    qkv: [&Tensor; 3],
    bits: &Tensor,
    config: &CompressionConfig,
    shared: bool,
    gradients: &ColumnGradients,
) -> Result<[Tensor; 2]> {
    for_dtype!(qkv[0], unfold_as(qkv, bits, config, shared, gradients))
}

fn unfold_as<T: GpuElement + Element>(
    [q, k, v]: [&Tensor; 3],
    bits: &Tensor,
    config: &CompressionConfig,
    shared: bool,
    gradients: &ColumnGradients,
) -> Result<[Tensor; 2]> {
    let dims = [k.dims().to_vec(), q.dims().to_vec()];
    let held = HeldCall::<T>::new([q, k, v], bits, &AttentionOptions::default())?;
    let call = held.fold(config, shared);
    let floats = |x: &Tensor| Emulator.upload(&x.flatten_all()?.to_vec1::<f32>()?);
    let near = gradients.near.map(floats).transpose()?;
    let (far, folded, queries) = (
        floats(gradients.far)?,
        floats(gradients.folded)?,
        floats(gradients.queries)?,
    );
    let columns = call.columns(&Emulator, false)?;
    let keys = call.unfold(&Emulator, Some((&columns.far_before, &far, &folded)), near.as_ref())?;
    let queries = call.unfold_queries(&Emulator, &queries, true)?;
    let [k_dims, q_dims] = dims;
    Ok([
        Tensor::from_vec(keys.download()?, k_dims, &Device::Cpu)?,
        Tensor::from_vec(queries.download()?, q_dims, &Device::Cpu)?,
    ])
}
