//! AdamW whose state can be saved: candle's own does not expose its moments.
//!
//! The moments of all weights of a group lie in one tensor each. An update of a weight of its own is a dozen kernels,
//! and a model has hundreds of weights.

use std::collections::{BTreeMap, HashMap};

use anyhow::{ensure, Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.95;
const EPSILON: f64 = 1e-8;
/// Numbers whose squares are summed in f32.
const RUN: usize = 4096;

pub struct AdamW {
    groups: Vec<Group>,
    /// Steps taken.
    step: usize,
    clip: f64,
}

/// Weights that share a learning rate and a decay.
struct Group {
    /// The caller's group.
    index: usize,
    vars: Vec<(String, Var)>,
    decay: f64,
    /// Running means of the gradient and of its square, of all weights one after the other.
    first: Tensor,
    second: Tensor,
}

impl AdamW {
    /// `groups`: weights that share a learning rate. `clip`: the largest norm of all gradients together.
    pub fn new(groups: Vec<BTreeMap<String, Var>>, weight_decay: f64, clip: f64) -> Result<Self> {
        let mut split = Vec::new();
        for (index, vars) in groups.into_iter().enumerate() {
            // Norms' weights are not decayed.
            let (matrices, vectors): (Vec<_>, Vec<_>) = vars.into_iter().partition(|(_, var)| var.rank() == 2);
            for (vars, decay) in [(matrices, weight_decay), (vectors, 0.0)] {
                split.extend(Group::new(index, vars, decay)?);
            }
        }
        Ok(Self {
            groups: split,
            step: 0,
            clip,
        })
    }

    /// One update, with a learning rate for each group; the weights of a group without one stand still. Returns the
    /// norm of the gradients of those that move. If that is not finite, nothing changes.
    pub fn step(&mut self, gradients: &GradStore, rates: &[Option<f64>]) -> Result<f64> {
        let mut moved = Vec::with_capacity(self.groups.len());
        let mut squares = Vec::with_capacity(self.groups.len());
        for group in &mut self.groups {
            let Some(rate) = rates.get(group.index).copied().flatten() else {
                continue;
            };
            let gradient = group.gradient(gradients)?;
            squares.push(sum_of_squares(&gradient)?);
            moved.push((group, gradient, rate));
        }
        ensure!(
            !moved.is_empty(),
            "rates: expected one for some weight, got none; this is a defect of the example"
        );
        let norm = Tensor::stack(&squares, 0)?.sum_all()?.to_scalar::<f64>()?.sqrt();
        if !norm.is_finite() {
            return Ok(norm);
        }
        self.step += 1;
        let scale = (self.clip / norm.max(1e-12)).min(1.0);
        for (group, gradient, rate) in moved {
            group.update(&(gradient * scale)?, self.step, rate)?;
        }
        Ok(norm)
    }

    /// The moments as tensors of each weight; the caller keeps the step.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        for group in &self.groups {
            for (moment, all) in [("first", &group.first), ("second", &group.second)] {
                let all = all.to_device(&Device::Cpu)?;
                for (name, var, place) in group.places() {
                    let values = all.narrow(0, place, var.elem_count())?.reshape(var.shape())?;
                    // Its own storage: that of a part is the whole one, and `copy` copies all of it on the CPU.
                    state.insert(format!("{name}.{moment}"), values.force_contiguous()?);
                }
            }
        }
        Ok(state)
    }

    /// Restores the state that [`Self::state`] returned after `step` steps.
    pub fn restore(&mut self, state: &HashMap<String, Tensor>, step: usize) -> Result<()> {
        let expected: usize = self.groups.iter().map(|group| 2 * group.vars.len()).sum();
        ensure!(
            state.len() == expected,
            "expected {expected} moments, two for each weight, got {}; the checkpoint is damaged",
            state.len()
        );
        for group in &mut self.groups {
            let device = group.first.device().clone();
            let all = |moment: &str| -> Result<Tensor> {
                let each = group.vars.iter().map(|(name, var)| {
                    let key = format!("{name}.{moment}");
                    let tensor = state.get(&key).with_context(|| format!("expected {key}, found none"))?;
                    ensure!(
                        tensor.dims() == var.dims(),
                        "{key}: expected shape {:?}, got {:?}",
                        var.dims(),
                        tensor.dims()
                    );
                    Ok(tensor.flatten_all()?)
                });
                Ok(Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)?.to_device(&device)?)
            };
            (group.first, group.second) = (all("first")?, all("second")?);
        }
        self.step = step;
        Ok(())
    }
}

impl Group {
    /// None without weights.
    fn new(index: usize, vars: Vec<(String, Var)>, decay: f64) -> Result<Option<Self>> {
        let Some((_, var)) = vars.first() else { return Ok(None) };
        let count: usize = vars.iter().map(|(_, var)| var.elem_count()).sum();
        let zeros = || Tensor::zeros(count, var.dtype(), var.device());
        let (first, second) = (zeros()?, zeros()?);
        Ok(Some(Self {
            index,
            vars,
            decay,
            first,
            second,
        }))
    }

    /// Each weight, and where its numbers begin.
    fn places(&self) -> impl Iterator<Item = (&String, &Var, usize)> {
        self.vars.iter().scan(0, |next, (name, var)| {
            let place = *next;
            *next += var.elem_count();
            Some((name, var, place))
        })
    }

    /// The gradients of all weights, without a graph.
    fn gradient(&self, gradients: &GradStore) -> Result<Tensor> {
        let each = self.vars.iter().map(|(name, var)| {
            let gradient = gradients
                .get(var)
                .with_context(|| format!("{name}: expected a gradient, got none; this is a defect of the example"))?;
            Ok(gradient.detach().flatten_all()?)
        });
        Ok(Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)?)
    }

    fn update(&mut self, gradient: &Tensor, step: usize, learning_rate: f64) -> Result<()> {
        let mix =
            |old: &Tensor, new: Tensor, beta: f64| -> Result<Tensor> { Ok(((old * beta)? + new * (1.0 - beta))?) };
        self.first = mix(&self.first, gradient.clone(), BETA1)?;
        self.second = mix(&self.second, gradient.sqr()?, BETA2)?;
        let rate = learning_rate / (1.0 - BETA1.powf(step as f64));
        let correction = 1.0 / (1.0 - BETA2.powf(step as f64));
        let root = ((&self.second * correction)?.sqrt()? + EPSILON)?;
        let change = (self.first.div(&root)? * rate)?;
        for (_, var, place) in self.places() {
            let change = change.narrow(0, place, var.elem_count())?.reshape(var.shape())?;
            let value = match self.decay {
                0.0 => var.as_detached_tensor(),
                decay => (var.as_detached_tensor() * (1.0 - learning_rate * decay))?,
            };
            var.set(&(value - change)?)?;
        }
        Ok(())
    }
}

/// The sum of the squares of numbers (n), an f64 scalar. candle gives a sum on a GPU one block, so there are many sums.
fn sum_of_squares(numbers: &Tensor) -> Result<Tensor> {
    let squares = numbers.sqr()?;
    let (runs, rest) = (squares.dim(0)? / RUN, squares.dim(0)? % RUN);
    let mut sums = Vec::with_capacity(2);
    if runs > 0 {
        sums.push(squares.narrow(0, 0, runs * RUN)?.reshape((runs, RUN))?.sum(1)?);
    }
    if rest > 0 {
        sums.push(squares.narrow(0, runs * RUN, rest)?.sum_keepdim(0)?);
    }
    Ok(Tensor::cat(&sums, 0)?.to_dtype(DType::F64)?.sum_all()?)
}
