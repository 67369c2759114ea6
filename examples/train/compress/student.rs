//! The model in training: its weights, a gate per layer, and attention that fades or hides tokens.

use std::collections::BTreeMap;

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_sfattention::{
    attend, AttentionOptions, CompressionConfig, HeadStrategies, KeyGate, KeyProbe, MergePlan, MergeStrategy,
};

use super::distill::Predictions;
use crate::model::LlamaConfig;
use crate::network::{AttentionCall, Network};

/// The names of gates begin with this.
const GATES: &str = "gates.";

pub struct Student {
    vars: VarMap,
    network: Network,
    gates: Vec<KeyGate>,
    compression: CompressionConfig,
    heads: usize,
    kv_heads: usize,
}

/// The hidden states of a pass, and the share of hidden tokens of those that can be hidden, a scalar.
pub struct Pass {
    pub hidden: Tensor,
    pub hidden_share: Tensor,
}

impl Student {
    /// Weights and gates are made, and not filled.
    pub fn new(config: &LlamaConfig, compression: CompressionConfig, products: DType, device: &Device) -> Result<Self> {
        let vars = VarMap::new();
        let root = VarBuilder::from_varmap(&vars, DType::F32, device);
        let network = Network::new(config, &root, products)?;
        let gate = |layer: usize| {
            let vb = root.pp(format!("{GATES}{layer}"));
            KeyGate::new(config.kv_heads, config.head_dim, &compression, vb)
        };
        let gates = (0..config.layers).map(gate).collect::<candle_core::Result<_>>()?;
        Ok(Self {
            vars,
            network,
            gates,
            compression,
            heads: config.heads,
            kv_heads: config.kv_heads,
        })
    }

    /// All variables, in the order of their names.
    pub fn vars(&self) -> BTreeMap<String, Var> {
        let vars = self.vars.data().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        vars.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
    }

    /// The weights by their Hugging Face names, without the gates.
    pub fn weights(&self) -> BTreeMap<String, Var> {
        let mut vars = self.vars();
        vars.retain(|name, _| !is_gate(name));
        vars
    }

    /// The gates' variables.
    pub fn gates(&self) -> BTreeMap<String, Var> {
        let mut vars = self.vars();
        vars.retain(|name, _| is_gate(name));
        vars
    }

    /// Starts the gates from a probe and a threshold for each layer and KV head.
    pub fn start_gates(&self, probe: &KeyProbe, thresholds: &[Vec<f64>]) -> Result<()> {
        let vars = self.vars();
        for (layer, thresholds) in thresholds.iter().enumerate() {
            let start = KeyGate::start(probe, layer, thresholds)?;
            for (name, value) in ["weight", "bias"].iter().zip(start) {
                let var = &vars[&format!("{GATES}{layer}.{name}")];
                var.set(&value.to_device(var.device())?)?;
            }
        }
        Ok(())
    }

    /// The gates as a probe.
    pub fn probe(&self) -> Result<KeyProbe> {
        Ok(KeyGate::probe(&self.gates)?)
    }

    /// The predictions of hidden states.
    pub fn predictions<'a>(&'a self, hidden: &'a Tensor) -> Predictions<'a> {
        Predictions {
            hidden,
            head: self.network.head(),
        }
    }

    /// Fades tokens by the relaxed gates, with the noise of `seed`.
    pub fn fading(&self, inputs: &Tensor, seed: u64) -> Result<Pass> {
        let plan = self.nothing(inputs)?;
        let mut shares = Vec::with_capacity(self.gates.len());
        let (batch, tokens) = inputs.dims2()?;
        // One draw for all layers: a layer's own would go to the device one after the other.
        let noise = KeyGate::noise(seed, (self.gates.len(), batch, self.kv_heads, tokens), inputs.device())?;
        let hidden = self.network.hidden(inputs, &mut |call| {
            let faded = self.gates[call.layer].relaxed_by(call.unrotated, &noise.get(call.layer)?)?;
            shares.push(faded.hidden_share);
            let options = AttentionOptions {
                column_bias: Some(faded.column_bias),
                ..AttentionOptions::default()
            };
            let [q, k, v] = call.qkv;
            Ok(attend(q, k, v, &plan, &options)?)
        })?;
        Ok(Pass {
            hidden,
            hidden_share: Tensor::stack(&shares, 0)?.mean_all()?,
        })
    }

