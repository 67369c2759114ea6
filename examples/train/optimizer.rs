//! AdamW whose state can be saved: candle's own does not expose its moments.

use std::collections::{BTreeMap, HashMap};

use anyhow::{ensure, Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};

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
    first: Vec<f32>,
    second: Vec<f32>,
}

impl AdamW {
    /// `clip`: the largest norm of all gradients together.
    pub fn new(vars: BTreeMap<String, Var>, weight_decay: f64, clip: f64) -> Self {
        let parameter = |var: Var| Parameter {
            first: vec![0.0; var.elem_count()],
            second: vec![0.0; var.elem_count()],
            var,
        };
        Self {
            parameters: vars.into_iter().map(|(name, var)| (name, parameter(var))).collect(),
            step: 0,
            weight_decay,
            clip,
        }
    }

    /// One update; returns the gradients' norm. If that is not finite, nothing changes.
    pub fn step(&mut self, gradients: &GradStore, learning_rate: f64) -> Result<f64> {
        let mut values = Vec::with_capacity(self.parameters.len());
        for (name, parameter) in &self.parameters {
            let gradient = gradients
                .get(&parameter.var)
                .with_context(|| format!("{name}: expected a gradient, got none; this is a defect of the example"))?;
            values.push(gradient.flatten_all()?.to_vec1::<f32>()?);
        }
        let squares = values.iter().flatten().map(|&x| f64::from(x).powi(2)).sum::<f64>();
        let norm = squares.sqrt();
        if !norm.is_finite() {
            return Ok(norm);
        }
        self.step += 1;
        let scale = (self.clip / norm.max(1e-12)).min(1.0) as f32;
        for (parameter, gradient) in self.parameters.values_mut().zip(values) {
            // Norms' weights are not decayed.
            let decay = if parameter.var.rank() == 2 {
                self.weight_decay
            } else {
                0.0
            };
            parameter.update(&gradient, scale, self.step, learning_rate, decay)?;
        }
        Ok(norm)
    }

    /// The moments as tensors; the caller keeps the step.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        for (name, parameter) in &self.parameters {
            let moments = [("first", &parameter.first), ("second", &parameter.second)];
            for (moment, values) in moments {
                let tensor = Tensor::from_slice(values, parameter.var.dims(), &Device::Cpu)?;
                state.insert(format!("{name}.{moment}"), tensor);
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
            let get = |moment: &str| -> Result<Vec<f32>> {
                let key = format!("{name}.{moment}");
                let tensor = state.get(&key).with_context(|| format!("expected {key}, found none"))?;
                ensure!(
                    tensor.dims() == shape,
                    "{key}: expected shape {shape:?}, got {:?}",
                    tensor.dims()
                );
                Ok(tensor.flatten_all()?.to_vec1()?)
            };
            (parameter.first, parameter.second) = (get("first")?, get("second")?);
        }
        self.step = step;
        Ok(())
    }
}

impl Parameter {
    fn update(&mut self, gradient: &[f32], scale: f32, step: usize, learning_rate: f64, decay: f64) -> Result<()> {
        let (beta1, beta2) = (BETA1 as f32, BETA2 as f32);
        let rate = (learning_rate / (1.0 - BETA1.powf(step as f64))) as f32;
        let correction = (1.0 / (1.0 - BETA2.powf(step as f64))) as f32;
        let keep = (1.0 - learning_rate * decay) as f32;
        let mut weights = self.var.flatten_all()?.to_vec1::<f32>()?;
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((weight, (first, second)), gradient) in weights.iter_mut().zip(moments).zip(gradient) {
            let gradient = gradient * scale;
            *first = beta1 * *first + (1.0 - beta1) * gradient;
            *second = beta2 * *second + (1.0 - beta2) * gradient * gradient;
            *weight = keep * *weight - rate * *first / ((*second * correction).sqrt() + EPSILON as f32);
        }
        Ok(self
            .var
            .set(&Tensor::from_vec(weights, self.var.dims(), &Device::Cpu)?)?)
    }
}
