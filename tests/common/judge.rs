//! The judge of results: the f64 reference on the given values, and how far from it an honest implementation in the
//! same dtype may be, element by element.
//!
//! * Halves: at most 2 · u · |exact|, twice the error of exact arithmetic with one rounding at the end, plus the bound
//!   that [`super::budget`] derives for intermediate roundings. No other implementation is a yardstick: candle 0.11.1
//!   sums halves in halves, so that its own error grows with the row.
//! * f32 on a GPU: [`F32_TIMES`] the largest error of this crate's CPU path.

use super::budget::{budget, Side, Units};
use super::inputs::{values, Shape};
use super::settings::{reference_bits, Setting};
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::reference::{self, Array4, Indicators};
use candle_sfattention::{attend, AttentionOptions, MergePlan};

/// The names of [`Expected::exact`].
const NAMES: [&str; 4] = ["output", "dq", "dk", "dv"];

/// The CPU sums in many lanes at once, so its error grows with D / 16; a GPU thread's error grows with D. In 256
/// dimensions, with logits up to 30, it was 8 times as large.
pub const F32_TIMES: f64 = 10.0;

/// The share of their allowance that halves use somewhere, at least: one rounding alone uses up to half of its part. In
/// f32 the allowance comes from the CPU's own error, and a GPU may err less.
pub const FLOOR: f64 = 0.25;

/// Exact results for the given values, and the allowed error of each element.
pub struct Expected {
    pub bits: Tensor,
    /// The output, and the gradients of sum(output * grad_output) with respect to query, key and value; f64.
    pub exact: [Tensor; 4],
    /// One per element, or one for all.
    allowed: [Vec<f64>; 4],
    /// The gradient of a column bias (B, Hk, N), f64, and what is allowed of it.
    column_bias: Option<(Tensor, Vec<f64>)>,
    dtype: DType,
}

/// The largest share of an allowance that was used, and its place. A bound that no result comes near proves nothing.
#[derive(Default)]
pub struct Shares {
    largest: f64,
    at: String,
    halves: bool,
}

impl Shares {
    fn add(&mut self, share: f64, dtype: DType, at: impl FnOnce() -> String) {
        self.halves |= dtype != DType::F32;
        if share > self.largest {
            (self.largest, self.at) = (share, at());
        }
    }

    /// Prints the largest share; in halves it must be at least [`FLOOR`].
    pub fn report(&self) -> Result<()> {
        println!("largest share of the allowance used: {:.2} ({})", self.largest, self.at);
        ensure!(
            !self.halves || self.largest >= FLOOR,
            "expected results that use {FLOOR} of their allowance somewhere, got {}: the bound proves little",
            self.largest
        );
        Ok(())
    }
}

