//! Bounds of the errors of halves before the last rounding, from the f64 reference's own numbers, element by element.
//!
//! An honest path sums in f32 and rounds once at the end. Before that it may round to halves only the factors of its
//! products: weights, folded rows, and gradients of logits. Let `inner` be the relative error of one such rounding. To
//! first order (second-order terms lie within the second half of the last rounding's allowance):
//!
//! * A rounded folded query or key moves a logit by at most `ε_j = n_j · inner · scale · Σ_d |q_d||k_jd|`,
//!   where `n_j` of the two are folded. Softmax turns that into `δw_j = w_j (ε_j - Σ w ε)`, hence into `Σ_j w_j ε_j
//!   |r_j v_j - o|` of an output o, with dropout's factors r.
//! * Rounded weights move an output by `inner · Σ_j w_j r_j |v_j|`, and rounded folded values by
//!   `inner · Σ_folded w_j r_j |v_j|`.
//! * dv_j = Σ_i w_ij r_ij g_i errs by `Σ_i r_ij |g_i| w_ij (inner + ε_ij + ε̄_i)`, ε̄ = Σ w ε: weights are computed
//!   again from the same logits and their log-sum-exp, and rounded.
//! * dl_ij = w_ij (a_ij - D_i), with a_ij = r_ij g_i · v_j and D_i = g_i · o_i, errs by `w_ij ((ε_ij + ε̄_i) |a_ij -
//!   D_i| + δa_ij + B_i) + inner |dl_ij|`: δa_ij = inner · r_ij Σ_d |g_id||v_jd| of folded values, `B_i = Σ_d |g_id|
//!   δo_id` of the rounded output, which gradients read: δo includes the last rounding, unless the output's rounding
//!   remainder is kept.
//! * dq_i = scale Σ_j dl_ij k_j and dk_j = scale Σ_i dl_ij q_i err by the same sums of |k_j| and |q_i| times the
//!   error of dl, and by `inner |dl_ij|` times the folded ones.
//! * The gradient of a column bias, Σ dl_ij over heads and rows, errs by the sum of the errors of dl before its
//!   rounding.
//! * Gradients pass through the fold's transpose, which is linear with factors that are not negative: so do their
//!   bounds.
//!
//! If a number is multiplied as a sum of two parts, the product of the small parts is left out: every product has a
//! relative error of its own. f16 has a smallest spacing: a number rounded to it errs by `least` at least.

use super::settings::Setting;
use anyhow::Result;
use candle_core::DType;
use candle_sfattention::reference::{
    dropout_keeps, fold, unfold, visible_columns, Array4, Column, HeadTokens, Indicators,
};
use candle_sfattention::{AttentionOptions, CompressionConfig, Fold};

/// The implementation whose roundings are bounded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Side {
    /// Multiplies in bf16 parts, or in f32, which errs less.
    Cpu,
    /// Multiplies halves.
    Cuda,
}

/// Relative sizes of roundings.
#[derive(Clone, Copy)]
pub struct Units {
    /// The last rounding: its relative error and its least absolute error.
    pub last: f64,
    pub least: f64,
    /// The output as gradients read it.
    output: f64,
    /// Intermediate roundings.
    inner: f64,
    inner_least: f64,
    /// A product of two numbers.
    product: f64,
}

impl Units {
    pub fn new(side: Side, dtype: DType, dim: usize, options: &AttentionOptions) -> Self {
        let (last, least) = match dtype {
            DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
            _ => (2f64.powi(-8), 2f64.powi(-134)),
        };
        // If one weight may be nearly all of a row's, CUDA also keeps the output's rounding remainder, and gradients
        // read it.
        let extras = options.bias.is_some() || options.dropout.is_some() || options.column_bias.is_some();
        let cuda = Self {
            last,
            least,
            output: if extras || !options.causal || dim > 128 {
                last * last
            } else {
                last
            },
            inner: last,
            inner_least: least,
            product: 0.0,
        };
        match (side, dtype) {
            // Two parts of 8 bits.
            (Side::Cpu, DType::F16) => Self {
                output: last,
                inner: 2f64.powi(-16),
                inner_least: 0.0,
                product: 2f64.powi(-16),
                ..cuda
            },
            (Side::Cpu, _) => Self { output: last, ..cuda },
            (Side::Cuda, _) => cuda,
        }
    }
}

/// Query, key, value and the output's gradient.
pub type Inputs<'a> = [&'a Array4; 4];

