//! Calls that the CUDA kernels do not compute at once, put together from such that they do: segments, values of another
//! size than keys, and fewer queries than keys. Everything here is operations on tensors, with their gradients.
//!
//! 1. Each segment is a call of its own on views of the tensors; the rows of all are put together.
//! 2. The smaller of keys and values is padded with zeros to the size of the larger one: zeros change no product of a
//!    query and a key, and the output's padding is cut off. The scale is that of the unpadded keys.
//! 3. Queries are the last rows: zeros stand before them, whose rows the kernels leave out. Queries that see all tokens
//!    come in groups of at most as many as there are tokens.

use crate::config::{AttentionOptions, Segment};
use crate::cuda::operands::Part;
use crate::cuda::sizes::padded;
use crate::plan::MergePlan;
use crate::problem::Problem;
use candle_core::{bail, Result, Tensor};

/// One call for the kernels: as many rows of queries as of keys, and values as large as keys. Its results are the rows
/// from `part.first_row` on.
pub(crate) struct PlainCall<'a> {
    pub qkv: [&'a Tensor; 3],
    pub plan: &'a MergePlan,
    pub options: &'a AttentionOptions,
    /// The bias in f32, as a (B, H, rows from `part.first_row` on, N) view.
    pub bias: Option<&'a Tensor>,
    pub part: Part,
}

/// The output (B, H, Nq, Dv) of checked tensors; `plain` computes a call that the kernels take.
///
/// # Errors
/// An error of `plain`, or a sliding window beside more queries than keys.
pub(crate) fn attend(
    [q, k, v]: [&Tensor; 3],
    plan: &MergePlan,
    options: &AttentionOptions,
    plain: &impl Fn(&PlainCall) -> Result<Tensor>,
) -> Result<Tensor> {
    let problem = Problem::of_rows([q, k, v], options.causal)?;
    let bias = problem.bias(options)?;
    let call = PlainCall {
        qkv: [q, k, v],
        plan,
        options,
        bias: bias.as_ref(),
        part: Part::default(),
    };
    let Some(segments) = problem.segments(options)? else {
        return of_one_size(&call, plain);
    };
    let mut rows = Vec::with_capacity(problem.batch);
    for batch in 0..problem.batch {
        let mine = segments.iter().filter(|segment| segment.batch == batch);
        rows.push(one_row_of_segments(&call, &problem, (batch, mine), plain)?);
    }
    Tensor::cat(&rows, 0)
}

/// The output (1, H, N, Dv) of one batch row: its segments alone, and zeros for padding.
fn one_row_of_segments<'a>(
    call: &PlainCall,
    problem: &Problem,
    (batch, segments): (usize, impl Iterator<Item = &'a Segment>),
    plain: &impl Fn(&PlainCall) -> Result<Tensor>,
) -> Result<Tensor> {
    let zeros = |tokens: usize| {
        let like = call.qkv[0];
        Tensor::zeros(
            (1, problem.heads, tokens, problem.value_dim),
            like.dtype(),
            like.device(),
        )
    };
    let (mut parts, mut at) = (Vec::new(), 0);
    for segment in segments {
        let (start, count) = (segment.tokens.start, segment.tokens.len());
        if start > at {
            parts.push(zeros(start - at)?);
        }
        at = segment.tokens.end;
        let mine = |x: &Tensor| x.narrow(0, batch, 1)?.narrow(2, start, count);
        let [q, k, v] = call.qkv.map(mine);
        let options = call.options.alone(segment, call.bias)?;
        parts.push(of_one_size(
            &PlainCall {
                qkv: [&q?, &k?, &v?],
                plan: &call.plan.alone(segment)?,
                bias: options.bias.as_ref(),
                options: &options,
                part: Part {
                    first_row: 0,
                    drawn_from: [batch * problem.heads, start, start].map(|first| first as u32),
                },
            },
            plain,
        )?);
    }
    if at < problem.tokens {
        parts.push(zeros(problem.tokens - at)?);
    }
    Tensor::cat(&parts, 2)
}

fn of_one_size(call: &PlainCall, plain: &impl Fn(&PlainCall) -> Result<Tensor>) -> Result<Tensor> {
    let value_dim = call.qkv[2].dim(3)?;
    if call.qkv[1].dim(3)? == value_dim {
        return of_all_rows(call, plain);
    }
    let ([q, k, v], options) = padded(call.qkv, call.options)?;
    let output = of_all_rows(
        &PlainCall {
            qkv: [&q, &k, &v],
            options: &options,
            ..*call
        },
        plain,
    )?;
    output.narrow(3, 0, value_dim)
}

fn of_all_rows(call: &PlainCall, plain: &impl Fn(&PlainCall) -> Result<Tensor>) -> Result<Tensor> {
    let [q, k, v] = call.qkv;
    let (queries, tokens) = (q.dim(2)?, k.dim(2)?);
    if queries == tokens {
        return plain(call);
    }
    if queries > tokens && call.options.sliding_window.is_some() {
        bail!(
            "sliding_window: expected None on CUDA with {queries} queries and {tokens} keys, got {:?}; no later query \
             would see a key, give as many queries as keys at most, or move the tensors with to_device(&Device::Cpu)",
            call.options.sliding_window
        )
    }
    let mut outputs = Vec::new();
    // One group where the call is causal.
    for start in (0..queries).step_by(tokens) {
        let count = tokens.min(queries - start);
        let first_row = tokens - count;
        let q = q.narrow(2, start, count)?.pad_with_zeros(2, first_row, 0)?;
        let bias = call.bias.map(|bias| bias.narrow(2, start, count)).transpose()?;
        let [head, row, token] = call.part.drawn_from;
        // A causal row is a token; another one counts from the first query.
        let moved = match call.options.causal {
            true => row,
            false => row.wrapping_add(start as u32).wrapping_sub(first_row as u32),
        };
        outputs.push(plain(&PlainCall {
            qkv: [&q, k, v],
            bias: bias.as_ref(),
            part: Part {
                first_row,
                drawn_from: [head, moved, token],
            },
            ..*call
        })?);
    }
    Tensor::cat(&outputs, 2)
}

/// The rows of a call that the CUDA kernels take, from the first one that they compute.
#[cfg(feature = "cuda")]
pub(super) fn on_cuda(call: &PlainCall) -> Result<Tensor> {
    let ([q, k, v], options, first_row) = (call.qkv, call.options, call.part.first_row);
    let problem = Problem::new(q, k, v)?;
    let op = super::CompressedAttentionOp {
        bias: call.bias.cloned(),
        device_sinks: problem.device_sinks(options, q)?,
        device_column_bias: problem.device_column_bias(options, q)?,
        part: call.part,
        ..super::CompressedAttentionOp::new(problem, [q, k, v], call.plan, options)
    };
    let (sinks, kept) = (Vec::new(), op.kept.clone());
    let output = super::column_bias::apply([q, k, v], op, options)?;
    // The gradient of sinks reads its rows from the start of their buffer.
    let output = match first_row {
        0 => output,
        _ => output
            .narrow(2, first_row, problem.tokens - first_row)?
            .force_contiguous()?,
    };
    super::SinkGradient { problem, sinks, kept }.over(output, options)
}
