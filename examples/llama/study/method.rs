//! The methods of a report, as plans for each layer.

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use candle_sfattention::{CompressionConfig, Fold, HeadStrategies, KeyProbe, MergePlan, MergeStrategy, Policy};
use rand::seq::index::sample;
use rand::{rngs::StdRng, SeedableRng};

use crate::model::LayerCall;

/// One way to attend.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    Dense,
    /// The paper's settings, on a model that was not trained with them.
    Paper,
    Pretrained,
    Calibrated(f64),
    /// Random tokens, the same number per KV head as the calibrated policy hides, with the same sinks and window.
    Random(f64),
    /// The first tokens, and a window as long as the entries that the calibrated policy keeps.
    Streaming(f64),
}

impl Method {
    pub const FAMILIES: [&str; 6] = ["dense", "paper", "pretrained", "calibrated", "random", "streaming"];

    pub fn all(policies: &[(f64, Policy)]) -> Vec<Self> {
        let families: [fn(f64) -> Self; 3] = [Self::Calibrated, Self::Random, Self::Streaming];
        let mut all = vec![Self::Dense, Self::Paper, Self::Pretrained];
        for family in families {
            all.extend(policies.iter().map(|(ratio, _)| family(*ratio)));
        }
        all
    }

    pub fn family(&self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Paper => "paper",
            Self::Pretrained => "pretrained",
            Self::Calibrated(_) => "calibrated",
            Self::Random(_) => "random",
            Self::Streaming(_) => "streaming",
        }
    }

    pub fn name(&self) -> String {
        match self {
            Self::Calibrated(ratio) | Self::Random(ratio) | Self::Streaming(ratio) => {
                format!("{}-{ratio}", self.family())
            }
            _ => self.family().into(),
        }
    }

    pub fn planner(&self, policies: &[(f64, Policy)]) -> Result<Planner> {
        let policy = match self {
            Self::Calibrated(ratio) | Self::Random(ratio) | Self::Streaming(ratio) => {
                let found = policies.iter().find(|(other, _)| other == ratio);
                Some(&found.with_context(|| format!("no policy for {ratio}"))?.1)
            }
            _ => None,
        };
        Ok(Planner {
            method: *self,
            strategies: match policy {
                Some(policy) => policy.head_strategies(&policy.parts().model)?,
                None => Vec::new(),
            },
            config: match (self, policy) {
                (_, Some(policy)) => policy.parts().config.clone(),
                (Self::Pretrained, _) => CompressionConfig::pretrained(),
                _ => CompressionConfig::default(),
            },
            probe: policy.and_then(|policy| policy.parts().probe.clone()),
            hidden_ratio: policy.map_or(0.0, |policy| policy.parts().calibration.hidden_ratio),
        })
    }
}

/// A method and its inputs.
pub struct Planner {
    method: Method,
    strategies: Vec<HeadStrategies>,
    config: CompressionConfig,
    /// The policy's, under given scores.
    probe: Option<KeyProbe>,
    /// The share hidden in calibration, of the tokens that have left the window.
    hidden_ratio: f64,
}

impl Planner {
    /// The plan of a layer, and whether its cache would need a list per query head.
    pub fn plan(&self, call: &LayerCall) -> Result<(MergePlan, bool)> {
        let [q, k, v] = call.qkv;
        let uniform = |strategy| {
            let strategies = HeadStrategies::uniform(strategy);
            MergePlan::new(q, k, v, &strategies, &self.config, call.options)
        };
        // As everywhere, settings for all heads leave layers that slide alone.
        let slides = call.options.sliding_window.is_some();
        let plan = match self.method {
            Method::Paper | Method::Pretrained | Method::Random(_) | Method::Streaming(_) if slides => {
                uniform(MergeStrategy::Off)?
            }
            Method::Dense => uniform(MergeStrategy::Off)?,
            Method::Paper => uniform(MergeStrategy::Difference)?,
            Method::Pretrained => uniform(MergeStrategy::Similarity)?,
            Method::Calibrated(_) => self.calibrated(call)?,
            Method::Random(_) => self.random(call, &self.calibrated(call)?)?,
            Method::Streaming(_) => self.streaming(call)?,
        };
        let alone = !self.config.group_rule.heads_agree();
        Ok((plan, alone && self.method == Method::Paper))
    }

    /// The policy's plan.
    fn calibrated(&self, call: &LayerCall) -> Result<MergePlan> {
        let ([q, k, v], strategies) = (call.qkv, &self.strategies[call.layer]);
        Ok(match &self.probe {
            Some(probe) => {
                let scores = probe.scores(call.layer, call.unrotated)?;
                MergePlan::from_scores(&scores, strategies, &self.config, call.options.causal)?
            }
            None => MergePlan::new(q, k, v, strategies, &self.config, call.options)?,
        })
    }

    fn random(&self, call: &LayerCall, plan: &MergePlan) -> Result<MergePlan> {
        let (heads, kv_heads) = (call.qkv[0].dim(1)?, call.qkv[1].dim(1)?);
        let (first, pairs) = (self.config.sinks, call.qkv[0].dim(2)? - 1);
        let eligible = pairs.saturating_sub(self.config.window + first);
        let counts = &plan.stats()?.per_head[0];
        let mut bits = vec![0u8; heads * pairs];
        let group = heads / kv_heads;
        for kv_head in 0..kv_heads {
            let mut rng = StdRng::seed_from_u64((call.layer * kv_heads + kv_head) as u64);
            for token in sample(&mut rng, eligible, counts[kv_head * group].min(eligible)) {
                for head in kv_head * group..(kv_head + 1) * group {
                    bits[head * pairs + first + token] = 1;
                }
            }
        }
        let bits = Tensor::from_vec(bits, (1, heads, pairs), call.qkv[0].device())?;
        Ok(MergePlan::from_indicators(&bits, &self.config)?)
    }

    fn streaming(&self, call: &LayerCall) -> Result<MergePlan> {
        let (heads, pairs) = (call.qkv[0].dim(1)?, call.qkv[0].dim(2)? - 1);
        let sinks = self.config.sinks;
        let hidden = self.hidden_ratio * pairs.saturating_sub(self.config.window + sinks) as f64;
        let config = CompressionConfig {
            fold: Fold::Drop,
            window: pairs - sinks.min(pairs) - (hidden.round() as usize).min(pairs - sinks.min(pairs)),
            ..Default::default()
        };
        let head: Vec<u8> = (0..pairs)
            .map(|t| u8::from(t >= sinks && t + config.window < pairs))
            .collect();
        let bits = Tensor::from_vec(head.repeat(heads), (1, heads, pairs), call.qkv[0].device())?;
        debug_assert_eq!(bits.dtype(), DType::U8);
        Ok(MergePlan::from_indicators(&bits, &config)?)
    }
}
