//! What a model says of the tokens that count: their likelihood, its likeliest tokens, and its distance from dense.

use anyhow::Result;
use candle_core::{Device, Tensor, D};

use crate::finite;
use crate::model::Llama;

/// Rows of logits held at once on the CPU: 64 rows of 50k f32 are 12 MiB, and about six such buffers live together.
const ROWS: usize = 64;
/// On a GPU, where a launch costs more: 512 rows of 150k f32 are 300 MiB.
const GPU_ROWS: usize = 512;

/// Sums over the predicted tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scores {
    /// Negative log likelihood, in nats.
    pub nll: f64,
    /// KL(dense || method), in nats.
    pub divergence: f64,
    /// Tokens where the likeliest one is dense's.
    pub agreed: usize,
    /// Tokens that are the likeliest.
    pub right: usize,
}

impl Scores {
    /// Of `tokens[first..]`, by hidden states `(1, N, hidden)` of a method and of dense. The logits of both are made a
    /// few rows at a time, so that memory does not grow with the text.
    pub fn of(model: &Llama, tokens: &[u32], first: usize, hidden: &Tensor, dense: &Tensor) -> Result<Self> {
        let rows = match model.device() {
            Device::Cpu => ROWS,
            Device::Cuda(_) | Device::Metal(_) => GPU_ROWS,
        };
        let mut sum = Self::default();
        for start in (first..tokens.len()).step_by(rows) {
            let count = rows.min(tokens.len() - start);
            // Row t predicts token t + 1.
            let [own, other] = [hidden, dense].map(|states| Rows::new(model, states, start - 1, count));
            sum.add(&own?, &other?, &tokens[start..start + count])?;
        }
        Ok(sum)
    }

    fn add(&mut self, own: &Rows, dense: &Rows, targets: &[u32]) -> Result<()> {
        self.nll += own.nll(targets)?;
        let difference = (&dense.log_likelihoods - &own.log_likelihoods)?;
        let divergence = (dense.log_likelihoods.exp()? * difference)?.sum(D::Minus1)?;
        self.divergence += divergence.to_vec1::<f32>()?.into_iter().map(f64::from).sum::<f64>();
        let equal = |a: &[u32], b: &[u32]| a.iter().zip(b).filter(|(a, b)| a == b).count();
        self.agreed += equal(&own.likeliest, &dense.likeliest);
        self.right += equal(&own.likeliest, targets);
        Ok(())
    }
}

/// Some rows of a model's output.
struct Rows {
    /// `(n, vocabulary)`, f32.
    log_likelihoods: Tensor,
    likeliest: Vec<u32>,
}

impl Rows {
    fn new(model: &Llama, hidden: &Tensor, first: usize, n: usize) -> Result<Self> {
        let logits = model.logits_in_place(hidden, first, n)?;
        // A quantized product reads NaN as 0, so logits alone do not show it.
        finite::check("hidden state", &hidden.narrow(1, first, n)?.squeeze(0)?, first)?;
        let sums = logits.log_sum_exp(D::Minus1)?;
        let plain = sums.to_vec1::<f32>()?.iter().all(|sum| sum.is_finite());
        if !plain || matches!(logits.device(), Device::Cpu) {
            finite::check("logits", &logits, first)?;
        }
        Ok(Self {
            likeliest: logits.argmax(D::Minus1)?.to_vec1()?,
            log_likelihoods: logits.broadcast_sub(&sums.unsqueeze(1)?)?,
        })
    }

    fn nll(&self, targets: &[u32]) -> Result<f64> {
        let targets = Tensor::new(targets, self.log_likelihoods.device())?.unsqueeze(1)?;
        let picked = self.log_likelihoods.gather(&targets, D::Minus1)?.squeeze(1)?;
        Ok(-picked.to_vec1::<f32>()?.into_iter().map(f64::from).sum::<f64>())
    }
}
