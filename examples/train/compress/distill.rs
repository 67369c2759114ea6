//! The loss: the divergence of a student's predictions from a teacher's.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, D};
use candle_nn::ops::{log_softmax, softmax_last_dim};

use crate::known::known;

/// Hidden states (n, hidden) and the output matrix (vocabulary, hidden).
#[derive(Clone, Copy)]
pub struct Predictions<'a> {
    pub hidden: &'a Tensor,
    pub head: &'a Tensor,
}

/// KL(teacher ‖ student) in nats, f32, the mean over the rows: a scalar with a gradient for the student's hidden states
/// and output matrix. Logits exist for some rows at a time, of both models; their gradient is known as soon as they
/// are.
pub fn distill(student: Predictions, teacher: Predictions) -> Result<Tensor> {
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
        let logits = |hidden: &Tensor, matrix: &Tensor| -> Result<_> {
            let rows = hidden.narrow(0, first, rows)?;
            let logits = rows.matmul(&matrix.t()?)?.to_dtype(DType::F32)?;
            Ok((rows, Shares::new(logits)?))
        };
        let (xs, student) = logits(&hidden, &matrix)?;
        let (_, teacher) = logits(&teacher.hidden.detach(), &teacher_matrix)?;
        // ln t - ln s = (z_t - z_s) - (the logarithms of the sums of exponentials), and shares sum to 1. Sums go row by
        // row: candle gives the sum of a whole tensor one block of a GPU.
        let apart = (&teacher.shares * (&teacher.logits - &student.logits)?)?.sum(D::Minus1)?;
        sums.push((apart - (teacher.log_sum - student.log_sum)?)?.sum_all()?);
        let gradient = (student.shares - teacher.shares)?.to_dtype(dtype)?;
        of_hidden.push(gradient.matmul(&matrix)?);
        of_head = (of_head + gradient.t()?.matmul(&xs)?.to_dtype(DType::F32)?)?;
    }
    let mean = |sum: Tensor| sum / count as f64;
    let of_hidden = mean(Tensor::cat(&of_hidden, 0)?.to_dtype(DType::F32)?)?;
    let gradients = [of_hidden.to_dtype(dtype)?, mean(of_head)?.to_dtype(head.dtype())?];
    let divergence = mean(Tensor::stack(&sums, 0)?.sum_all()?)?;
    Ok(known(
        "divergence",
        [student.hidden, student.head],
        divergence,
        move |gradient| {
            let times = |of: &Tensor| of.broadcast_mul(&gradient.to_dtype(of.dtype())?);
            Ok([Some(times(&gradients[0])?), Some(times(&gradients[1])?)])
        },
    )?)
}

/// Logits of rows in f32, and their softmax.
struct Shares {
    logits: Tensor,
    shares: Tensor,
    /// The logarithm of each row's sum of exponentials.
    log_sum: Tensor,
}

impl Shares {
    fn new(logits: Tensor) -> Result<Self> {
        let shares = softmax_last_dim(&logits)?;
        // The largest share is never rounded to 0.
        let log_sum = (logits.max(D::Minus1)? - shares.max(D::Minus1)?.log()?)?;
        Ok(Self {
            logits,
            shares,
            log_sum,
        })
    }
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

/// Rows of logits held at once: a tensor of them has 1 GiB on a GPU, where candle's softmax gives a row one warp, and
/// 16 MiB on the CPU.
fn rows_at_once(vocabulary: usize, device: &Device) -> usize {
    let numbers = if device.is_cpu() { 1 << 22 } else { 1 << 28 };
    (numbers / vocabulary).max(1)
}
