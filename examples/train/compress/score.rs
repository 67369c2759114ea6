//! A held-out text's likelihood under the teacher and the student, window by window.

use anyhow::{ensure, Result};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::distill::nll;
use super::student::{Student, Teacher};
use crate::load::text::Start;
use crate::windows::{spread, Purpose};

/// Windows scored at once.
const BATCH: usize = 8;

/// The windows of a text: prose, and passages twice whose second halves count.
pub struct HeldOut {
    prose: Vec<Vec<u32>>,
    copies: Vec<Vec<u32>>,
    /// Tokens of each window that are no text.
    start: usize,
}

/// Mean nats per token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    pub windows: usize,
    pub dense: f64,
    /// Nats above the dense checkpoint's, and the standard error of this difference over the windows.
    pub over_dense: f64,
    pub standard_error: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Tokens of a window.
    pub context: usize,
    pub prose: Score,
    pub copies: Score,
    /// Of the tokens that can be hidden.
    pub hidden_share: f64,
}

impl HeldOut {
    /// Windows as those of `llama report`: the start stands in place of the first tokens.
    pub fn new(tokens: &[u32], start: &Start, context: usize, count: usize) -> Result<Self> {
        start.check_room(context)?;
        let windows = spread(tokens, context, count, Purpose::Score)?;
        Ok(Self {
            copies: windows.iter().map(|window| start.over_twice(window)).collect(),
            prose: windows.into_iter().map(|window| start.over(window)).collect(),
            start: start.count(),
        })
    }

    pub fn score(&self, teacher: &Teacher, student: &Student, shift: f64, device: &Device) -> Result<Scores> {
        let (prose, hidden_share) = score(&self.prose, self.start.max(1), (teacher, student), shift, device)?;
        let halves = self.copies.first().map_or(1, |window| window.len() - self.start);
        let again = (self.start + halves / 2).max(1);
        Ok(Scores {
            context: self.prose.first().map_or(0, Vec::len),
            prose,
            copies: score(&self.copies, again, (teacher, student), shift, device)?.0,
            hidden_share,
        })
    }
}

/// The score of the tokens from `first` on, and the share hidden.
fn score(
    windows: &[Vec<u32>],
    first: usize,
    (teacher, student): (&Teacher, &Student),
    shift: f64,
    device: &Device,
) -> Result<(Score, f64)> {
    let (mut dense, mut over, mut shares) = (Vec::new(), Vec::new(), 0.0);
    for windows in windows.chunks(BATCH) {
        let (batch, tokens) = (windows.len(), windows[0].len());
        let inputs = Tensor::from_vec(windows.concat(), (batch, tokens), device)?;
        // Row t predicts token t + 1; the last row's target is not counted.
        let targets: Vec<u32> = windows
            .iter()
            .flat_map(|window| window[1..].iter().chain(&window[..1]))
            .copied()
            .collect();
        let targets = Tensor::from_vec(targets, batch * tokens, device)?;
        let means = |losses: Tensor| -> Result<Vec<f64>> {
            let counted = losses.reshape((batch, tokens))?.narrow(1, first - 1, tokens - first)?;
            Ok(counted.mean(1)?.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
        };
        let hidden = teacher.hidden(&inputs, |_| Ok(()))?;
        let of_teacher = means(nll(teacher.predictions(&hidden), &targets)?)?;
        let pass = student.hiding(&inputs, shift, |_, _, _| Ok(()))?;
        let of_student = means(nll(student.predictions(&pass.hidden), &targets)?)?;
        over.extend(
            of_student
                .iter()
                .zip(&of_teacher)
                .map(|(student, teacher)| student - teacher),
        );
        dense.extend(of_teacher);
        shares += f64::from(pass.hidden_share.to_scalar::<f32>()?) * batch as f64;
    }
    ensure!(
        over.iter().all(|x| x.is_finite()),
        "held-out: expected finite losses, got none in some window; lower --lr"
    );
    let count = over.len() as f64;
    let mean = |numbers: &[f64]| numbers.iter().sum::<f64>() / count;
    let over_dense = mean(&over);
    let squares: f64 = over.iter().map(|x| (x - over_dense).powi(2)).sum();
    let score = Score {
        windows: over.len(),
        dense: mean(&dense),
        over_dense,
        standard_error: (squares / (count - 1.0).max(1.0) / count).sqrt(),
    };
    Ok((score, shares / count))
}
