//! The loss: the divergence of a student's predictions from a teacher's.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, D};
use candle_nn::ops::{log_softmax, softmax_last_dim};

/// Added to shares before their logarithm.
const TINY: f64 = 1e-30;

/// Hidden states (n, hidden) and the output matrix (vocabulary, hidden).
#[derive(Clone, Copy)]
pub struct Predictions<'a> {
    pub hidden: &'a Tensor,
    pub head: &'a Tensor,
}

/// A divergence with its gradients.
pub struct Distilled {
    /// KL(teacher ‖ student) in nats, f32, the mean over the rows.
    pub divergence: Tensor,
    /// A scalar whose gradients are those of the divergence.
    pub loss: Tensor,
}

/// Logits exist for some rows at a time, of both models: their gradient is known as soon as they are.
pub fn distill(student: Predictions, teacher: Predictions) -> Result<Distilled> {
    let (count, _) = student.hidden.dims2()?;
    let (hidden, head) = (student.hidden.detach(), student.head.detach());
    let dtype = hidden.dtype();
    let (matrix, teacher_matrix) = (head.to_dtype(dtype)?, teacher.head.to_dtype(dtype)?);
    let at_once = rows_at_once(head.dim(0)?, head.device());
    let mut of_hidden = Vec::with_capacity(count.div_ceil(at_once));
    let mut of_head = head.to_dtype(DType::F32)?.zeros_like()?;
    let mut sums = Vec::with_capacity(of_hidden.capacity());
    for first in (0..count).step_by(at_once) {
        let rows = at_once.min(count - first);
        let shares = |hidden: &Tensor, matrix: &Tensor| -> Result<(Tensor, Tensor)> {
            let rows = hidden.narrow(0, first, rows)?;
            let logits = rows.matmul(&matrix.t()?)?.to_dtype(DType::F32)?;
            Ok((rows, softmax_last_dim(&logits)?))
        };
        let (xs, student) = shares(&hidden, &matrix)?;
        let (_, teacher) = shares(&teacher.hidden.detach(), &teacher_matrix)?;
        let gradient = ((&student - &teacher)? / count as f64)?.to_dtype(dtype)?;
        let logarithm = |shares: &Tensor| (shares + TINY)?.log();
        sums.push((&teacher * (logarithm(&teacher)? - logarithm(&student)?)?)?.sum_all()?);
        of_hidden.push(gradient.matmul(&matrix)?);
        of_head = (of_head + gradient.t()?.matmul(&xs)?.to_dtype(DType::F32)?)?;
    }
    let inner = |x: &Tensor, gradient: &Tensor| -> Result<Tensor> {
        Ok((x.to_dtype(DType::F32)? * gradient.to_dtype(DType::F32)?)?.sum_all()?)
    };
    let loss = (inner(student.hidden, &Tensor::cat(&of_hidden, 0)?)? + inner(student.head, &of_head)?)?;
    Ok(Distilled {
        divergence: (Tensor::stack(&sums, 0)?.sum_all()? / count as f64)?,
        loss,
    })
}

/// The negative log likelihood of each target u32 (n), f32 (n).
pub fn nll(predictions: Predictions, targets: &Tensor) -> Result<Tensor> {
    let (count, _) = predictions.hidden.dims2()?;
    let hidden = predictions.hidden.detach();
    let matrix = predictions.head.detach().to_dtype(hidden.dtype())?;
    let at_once = rows_at_once(matrix.dim(0)?, matrix.device());
    let mut all = Vec::with_capacity(count.div_ceil(at_once));
    for first in (0..count).step_by(at_once) {
        let rows = at_once.min(count - first);
        let logits = hidden
            .narrow(0, first, rows)?
            .matmul(&matrix.t()?)?
            .to_dtype(DType::F32)?;
        let targets = targets.narrow(0, first, rows)?.unsqueeze(1)?;
        all.push(
            log_softmax(&logits, D::Minus1)?
                .gather(&targets, 1)?
                .squeeze(1)?
                .neg()?,
        );
    }
    Ok(Tensor::cat(&all, 0)?)
}

/// Rows of logits held at once: some of them are in 256 MiB on a GPU, and in 16 MiB on the CPU.
fn rows_at_once(vocabulary: usize, device: &Device) -> usize {
    let numbers = if device.is_cpu() { 1 << 22 } else { 1 << 26 };
    (numbers / vocabulary).max(1)
}
