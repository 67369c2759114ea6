//! Attention from q, k, v and merge bits: folds, attends, and changes gradients of columns back to gradients of q, k
//! and v.

use super::backward;
use super::extras::has_extras;
use super::fold::{contiguous_rows, FoldCall};
use super::on_gpu::{Gpu, GpuElement};
use crate::config::{AttentionOptions, Fold};
use crate::cuda::forward;
use crate::cuda::forward::{Attended, AttentionCall, Saved, LARGEST_LISTED};
use crate::cuda::operands::{BiasBuffer, ColumnBuffers, Part};
use crate::problem::{Problem, RowLayout};
use candle_core::Result;

/// One attention call.
pub(crate) struct Attention<'a, G: Gpu, T: GpuElement> {
    pub fold: FoldCall<'a, G, T>,
    /// Whether no token can be hidden; then nothing is folded.
    pub dense: bool,
    pub window: usize,
    pub bias: Option<BiasBuffer<'a, G>>,
    /// Sink logits (H) in f32.
    pub sinks: Option<&'a G::Slice<f32>>,
    /// A column bias (B, Hk, N) in f32.
    pub column_bias: Option<&'a G::Slice<f32>>,
    pub options: &'a AttentionOptions,
    pub part: Part,
}

/// Lists of columns per batch row: one per KV head where nothing is hidden, or where the query heads of each KV head
/// are known to agree; else one per query head. Every kernel of a call gets the same number.
pub(crate) fn lists(problem: &Problem, dense: bool, agree: bool) -> usize {
    if dense || agree {
        problem.kv_heads
    } else {
        problem.heads
    }
}

/// The results of folding; None where the raw tensors serve unchanged.
pub(crate) struct Folded<G: Gpu, T: GpuElement> {
    pub queries: Option<G::Slice<T>>,
    pub columns: Option<ColumnBuffers<G, T>>,
}

/// Gradients of query (B, H, N, D), key and value (B, Hk, N, D), and of the column bias (B, Hk, N) if there is one.
pub(crate) struct GradientBuffers<G: Gpu, T: GpuElement> {
    pub dq: G::Slice<T>,
    pub dk: G::Slice<T>,
    pub dv: G::Slice<T>,
    pub column_bias: Option<G::Slice<f32>>,
}

