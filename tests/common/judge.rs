//! What a GPU's results are held against: the f64 reference, and how far from it an honest implementation in the same
//! dtype lies. For halves that is candle's own operations, which keep every weight for their gradients; for f32 this
//! crate's CPU path.

use super::inputs::{values, Shape};
use super::plain::plain_attention;
use super::settings::{reference_bits, Setting};
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::reference::{self, Array4, Indicators};
use candle_sfattention::{attend, AttentionOptions, MergePlan};

/// The names of [`Expected::exact`].
const NAMES: [&str; 4] = ["output", "dq", "dk", "dv"];

/// The CPU's sums run in many lanes at once, so its error grows with D / 16; that of a GPU's thread grows with D. In 256
/// dimensions, where logits reach 30, it was 8 times as large.
pub const F32_TIMES: f64 = 10.0;

/// Exact results for the values that were given, and what their largest error may be.
pub struct Expected {
    pub bits: Tensor,
    /// The output, and the gradients of sum(output * grad_output) with respect to query, key and value; f64.
    pub exact: [Tensor; 4],
    pub allowed: [f64; 4],
}

/// The largest of |got - exact|; a NaN is an error without bound.
pub fn largest_error(got: &Tensor, exact: &Tensor) -> Result<f64> {
    ensure!(
        got.dims() == exact.dims(),
        "shape {:?}, expected {:?}",
        got.dims(),
        exact.dims()
    );
    let mut largest: f64 = 0.0;
    for (got, exact) in values(got)?.into_iter().zip(values(exact)?) {
        let error = (got - exact).abs();
        largest = if error.is_nan() {
            f64::INFINITY
        } else {
            error.max(largest)
        };
    }
    Ok(largest)
}

pub fn largest(exact: &Tensor) -> Result<f64> {
    Ok(values(exact)?.iter().fold(0.0, |most: f64, x| most.max(x.abs())))
}

/// Output and gradients of sum(output * grad_output) of `attention`.
pub fn differentiate(
    qkv: &[Tensor; 3],
    grad_output: &Tensor,
    attention: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
) -> Result<[Tensor; 4]> {
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Var::from_tensor);
    let (q, k, v) = (q?, k?, v?);
    let output = attention(&q, &k, &v)?;
    let store = (&output * grad_output)?.sum_all()?.backward()?;
    let gradient = |var: &Var| store.get(var).cloned().context("no gradient");
    Ok([output.detach(), gradient(&q)?, gradient(&k)?, gradient(&v)?])
}

impl Expected {
    /// On the CPU, for one setting of the table.
    pub fn new(qkv: &[Tensor; 3], grad_output: &Tensor, setting: &Setting, options: &AttentionOptions) -> Result<Self> {
        let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
        let (q, k, v, config) = (q?, k?, v?, &setting.config);
        let [batch, heads, tokens, dim] = q.dims;
        let strategies = setting.strategies(&Shape(batch, heads, k.dims[1], tokens, dim))?;
        let bits = reference_bits([&q, &k, &v], &strategies, config, options)?;
        let exact = exact(
            [&q, &k, &v],
            &Array4::from_tensor(grad_output)?,
            &bits,
            setting,
            options,
        )?;
        let tensor = bits.to_tensor(&Device::Cpu)?;
        let yardstick = match qkv[0].dtype() {
            DType::F32 => {
                let plan = MergePlan::from_indicators(&tensor, config)?;
                differentiate(qkv, grad_output, |q, k, v| Ok(attend(q, k, v, &plan, options)?))?
            }
            _ => differentiate(qkv, grad_output, |q, k, v| {
                plain_attention([q, k, v], &bits, config, options)
            })?,
        };
        let (times, rounding) = match qkv[0].dtype() {
            DType::F32 => (F32_TIMES, 4.0 * 2f64.powi(-24)),
            DType::F16 => (2.0, 2f64.powi(-13)),
            _ => (2.0, 2f64.powi(-10)),
        };
        let mut allowed = [0.0; 4];
        for (index, allowed) in allowed.iter_mut().enumerate() {
            // A yardstick may be lucky, where few numbers are summed, or cancel: the terms are about 1, and what is
            // left of them is known to a part of a rounding of 1 only.
            let error = largest_error(&yardstick[index], &exact[index])?;
            *allowed = times * error + rounding * largest(&exact[index])?.max(1.0);
        }
        Ok(Self {
            bits: tensor,
            exact,
            allowed,
        })
    }

    /// [`Self::check`] of the output alone.
    pub fn check_output(&self, what: &str, got: &Tensor) -> Result<()> {
        let (error, allowed) = (largest_error(got, &self.exact[0])?, self.allowed[0]);
        ensure!(
            error <= allowed,
            "{what}: expected an error of at most {allowed:e}, got {error:e}"
        );
        Ok(())
    }

    /// Every result is as close as it may be expected to be; returns the largest share of what was allowed.
    pub fn check(&self, what: &str, got: [&Tensor; 4]) -> Result<f64> {
        let mut worst: f64 = 0.0;
        for (index, got) in got.into_iter().enumerate() {
            let (error, allowed) = (largest_error(got, &self.exact[index])?, self.allowed[index]);
            ensure!(
                error <= allowed,
                "{what} {}: expected an error of at most {allowed:e}, got {error:e}",
                NAMES[index]
            );
            worst = worst.max(if allowed > 0.0 { error / allowed } else { 0.0 });
        }
        Ok(worst)
    }
}

fn exact(
    [q, k, v]: [&Array4; 3],
    grad_output: &Array4,
    bits: &Indicators,
    setting: &Setting,
    options: &AttentionOptions,
) -> Result<[Tensor; 4]> {
    let output = reference::attention(q, k, v, bits, &setting.config, options)?;
    let (dq, dk, dv) = reference::attention_gradients(q, k, v, grad_output, bits, &setting.config, options)?;
    let [a, b, c, d] = [output, dq, dk, dv].map(|x| x.to_tensor(DType::F64, &Device::Cpu));
    Ok([a?, b?, c?, d?])
}
