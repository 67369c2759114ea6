//! One softmax per row over the columns that it sees.

use candle_core::{bail, Result, Tensor};

use super::bias::Bias;
use super::fold::{fold, visible_columns, Column};
use super::{add_scaled, dot, dropout_keeps, Array4, Axes, HeadTokens, Indicators};
use crate::config::{AttentionOptions, CompressionConfig, Fold, Segment};

/// Compressed attention of shape (B, H, N, D), for q (B, H, N, D), k and v (B, Hk, N, D) and bits (B, H, N-1).
///
/// v may have a size of its own, (B, Hk, N, Dv): the output then has it too.
/// There may be fewer queries than keys, (B, H, Nq, D): query j is row N - Nq + j. Tokens may then be hidden in causal
/// calls without [`Fold::PairSum`] only. In calls that are not causal, any number of rows sees all tokens.
///
/// Row i is `Σ w_j · value_j` over its [`visible_columns`], with the softmax weights w of the logits
/// `scale · query_i · key_j + ln n_j + bias[i, token j]` after dropout. A softcap c changes the first term z to
/// `c · tanh(z / c)`. Keys and values of far columns and of the edge
/// are folded by the query head's own bits; so are the queries under [`Fold::PairSum`], for any window.
///
/// Each of [`AttentionOptions::segments`] is computed alone; rows of padding are zeros. Bias and dropout go by the
/// indices of the whole call.
///
/// A row is NaN when its query, or the key or value of any column that it sees, has an entry that is not finite, for
/// any bias or dropout of the column. Other rows are not affected by that token. A row whose columns all have a bias of
/// -inf is zeros, and sends no gradient; a finite bias of any size hides nothing. A sink logit s of the head adds
/// exp(s) to the softmax's denominator.
///
/// # Errors
/// Shapes or settings that do not fit together, or a bias of -inf at a column that a row would see in a head that hides
/// tokens.
pub fn attention(
    q: &Array4,
    k: &Array4,
    v: &Array4,
    indicators: &Indicators,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Array4> {
    let mut output = Array4::zeros(output_dims(q, v));
    if let Some(segments) = segments_of(q, k, indicators, options)? {
        for segment in &segments {
            let [q, k, v] = [q, k, v].map(|x| x.cut(segment));
            let bits = indicators.cut(segment);
            let call = Call::new((&q, &k, &v), &bits, config, options, Some(segment))?;
            output.paste(segment, &output_of(&call));
        }
        return Ok(output);
    }
    Ok(output_of(&Call::new((q, k, v), indicators, config, options, None)?))
}

/// The segments, where they are given and no token is folded into another one.
pub(super) fn segments_of(
    q: &Array4,
    k: &Array4,
    indicators: &Indicators,
    options: &AttentionOptions,
) -> Result<Option<Vec<Segment>>> {
    let [batch, heads, tokens, _] = q.dims;
    if options.segments.is_some() && k.dims[2] != tokens {
        bail!(
            "segments: expected as many queries as keys, got {tokens} and {}; give the queries of all tokens",
            k.dims[2]
        )
    }
    let segments = super::segments::read(options.segments.as_ref(), [batch, tokens])?;
    for segment in segments.iter().flatten() {
        for head in 0..heads {
            let bits = indicators.head(segment.batch, head);
            if let Some(pair) = segment.borders(tokens).find(|pair| bits[*pair]) {
                bail!(
                    "indicators: expected bit 0 between two segments, got 1 at token {pair} of batch row {}, head \
                     {head}; make them with indicators_in_segments",
                    segment.batch
                )
            }
        }
    }
    Ok(segments)
}

/// (B, H, Nq, Dv)
pub(super) fn output_dims(q: &Array4, v: &Array4) -> [usize; 4] {
    let ([batch, heads, queries, _], [.., value_dim]) = (q.dims, v.dims);
    [batch, heads, queries, value_dim]
}

/// [`attention`] of a call without segments, with far columns' keys and values changed by `change`.
pub(super) fn attention_with_far(
    qkv: (&Array4, &Array4, &Array4),
    indicators: &Indicators,
    change: &dyn Fn(&mut HeadTokens),
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Array4> {
    let call = Call::new(qkv, indicators, config, options, None)?;
    Ok(output_of(&Call {
        change: Some(change),
        ..call
    }))
}

/// For each batch row, head and token, the first row that does not see it any more.
pub(super) type Dropped = Vec<Vec<Vec<usize>>>;

/// [`attention`] of a call without segments, whose rows do not see tokens that were dropped before.
pub(super) fn attention_without(
    qkv: (&Array4, &Array4, &Array4),
    indicators: &Indicators,
    dropped: &Dropped,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Array4> {
    let call = Call::new(qkv, indicators, config, options, None)?;
    Ok(output_of(&Call {
        dropped: Some(dropped),
        ..call
    }))
}

fn output_of(call: &Call) -> Array4 {
    let mut output = Array4::zeros(output_dims(call.inputs.0, call.inputs.2));
    for (batch, head) in call.sizes.batch_heads() {
        let parts = call.head(batch, head);
        for row in call.sizes.rows() {
            let Row {
                columns, weights, keep, ..
            } = call.row(&parts, row);
            let into = output.row_mut(batch, head, row - call.sizes.first_row);
            for (j, &column) in columns.iter().enumerate() {
                add_scaled(into, weights[j] * keep[j], parts.value(column))
            }
        }
    }
    output
}

/// A call's arguments, checked.
pub(super) struct Call<'a> {
    pub(super) sizes: Axes,
    pub(super) inputs: (&'a Array4, &'a Array4, &'a Array4),
    pub(super) indicators: &'a Indicators,
    pub(super) config: &'a CompressionConfig,
    pub(super) options: &'a AttentionOptions,
    pub(super) scale: f64,
    pub(super) bias: Option<Bias>,
    /// (H)
    pub(super) sinks: Option<Vec<f64>>,
    /// (B, Hk, N) of the whole call, and these sizes.
    pub(super) column_bias: Option<(Vec<f64>, [usize; 3])>,
    /// What rows do not see beside their own rules.
    dropped: Option<&'a Dropped>,
    /// What far columns are stored as.
    change: Option<&'a dyn Fn(&mut HeadTokens)>,
    /// The batch row and the token that the arrays begin with: bias and dropout go by the indices of the whole call.
    pub(super) first: [usize; 2],
}

/// One query head's vectors, raw and folded.
pub(super) struct Head<'a> {
    pub(super) batch: usize,
    pub(super) head: usize,
    pub(super) bits: &'a [bool],
    /// The token index of the first query's row.
    pub(super) first_row: usize,
    pub(super) scale: f64,
    pub(super) softcap: Option<f64>,
    pub(super) queries: HeadTokens,
    pub(super) raw_keys: HeadTokens,
    pub(super) raw_values: HeadTokens,
    pub(super) folded_keys: HeadTokens,
    pub(super) folded_values: HeadTokens,
    /// Folded keys and values as far columns have them, where that differs.
    far: Option<[HeadTokens; 2]>,
    pub(super) sizes: Vec<f64>,
}

/// One row's columns, their softmax weights, and dropout's factor on each: 0 or `1 / (1 - p)`.
pub(super) struct Row {
    pub(super) columns: Vec<Column>,
    pub(super) weights: Vec<f64>,
    /// The weight of the sink; 0 without one.
    pub(super) sink: f64,
    pub(super) keep: Vec<f64>,
}

impl<'a> Call<'a> {
    pub(super) fn new(
        (q, k, v): (&'a Array4, &'a Array4, &'a Array4),
        indicators: &'a Indicators,
        config: &'a CompressionConfig,
        options: &'a AttentionOptions,
        segment: Option<&Segment>,
    ) -> Result<Self> {
        config.check(options.causal)?;
        options.check()?;
        let sizes = Axes::of_rows(q, k, options.causal)?;
        v.check("v")?;
        if v.dims[..3] != k.dims[..3] {
            bail!(
                "v: expected shape {:?} like k but for the last axis, got {:?}; keys and values share heads and tokens",
                k.dims,
                v.dims
            )
        }
        let expected = [sizes.batch, sizes.heads, sizes.pairs()];
        super::check_len("indicators", &indicators.dims, indicators.bits.len())?;
        if indicators.dims != expected {
            bail!(
                "indicators: expected shape {expected:?} (batch, query heads, tokens - 1), got {:?}; \
                 make them with indicators() from the same q and k",
                indicators.dims
            )
        }
        let hides = indicators.bits.contains(&true);
        if sizes.queries != sizes.tokens && hides && (config.fold.folds_queries() || !options.causal) {
            bail!(
                "q: expected the queries of all {} tokens, got {}; hidden tokens need them under PairSum, and where \
                 rows see all tokens",
                sizes.tokens,
                sizes.queries
            )
        }
        let bias = match (&options.bias, &options.segments, segment) {
            (Some(bias), Some(segments), Some(segment)) => {
                let (batch, tokens) = segments.dims2()?;
                let whole = Axes {
                    batch,
                    tokens,
                    queries: tokens,
                    ..sizes
                };
                Some(Bias::read(bias, whole)?.alone(segment))
            }
            (Some(bias), _, _) => Some(Bias::read(bias, sizes)?),
            (None, _, _) => None,
        };
        if let Some(bias) = &bias {
            bias.check(indicators, options)?;
        }
        Ok(Self {
            sizes,
            inputs: (q, k, v),
            indicators,
            config,
            options,
            scale: options.scale(q.dims[3]),
            bias,
            sinks: options.sink_logits.as_ref().map(|s| read_sinks(s, sizes)).transpose()?,
            column_bias: options.column_bias.as_ref().map(read_column_bias).transpose()?,
            dropped: None,
            change: None,
            first: segment.map_or([0, 0], |segment| [segment.batch, segment.tokens.start]),
        })
    }

    pub(super) fn head(&self, batch: usize, head: usize) -> Head<'a> {
        let (q, k, v) = self.inputs;
        let kv_head = self.sizes.kv_head(head);
        let bits = self.indicators.head(batch, head);
        let (raw_keys, raw_values) = (k.head(batch, kv_head), v.head(batch, kv_head));
        let (folded_keys, sizes) = fold(self.config.fold, &raw_keys, bits);
        let (folded_values, _) = fold(self.config.fold, &raw_values, bits);
        let queries = match self.config.fold {
            // With fewer queries than tokens nothing is hidden: `new` refuses it.
            Fold::PairSum if bits.contains(&true) => fold(Fold::PairSum, &q.head(batch, head), bits).0,
            Fold::PairSum => q.head(batch, head),
            Fold::Mean | Fold::Drop => q.head(batch, head),
        };
        Head {
            batch,
            head,
            bits,
            first_row: self.sizes.first_row,
            scale: self.scale,
            softcap: self.options.softcap,
            queries,
            raw_keys,
            raw_values,
            far: self.change.map(|change| {
                let mut far = [folded_keys.clone(), folded_values.clone()];
                far.iter_mut().for_each(change);
                far
            }),
            folded_keys,
            folded_values,
            sizes,
        }
    }

    pub(super) fn row(&self, head: &Head, row: usize) -> Row {
        let (window, sliding) = (self.config.window, self.options.sliding_window);
        let mut columns = visible_columns(head.bits, row, window, self.options.causal, sliding);
        if let Some(dropped) = self.dropped {
            columns.retain(|column| row < dropped[head.batch][head.head][column.token()]);
        }
        let finite = |vector: &[f64]| vector.iter().all(|x| x.is_finite());
        let poisoned = !finite(head.query(row))
            || columns
                .iter()
                .any(|&column| !finite(head.key(column)) || !finite(head.value(column)));
        let mut logits: Vec<f64> = columns.iter().map(|&c| self.logit(head, row, c)).collect();
        // A term of the denominator that belongs to no column.
        logits.push(self.sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| sinks[head.head]));
        let mut weights = match poisoned {
            true => vec![f64::NAN; logits.len()],
            false => softmax(logits),
        };
        let sink = weights.pop().unwrap_or(0.0);
        let keep = columns.iter().map(|c| self.keep(head, row, c.token())).collect();
        Row {
            columns,
            weights,
            sink,
            keep,
        }
    }

    /// `scale · query · key`, capped, plus `ln n + bias`.
    fn logit(&self, head: &Head, row: usize, column: Column) -> f64 {
        let bias = match &self.bias {
            Some(bias) => bias.get([head.batch, head.head, row, column.token()]),
            None => 0.0,
        };
        head.capped(row, column).0 + head.size(column).ln() + bias + self.column_bias(head, column)
    }

    /// c of a column that has left the row's window; the edge is not past it yet.
    fn column_bias(&self, head: &Head, column: Column) -> f64 {
        let (Some((bias, [_, kv_heads, tokens])), Column::Far(s)) = (&self.column_bias, column) else {
            return 0.0;
        };
        let [first_batch, first] = self.first;
        let row = (first_batch + head.batch) * kv_heads + self.sizes.kv_head(head.head);
        bias[row * tokens + first + s]
    }

    fn keep(&self, head: &Head, row: usize, token: usize) -> f64 {
        let [first_batch, first] = self.first;
        let batch_head = (first_batch + head.batch) * self.sizes.heads + head.head;
        match self.options.dropout {
            Some(d) if dropout_keeps(d, batch_head, row + first, token + first) => 1.0 / (1.0 - d.p),
            Some(_) => 0.0,
            None => 1.0,
        }
    }
}

impl Head<'_> {
    /// `scale · query · key` after the softcap, and its derivative by what it was before: 1 - tanh².
    pub(super) fn capped(&self, row: usize, column: Column) -> (f64, f64) {
        let logit = self.scale * dot(self.query(row), self.key(column));
        match self.softcap {
            Some(c) => (c * (logit / c).tanh(), 1.0 - (logit / c).tanh().powi(2)),
            None => (logit, 1.0),
        }
    }

    /// The gradients of a row's weights: `a_j = r_j · g · value_j`, for dropout factors r and the output's gradient g.
    pub(super) fn arrived(&self, Row { columns, keep, .. }: &Row, grad: &[f64]) -> Vec<f64> {
        let pairs = columns.iter().zip(keep);
        pairs.map(|(&column, r)| r * dot(grad, self.value(column))).collect()
    }

    /// The folded query of a row (a token index).
    pub(super) fn query(&self, row: usize) -> &[f64] {
        &self.queries[row - self.first_row]
    }

    pub(super) fn key(&self, column: Column) -> &[f64] {
        match column {
            Column::Far(s) => self.far.as_ref().map_or(&self.folded_keys[s], |far| &far[0][s]),
            Column::Edge(s) => &self.folded_keys[s],
            Column::Near(t) => &self.raw_keys[t],
        }
    }

    pub(super) fn value(&self, column: Column) -> &[f64] {
        match column {
            Column::Far(s) => self.far.as_ref().map_or(&self.folded_values[s], |far| &far[1][s]),
            Column::Edge(s) => &self.folded_values[s],
            Column::Near(t) => &self.raw_values[t],
        }
    }

    fn size(&self, column: Column) -> f64 {
        match column {
            Column::Far(s) | Column::Edge(s) => self.sizes[s],
            Column::Near(_) => 1.0,
        }
    }
}

fn read_column_bias(bias: &Tensor) -> Result<(Vec<f64>, [usize; 3])> {
    let (batch, kv_heads, tokens) = bias.dims3()?;
    Ok((super::to_f64(bias)?, [batch, kv_heads, tokens]))
}

/// The sink logits (H): finite or -inf.
fn read_sinks(sinks: &Tensor, sizes: Axes) -> Result<Vec<f64>> {
    if sinks.dims() != [sizes.heads] {
        bail!(
            "sink_logits: expected shape ({}), got {:?}; give one logit per query head",
            sizes.heads,
            sinks.dims()
        )
    }
    let sinks = super::to_f64(sinks)?;
    match sinks.iter().find(|sink| sink.is_nan() || **sink == f64::INFINITY) {
        Some(bad) => bail!("sink_logits: expected finite numbers or -inf, got {bad}; -inf is a head without a sink"),
        None => Ok(sinks),
    }
}

/// `exp(l - max l) / Σ exp(l - max l)`. All minus infinity gives zeros.
fn softmax(logits: Vec<f64>) -> Vec<f64> {
    if logits.iter().all(|logit| *logit == f64::NEG_INFINITY) {
        return vec![0.0; logits.len()];
    }
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.into_iter().map(|e| e / sum).collect()
}
