//! One call of attention on the CPU: its inputs from candle's storages, segment by segment, and its gradients.

use super::CompressedAttentionOp;
use crate::config::Segment;
use crate::cpu::attend::backward::{backward, Gradients};
use crate::cpu::attend::forward::forward;
use crate::cpu::attend::input::{BackwardInput, ColumnBias, ForwardInput};
use crate::cpu::number::bias::sinks_in_base_2;
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::rows::RowGrid;
use crate::problem::{Problem, RowLayout};
use crate::storage::{bias_view, cpu_slice};
use candle_core::{bail, CpuStorage, DType, Device, Error, Layout, Result, Shape, Storage, Tensor};

impl CompressedAttentionOp {
    pub(super) fn cpu<T: Element>(&self, qkv: [(&[T], &Layout); 3]) -> Result<(CpuStorage, Shape)> {
        let Problem {
            batch,
            heads,
            queries,
            value_dim,
            ..
        } = self.problem;
        let mut log_sum_exp = vec![[T::Acc::ZERO; 2]; if self.tracked { batch * heads * queries } else { 0 }];
        let column_bias = self.column_bias_in_base_2::<T::Acc>()?;
        let run = |segment: Option<&Segment>, log_sum_exp: &mut [[T::Acc; 2]]| {
            self.with_input(qkv, column_bias.as_deref(), segment, |input| {
                input.check_bias()?;
                Ok(forward(input, self.tracked.then_some(log_sum_exp)))
            })
        };
        let output = match &self.segments {
            None => run(None, &mut log_sum_exp)?,
            Some(segments) => {
                let mut output = vec![T::zero(); batch * heads * queries * value_dim];
                for segment in segments {
                    let rows = if self.tracked { heads * segment.tokens.len() } else { 0 };
                    let mut part_log_sum_exp = vec![[T::Acc::ZERO; 2]; rows];
                    let part =
                        run(Some(segment), &mut part_log_sum_exp).map_err(|error| in_segment(segment, &error))?;
                    segment.paste(&part, &mut output, [heads, queries, value_dim]);
                    segment.paste(&part_log_sum_exp, &mut log_sum_exp, [heads, queries, 1]);
                }
                output
            }
        };
        if self.tracked {
            let kept = Tensor::from_vec(log_sum_exp.into_flattened(), (batch, heads, queries, 2), &Device::Cpu)?;
            self.kept.get_or_init(|| vec![kept]);
        }
        Ok((
            T::to_cpu_storage_owned(output),
            Shape::from((batch, heads, queries, value_dim)),
        ))
    }

    /// The column bias in row-major order and the accumulator's dtype, in base 2, if there is one.
    fn column_bias_in_base_2<A: Accumulator>(&self) -> Result<Option<Vec<A>>> {
        let Some(bias) = &self.options.column_bias else {
            return Ok(None);
        };
        let numbers = bias.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let in_base_2 = |x: f64| A::of(x * std::f64::consts::LOG2_E);
        Ok(Some(numbers.into_iter().map(in_base_2).collect()))
    }

    /// Calls `body` with the input of the whole call, or of one segment alone; `column_bias` is in base 2.
    fn with_input<T: Element, R>(
        &self,
        [q, k, v]: [(&[T], &Layout); 3],
        column_bias: Option<&[T::Acc]>,
        segment: Option<&Segment>,
        body: impl FnOnce(&ForwardInput<T>) -> Result<R>,
    ) -> Result<R> {
        let indicators = self.plan.indicators().storage_and_layout();
        let bias = self.bias.as_ref().map(Tensor::storage_and_layout);
        let bias = match &bias {
            Some((storage, layout)) => Some(bias_view(storage, layout)?),
            None => None,
        };
        let sinks = self.sinks.as_deref().map(sinks_in_base_2);
        let bits = contiguous::<u8>(&indicators.0, indicators.1)?;
        let whole = ForwardInput {
            q: rows(q),
            k: rows(k),
            v: rows(v),
            problem: self.problem,
            bits,
            fold: self.plan.config().fold,
            window: self.plan.config().window,
            causal: self.options.causal,
            sliding_window: self.options.sliding_window.unwrap_or(usize::MAX),
            scale: self.options.scale(self.problem.head_dim),
            softcap: self.options.softcap,
            dropout: self.options.dropout,
            first: [0, 0],
            bias,
            sinks: sinks.as_deref(),
            column_bias: column_bias.map(|bias| {
                let Problem { kv_heads, tokens, .. } = self.problem;
                ColumnBias::new(bias, [kv_heads, tokens])
            }),
        };
        let Some(segment) = segment else { return body(&whole) };
        let (batch, first) = (segment.batch, segment.tokens.start);
        body(&ForwardInput {
            q: whole.q.from(batch, first),
            k: whole.k.from(batch, first),
            v: whole.v.from(batch, first),
            problem: self.problem.alone(segment),
            bits: &segment.pairs().cut(bits, [self.problem.heads, self.problem.pairs(), 1]),
            first: [batch, first],
            bias: bias.map(|bias| bias.from(batch, first)),
            column_bias: whole.column_bias.map(|bias| bias.from(batch, first)),
            ..whole
        })
    }

