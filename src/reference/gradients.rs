//! The gradients of attention: of query, key and value, of sink logits, and of a column bias.

use candle_core::{bail, Result};

use super::attend::{output_dims, segments_of, Call, Head, Row};
use super::fold::{unfold, Column};
use super::{add_scaled, dot, Array4, HeadTokens, Indicators};
use crate::config::{AttentionOptions, CompressionConfig, Fold, Segment};

fn check_grad_output(grad_output: &Array4, q: &Array4, v: &Array4) -> Result<()> {
    grad_output.check("grad_output")?;
    let expected = output_dims(q, v);
    if grad_output.dims != expected {
        bail!(
            "grad_output: expected shape {:?} like the output, got {:?}; pass the gradient of this call's output",
            expected,
            grad_output.dims
        )
    }
    Ok(())
}

/// The gradient of `Σ attention · grad_output` with respect to the sink logits, one per query head: with a row's output
/// gradient g, the sink's weight p and dropout factors r, the sum of `-p · Σ w_j r_j g · value_j` over the rows.
///
/// # Errors
/// Options without sink logits, or shapes or settings that do not fit together.
pub fn sink_gradients(
    q: &Array4,
    k: &Array4,
    v: &Array4,
    grad_output: &Array4,
    indicators: &Indicators,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Vec<f64>> {
    check_grad_output(grad_output, q, v)?;
    if options.sink_logits.is_none() {
        bail!("sink_logits: expected a tensor of shape (heads), got None; without sinks there is no gradient for them")
    }
    let mut gradients = vec![0.0; q.dims[1]];
    each_call(
        [q, k, v, grad_output],
        indicators,
        (config, options),
        |call, grad_output, _| add_sink_gradients(call, grad_output, &mut gradients),
    )?;
    Ok(gradients)
}

fn add_sink_gradients(call: &Call, grad_output: &Array4, gradients: &mut [f64]) {
    for (batch, head) in call.sizes.batch_heads() {
        let parts = call.head(batch, head);
        for row in call.sizes.rows() {
            let seen = call.row(&parts, row);
            let arrived = parts.arrived(&seen, grad_output.row(batch, head, row - call.sizes.first_row));
            gradients[head] -= seen.sink * dot(&seen.weights, &arrived);
        }
    }
}

/// The gradient of `Σ attention · grad_output` with respect to the column bias, (B, Hk, N) row-major: the sum over the
/// group's query heads and over the rows i > t + window of `w_j (a_j - Σ w a)`, with the weight w of token t's column
/// and `a_j = r_j · g · value_j`.
///
/// # Errors
/// Options without a column bias, or shapes or settings that do not fit together.
pub fn column_bias_gradients(
    q: &Array4,
    k: &Array4,
    v: &Array4,
    grad_output: &Array4,
    indicators: &Indicators,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Vec<f64>> {
    check_grad_output(grad_output, q, v)?;
    if options.column_bias.is_none() {
        bail!("column_bias: expected a tensor of shape (batch, KV heads, tokens), got None; it has no gradient")
    }
    let [batch, kv_heads, tokens, _] = k.dims;
    let mut gradients = vec![0.0; batch * kv_heads * tokens];
    each_call(
        [q, k, v, grad_output],
        indicators,
        (config, options),
        |call, grad_output, _| add_column_bias_gradients(call, grad_output, &mut gradients),
    )?;
    Ok(gradients)
}

/// `gradients` are those of the whole call.
fn add_column_bias_gradients(call: &Call, grad_output: &Array4, gradients: &mut [f64]) {
    let (Some((_, [_, kv_heads, tokens])), [first_batch, first]) = (&call.column_bias, call.first) else {
        return;
    };
    for (batch, head) in call.sizes.batch_heads() {
        let parts = call.head(batch, head);
        let at = ((first_batch + batch) * kv_heads + call.sizes.kv_head(head)) * tokens + first;
        for row in call.sizes.rows() {
            let seen = call.row(&parts, row);
            let arrived = parts.arrived(&seen, grad_output.row(batch, head, row - call.sizes.first_row));
            let mean = dot(&seen.weights, &arrived);
            for (j, &column) in seen.columns.iter().enumerate() {
                if let Column::Far(s) = column {
                    gradients[at + s] += seen.weights[j] * (arrived[j] - mean);
                }
            }
        }
    }
}

/// The gradients of `Σ attention · grad_output` with respect to q, k and v, in their shapes. The bits are constants.
///
/// # Errors
/// Shapes or settings that do not fit together.
pub fn attention_gradients(
    q: &Array4,
    k: &Array4,
    v: &Array4,
    grad_output: &Array4,
    indicators: &Indicators,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<(Array4, Array4, Array4)> {
    check_grad_output(grad_output, q, v)?;
    let (mut dq, mut dk, mut dv) = (Array4::zeros(q.dims), Array4::zeros(k.dims), Array4::zeros(v.dims));
    each_call(
        [q, k, v, grad_output],
        indicators,
        (config, options),
        |call, grad_output, segment| {
            let alone = gradients_of(call, grad_output);
            match segment {
                None => (dq, dk, dv) = alone,
                Some(segment) => {
                    dq.paste(segment, &alone.0);
                    dk.paste(segment, &alone.1);
                    dv.paste(segment, &alone.2);
                }
            }
        },
    )?;
    Ok((dq, dk, dv))
}

/// Calls `body` with the whole call, or with each of its segments alone, and the part of the output's gradient.
fn each_call(
    [q, k, v, grad_output]: [&Array4; 4],
    indicators: &Indicators,
    (config, options): (&CompressionConfig, &AttentionOptions),
    mut body: impl FnMut(&Call, &Array4, Option<&Segment>),
) -> Result<()> {
    let Some(segments) = segments_of(q, k, indicators, options)? else {
        body(
            &Call::new((q, k, v), indicators, config, options, None)?,
            grad_output,
            None,
        );
        return Ok(());
    };
    for segment in &segments {
        let [q, k, v, grad_output] = [q, k, v, grad_output].map(|x| x.cut(segment));
        let bits = indicators.cut(segment);
        let call = Call::new((&q, &k, &v), &bits, config, options, Some(segment))?;
        body(&call, &grad_output, Some(segment));
    }
    Ok(())
}

fn gradients_of(call: &Call, grad_output: &Array4) -> (Array4, Array4, Array4) {
    let ((q, k, v), config) = (call.inputs, call.config);
    let (mut dq, mut dk, mut dv) = (Array4::zeros(q.dims), Array4::zeros(k.dims), Array4::zeros(v.dims));
    for (batch, head) in call.sizes.batch_heads() {
        let parts = call.head(batch, head);
        let mut grads = HeadGradients::zeros(&parts);
        for row in call.sizes.rows() {
            grads.add_row(
                &parts,
                row,
                &call.row(&parts, row),
                grad_output.row(batch, head, row - call.sizes.first_row),
            );
        }
        let kv_head = call.sizes.kv_head(head);
        let unfolded = |rows: &HeadTokens| unfold(config.fold, rows, parts.bits, &parts.sizes);
        dk.add_head(batch, kv_head, &grads.raw_keys);
        dk.add_head(batch, kv_head, &unfolded(&grads.folded_keys));
        dv.add_head(batch, kv_head, &grads.raw_values);
        dv.add_head(batch, kv_head, &unfolded(&grads.folded_values));
        match config.fold {
            Fold::PairSum if parts.bits.contains(&true) => dq.add_head(batch, head, &unfolded(&grads.queries)),
            Fold::PairSum => dq.add_head(batch, head, &grads.queries),
            Fold::Mean | Fold::Drop => dq.add_head(batch, head, &grads.queries),
        }
    }
    (dq, dk, dv)
}

/// The gradients of one query head's vectors, before they are unfolded.
struct HeadGradients {
    queries: HeadTokens,
    raw_keys: HeadTokens,
    raw_values: HeadTokens,
    folded_keys: HeadTokens,
    folded_values: HeadTokens,
}

impl HeadGradients {
    fn zeros(head: &Head) -> Self {
        let zeros = |like: &HeadTokens| -> HeadTokens { like.iter().map(|row| vec![0.0; row.len()]).collect() };
        Self {
            queries: zeros(&head.queries),
            raw_keys: zeros(&head.raw_keys),
            raw_values: zeros(&head.raw_values),
            folded_keys: zeros(&head.folded_keys),
            folded_values: zeros(&head.folded_values),
        }
    }

    /// With weights w, dropout factors r and the row's output gradient g: `dvalue_j = w_j r_j g`, and for the logits
    /// `dl_j = w_j (a_j - Σ w a)` with `a_j = r_j · g · value_j`; `dquery = scale Σ dl_j s_j key_j`,
    /// `dkey_j = scale dl_j s_j query`, where s is the softcap's 1 - tanh², or 1.
    fn add_row(&mut self, head: &Head, row: usize, seen: &Row, grad: &[f64]) {
        let Row {
            columns, weights, keep, ..
        } = seen;
        let arrived = head.arrived(seen, grad);
        let mean = dot(weights, &arrived);
        for (j, &column) in columns.iter().enumerate() {
            let (_, slope) = head.capped(row, column);
            let d_logit = head.scale * slope * weights[j] * (arrived[j] - mean);
            add_scaled(&mut self.queries[row - head.first_row], d_logit, head.key(column));
            let (d_key, d_value) = match column {
                Column::Far(s) | Column::Edge(s) => (&mut self.folded_keys[s], &mut self.folded_values[s]),
                Column::Near(t) => (&mut self.raw_keys[t], &mut self.raw_values[t]),
            };
            add_scaled(d_key, d_logit, head.query(row));
            add_scaled(d_value, weights[j] * keep[j], grad);
        }
    }
}
