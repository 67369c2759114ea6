//! The kernels under the emulator on inputs at the edge: masks by bias, logits of any size, numbers that are not
//! finite, any strides. Everything is held against the f64 reference: NaN where it has NaN, zeros where it has zeros.

mod bad_numbers;
mod decisions;
mod large_logits;
mod masks;
mod strides;

use crate::common::inputs::{values, Shape};
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::emulation::{self, EmulatedPass};
use candle_sfattention::reference::{self, Array4, Indicators};
use candle_sfattention::{AttentionOptions, CompressionConfig, Fold};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// The family of kernels that run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kernels {
    Plain,
    Deterministic,
    Warpgroups,
    ShortWarpgroups,
}

impl Kernels {
    /// The families that exist for such a call.
    fn of(dtype: DType, dim: usize, options: &AttentionOptions) -> Vec<Self> {
        let lean = options.bias.is_none() && options.dropout.is_none() && dim <= 128;
        match (dtype, lean) {
            (DType::F32, _) => vec![Self::Plain],
            (_, false) => vec![Self::Plain, Self::Deterministic],
            (_, true) => vec![
                Self::Plain,
                Self::Deterministic,
                Self::Warpgroups,
                Self::ShortWarpgroups,
            ],
        }
    }

    fn run<R>(self, run: impl FnOnce() -> R) -> R {
        match self {
            Self::Warpgroups => emulation::with_warpgroups(0, run),
            Self::ShortWarpgroups => emulation::with_warpgroups(usize::MAX, run),
            Self::Plain | Self::Deterministic => run(),
        }
    }
}

/// One call and the gradient of its output.
struct Call<'a> {
    qkv: &'a [Tensor; 3],
    grad_output: Tensor,
    bits: Tensor,
    config: &'a CompressionConfig,
    options: &'a AttentionOptions,
    /// Families that are not run.
    without: Vec<Kernels>,
}

impl<'a> Call<'a> {
    /// A call of `shape`, with an output gradient of numbers about 1.
    fn new(
        qkv: &'a [Tensor; 3],
        bits: Tensor,
        config: &'a CompressionConfig,
        options: &'a AttentionOptions,
    ) -> Result<Self> {
        let (batch, heads, tokens, dim) = qkv[0].dims4()?;
        let [_, _, grad_output] = Shape(batch, heads, heads, tokens, dim).qkv(77, qkv[0].dtype())?;
        Ok(Self {
            qkv,
            grad_output,
            bits,
            config,
            options,
            without: Vec::new(),
        })
    }

    /// Output and gradients, f64.
    fn exact(&self) -> Result<[Tensor; 4]> {
        let [q, k, v] = [&self.qkv[0], &self.qkv[1], &self.qkv[2]].map(Array4::from_tensor);
        let (q, k, v, grad) = (q?, k?, v?, Array4::from_tensor(&self.grad_output)?);
        let bits = Indicators::from_tensor(&self.bits)?;
        let output = reference::attention(&q, &k, &v, &bits, self.config, self.options)?;
        let (dq, dk, dv) = reference::attention_gradients(&q, &k, &v, &grad, &bits, self.config, self.options)?;
        let [a, b, c, d] = [output, dq, dk, dv].map(|x| x.to_tensor(DType::F64, &Device::Cpu));
        Ok([a?, b?, c?, d?])
    }

    fn run(&self, dense: bool, kernels: Kernels) -> Result<EmulatedPass> {
        let options = AttentionOptions {
            deterministic: kernels == Kernels::Deterministic,
            ..self.options.clone()
        };
        let ([q, k, v], grad) = (self.qkv, Some(&self.grad_output));
        let pass = kernels.run(|| emulation::attend([q, k, v], &self.bits, self.config, &options, dense, grad));
        Ok(pass?)
    }