/// Bounds of the errors of output, dq, dk and dv before their last rounding, and those of the gradient of a column bias
/// (B, Hk, N).
pub fn budget(
    inputs: Inputs,
    bits: &Indicators,
    setting: &Setting,
    options: &AttentionOptions,
    units: Units,
) -> Result<([Array4; 4], Vec<f64>)> {
    let [q, k, v, grad_output] = inputs;
    let [batch, heads, tokens, dim] = q.dims;
    let full = [batch, heads, tokens, tokens];
    let bias = match &options.bias {
        Some(bias) => Some(
            bias.to_dtype(DType::F64)?
                .broadcast_as(&full)?
                .flatten_all()?
                .to_vec1::<f64>()?,
        ),
        None => None,
    };
    let column_bias = match &options.column_bias {
        Some(bias) => bias.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?,
        None => vec![0.0; batch * k.dims[1] * tokens],
    };
    let mut column_bounds = vec![0.0; column_bias.len()];
    let mut bounds = [q, q, k, k].map(|like| Array4::zeros(like.dims));
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        let kv = h / (heads / k.dims[1]);
        let rows =
            |x: &Array4, head: usize| -> HeadTokens { (0..tokens).map(|t| x.row(b, head, t).to_vec()).collect() };
        let head = Head::new([rows(q, h), rows(k, kv), rows(v, kv)], bits.head(b, h), &setting.config);
        let mut sums = Sums::new(tokens, dim);
        let columns_at = (b * k.dims[1] + kv) * tokens;
        for row in 0..tokens {
            let at = (b * heads + h) * tokens + row;
            let bias = bias.as_ref().map(|bias| &bias[at * tokens..(at + 1) * tokens]);
            let keep = |token| match options.dropout {
                Some(d) if dropout_keeps(d, b * heads + h, row, token) => 1.0 / (1.0 - d.p),
                Some(_) => 0.0,
                None => 1.0,
            };
            let columns = visible_columns(
                head.bits,
                row,
                setting.config.window,
                options.causal,
                options.sliding_window,
            );
            let call = Call {
                scale: options.scale(dim),
                units,
                grad: grad_output.row(b, h, row),
                column_bias: &column_bias[columns_at..columns_at + tokens],
            };
            let output = call.row(&head, row, &columns, (bias, &keep), &mut sums);
            bounds[0].row_mut(b, h, row).copy_from_slice(&output);
        }
        add(&mut column_bounds[columns_at..columns_at + tokens], 1.0, &sums.columns);
        let home = |rows: &HeadTokens| unfold(setting.config.fold, rows, head.bits, &head.sizes);
        let queries = match setting.config.fold {
            Fold::PairSum => home(&sums.queries),
            Fold::Mean | Fold::Drop => sums.queries.clone(),
        };
        for (bound, head, rows) in [
            (1, h, queries),
            (2, kv, home(&sums.keys[0])),
            (2, kv, sums.keys[1].clone()),
            (3, kv, home(&sums.values[0])),
            (3, kv, sums.values[1].clone()),
        ] {
            for (token, row) in rows.iter().enumerate() {
                add(bounds[bound].row_mut(b, head, token), 1.0, row);
            }
        }
    }
    Ok((bounds, column_bounds))
}

/// One query head: folded rows, and raw ones.
struct Head<'a> {
    bits: &'a [bool],
    sizes: Vec<f64>,
    queries: HeadTokens,
    keys: [HeadTokens; 2],
    values: [HeadTokens; 2],
    fold: Fold,
}

impl<'a> Head<'a> {
    fn new([q, k, v]: [HeadTokens; 3], bits: &'a [bool], config: &CompressionConfig) -> Self {
        let (keys, sizes) = fold(config.fold, &k, bits);
        let (values, _) = fold(config.fold, &v, bits);
        Self {
            bits,
            sizes,
            queries: match config.fold {
                Fold::PairSum => fold(config.fold, &q, bits).0,
                Fold::Mean | Fold::Drop => q,
            },
            keys: [keys, k],
            values: [values, v],
            fold: config.fold,
        }
    }

    /// 1 if folding changed the token's row, so that it may have been rounded; else 0.
    fn folds(&self, token: usize) -> f64 {
        let folds = self.fold.keeps_hidden() && token > 0 && self.bits[token - 1];
        f64::from(u8::from(folds))
    }
}

/// Bounds of one head's gradients before the fold's transpose: of queries, of folded and raw keys and values, and of
/// the logits of far columns, added up.
struct Sums {
    queries: HeadTokens,
    keys: [HeadTokens; 2],
    values: [HeadTokens; 2],
    columns: Vec<f64>,
}

impl Sums {
    fn new(tokens: usize, dim: usize) -> Self {
        let zeros = || vec![vec![0.0; dim]; tokens];
        Self {
            queries: zeros(),
            keys: [zeros(), zeros()],
            values: [zeros(), zeros()],
            columns: vec![0.0; tokens],
        }
    }
}

/// The settings that one row is judged by.
struct Call<'a> {
    scale: f64,
    units: Units,
    grad: &'a [f64],
    /// Of the KV head.
    column_bias: &'a [f64],
}

/// One column of a row: its place, softmax weight and dropout factor, and the bound of its logit's error.
struct Seen {
    kind: usize,
    far: bool,
    token: usize,
    folded: f64,
    weight: f64,
    keep: f64,
    logit_error: f64,
}

