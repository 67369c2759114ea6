//! Attention forward and backward on CPU tensors under the emulator, from merge bits to gradients of q, k and v: for
//! tests.

use super::device::{EmuSlice, Emulator};
use super::{held, held_column_bias, held_sinks, HeldBias};
use crate::config::{AttentionOptions, CompressionConfig};
use crate::cpu::number::element::Element;
use crate::cuda::attention::{lists, Attention};
use crate::cuda::fold::FoldCall;
use crate::cuda::on_gpu::{Gpu, GpuElement};
use crate::cuda::operands::Part;
use crate::problem::Problem;
use candle_core::{DType, Device, Result, Tensor};

/// The results of one pass under the emulator.
pub struct EmulatedPass {
    /// (B, H, N, D)
    pub output: Tensor,
    /// (B, H, N), base 2.
    pub log_sum_exp: Tensor,
    /// Gradients of q, k and v, if a gradient of the output was given.
    pub gradients: Option<[Tensor; 3]>,
    /// The gradient of the column bias (B, Hk, N) in f32, if there is one and a gradient of the output was given.
    pub column_bias: Option<Tensor>,
}

/// Attends under the emulator: query (B, H, N, D), key and value (B, Hk, N, D), indicators u8 (B, H, N-1), and the
/// output's gradient (B, H, N, D) or none. `dense` tells the kernels that nothing is hidden.
///
/// # Errors
/// An error of the launchers or the emulator.
pub fn attend(
    qkv: [&Tensor; 3],
    indicators: &Tensor,
    config: &CompressionConfig,
    options: &AttentionOptions,
    dense: bool,
    grad_output: Option<&Tensor>,
) -> Result<EmulatedPass> {
    let pass = match qkv[0].dtype() {
        DType::F16 => attend_as::<half::f16>,
        DType::BF16 => attend_as::<half::bf16>,
        _ => attend_as::<f32>,
    };
    pass(qkv, indicators, config, options, dense, grad_output)
}

fn attend_as<T: GpuElement + Element>(
    [q, k, v]: [&Tensor; 3],
    indicators: &Tensor,
    config: &CompressionConfig,
    options: &AttentionOptions,
    dense: bool,
    grad_output: Option<&Tensor>,
) -> Result<EmulatedPass> {
    let gpu = &Emulator;
    let problem = Problem::new(q, k, v)?;
    let dims = [q, k, v].map(|x| x.dims().to_vec());
    let (q, k, v) = (held::<T>(q)?, held::<T>(k)?, held::<T>(v)?);
    let bits = gpu.upload(&indicators.flatten_all()?.to_vec1::<u8>()?)?;
    let fold = FoldCall {
        problem,
        q: (&q.0, q.1),
        k: (&k.0, k.1),
        v: (&v.0, v.1),
        bits: &bits,
        fold: config.fold,
        lists: lists(&problem, dense, config.group_rule.heads_agree()),
    };
    let bias = options.bias.as_ref();
    let bias = bias.map(|bias| HeldBias::new(bias, &problem.bias_dims())).transpose()?;
    let (sinks, column_bias) = (held_sinks(options)?, held_column_bias(options)?);
    let attention = Attention {
        fold,
        dense,
        window: config.window,
        bias: bias.as_ref().map(HeldBias::view),
        sinks: sinks.as_ref(),
        column_bias: column_bias.as_ref(),
        options,
        part: Part::default(),
    };
    let attended = attention.forward(gpu, true)?;
    let mut column_bias = None;
    let gradients = match grad_output {
        Some(grad_output) => {
            let grad = gpu.upload(&grad_output.flatten_all()?.to_vec1::<T>()?)?;
            let found = attention.backward(gpu, &attended.saved()?, &grad)?;
            let [q, k, v] = &dims;
            let tensor = |data: &EmuSlice<T>, dims: &Vec<usize>| {
                Tensor::from_vec(data.download()?, dims.as_slice(), &Device::Cpu)
            };
            let dims = (problem.batch, problem.kv_heads, problem.tokens);
            if let Some(found) = &found.column_bias {
                column_bias = Some(Tensor::from_vec(found.download()?, dims, &Device::Cpu)?);
            }
            Some([tensor(&found.dq, q)?, tensor(&found.dk, k)?, tensor(&found.dv, v)?])
        }
        None => None,
    };
    let [q_dims, ..] = dims;
    let mut log_sum_exp = attended.saved()?.log_sum_exp.download()?;
    // The second half holds the rounding errors of the first.
    log_sum_exp.truncate(log_sum_exp.len() / 2);
    Ok(EmulatedPass {
        log_sum_exp: Tensor::from_vec(log_sum_exp, &q_dims[..3], &Device::Cpu)?,
        output: Tensor::from_vec(attended.output.download()?, q_dims, &Device::Cpu)?,
        gradients,
        column_bias,
    })
}
