//! The reference's results for one case, and how far others may be from them.

use super::case::{Case, Layout, Mask};
use anyhow::{bail, ensure, Result};
use candle_core::{DType, Tensor};
use candle_sfattention::reference::{self, Array4, Indicators};
use candle_sfattention::{AttentionOptions, Criterion, Fold, HeadStrategies};
use std::ops::Range;

#[derive(Clone)]
pub struct Exact<'a> {
    pub case: &'a Case,
    /// q, k and v of all tokens.
    pub inputs: [Array4; 3],
    pub grad_output: Array4,
    pub options: &'a AttentionOptions,
    /// Whether rounding may change a decision.
    pub near: bool,
    /// Whether numbers are held in f16.
    pub narrow: bool,
}

impl Exact<'_> {
    /// Whether an error is a right answer: a layout without a contiguous last axis, columns hidden by a bias while
    /// tokens are folded, values that the storage cannot hold.
    pub fn may_refuse(&self) -> bool {
        let case = self.case;
        let hides = case
            .bias
            .is_some_and(|bias| matches!(bias.mask, Mask::Hides | Mask::Padding));
        let large = case.size > 100.0 || case.bad.is_some();
        case.layouts.contains(&Layout::Turned) || hides || self.narrow && large
    }

    /// The queries of the rows that are computed.
    pub fn queries(&self) -> Array4 {
        let Case {
            batch, tokens, queries, ..
        } = *self.case;
        part(&self.inputs[0], 0..batch, tokens - queries..tokens)
    }

    /// The decisions that the settings ask for, with the queries of all tokens where the criterion reads them.
    pub fn bits(&self, strategies: &HeadStrategies) -> Result<Indicators> {
        let [q, k, v] = &self.inputs;
        let (config, options) = (&self.case.config, self.options);
        let whole = self.case.queries == self.case.tokens;
        let bias = options.bias.as_ref();
        Ok(match (config.criterion, &options.segments) {
            // No case draws scores.
            (Criterion::Given, _) => anyhow::bail!("criterion: expected one that needs no scores, got Given"),
            (Criterion::ObservedMass, _) => reference::observed_indicators(q, k, v, strategies, config, options),
            (Criterion::QueryKey | Criterion::KeyKey, Some(segments)) => {
                reference::indicators_in_segments(q, k, strategies, config, bias, segments)
            }
            (Criterion::QueryKey, None) => {
                reference::indicators_under(q, k, strategies, config, bias.filter(|_| whole))
            }
            (Criterion::KeyKey, None) => reference::indicators_under(&self.queries(), k, strategies, config, bias),
        }?)
    }

    pub fn output(&self, bits: &Indicators) -> Result<Array4> {
        let [_, k, v] = &self.inputs;
        Ok(reference::attention(
            &self.queries(),
            k,
            v,
            bits,
            &self.case.config,
            self.options,
        )?)
    }

    /// The allowed difference of one result in this dtype: roundings of logits and of weights, of numbers as large as
    /// the values.
    pub fn tolerance(&self, dtype: DType) -> f64 {
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

pub fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 2f64.powi(-52),
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => 2f64.powi(-23),
    }
}

pub fn largest(data: &[f64]) -> f64 {
    data.iter()
        .filter(|x| x.is_finite())
        .fold(0.0, |most, x| most.max(x.abs()))
}

/// Some batch rows and tokens of an array.
pub fn part(array: &Array4, rows: Range<usize>, tokens: Range<usize>) -> Array4 {
    let [_, heads, _, dim] = array.dims;
    let mut part = Array4::zeros([rows.len(), heads, tokens.len(), dim]);
    for (row, from) in rows.enumerate() {
        for (head, token) in (0..heads).flat_map(|head| (0..tokens.len()).map(move |token| (head, token))) {
            part.row_mut(row, head, token)
                .copy_from_slice(array.row(from, head, tokens.start + token));
        }
    }
    part
}

/// Asserts NaN exactly where it is expected, and numbers within the tolerance, or infinite beyond the dtype's range.
pub fn compare(what: &str, got: &Tensor, expected: &Array4, tolerance: f64, dtype: DType) -> Result<()> {
    ensure!(got.dims() == expected.dims, "{what}: shape {:?}", got.dims());
    ensure!(got.dtype() == dtype, "{what}: dtype {:?}", got.dtype());
    let got = got.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let bound = if dtype == DType::F16 {
        65504.0
    } else {
        f64::from(f32::MAX)
    };
    // f16 rounds to steps of 2^-24 near 0.
    let tolerance = if dtype == DType::F16 {
        tolerance + 2f64.powi(-25)
    } else {
        tolerance
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