/// The largest of |got - exact|; infinite for a NaN.
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
    /// Computes the expected results on the CPU, for one setting of the table and results of `side`.
    pub fn new(
        side: Side,
        qkv: &[Tensor; 3],
        grad_output: &Tensor,
        setting: &Setting,
        options: &AttentionOptions,
    ) -> Result<Self> {
        let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
        let (q, k, v, grad, config) = (q?, k?, v?, Array4::from_tensor(grad_output)?, &setting.config);
        let [batch, heads, tokens, dim] = q.dims;
        let strategies = setting.strategies(&Shape(batch, heads, k.dims[1], tokens, dim))?;
        let bits = reference_bits([&q, &k, &v], &strategies, config, options)?;
        let exact = exact([&q, &k, &v], &grad, &bits, setting, options)?;
        let (tensor, dtype) = (bits.to_tensor(&Device::Cpu)?, qkv[0].dtype());
        let mut allowed = [const { Vec::new() }; 4];
        let mut column_bias = None;
        if let Some(bias) = &options.column_bias {
            let exact = reference::column_bias_gradients(&q, &k, &v, &grad, &bits, config, options)?;
            column_bias = Some((Tensor::from_vec(exact, bias.dims(), &Device::Cpu)?, Vec::new()));
        }
        // The CPU's error may be small by luck if few numbers are summed, or if they cancel: the terms are about 1, so
        // a remainder is known only to a part of a rounding of 1.
        let of_cpu = |cpu: &Tensor, exact: &Tensor| -> Result<f64> {
            Ok(F32_TIMES * largest_error(cpu, exact)? + 4.0 * 2f64.powi(-24) * largest(exact)?.max(1.0))
        };
        if dtype == DType::F32 {
            let plan = MergePlan::from_indicators(&tensor, config)?;
            let cpu = differentiate(qkv, grad_output, |q, k, v| Ok(attend(q, k, v, &plan, options)?))?;
            for (index, allowed) in allowed.iter_mut().enumerate() {
                allowed.push(of_cpu(&cpu[index], &exact[index])?);
            }
            if let (Some((exact, allowed)), Some(bias)) = (&mut column_bias, &options.column_bias) {
                let bias = Var::from_tensor(bias)?;
                let options = AttentionOptions {
                    column_bias: Some(bias.as_tensor().clone()),
                    ..options.clone()
                };
                let output = attend(&qkv[0], &qkv[1], &qkv[2], &plan, &options)?;
                let store = (output * grad_output)?.sum_all()?.backward()?;
                allowed.push(of_cpu(store.get(&bias).context("no gradient")?, exact)?);
            }
        } else {
            // A window that no token leaves has no column that a bias fades.
            let fades = options.column_bias.as_ref().filter(|_| config.window + 1 < tokens);
            let units = Units::new(
                side,
                dtype,
                dim,
                &AttentionOptions {
                    column_bias: fades.cloned(),
                    ..options.clone()
                },
            );
            let (budgets, of_columns) = budget([&q, &k, &v, &grad], &bits, setting, options, units)?;
            let rounding = |x: &f64| 2.0 * (units.last * x.abs() + units.least);
            if let Some((exact, allowed)) = &mut column_bias {
                let exact = values(exact)?;
                allowed.extend(exact.iter().zip(of_columns).map(|(x, b)| rounding(x) + b));
            }
            for ((allowed, exact), budget) in allowed.iter_mut().zip(&exact).zip(budgets) {
                *allowed = values(exact)?
                    .iter()
                    .zip(budget.data)
                    .map(|(x, b)| rounding(x) + b)
                    .collect();
            }
        }
        Ok(Self {
            bits: tensor,
            exact,
            allowed,
            column_bias,
            dtype,
        })
    }

    /// [`Self::check`] of the output alone.
    pub fn check_output(&self, what: &str, got: &Tensor, shares: &mut Shares) -> Result<()> {
        self.check_part(what, 0, got, shares)
    }

    /// Asserts that every element is within its allowance.
    pub fn check(&self, what: &str, got: [&Tensor; 4], shares: &mut Shares) -> Result<()> {
        (0..4).try_for_each(|index| self.check_part(what, index, got[index], shares))
    }

    /// The same for the gradient of the column bias.
    pub fn check_column_bias(&self, what: &str, got: &Tensor, shares: &mut Shares) -> Result<()> {
        let (exact, allowed) = self.column_bias.as_ref().context("no column bias")?;
        self.check_numbers(what, ("column bias", exact, allowed), got, shares)
    }

    fn check_part(&self, what: &str, index: usize, got: &Tensor, shares: &mut Shares) -> Result<()> {
        let part = (NAMES[index], &self.exact[index], &self.allowed[index]);
        self.check_numbers(what, (part.0, part.1, part.2), got, shares)
    }

    fn check_numbers(
        &self,
        what: &str,
        (name, exact, allowed): (&str, &Tensor, &[f64]),
        got: &Tensor,
        shares: &mut Shares,
    ) -> Result<()> {
        ensure!(
            got.dims() == exact.dims(),
            "{what} {name}: expected shape {:?}, got {:?}",
            exact.dims(),
            got.dims()
        );
        for (at, (got, exact)) in values(got)?.into_iter().zip(values(exact)?).enumerate() {
            let (error, allowed) = ((got - exact).abs(), allowed[at.min(allowed.len() - 1)]);
            // False for a NaN.
            ensure!(
                error <= allowed,
                "{what} {name}: element {at} is {got:e}, expected {exact:e} within {allowed:e}: {:.2} of it",
                error / allowed
            );
            if allowed > 0.0 {
                shares.add(error / allowed, self.dtype, || {
                    format!("{:?}, {name}, {what}", self.dtype)
                });
            }
        }
        Ok(())
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
