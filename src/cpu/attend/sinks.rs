//! The gradient of sink logits on the CPU, from the forward's output and log-sum-exp.

use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::rows::RowGrid;
use crate::cpu::number::vectorized::dot;
use crate::problem::Problem;
use rayon::prelude::*;

/// The inputs of [`sink_gradients`].
pub(crate) struct SinkInput<'a, T: Element> {
    pub problem: Problem,
    /// The forward's output (B, H, Nq, Dv) and its gradient.
    pub output: RowGrid<'a, T>,
    pub grad_output: RowGrid<'a, T>,
    /// The forward's log-sum-exp in base 2, (B, H, Nq), as two numbers that add up to it.
    pub log_sum_exp: &'a [[T::Acc; 2]],
    /// The sink logits (H) in base 2.
    pub sinks: &'a [T::Acc],
}

/// The gradient (H) of each query head's sink: the sum of -p · (output · grad_output) over its rows, where p is the
/// sink's weight. Rows are added in order, in f64.
pub(crate) fn sink_gradients<T: Element>(input: &SinkInput<T>) -> Vec<f64> {
    let Problem { batch, heads, .. } = input.problem;
    let rows = input.log_sum_exp.len() / (batch * heads);
    let of_head = |at: usize| {
        let (b, head) = (at / heads, at % heads);
        let (outputs, grads) = (input.output.head(b, head), input.grad_output.head(b, head));
        let [mut output, mut grad] = [outputs.dim, grads.dim].map(|dim| vec![T::Acc::ZERO; dim]);
        let sink = input.sinks[head].double();
        let mut sum = 0.0;
        for (row, [max, log2_sum]) in input.log_sum_exp[at * rows..][..rows].iter().enumerate() {
            T::widen(outputs.row(row), &mut output);
            T::widen(grads.row(row), &mut grad);
            let weight = (sink - max.double() - log2_sum.double()).exp2();
            sum -= weight * dot(&output, &grad).double();
        }
        sum
    };
    let parts: Vec<f64> = (0..batch * heads).into_par_iter().map(of_head).collect();
    (0..heads)
        .map(|head| parts.iter().skip(head).step_by(heads).sum())
        .collect()
}
