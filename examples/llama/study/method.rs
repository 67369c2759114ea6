//! The methods of a report, as plans for each layer.

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_sfattention::{CompressionConfig, Fold, HeadStrategies, KeyProbe, MergePlan, MergeStrategy};
use rand::seq::index::sample;
use rand::{rngs::StdRng, SeedableRng};

use super::policies::Named;
use super::prune::Ranking;
use crate::model::LayerCall;

/// One way to attend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Dense,
    /// The paper's settings, on a model that was not trained with them.
    Paper,
    Pretrained,
    /// As the policy decides.
    Policy,
    /// Random tokens, the same number per KV head as the policy hides, with the same sinks and window.
    Random,
    /// The first tokens, and a window as long as the entries that the policy keeps.
    Streaming,
    /// As many of a context's tokens as that window and the first tokens are, by a ranking. Only questions read it.
    Pruned(Ranking),
}

/// A way to attend, under its name in tables.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    kind: Kind,
    pub family: &'static str,
    ratio: Option<f64>,
    /// The number of its policy among those of the report.
    policy: Option<usize>,
}

impl Method {
    pub const FAMILIES: [&str; 13] = [
        "dense",
        "paper",
        "pretrained",
        "calibrated",
        "observed",
        "probe",
        "query-key",
        "key-key",
        "random",
        "streaming",
        "snapkv",
        "knorm",
        "expected",
    ];

    /// All methods, of one family after the other. Controls exist once a ratio: by its first policy.
    pub fn all(policies: &[Named]) -> Vec<Self> {
        let plain = |kind, family| Self {
            kind,
            family,
            ratio: None,
            policy: None,
        };
        let by_policy = |kind, family, policy: usize| Self {
            kind,
            family,
            ratio: Some(policies[policy].ratio),
            policy: Some(policy),
        };
        let mut all = vec![
            plain(Kind::Dense, "dense"),
            plain(Kind::Paper, "paper"),
            plain(Kind::Pretrained, "pretrained"),
        ];
        all.extend((0..policies.len()).map(|policy| by_policy(Kind::Policy, policies[policy].family, policy)));
        let first = |policy: &usize| {
            let before = &policies[..*policy];
            before.iter().all(|other| other.ratio != policies[*policy].ratio)
        };
        let pruned = Ranking::ALL.map(|ranking| (Kind::Pruned(ranking), ranking.name()));
        for (kind, family) in [(Kind::Random, "random"), (Kind::Streaming, "streaming")]
            .into_iter()
            .chain(pruned)
        {
            let each = (0..policies.len()).filter(first);
            all.extend(each.map(|policy| by_policy(kind, family, policy)));
        }
        all
    }

    pub fn is_dense(&self) -> bool {
        self.kind == Kind::Dense
    }

    /// Whether it prunes after a context, and so needs a question after it.
    pub fn prunes(&self) -> bool {
        matches!(self.kind, Kind::Pruned(_))
    }

    pub fn name(&self) -> String {
        match self.ratio {
            Some(ratio) => format!("{}-{ratio}", self.family),
            None => self.family.into(),
        }
    }

    pub fn planner(&self, policies: &[Named]) -> Result<Planner> {
        let policy = self.policy.map(|policy| policies[policy].policy.parts());
        Ok(Planner {
            kind: self.kind,
            strategies: match self.policy {
                Some(policy) => policies[policy]
                    .policy
                    .head_strategies(&policies[policy].policy.parts().model)?,
                None => Vec::new(),
            },
            config: match (self.kind, policy) {
                (_, Some(policy)) => policy.config.clone(),
                (Kind::Pretrained, _) => CompressionConfig::pretrained(),
                _ => CompressionConfig::default(),
            },
            probe: policy.and_then(|policy| policy.probe.clone()),
            hidden_ratio: policy.map_or(0.0, |policy| policy.calibration.hidden_ratio),
        })
    }
}

/// A method and its inputs.
pub struct Planner {
    kind: Kind,
    strategies: Vec<HeadStrategies>,
    config: CompressionConfig,
    /// The policy's, under given scores.
    probe: Option<KeyProbe>,
    /// The share hidden in calibration, of the tokens that have left the window.
    hidden_ratio: f64,
}

impl Planner {
    /// Plans that hide nothing.
    pub fn dense() -> Self {
        Self {
            kind: Kind::Dense,
            strategies: Vec::new(),
            config: CompressionConfig::default(),
            probe: None,
            hidden_ratio: 0.0,
        }
    }

    pub fn is_dense(&self) -> bool {
        self.kind == Kind::Dense
    }

    /// The ranking of a method that prunes after the first `context` of some tokens, and how many of them it keeps: it
    /// hides as many as [`Kind::Streaming`] hides of all tokens.
    pub fn pruning(&self, context: usize, tokens: usize) -> Option<(Ranking, usize)> {
        match self.kind {
            Kind::Pruned(ranking) => Some((ranking, context.saturating_sub(self.hidden(tokens)).max(1))),
            Kind::Dense | Kind::Paper | Kind::Pretrained | Kind::Policy | Kind::Random | Kind::Streaming => None,
        }
    }

    /// How many of a sequence's tokens are to be hidden.
    fn hidden(&self, tokens: usize) -> usize {
        let (pairs, sinks) = (tokens - 1, self.config.sinks);
        let hidden = self.hidden_ratio * pairs.saturating_sub(self.config.window + sinks) as f64;
        (hidden.round() as usize).min(pairs.saturating_sub(sinks))
    }

    /// The plan of a layer, and whether its cache would need a list per query head.
    pub fn plan(&self, call: &LayerCall) -> Result<(MergePlan, bool)> {
        let [q, k, v] = call.qkv;
        let uniform = |strategy| {
            let strategies = HeadStrategies::uniform(strategy);
            MergePlan::new(q, k, v, &strategies, &self.config, call.options)
        };
        // As everywhere, settings for all heads leave layers that slide alone.
        let slides = call.options.sliding_window.is_some();
        let plan = match self.kind {
            Kind::Paper | Kind::Pretrained | Kind::Random | Kind::Streaming if slides => uniform(MergeStrategy::Off)?,
            // A prefill before it is cut back.
            Kind::Dense | Kind::Pruned(_) => uniform(MergeStrategy::Off)?,
            Kind::Paper => uniform(MergeStrategy::Difference)?,
            Kind::Pretrained => uniform(MergeStrategy::Similarity)?,
            Kind::Policy => self.calibrated(call)?,
            Kind::Random => self.random(call, &self.calibrated(call)?)?,
            Kind::Streaming => self.streaming(call)?,
        };
        let alone = !self.config.group_rule.heads_agree();
        Ok((plan, alone && self.kind == Kind::Paper))
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
        let config = CompressionConfig {
            fold: Fold::Drop,
            window: pairs - sinks.min(pairs) - self.hidden(pairs + 1),
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