    /// The gradients dq (B, H, Nq, D), dk (B, Hk, N, D) and dv (B, Hk, N, Dv), and that of the column bias (B, Hk, N),
    /// if there is one.
    fn cpu_bwd<T: Element>(
        &self,
        qkv: [&Tensor; 3],
        output: &Tensor,
        grad_output: &Tensor,
    ) -> Result<([Tensor; 3], Option<Tensor>)> {
        let log_sum_exp = self.kept()?[0].storage_and_layout();
        let tensors = [qkv[0], qkv[1], qkv[2], output, grad_output].map(Tensor::storage_and_layout);
        let mut slices = Vec::with_capacity(5);
        for (storage, layout) in &tensors {
            slices.push((cpu_slice::<T>(storage)?, *layout));
        }
        let [q, k, v, output, grad_output] = slices[..] else {
            bail!(
                "compressed-attention: expected 5 tensors, got {}; this is a defect of the crate",
                slices.len()
            )
        };
        let log_sum_exp = contiguous::<T::Acc>(&log_sum_exp.0, log_sum_exp.1)?.as_chunks().0;
        let column_bias = self.column_bias_in_base_2::<T::Acc>()?;
        let run = |segment: Option<&Segment>, log_sum_exp: &[[T::Acc; 2]]| {
            let [batch, first] = segment.map_or([0, 0], |segment| [segment.batch, segment.tokens.start]);
            self.with_input([q, k, v], column_bias.as_deref(), segment, |input| {
                Ok(backward(&BackwardInput {
                    forward: *input,
                    output: rows(output).from(batch, first),
                    grad_output: rows(grad_output).from(batch, first),
                    log_sum_exp,
                }))
            })
        };
        let Gradients {
            dq,
            dk,
            dv,
            column_bias,
        } = match &self.segments {
            None => run(None, log_sum_exp)?,
            Some(segments) => {
                let Problem {
                    heads,
                    kv_heads,
                    tokens,
                    head_dim,
                    ..
                } = self.problem;
                let zeros = |like: &Tensor| vec![T::zero(); like.elem_count()];
                let mut whole = Gradients {
                    dq: zeros(qkv[0]),
                    dk: zeros(qkv[1]),
                    dv: zeros(qkv[2]),
                    column_bias: match self.options.column_bias {
                        Some(_) => vec![T::Acc::ZERO; self.problem.batch * kv_heads * tokens],
                        None => Vec::new(),
                    },
                };
                for segment in segments {
                    let part = run(Some(segment), &segment.cut(log_sum_exp, [heads, tokens, 1]))?;
                    segment.paste(&part.dq, &mut whole.dq, [heads, tokens, head_dim]);
                    segment.paste(&part.dk, &mut whole.dk, [kv_heads, tokens, head_dim]);
                    segment.paste(&part.dv, &mut whole.dv, [kv_heads, tokens, self.problem.value_dim]);
                    if !part.column_bias.is_empty() {
                        segment.paste(&part.column_bias, &mut whole.column_bias, [kv_heads, tokens, 1]);
                    }
                }
                whole
            }
        };
        let like = |data: Vec<T>, tensor: &Tensor| Tensor::from_vec(data, tensor.dims(), &Device::Cpu);
        let column_bias = match &self.options.column_bias {
            Some(bias) => Some(Tensor::from_vec(column_bias, bias.dims(), &Device::Cpu)?.to_dtype(bias.dtype())?),
            None => None,
        };
        Ok(([like(dq, qkv[0])?, like(dk, qkv[1])?, like(dv, qkv[2])?], column_bias))
    }

    /// [`Self::cpu_bwd`] in the call's dtype.
    pub(super) fn cpu_gradients(
        &self,
        qkv: [&Tensor; 3],
        output: &Tensor,
        grad_output: &Tensor,
    ) -> Result<([Tensor; 3], Option<Tensor>)> {
        match self.problem.dtype {
            DType::F64 => self.cpu_bwd::<f64>(qkv, output, grad_output),
            DType::F16 => self.cpu_bwd::<half::f16>(qkv, output, grad_output),
            DType::BF16 => self.cpu_bwd::<half::bf16>(qkv, output, grad_output),
            _ => self.cpu_bwd::<f32>(qkv, output, grad_output),
        }
    }
}

/// An error of one segment's call, whose rows and columns count from its first token.
fn in_segment(segment: &Segment, error: &Error) -> Error {
    let Segment { batch, tokens, .. } = segment;
    Error::msg(format!(
        "in the segment of batch row {batch} from token {} on: {error}",
        tokens.start
    ))
}

fn rows<'a, T>((data, layout): (&'a [T], &Layout)) -> RowGrid<'a, T> {
    RowGrid::new(data, RowLayout::new(layout))
}

fn contiguous<'a, T: candle_core::WithDType>(storage: &'a Storage, layout: &Layout) -> Result<&'a [T]> {
    match (storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => Ok(&storage.as_slice::<T>()?[start..end]),
        _ => bail!(
            "indicators: expected a contiguous tensor on the CPU, got strides {:?} on {:?}; \
             make the plan on the query's device",
            layout.stride(),
            storage.device().location()
        ),
    }
}