    /// Runs every family of kernels; errors stay within these shares of the largest number of output, dq, dk and dv.
    fn check(&self, what: &str, shares: [f64; 4]) -> Result<()> {
        let exact = self.exact()?;
        let hidden = values(&self.bits)?.iter().any(|bit| *bit != 0.0);
        let (dtype, dim) = (self.qkv[0].dtype(), self.qkv[0].dim(3)?);
        for dense in [false, true] {
            if dense && hidden {
                continue;
            }
            for kernels in Kernels::of(dtype, dim, self.options) {
                if self.without.contains(&kernels) {
                    continue;
                }
                let what = format!("{what} {dtype:?} dense {dense} {kernels:?}");
                let pass = self.run(dense, kernels).with_context(|| what.clone())?;
                let [dq, dk, dv] = &pass.gradients.context("gradients were asked for")?;
                for (index, got) in [&pass.output, dq, dk, dv].into_iter().enumerate() {
                    let what = format!("{what} {}", ["output", "dq", "dk", "dv"][index]);
                    agree(&what, got, &exact[index], shares[index])?;
                    // A row that sees nothing, a token that no row sees, or one whose every weight was dropped.
                    let unseen = if index < 2 { &exact[0] } else { &exact[3] };
                    if index != 2 || self.options.dropout.is_none() {
                        zeros_agree(&what, got, unseen)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Asserts NaN where `exact` is NaN, and elsewhere an error within a share of its largest finite number, or of 1.
fn agree(what: &str, got: &Tensor, exact: &Tensor, share: f64) -> Result<()> {
    ensure!(got.dims() == exact.dims(), "{what}: shape {:?}", got.dims());
    let (got, exact) = (values(got)?, values(exact)?);
    let finite = exact.iter().filter(|x| x.is_finite());
    let allowed = share * finite.fold(1.0, |most: f64, x| most.max(x.abs()));
    for (index, (got, exact)) in got.into_iter().zip(exact).enumerate() {
        let fits = match exact {
            x if x.is_nan() => got.is_nan(),
            x => (got - x).abs() <= allowed,
        };
        ensure!(
            fits,
            "{what}: element {index} is {got}, expected {exact} within {allowed:e}"
        );
    }
    Ok(())
}

/// Asserts that rows are zeros where the rows of `unseen` are.
fn zeros_agree(what: &str, got: &Tensor, unseen: &Tensor) -> Result<()> {
    let dim = got.dim(3)?;
    let (got, unseen) = (values(got)?, values(unseen)?);
    for (row, (got, unseen)) in got.chunks(dim).zip(unseen.chunks(dim)).enumerate() {
        let zeros = |x: &[f64]| x.iter().all(|x| *x == 0.0);
        ensure!(
            !zeros(unseen) || zeros(got),
            "{what}: row {row} is {got:?}, expected zeros"
        );
    }
    Ok(())
}

/// The allowed error of a dtype's kernels.
fn share_of(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 6e-3,
        _ => 4e-2,
    }
}

/// Merge indicators (B, H, N-1) from a rule over tokens.
fn bits_of(shape: &Shape, hides: impl Fn(usize) -> bool) -> Result<Tensor> {
    let &Shape(batch, heads, _, tokens, _) = shape;
    let pairs = tokens - 1;
    let bits: Vec<u8> = (0..batch * heads * pairs)
        .map(|i| hides(i % pairs.max(1)).into())
        .collect();
    Ok(Tensor::from_vec(bits, (batch, heads, pairs), &Device::Cpu)?)
}

/// A bias (B, H, N, N) from its entries.
fn bias_of(shape: &Shape, dtype: DType, entry: impl Fn([usize; 4]) -> f32) -> Result<Tensor> {
    let &Shape(batch, heads, _, tokens, _) = shape;
    let at = |i: usize| {
        entry([
            i / (heads * tokens * tokens),
            i / (tokens * tokens) % heads,
            i / tokens % tokens,
            i % tokens,
        ])
    };
    let data: Vec<f32> = (0..batch * heads * tokens * tokens).map(at).collect();
    Ok(Tensor::from_vec(data, (batch, heads, tokens, tokens), &Device::Cpu)?.to_dtype(dtype)?)
}

fn with_bias(bias: Tensor) -> AttentionOptions {
    AttentionOptions {
        bias: Some(bias),
        ..Default::default()
    }
}