    /// Hides the tokens whose gate's logit is above `shift`; `visit` gets each layer's call, logits and plan.
    pub fn hiding(
        &self,
        inputs: &Tensor,
        shift: f64,
        mut visit: impl FnMut(&AttentionCall, &Tensor, &MergePlan) -> Result<()>,
    ) -> Result<Pass> {
        let mut shares = Vec::with_capacity(self.gates.len());
        let strategies = self.strategies(shift)?;
        let hidden = self.network.hidden(inputs, &mut |call| {
            let logits = self.gates[call.layer].logits(&call.unrotated.detach())?.detach();
            if let Some(can) = self.can_be_hidden(&logits)? {
                shares.push(can.gt(shift)?.to_dtype(DType::F32)?.mean_all()?);
            }
            let plan = MergePlan::from_scores(&logits.neg()?, &strategies, &self.compression, true)?;
            visit(call, &logits, &plan)?;
            let [q, k, v] = call.qkv;
            Ok(attend(q, k, v, &plan, &AttentionOptions::default())?)
        })?;
        let hidden_share = match shares[..] {
            [] => Tensor::zeros((), DType::F32, inputs.device())?,
            _ => Tensor::stack(&shares, 0)?.mean_all()?,
        };
        Ok(Pass { hidden, hidden_share })
    }

    /// The shift that hides the share `target` of the tokens of `windows` that can be hidden, as they are when those
    /// above `now` are hidden.
    pub fn shift(&self, windows: &[&Tensor], target: f64, now: f64) -> Result<f64> {
        let mut logits: Vec<f32> = Vec::new();
        for window in windows {
            self.hiding(window, now, |_, all, _| {
                if let Some(can) = self.can_be_hidden(all)? {
                    logits.extend(can.flatten_all()?.to_vec1::<f32>()?);
                }
                Ok(())
            })?;
        }
        ensure!(
            !logits.is_empty(),
            "context: expected more tokens than the window {} and the {} sinks, got fewer; raise --context",
            self.compression.window,
            self.compression.sinks
        );
        logits.sort_unstable_by(f32::total_cmp);
        let kept = ((logits.len() as f64 * (1.0 - target)).round() as usize).clamp(1, logits.len());
        // In a gap between logits: a score that equals the threshold but for its last bits would be hidden by one
        // kernel and kept by another. A token that comes again has the same logit, but for such bits.
        let last_kept = logits[kept - 1];
        let alike = |logit: &&f32| **logit <= last_kept + 1e-4 * (1.0 + last_kept.abs());
        let next = kept + logits[kept..].iter().take_while(alike).count();
        let below = logits[next - 1];
        Ok(f64::from(below.midpoint(logits.get(next).copied().unwrap_or(below))))
    }

    /// Decisions that hide the tokens whose logit is above `shift`.
    pub fn strategies(&self, shift: f64) -> Result<HeadStrategies> {
        let thresholds = Tensor::full(-shift, self.heads, &Device::Cpu)?;
        Ok(HeadStrategies::uniform(MergeStrategy::Similarity).with_thresholds(&thresholds)?)
    }

    /// The numbers of the tokens that can be hidden, of numbers (B, Hk, N); None if there are none.
    pub fn can_be_hidden(&self, numbers: &Tensor) -> Result<Option<Tensor>> {
        let (first, window) = (self.compression.sinks, self.compression.window);
        let count = numbers.dim(2)?.saturating_sub(window + 1).saturating_sub(first);
        Ok(match count {
            0 => None,
            _ => Some(numbers.narrow(2, first, count)?),
        })
    }

    /// A plan that hides nothing of inputs (B, N).
    fn nothing(&self, inputs: &Tensor) -> Result<MergePlan> {
        let (batch, tokens) = inputs.dims2()?;
        let bits = Tensor::zeros((batch, self.heads, tokens - 1), DType::U8, inputs.device())?;
        Ok(MergePlan::from_indicators(&bits, &self.compression)?)
    }
}

fn is_gate(name: &str) -> bool {
    name.starts_with(GATES)
}

/// The checkpoint as it was, with dense attention.
pub struct Teacher {
    network: Network,
    heads: usize,
}

impl Teacher {
    /// `weights`: f32, by their Hugging Face names.
    pub fn new(
        config: &LlamaConfig,
        weights: BTreeMap<String, Tensor>,
        products: DType,
        device: &Device,
    ) -> Result<Self> {
        let root = VarBuilder::from_tensors(weights.into_iter().collect(), DType::F32, device);
        Ok(Self {
            network: Network::new(config, &root, products)?,
            heads: config.heads,
        })
    }

    /// Hidden states (B·N, hidden); `visit` gets each layer's call.
    pub fn hidden(&self, inputs: &Tensor, mut visit: impl FnMut(&AttentionCall) -> Result<()>) -> Result<Tensor> {
        let (batch, tokens) = inputs.dims2()?;
        let bits = Tensor::zeros((batch, self.heads, tokens - 1), DType::U8, inputs.device())?;
        let plan = MergePlan::from_indicators(&bits, &CompressionConfig::default())?;
        self.network.hidden(inputs, &mut |call| {
            visit(call)?;
            let [q, k, v] = call.qkv;
            Ok(attend(q, k, v, &plan, &AttentionOptions::default())?)
        })
    }

    /// The predictions of hidden states.
    pub fn predictions<'a>(&'a self, hidden: &'a Tensor) -> Predictions<'a> {
        Predictions {
            hidden,
            head: self.network.head(),
        }
    }
}
