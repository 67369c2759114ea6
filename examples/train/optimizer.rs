//! AdamW whose state can be saved: candle's own does not expose its moments.

use std::collections::{BTreeMap, HashMap};

use anyhow::{ensure, Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.95;
const EPSILON: f64 = 1e-8;

pub struct AdamW {
    parameters: BTreeMap<String, Parameter>,
    /// Steps taken.
    step: usize,
    weight_decay: f64,
    clip: f64,
}

struct Parameter {
    var: Var,
    /// Running means of the gradient and of its square.
    first: Tensor,
    second: Tensor,
}

impl AdamW {
    /// `clip`: the largest norm of all gradients together.
    pub fn new(vars: BTreeMap<String, Var>, weight_decay: f64, clip: f64) -> Result<Self> {
        let parameter = |(name, var): (String, Var)| -> Result<_> {
            let zeros = || var.as_detached_tensor().zeros_like();
            let (first, second) = (zeros()?, zeros()?);
            Ok((name, Parameter { var, first, second }))
        };
        Ok(Self {
            parameters: vars.into_iter().map(parameter).collect::<Result<_>>()?,
            step: 0,
            weight_decay,
            clip,
        })
    }

    /// One update of all weights by one learning rate; returns the gradients' norm. If that is not finite, nothing
    /// changes.
    pub fn step(&mut self, gradients: &GradStore, learning_rate: f64) -> Result<f64> {
        self.step_by(gradients, |_| Some(learning_rate))
    }

    /// One update, with a learning rate for each name; weights of no rate stand still.
    pub fn step_by(&mut self, gradients: &GradStore, rate: impl Fn(&str) -> Option<f64>) -> Result<f64> {
        let mut moved = Vec::with_capacity(self.parameters.len());
        let mut squares = Vec::with_capacity(self.parameters.len());
        for (name, parameter) in &mut self.parameters {
            let Some(rate) = rate(name) else { continue };
            let gradient = gradients
                .get(&parameter.var)
                .with_context(|| format!("{name}: expected a gradient, got none; this is a defect of the example"))?;
            squares.push(gradient.to_dtype(DType::F64)?.sqr()?.sum_all()?);
            moved.push((parameter, gradient, rate));
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
        for (parameter, gradient, rate) in moved {
            // Norms' weights are not decayed.
            let decay = if parameter.var.rank() == 2 {
                self.weight_decay
            } else {
                0.0
            };
            parameter.update(&(gradient * scale)?, self.step, rate, decay)?;
        }
        Ok(norm)
    }

    /// The moments as tensors; the caller keeps the step.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        for (name, parameter) in &self.parameters {
            for (moment, values) in [("first", &parameter.first), ("second", &parameter.second)] {
                state.insert(format!("{name}.{moment}"), values.to_device(&Device::Cpu)?);
            }
        }
        Ok(state)
    }

    /// Restores the state that [`Self::state`] returned after `step` steps.
    pub fn restore(&mut self, state: &HashMap<String, Tensor>, step: usize) -> Result<()> {
        let expected = 2 * self.parameters.len();
        ensure!(
            state.len() == expected,
            "expected {expected} moments, two for each weight, got {}; the checkpoint is damaged",
            state.len()
        );
        for (name, parameter) in &mut self.parameters {
            let shape = parameter.var.dims().to_vec();
            let device = parameter.var.device().clone();
            let get = |moment: &str| -> Result<Tensor> {
                let key = format!("{name}.{moment}");
                let tensor = state.get(&key).with_context(|| format!("expected {key}, found none"))?;
                ensure!(
                    tensor.dims() == shape,
                    "{key}: expected shape {shape:?}, got {:?}",
                    tensor.dims()
                );
                Ok(tensor.to_device(&device)?)
            };
            (parameter.first, parameter.second) = (get("first")?, get("second")?);
        }
        self.step = step;
        Ok(())
    }
}

impl Parameter {
    fn update(&mut self, gradient: &Tensor, step: usize, learning_rate: f64, decay: f64) -> Result<()> {
        let mix =
            |old: &Tensor, new: Tensor, beta: f64| -> Result<Tensor> { Ok(((old * beta)? + new * (1.0 - beta))?) };
        // The graph of a gradient would grow from step to step.
        let gradient = gradient.detach();
        self.first = mix(&self.first, gradient.clone(), BETA1)?;
        self.second = mix(&self.second, gradient.sqr()?, BETA2)?;
        let rate = learning_rate / (1.0 - BETA1.powf(step as f64));
        let correction = 1.0 / (1.0 - BETA2.powf(step as f64));
        let root = ((&self.second * correction)?.sqrt()? + EPSILON)?;
        let kept = (self.var.as_detached_tensor() * (1.0 - learning_rate * decay))?;
        Ok(self.var.set(&(kept - (self.first.div(&root)? * rate)?)?)?)
    }
}
