//! Results of the fast path and of the cache against the reference.

use super::case::{Case, Layout, Mask};
use super::inputs::{options, part_of_bias, strategies, Inputs};
use super::near;
use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::reference::{self, Array4, Indicators};
use candle_sfattention::{
    attend, AttentionOptions, CacheOptions, CompressedKvCache, Criterion, Fold, HeadStrategies, MergePlan,
};

pub fn check(case: &Case) -> Result<()> {
    let inputs = Inputs::new(case)?;
    let (options, strategies) = (options(case)?, strategies(case)?);
    let [q, k, v] = [0, 1, 2].map(|part| Array4::from_tensor(&inputs.qkv[part]));
    let exact = Exact {
        case,
        inputs: [q?, k?, v?],
        grad_output: Array4::from_tensor(&inputs.grad_output)?,
        options: &options,
        near: false,
    };
    let [q, k, v] = &exact.inputs;
    let exact = Exact {
        near: near::any(case, [q, k, v], &strategies, &options)?,
        ..exact.clone()
    };
    let refused = |error: candle_core::Error| match may_refuse(case) {
        true => Ok(()),
        false => Err(anyhow::Error::msg(format!("refused: {error}"))),
    };
    let bits = match plan(&exact, &inputs, &strategies) {
        Ok(bits) => bits,
        Err(Failure::Refused(error)) => return refused(error),
        Err(Failure::Wrong(error)) => return Err(error),
    };
    match attention(&exact, &inputs, &bits) {
        Err(Failure::Refused(error)) => refused(error)?,
        Err(Failure::Wrong(error)) => return Err(error),
        Ok(()) => {}
    }
    if case.options_are_cached() && !exact.near {
        match cache(&exact, &inputs, &strategies, &bits) {
            Err(Failure::Refused(error)) => refused(error)?,
            Err(Failure::Wrong(error)) => return Err(error),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Whether an error is a right answer: a layout without a contiguous last axis, columns hidden by a bias while tokens
/// are folded, values that the storage cannot hold.
fn may_refuse(case: &Case) -> bool {
    let hides = case
        .bias
        .is_some_and(|bias| matches!(bias.mask, Mask::Hides | Mask::Padding));
    let narrow = case.storage == Some(DType::F16) || case.dtype == DType::F16;
    case.layouts.contains(&Layout::Turned) || hides || narrow && (case.size > 100.0 || case.bad.is_some())
}

enum Failure {
    /// Refused by the crate.
    Refused(candle_core::Error),
    Wrong(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Wrong(error)
    }
}

#[derive(Clone)]
struct Exact<'a> {
    case: &'a Case,
    inputs: [Array4; 3],
    grad_output: Array4,
    options: &'a AttentionOptions,
    /// Whether rounding may change a decision.
    near: bool,
}

impl Exact<'_> {
    fn output(&self, bits: &Indicators) -> Result<Array4> {
        let [q, k, v] = &self.inputs;
        Ok(reference::attention(q, k, v, bits, &self.case.config, self.options)?)
    }

    /// The allowed difference of one result in this dtype: roundings of logits and of weights, of numbers as large as
    /// the values.
    fn tolerance(&self, dtype: DType) -> f64 {
        let norms = [0, 1].map(|part| {
            let rows = self.inputs[part].data.chunks(self.case.dim);
            rows.map(reference::norm)
                .filter(|norm| norm.is_finite())
                .fold(0.0, f64::max)
        });
        // Pair sums add two queries and two keys.
        let fold = match self.case.config.fold {
            Fold::PairSum => 4.0,
            Fold::Mean | Fold::Drop => 1.0,
        };
        let logit = self.options.scale(self.case.dim).abs() * norms[0] * norms[1] * fold;
        // Sums of equal numbers drift with their count; sums of halves are f32.
        let drift = match dtype {
            DType::F16 | DType::BF16 => 0.0,
            _ => self.case.tokens as f64 / 4.0,
        };
        epsilon(dtype) * largest(&self.inputs[2].data) * (8.0 + drift + 4.0 * logit)
    }
}

fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 2f64.powi(-52),
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => 2f64.powi(-23),
    }
}

