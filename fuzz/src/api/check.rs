//! Results of the fast path against the reference.

use super::cached;
use super::case::Case;
use super::exact::{compare, epsilon, largest, Exact};
use super::inputs::{options, strategies, Inputs};
use super::near;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::reference::{self, Array4, Indicators};
use candle_sfattention::{attend, AttentionOptions, HeadStrategies, MergePlan};

pub fn check(case: &Case) -> Result<()> {
    let inputs = Inputs::new(case)?;
    let (options, strategies) = (options(case)?, strategies(case)?);
    let exact = exact(
        case,
        &inputs.qkv,
        Array4::from_tensor(&inputs.grad_output)?,
        &options,
        &strategies,
    )?;
    let bits = match plan(&exact, &inputs, &strategies) {
        Ok(bits) => bits,
        Err(failure) => return failure.judged(&exact),
    };
    attention(&exact, &inputs, &bits).or_else(|failure| failure.judged(&exact))?;
    let [q, k, v] = &inputs.qkv;
    let mixed = case
        .mixed
        .map(|[dq, dk, dv]| -> Result<_> { Ok([q.to_dtype(dq)?, k.to_dtype(dk)?, v.to_dtype(dv)?]) });
    for qkv in [Some(inputs.qkv.clone()), mixed.transpose()?].into_iter().flatten() {
        if case.is_cached() {
            // A cache decides and attends by the numbers that it stores.
            let storage = case.storage.unwrap_or(qkv[1].dtype());
            let stored = [qkv[0].clone(), qkv[1].to_dtype(storage)?, qkv[2].to_dtype(storage)?];
            let exact = self::exact(case, &stored, exact.grad_output.clone(), &options, &strategies)?;
            if !exact.near {
                let bits = exact.bits(&strategies)?;
                cached::check(&exact, &qkv, &strategies, &bits).or_else(|failure| failure.judged(&exact))?;
            }
        }
    }
    Ok(())
}

fn exact<'a>(
    case: &'a Case,
    qkv: &[Tensor; 3],
    grad_output: Array4,
    options: &'a AttentionOptions,
    strategies: &HeadStrategies,
) -> Result<Exact<'a>> {
    let [q, k, v] = [0, 1, 2].map(|part| Array4::from_tensor(&qkv[part]));
    let inputs = [q?, k?, v?];
    let [q, k, v] = &inputs;
    Ok(Exact {
        case,
        near: near::any(case, [q, k, v], strategies, options)?,
        narrow: case.storage == Some(DType::F16) || qkv.iter().any(|x| x.dtype() == DType::F16),
        inputs,
        grad_output,
        options,
    })
}

pub enum Failure {
    /// Refused by the crate.
    Refused(candle_core::Error),
    Wrong(anyhow::Error),
}

impl Failure {
    fn judged(self, exact: &Exact) -> Result<()> {
        match self {
            Self::Refused(_) if exact.may_refuse() => Ok(()),
            Self::Refused(error) => Err(anyhow::Error::msg(format!("refused: {error}"))),
            Self::Wrong(error) => Err(error),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Wrong(error)
    }
}

/// The decisions; where a part of the rows cannot take them, those of all rows, or none.
fn plan(exact: &Exact, inputs: &Inputs, strategies: &HeadStrategies) -> Result<Indicators, Failure> {
    let case = exact.case;
    let expected = exact.bits(strategies)?;
    let some = case.queries < case.tokens;
    let decides = !some || case.is_off() || case.causal && !case.config.criterion.reads_queries();
    if decides {
        let [q, k, v] = &inputs.of_rows(case)?;
        let plan = MergePlan::new(q, k, v, strategies, &case.config, exact.options).map_err(Failure::Refused)?;
        let bits = Indicators::from_tensor(plan.indicators()).map_err(anyhow::Error::from)?;
        if bits != expected && !exact.near {
            let mut pairs = bits.bits.iter().zip(&expected.bits);
            let at = pairs.position(|(got, expected)| got != expected);
            return Err(Failure::Wrong(anyhow::anyhow!(
                "bits: differ first at {at:?} of {:?}",
                bits.dims
            )));
        }
        if !some {
            return Ok(bits);
        }
    }
    let folds = case.config.fold.folds_queries() || !case.causal;
    Ok(Indicators {
        bits: expected.bits.iter().map(|bit| *bit && !folds).collect(),
        ..expected
    })
}

fn attention(exact: &Exact, inputs: &Inputs, bits: &Indicators) -> Result<(), Failure> {
    let case = exact.case;
    let tensor = bits.to_tensor(&Device::Cpu).map_err(anyhow::Error::from)?;
    let plan = MergePlan::from_indicators(&tensor, &case.config).map_err(Failure::Refused)?;
    let [q, k, v] = &inputs.of_rows(case)?;
    let output = attend(q, k, v, &plan, exact.options).map_err(Failure::Refused)?;
    let expected = exact.output(bits)?;
    let tolerance = exact.tolerance(case.dtype);
    compare("output", &output, &expected, tolerance, case.dtype)?;
    let var = |x: &Tensor| Var::from_tensor(x).map_err(anyhow::Error::from);
    let (q, k, v) = (var(q)?, var(k)?, var(v)?);
    let sinks = exact.options.sink_logits.as_ref().map(var).transpose()?;
    let options = AttentionOptions {
        sink_logits: sinks.as_ref().map(|sinks| sinks.as_tensor().clone()),
        ..exact.options.clone()
    };
    let gradients = || -> candle_core::Result<_> {
        let output = attend(&q, &k, &v, &plan, &options)?;
        (&output * &inputs.grad_output)?.sum_all()?.backward()
    };
    let store = gradients().map_err(Failure::Refused)?;
    let (xq, [_, xk, xv]) = (exact.queries(), &exact.inputs);
    let (config, grad) = (&case.config, &exact.grad_output);
    let (dq, dk, dv) =
        reference::attention_gradients(&xq, xk, xv, grad, bits, config, exact.options).map_err(anyhow::Error::from)?;
    let scale = exact.options.scale(case.dim).abs();
    let (dim, many) = (
        case.value_dim as f64,
        (case.queries * case.heads / case.kv_heads) as f64,
    );
    // A weight's gradient is as large as a row of the output's gradient times a value, and many rows add up in a key's.
    let arrived = tolerance * dim * largest(&grad.data) * 4.0;
    let weight = arrived * scale;
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
    if let Some(sinks) = sinks {
        let data = reference::sink_gradients(&xq, xk, xv, grad, bits, config, exact.options);
        let data = data.map_err(anyhow::Error::from)?;
        let tolerance = arrived * (case.batch * case.queries) as f64 + 8.0 * epsilon(sinks.dtype()) * largest(&data);
        let dims = [1, 1, 1, case.heads];
        let got = store.get(&sinks).context("dsink: no gradient")?;
        let got = got.reshape(&dims).map_err(anyhow::Error::from)?;
        compare("dsink", &got, &Array4 { dims, data }, tolerance, sinks.dtype())?;
    }
    Ok(())
}
