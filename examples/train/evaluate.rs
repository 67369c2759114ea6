//! Held-out perplexity and hidden ratio, by the llama example's model on the current weights.

use std::collections::BTreeMap;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var, D};
use candle_sfattention::CompressedAttention;
use serde::{Deserialize, Deserializer, Serialize};

use crate::load::text::Start;
use crate::model::{HiddenCounts, Llama, LlamaConfig};
use crate::ranks::Ranks;
use crate::trainable::Trainable;
use crate::weights::{Linear, Weights};
use crate::windows::{self, Purpose};

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct HeldOut {
    #[serde(deserialize_with = "number_or_nan")]
    pub perplexity: f64,
    pub hidden_ratio: f64,
}

/// JSON has no NaN or infinity: such a number, of a run that diverged, is written as null.
pub fn number_or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// Windows of the held-out text that do not overlap.
pub struct Evaluator {
    windows: Vec<Vec<u32>>,
    /// The first token that is predicted.
    first: usize,
}

impl Evaluator {
    /// `wanted` windows of `context` tokens, as in `llama eval --spread`, or all windows, as in `llama eval`.
    pub fn new(tokens: &[u32], start: &Start, context: usize, wanted: Option<usize>) -> Result<Self> {
        start.check_room(context)?;
        let available = tokens.len() / context;
        ensure!(
            available > 0,
            "text: expected at least {context} held-out tokens, one window, got {}; lower --context or give a longer \
             text",
            tokens.len()
        );
        let windows = match wanted {
            Some(wanted) => windows::spread(tokens, context, wanted, Purpose::Score).context("eval-windows")?,
            None => tokens.chunks_exact(context).collect(),
        };
        Ok(Self {
            windows: windows.into_iter().map(|window| start.over(window)).collect(),
            first: start.count().max(1),
        })
    }

    pub fn measure(
        &self,
        model: &Trainable,
        config: &LlamaConfig,
        attention: Vec<CompressedAttention>,
    ) -> Result<HeldOut> {
        let model = Llama::load(&mut VarWeights(model.vars()), config, attention, &Ranks::default())?;
        let mut counts = HiddenCounts::default();
        let (mut sum, mut predicted) = (0.0, 0);
        for window in &self.windows {
            let hidden = model.forward(window, &mut counts)?;
            let rows = window.len() - self.first;
            sum += nll(&model.logits(&hidden, self.first - 1, rows)?, &window[self.first..])?;
            predicted += rows;
        }
        Ok(HeldOut {
            perplexity: (sum / predicted as f64).exp(),
            hidden_ratio: counts.ratio(),
        })
    }
}

/// Σ log Σ exp(logits) - logits[target] over rows `(n, vocabulary)`.
fn nll(logits: &Tensor, targets: &[u32]) -> Result<f64> {
    let targets = Tensor::new(targets, &Device::Cpu)?.unsqueeze(1)?;
    let picked = logits.gather(&targets, D::Minus1)?.squeeze(1)?;
    let losses = (logits.log_sum_exp(D::Minus1)? - picked)?;
    Ok(losses.to_vec1::<f32>()?.into_iter().map(f64::from).sum())
}

/// The weights in training without their graph, so that fused operations can run.
struct VarWeights(BTreeMap<String, Var>);

impl VarWeights {
    fn get(&self, name: &str) -> Result<Tensor> {
        let var = self.0.get(name).with_context(|| format!("{name}: no such weight"))?;
        Ok(var.as_detached_tensor())
    }

    fn weight(&self, path: &str) -> Result<Tensor> {
        self.get(&format!("{path}.weight"))
    }
}

impl Weights for VarWeights {
    fn dtype(&self) -> DType {
        DType::F32
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn shape(&self, path: &str) -> Option<Vec<usize>> {
        self.0.get(&format!("{path}.weight")).map(|var| var.dims().to_vec())
    }

    fn table(&mut self, path: &str, _rows: usize, _columns: usize) -> Result<Linear> {
        Ok(Linear::Float(candle_nn::Linear::new(self.weight(path)?, None)))
    }

    fn linear(&mut self, path: &str, _rows: usize, _columns: usize) -> Result<Linear> {
        let bias = self.0.get(&format!("{path}.bias")).map(Var::as_detached_tensor);
        Ok(Linear::Float(candle_nn::Linear::new(self.weight(path)?, bias)))
    }

    fn vector(&mut self, path: &str, _len: usize) -> Result<Tensor> {
        self.weight(path)
    }

    fn bias(&mut self, path: &str, _len: usize) -> Result<Tensor> {
        self.get(&format!("{path}.bias"))
    }

    /// The names come from the same model in training.
    fn check_all_read(&mut self) -> Result<()> {
        Ok(())
    }
}