impl<G: Gpu, T: GpuElement> Attention<'_, G, T> {
    /// Whether kernels that read raw tokens by their lists accept these tensors: "listed" in `cuda/lib/params.cuh`.
    fn can_list(&self) -> bool {
        let narrow = |layout: &RowLayout| i32::try_from(layout.strides[2]).is_ok();
        T::HALF
            && self.fades().is_none()
            && !self.fold.fold.keeps_hidden()
            && self.options.causal
            && self.fold.problem.head_dim <= LARGEST_LISTED
            && [self.fold.k.1, self.fold.v.1].iter().all(narrow)
    }

    /// L of the sliding window where it hides something.
    fn slides(&self) -> Option<usize> {
        self.options
            .sliding_window
            .filter(|length| *length < self.fold.problem.tokens)
    }

    /// The column bias, where a row sees a column that has left its window. Far columns have it beside their sizes: see
    /// `cuda/decide/fade.cu`.
    fn fades(&self) -> Option<&G::Slice<f32>> {
        let reach = self.slides().unwrap_or(self.fold.problem.tokens);
        self.column_bias.filter(|_| reach - 1 > self.window)
    }

    /// Whether rows see raw tokens only: nothing is hidden or faded, or the sliding window ends before the first folded
    /// column.
    fn raw(&self) -> bool {
        self.dense && self.fades().is_none() || self.slides().is_some_and(|length| length <= self.window)
    }

    /// The folding of this call. Where nothing is hidden, no fold changes a token, and dropping copies least.
    fn folding(&self) -> FoldCall<'_, G, T> {
        let fold = if self.dense { Fold::Drop } else { self.fold.fold };
        FoldCall { fold, ..self.fold }
    }

    /// Folds queries and columns. `listed`: see [`FoldCall::columns`].
    ///
    /// # Errors
    /// An error of the device.
    pub fn folded(&self, gpu: &G, listed: bool) -> Result<Folded<G, T>> {
        let fold = self.folding();
        let mut columns = match self.raw() {
            true => None,
            false => Some(fold.columns(gpu, listed)?),
        };
        if let (Some(columns), Some(bias)) = (&mut columns, self.fades()) {
            fold.fade(gpu, columns, bias)?;
        }
        Ok(Folded {
            queries: fold.queries(gpu)?,
            columns,
        })
    }

    /// The input of the attention kernels.
    pub fn call<'b>(&'b self, folded: &'b Folded<G, T>) -> AttentionCall<'b, G, T> {
        AttentionCall {
            problem: self.fold.problem,
            q: match &folded.queries {
                Some(queries) => (queries, contiguous_rows(&self.fold.problem)),
                None => self.fold.q,
            },
            k: self.fold.k,
            v: self.fold.v,
            columns: folded.columns.as_ref(),
            lists: self.fold.lists,
            window: self.window,
            bias: self.bias,
            sinks: self.sinks,
            fades: self.fades().is_some(),
            options: self.options,
            part: self.part,
        }
    }

    /// The output, and with `keep` the tensors that the backward pass needs.
    ///
    /// # Errors
    /// As [`forward::forward`].
    pub fn forward(&self, gpu: &G, keep: bool) -> Result<Attended<G, T>> {
        let lean = !has_extras(self.options) && self.slides().is_none() && self.part.first_row == 0;
        let folded = self.folded(gpu, lean && self.can_list())?;
        forward::forward(gpu, &self.call(&folded), keep)
    }

    /// The gradients of query, key and value, and of the column bias. Folds or lists again, O(N·D), which costs less
    /// than keeping the columns.
    ///
    /// # Errors
    /// As [`backward::backward`].
    pub fn backward(
        &self,
        gpu: &G,
        saved: &Saved<'_, G, T>,
        grad_output: &G::Slice<T>,
    ) -> Result<GradientBuffers<G, T>> {
        let lists = match self.raw() || self.dense {
            true => backward::lists::<G, T>(gpu, &self.fold.problem, self.options)?,
            false => self.fold.lists,
        };
        let fold = FoldCall { lists, ..self.fold };
        Attention { fold, ..*self }.gradients(gpu, saved, grad_output)
    }

    fn gradients(&self, gpu: &G, saved: &Saved<'_, G, T>, grad_output: &G::Slice<T>) -> Result<GradientBuffers<G, T>> {
        let listed = self.can_list() && backward::fuses::<G, T>(gpu, &self.fold.problem, self.options)?;
        let folded = self.folded(gpu, listed)?;
        let gradients = backward::backward(gpu, &self.call(&folded), saved, grad_output)?;
        let fold = self.folding();
        let dq = fold.unfold_queries(gpu, &gradients.queries, true)?;
        let far_before = folded.columns.as_ref().map(|columns| &columns.far_before);
        let column_bias = match (far_before, &gradients.fades) {
            (Some(before), Some(sums)) => Some(fold.unfade(gpu, before, sums)?),
            _ => {
                let Problem {
                    batch,
                    kv_heads,
                    tokens,
                    ..
                } = fold.problem;
                let zeros = |_| gpu.zeros(batch * kv_heads * tokens);
                self.column_bias.map(zeros).transpose()?
            }
        };
        if let Some((dk, dv)) = gradients.done {
            return Ok(GradientBuffers {
                dq,
                dk,
                dv,
                column_bias,
            });
        }
        let home = |pick: fn(&backward::KvGradients<G>) -> &G::Slice<f32>| {
            let columns = match (far_before, &gradients.far, &gradients.folded) {
                (Some(before), Some(far), Some(folded)) => Some((before, pick(far), pick(folded))),
                _ => None,
            };
            fold.unfold(gpu, columns, gradients.near.as_ref().map(pick))
        };
        Ok(GradientBuffers {
            dq,
            dk: home(|x| &x.keys)?,
            dv: home(|x| &x.values)?,
            column_bias,
        })
    }
}