impl Call<'_> {
    /// Adds the row's part to the gradients' bounds, and returns the bound of its output.
    fn row(
        &self,
        head: &Head,
        row: usize,
        columns: &[Column],
        (bias, keep): (Option<&[f64]>, &dyn Fn(usize) -> f64),
        sums: &mut Sums,
    ) -> Vec<f64> {
        let seen = self.weights(head, row, columns, (bias, keep));
        let mean_error: f64 = seen.iter().map(|s| s.weight * s.logit_error).sum();
        let (output, bound) = self.output(head, &seen);
        let (query, units) = (&head.queries[row], self.units);
        let delta = dot(self.grad, &output);
        let stored = |d: usize| units.output * output[d].abs() + units.least + bound[d];
        let delta_error: f64 = self.grad.iter().enumerate().map(|(d, g)| g.abs() * stored(d)).sum();
        let query_inner = units.product
            + match head.fold {
                Fold::PairSum => units.inner * head.folds(row),
                Fold::Mean | Fold::Drop => 0.0,
            };
        for s in &seen {
            let (key, value) = (&head.keys[s.kind][s.token], &head.values[s.kind][s.token]);
            let arrived = s.keep * dot(self.grad, value) - delta;
            let row_inner = units.inner * s.folded + units.product;
            let arrived_error = row_inner * s.keep * absolute_dot(self.grad, value) + delta_error;
            let moved = s.logit_error + mean_error;
            let d_logit = s.weight * arrived.abs();
            let summed_error = s.weight * (moved * arrived.abs() + arrived_error);
            let d_logit_error = summed_error + units.inner * d_logit + units.inner_least;
            let weight_error = s.weight * (units.inner + units.product + moved) + units.inner_least;
            if s.far {
                sums.columns[s.token] += summed_error;
            }
            add(&mut sums.values[s.kind][s.token], s.keep * weight_error, self.grad);
            let of_key = self.scale * (d_logit_error + d_logit * row_inner);
            add(&mut sums.queries[row], of_key, key);
            let of_query = self.scale * (d_logit_error + d_logit * query_inner);
            add(&mut sums.keys[s.kind][s.token], of_query, query);
        }
        bound
    }

    fn weights(
        &self,
        head: &Head,
        row: usize,
        columns: &[Column],
        (bias, keep): (Option<&[f64]>, &dyn Fn(usize) -> f64),
    ) -> Vec<Seen> {
        let query = &head.queries[row];
        let query_folds = match head.fold {
            Fold::PairSum => head.folds(row),
            Fold::Mean | Fold::Drop => 0.0,
        };
        let mut seen = Vec::with_capacity(columns.len());
        for column in columns {
            let token = column.token();
            let (kind, folded, ln) = match column {
                Column::Far(_) | Column::Edge(_) => (0, head.folds(token), head.sizes[token].ln()),
                Column::Near(_) => (1, 0.0, 0.0),
            };
            let (far, fade) = match column {
                Column::Far(_) => (true, self.column_bias[token]),
                Column::Edge(_) | Column::Near(_) => (false, 0.0),
            };
            let key = &head.keys[kind][token];
            let roundings = self.units.product + self.units.inner * (query_folds + folded);
            seen.push(Seen {
                kind,
                far,
                token,
                folded,
                weight: self.scale * dot(query, key) + ln + fade + bias.map_or(0.0, |bias| bias[token]),
                keep: keep(token),
                logit_error: roundings * self.scale * absolute_dot(query, key),
            });
        }
        let most = seen.iter().fold(f64::NEG_INFINITY, |most, s| most.max(s.weight));
        seen.iter_mut().for_each(|s| {
            s.weight = if s.weight > f64::NEG_INFINITY {
                (s.weight - most).exp()
            } else {
                0.0
            }
        });
        let sum: f64 = seen.iter().map(|s| s.weight).sum();
        seen.iter_mut().for_each(|s| s.weight /= sum.max(1.0));
        seen
    }

    /// The output, and its bound.
    fn output(&self, head: &Head, seen: &[Seen]) -> (Vec<f64>, Vec<f64>) {
        let (units, dim) = (self.units, self.grad.len());
        let mut output = vec![0.0; dim];
        for s in seen {
            let value = &head.values[s.kind][s.token];
            output
                .iter_mut()
                .zip(value)
                .for_each(|(o, v)| *o += s.weight * s.keep * v);
        }
        let mut bound = vec![0.0; dim];
        for s in seen {
            let value = &head.values[s.kind][s.token];
            let rounded = s.weight * (units.inner * (1.0 + s.folded) + units.product) + units.inner_least;
            for ((bound, o), v) in bound.iter_mut().zip(&output).zip(value) {
                *bound += s.keep * v.abs() * rounded + s.weight * s.logit_error * (s.keep * v - o).abs();
            }
        }
        (output, bound)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn absolute_dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| (x * y).abs()).sum()
}

/// Adds `factor · |row|`.
fn add(into: &mut [f64], factor: f64, row: &[f64]) {
    into.iter_mut().zip(row).for_each(|(x, y)| *x += factor * y.abs());
}
