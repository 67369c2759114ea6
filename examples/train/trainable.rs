//! A Llama in training: its weights, their start, and its losses with compressed attention.

use std::collections::BTreeMap;

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_sfattention::{CompressedAttention, CompressionLossSink};
use rand::{rngs::StdRng, Rng, SeedableRng};

use crate::model::LlamaConfig;
use crate::network::Network;

/// The model and its weights.
pub struct Trainable {
    vars: VarMap,
    network: Network,
    attention: Vec<CompressedAttention>,
}

/// The losses of one forward pass, scalars with a graph.
pub struct Losses {
    pub cross_entropy: Tensor,
    /// Summed over layers.
    pub compression: Option<Tensor>,
    /// Hidden tokens over pairs, of all layers and heads.
    pub hidden_ratio: f64,
}

impl Trainable {
    /// Fresh weights, the same for the same seed; `attention` holds one entry per layer.
    pub fn new(config: &LlamaConfig, attention: Vec<CompressedAttention>, seed: u64) -> Result<Self> {
        ensure!(
            attention.len() == config.layers,
            "attention: expected {} layers, got {}; give one per layer",
            config.layers,
            attention.len()
        );
        let vars = VarMap::new();
        let root = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let model = Self {
            network: Network::new(config, &root, DType::F32)?,
            vars,
            attention,
        };
        model.initialize(seed)?;
        Ok(model)
    }

    /// Normal values: standard deviation 0.02 for the embedding, `fan_in^-1/2` for matrices, divided by the root of the
    /// number of residual additions for matrices that add to the stream. Norms start at 1, biases at 0. candle's own
    /// CPU generator has no seed.
    fn initialize(&self, seed: u64) -> Result<()> {
        let mut rng = StdRng::seed_from_u64(seed);
        let residual = (2.0 * self.attention.len() as f64).sqrt();
        for (name, var) in self.vars() {
            let &[rows, columns] = var.dims() else {
                let start = match name.ends_with(".bias") {
                    true => var.zeros_like()?,
                    false => var.ones_like()?,
                };
                var.set(&start)?;
                continue;
            };
            let std = match name.rsplit('.').nth(1) {
                Some("embed_tokens") => 0.02,
                Some("o_proj" | "down_proj") => (columns as f64).powf(-0.5) / residual,
                _ => (columns as f64).powf(-0.5),
            };
            let values: Vec<f32> = (0..rows * columns).map(|_| (std * normal(&mut rng)) as f32).collect();
            var.set(&Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)?;
        }
        Ok(())
    }

    /// Every weight by its Hugging Face name, in the order of the names.
    pub fn vars(&self) -> BTreeMap<String, Var> {
        let vars = self.vars.data().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        vars.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
    }

    /// The number of parameters.
    pub fn parameters(&self) -> usize {
        self.vars().values().map(|var| var.elem_count()).sum()
    }

    /// inputs and targets (B, N) u32.
    pub fn losses(&self, inputs: &Tensor, targets: &Tensor) -> Result<Losses> {
        let sum = CompressionLossSink::new();
        let (mut hidden_tokens, mut pairs) = (0, 0);
        let hidden = self.network.hidden(inputs, &mut |call| {
            let [q, k, v] = call.qkv;
            let result = self.attention[call.layer].forward_with_loss(q, k, v)?;
            result.compression_loss.into_iter().for_each(|loss| sum.push(loss));
            let stats = result.plan.stats()?;
            hidden_tokens += stats.hidden;
            pairs += stats.pairs;
            Ok(result.output)
        })?;
        let logits = hidden.matmul(&self.network.head().t()?)?;
        Ok(Losses {
            cross_entropy: candle_nn::loss::cross_entropy(&logits, &targets.flatten_all()?)?,
            compression: sum.take()?,
            hidden_ratio: hidden_tokens as f64 / pairs.max(1) as f64,
        })
    }
}

/// A standard normal value: Box and Muller.
fn normal(rng: &mut StdRng) -> f64 {
    let (u, turn): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * turn).cos()
}