fn largest(data: &[f64]) -> f64 {
    data.iter()
        .filter(|x| x.is_finite())
        .fold(0.0, |most, x| most.max(x.abs()))
}

fn plan(exact: &Exact, inputs: &Inputs, strategies: &HeadStrategies) -> Result<Indicators, Failure> {
    let (case, [q, k, v]) = (exact.case, &inputs.qkv);
    let plan = MergePlan::new(q, k, v, strategies, &case.config, exact.options).map_err(Failure::Refused)?;
    let bits = Indicators::from_tensor(plan.indicators()).map_err(anyhow::Error::from)?;
    let [q, k, v] = &exact.inputs;
    let expected = match case.config.criterion {
        Criterion::ObservedMass => reference::observed_indicators(q, k, v, strategies, &case.config, exact.options),
        Criterion::QueryKey | Criterion::KeyKey => {
            reference::indicators_under(q, k, strategies, &case.config, exact.options.bias.as_ref())
        }
    };
    let expected = expected.map_err(anyhow::Error::from)?;
    if bits != expected && !exact.near {
        let at = bits
            .bits
            .iter()
            .zip(&expected.bits)
            .position(|(got, expected)| got != expected);
        return Err(Failure::Wrong(anyhow::anyhow!(
            "bits: differ first at {at:?} of {:?}",
            bits.dims
        )));
    }
    Ok(bits)
}

fn attention(exact: &Exact, inputs: &Inputs, bits: &Indicators) -> Result<(), Failure> {
    let case = exact.case;
    let tensor = bits.to_tensor(&Device::Cpu).map_err(anyhow::Error::from)?;
    let plan = MergePlan::from_indicators(&tensor, &case.config).map_err(Failure::Refused)?;
    let [q, k, v] = &inputs.qkv;
    let output = attend(q, k, v, &plan, exact.options).map_err(Failure::Refused)?;
    let expected = exact.output(bits)?;
    let tolerance = exact.tolerance(case.dtype);
    compare("output", &output, &expected, tolerance, case.dtype)?;
    let vars = [q, k, v].map(Var::from_tensor);
    let [q, k, v] = vars.map(|var| var.map_err(anyhow::Error::from));
    let (q, k, v) = (q?, k?, v?);
    let gradients = || -> candle_core::Result<_> {
        let output = attend(&q, &k, &v, &plan, exact.options)?;
        (&output * &inputs.grad_output)?.sum_all()?.backward()
    };
    let store = gradients().map_err(Failure::Refused)?;
    let [xq, xk, xv] = &exact.inputs;
    let (dq, dk, dv) =
        reference::attention_gradients(xq, xk, xv, &exact.grad_output, bits, &case.config, exact.options)
            .map_err(anyhow::Error::from)?;
    let scale = exact.options.scale(case.dim).abs();
    let (dim, many) = (case.dim as f64, (case.tokens * case.heads / case.kv_heads) as f64);
    // A weight's gradient is as large as a row of the output's gradient times a value, and many rows add up in a key's.
    let weight = tolerance * dim * largest(&exact.grad_output.data) * scale * 4.0;
    let by_key = weight * largest(&xk.data);
    let by_query = weight * largest(&xq.data) * many.sqrt();
    let by_value = tolerance / largest(&xv.data).max(1e-30) * many.sqrt();
    for (name, var, expected, tolerance) in [
        ("dq", &q, &dq, by_key),
        ("dk", &k, &dk, by_query),
        ("dv", &v, &dv, by_value),
    ] {
        let got = store.get(var).with_context(|| format!("{name}: no gradient"))?;
        let tolerance = tolerance + 8.0 * epsilon(case.dtype) * largest(&expected.data);
        compare(name, got, expected, tolerance, case.dtype)?;
    }
    Ok(())
}

