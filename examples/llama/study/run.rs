//! One task under each method, beside dense.

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::held::Kept;
use super::ledger::Record;
use super::method::{Method, Planner};
use super::prune::attended;
use super::score::Scores;
use super::tasks::Sample;
use crate::corpus::Window;
use crate::model::{HiddenCounts, Llama};

/// A task for a method.
pub enum Task {
    Text(Window),
    Asked(Sample),
}

impl Task {
    /// Whether the method applies: one that prunes after a context needs a question.
    pub fn takes(&self, method: &Method) -> bool {
        match self {
            Self::Text(_) => !method.prunes(),
            Self::Asked(_) => true,
        }
    }

    fn tokens(&self) -> &[u32] {
        match self {
            Self::Text(window) => &window.tokens,
            Self::Asked(sample) => &sample.tokens,
        }
    }

    /// How many tokens are predicted: the last ones.
    fn predicted(&self) -> usize {
        match self {
            Self::Text(window) => window.predicted(),
            Self::Asked(sample) => sample.answer,
        }
    }
}

/// The passes over one task.
pub struct Run<'a> {
    model: &'a Llama,
    task: &'a Task,
    /// Dense hidden states. Every method's logits are compared with theirs.
    dense: Option<Tensor>,
}

impl<'a> Run<'a> {
    pub fn new(model: &'a Llama, task: &'a Task) -> Self {
        Self {
            model,
            task,
            dense: None,
        }
    }

    /// Runs the task under one method.
    pub fn measure(&mut self, planner: &Planner) -> Result<Record> {
        let tokens = self.task.tokens();
        if self.dense.is_none() && !planner.is_dense() {
            self.dense = Some(self.pass(&Planner::dense())?.hidden);
        }
        let Passed { hidden, kept, seconds } = self.pass(planner)?;
        if planner.is_dense() {
            self.dense = Some(hidden.clone());
        }
        let predicted = self.task.predicted();
        let dense = self.dense.as_ref().context("dense pass")?;
        let scores = Scores::of(self.model, tokens, tokens.len() - predicted, &hidden, dense)?;
        Ok(Record {
            score: scores.nll,
            predicted,
            divergence: scores.divergence,
            agreed: scores.agreed,
            found: match self.task {
                Task::Text(_) => None,
                Task::Asked(_) => Some(scores.right == predicted),
            },
            tokens: tokens.len(),
            kept,
            seconds,
        })
    }

    fn pass(&self, planner: &Planner) -> Result<Passed> {
        let mut kept = Kept::default();
        let start = Instant::now();
        let tokens = self.task.tokens();
        let pruning = match self.task {
            Task::Text(_) => None,
            Task::Asked(sample) => planner
                .pruning(sample.context, tokens.len())
                .map(|pruning| (sample.context, pruning)),
        };
        let hidden = match pruning {
            Some((context, (ranking, keep))) => self.model.forward_attended(tokens, |call| {
                kept.add_pruned(call, context - keep.min(context))?;
                attended(call, context, ranking, keep)
            })?,
            None => self
                .model
                .forward_planned(tokens, &mut HiddenCounts::default(), |call| {
                    let (plan, per_query_head) = planner.plan(call)?;
                    kept.add(call, &plan, per_query_head)?;
                    Ok(plan)
                })?,
        };
        // A GPU computes on after its calls return.
        self.model.device().synchronize()?;
        Ok(Passed {
            hidden,
            kept,
            seconds: start.elapsed().as_secs_f64(),
        })
    }
}

/// One forward pass.
struct Passed {
    hidden: Tensor,
    kept: Kept,
    /// Without the logits.
    seconds: f64,
}