fn cache(exact: &Exact, inputs: &Inputs, strategies: &HeadStrategies, bits: &Indicators) -> Result<(), Failure> {
    let case = exact.case;
    let options = CacheOptions {
        storage: case.storage,
        ..Default::default()
    };
    let new = CompressedKvCache::new(strategies.clone(), case.config.clone(), options);
    let mut cache = new.map_err(Failure::Refused)?;
    // What the reference refuses the cache may refuse, or take in without rows; its rows have no yardstick.
    let expected = match exact.output(bits) {
        Err(_) if may_refuse(case) => None,
        expected => Some(expected?),
    };
    // Stored numbers are rounded before and after they are folded.
    let storage = case.storage.unwrap_or(case.dtype);
    let tolerance = exact.tolerance(case.dtype) + 2.0 * exact.tolerance(storage);
    // An append without rows has no options, hence no scale for the decision.
    let all_rows = case.config.criterion.observes() && case.scale.is_some();
    let mut start = 0;
    for (chunk, rows) in case.chunks.iter().cycle() {
        let count = (*chunk).min(case.tokens - start);
        if count == 0 {
            break;
        }
        let part = |x: &Tensor| x.narrow(2, start, count).map_err(anyhow::Error::from);
        let (q, k, v) = (part(&inputs.qkv[0])?, part(&inputs.qkv[1])?, part(&inputs.qkv[2])?);
        if !rows && !all_rows {
            cache.append(&q, &k, &v).map_err(Failure::Refused)?;
        } else {
            let bias = exact.options.bias.as_ref();
            let options = AttentionOptions {
                bias: bias.map(|bias| part_of_bias(bias, start, count)).transpose()?,
                ..exact.options.clone()
            };
            let output = cache
                .append_and_attend(&q, &k, &v, &options)
                .map_err(Failure::Refused)?;
            if let Some(expected) = &expected {
                let rows = tokens(expected, start, count);
                let what = format!("cache, {count} tokens at {start}");
                compare(&what, &output, &rows, tolerance, case.dtype)?;
            }
        }
        start += count;
        ensure_len(&cache, start)?;
    }
    Ok(())
}

fn ensure_len(cache: &CompressedKvCache, tokens: usize) -> Result<()> {
    ensure!(
        cache.seq_len() == tokens,
        "cache: {} tokens, expected {tokens}",
        cache.seq_len()
    );
    let most = cache.lens().into_iter().flatten().max().unwrap_or(0);
    ensure!(most <= tokens, "cache: {most} entries of {tokens} tokens");
    Ok(())
}

fn tokens(array: &Array4, start: usize, count: usize) -> Array4 {
    let [batch, heads, _, dim] = array.dims;
    let mut part = Array4::zeros([batch, heads, count, dim]);
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        for token in 0..count {
            part.row_mut(b, h, token)
                .copy_from_slice(array.row(b, h, start + token));
        }
    }
    part
}

/// Asserts NaN exactly where it is expected, and numbers within the tolerance, or infinite beyond the dtype's range.
fn compare(what: &str, got: &Tensor, expected: &Array4, tolerance: f64, dtype: DType) -> Result<()> {
    ensure!(got.dims() == expected.dims, "{what}: shape {:?}", got.dims());
    ensure!(got.dtype() == dtype, "{what}: dtype {:?}", got.dtype());
    let got = got.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let bound = if dtype == DType::F16 {
        65504.0
    } else {
        f64::from(f32::MAX)
    };
    for (at, (got, expected)) in got.iter().zip(&expected.data).enumerate() {
        let right = match expected.is_nan() {
            true => got.is_nan(),
            // The expected number may be beyond the dtype's range.
            false if expected.abs() + tolerance >= bound => true,
            false => (got - expected).abs() <= tolerance,
        };
        if !right {
            bail!("{what}: entry {at} is {got}, expected {expected} within {tolerance:e}");
        }
    }
    Ok(())
}
