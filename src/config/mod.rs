//! What a caller may choose: the method's parameters, each head's strategy, and the options of one attention call.
//!
//! Everything here is plain data. Combinations that make no sense together are refused by [`CompressionConfig::check`],
//! which every entry point of the crate calls before it computes anything.

use candle_core::{bail, Result, Tensor};
use serde::{Deserialize, Serialize};

mod layout;
mod strategies;
pub(crate) mod whole;

pub use layout::TensorLayout;
pub use strategies::{HeadStrategies, HeadTest};

/// How one head decides that a token resembles its neighbour. Source: the paper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MergeStrategy {
    /// A pair qualifies when `1 - cos < threshold`: the two vectors point the same way. Code 0 in a strategy tensor.
    Similarity,
    /// A pair qualifies when `|cos| < threshold`: the two vectors are nearly orthogonal. Code 1 in a strategy tensor.
    Difference,
    /// No pair qualifies: the head computes ordinary attention. Code 2 in a strategy tensor.
    Off,
}

impl MergeStrategy {
    /// Every strategy, in the order of its code in a strategy tensor.
    pub const ALL: [Self; 3] = [Self::Similarity, Self::Difference, Self::Off];

    /// The code of this strategy in a strategy tensor: 0, 1 or 2.
    pub fn code(self) -> u32 {
        self as u32
    }

    fn from_code(code: i64) -> Result<Self> {
        match usize::try_from(code).ok().and_then(|code| Self::ALL.get(code)) {
            Some(strategy) => Ok(*strategy),
            None => bail!(
                "strategy tensor: expected the codes 0 (similarity), 1 (difference) or 2 (off), got {code}; \
                 write them with MergeStrategy::code"
            ),
        }
    }
}

/// Which qualifying pairs are merged. See [`crate::reference`] for both as scalar code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MergeRule {
    /// One left-to-right scan per head: a token joins the run that ends at its left neighbour when it also qualifies
    /// against the run's first token and the run is shorter than `max_merge_level`. A bit depends on tokens up to its
    /// right neighbour only, so prefill and step-by-step decoding agree. Ours.
    Causal,
    /// Bit for bit what the published Python reference does. **Not causal**: a row can depend on tokens up to four
    /// places to its right, and all heads and batch rows of one call influence each other. It has no cache.
    Reference,
}

/// How the query heads that share one KV head decide. Ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupRule {
    /// Every query head decides for itself, as if keys and values had been repeated.
    PerQueryHead,
    /// One decision per KV head: a pair merges only when every query head of the group passes every test. Only this
    /// (or as many KV heads as query heads) lets a KV cache drop anything.
    Unanimous,
}

/// Which quantity a pair is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Criterion {
    /// `cos(q[t+1], k[t])`, the paper's.
    QueryKey,
    /// `cos(k[t+1], k[t])`, ours; it does not read the queries.
    KeyKey,
    /// The attention that the rows of a token's window gave it, times the norm of its value: a token that was little
    /// attended to is left out once it has left the window. Needs a `window` of at least 2, [`Fold::Drop`],
    /// [`GroupRule::Unanimous`], and a threshold of its own for every head that is not off, as scores depend on the
    /// model; it reads neither the strategy of those heads nor `max_merge_level`, and has no compression loss. For
    /// pretrained models. Ours. See [`crate::reference::observed_mass`].
    ObservedMass,
}

/// What merging does to keys and values (and, for [`Fold::PairSum`], to queries).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fold {
    /// The token plus its hidden left neighbour, both as they came in, so a chain does not accumulate; queries are
    /// folded the same way. The paper's: for models trained with it.
    PairSum,
    /// The running mean of the chain, which enters the softmax with `ln n` for its `n` tokens. For pretrained models.
    /// Ours.
    Mean,
    /// The hidden token is left out. For pretrained models; the cheapest. Ours.
    Drop,
}

/// What the squared terms of the compression loss are divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossNormalizer {
    /// The number of qualifying pairs, or of all pairs where none qualifies. The paper's; it explodes when only a few
    /// pairs qualify.
    Merged,
    /// The number of all pairs: bounded. Ours.
    Pairs,
}

/// The method's parameters. [`Default`] gives the paper's values under the causal rule.
///
/// ```
/// use candle_sfattention::{CompressionConfig, Fold};
/// let config = CompressionConfig { fold: Fold::Mean, window: 32, ..Default::default() };
/// config.check(true)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CompressionConfig {
    /// A pair of a [`MergeStrategy::Similarity`] head qualifies when `1 - cos` is below this. Default 2e-4 (paper).
    pub similarity_threshold: f64,
    /// A pair of a [`MergeStrategy::Difference`] head qualifies when `|cos|` is below this. Default 0.0175 (paper).
    pub difference_threshold: f64,
    /// The most tokens that may be hidden in one run, at least 1. Default 20 (paper).
    pub max_merge_level: usize,
    /// Default [`MergeRule::Causal`].
    pub rule: MergeRule,
    /// Default [`GroupRule::PerQueryHead`].
    pub group_rule: GroupRule,
    /// Default [`Criterion::QueryKey`] (paper).
    pub criterion: Criterion,
    /// Default [`Fold::PairSum`] (paper).
    pub fold: Fold,
    /// The first `sinks` tokens are never hidden. Default 0.
    pub sinks: usize,
    /// The last `window` tokens before a row, itself included, are attended raw; folding starts to their left.
    /// Default 0: each row sees its own folded token. Needs causal attention.
    pub window: usize,
    /// Factor on the compression loss. Default 1.
    pub loss_factor: f64,
    /// Default [`LossNormalizer::Merged`] (paper).
    pub loss_normalizer: LossNormalizer,
}

impl Default for CompressionConfig {
    fn default() -> Self {
        Self {
            similarity_threshold: 2e-4,
            difference_threshold: 0.0175,
            max_merge_level: 20,
            rule: MergeRule::Causal,
            group_rule: GroupRule::PerQueryHead,
            criterion: Criterion::QueryKey,
            fold: Fold::PairSum,
            sinks: 0,
            window: 0,
            loss_factor: 1.0,
            loss_normalizer: LossNormalizer::Merged,
        }
    }
}

impl CompressionConfig {
    /// Parity with the published Python reference: the default values under [`MergeRule::Reference`].
    pub fn reference() -> Self {
        Self {
            rule: MergeRule::Reference,
            ..Self::default()
        }
    }

    /// For stock checkpoints that were never trained with merging: running means of similar keys, decided once per KV
    /// head, with the first 4 tokens and the last 32 left alone. Use it with [`MergeStrategy::Similarity`].
    pub fn pretrained() -> Self {
        Self {
            fold: Fold::Mean,
            criterion: Criterion::KeyKey,
            similarity_threshold: 0.1,
            sinks: 4,
            window: 32,
            max_merge_level: 5,
            group_rule: GroupRule::Unanimous,
            ..Self::default()
        }
    }

    /// For stock checkpoints with a calibrated [`Policy`](crate::Policy): tokens that their window's rows hardly attended
    /// to are left out, decided once per KV head, with the first 4 tokens and the last 32 left alone. The thresholds are
    /// the policy's.
    pub fn calibrated() -> Self {
        Self {
            fold: Fold::Drop,
            criterion: Criterion::ObservedMass,
            ..Self::pretrained()
        }
    }

    /// The threshold of a head that has none of its own; infinity for [`MergeStrategy::Off`], which reads none.
    pub fn default_threshold(&self, strategy: MergeStrategy) -> f64 {
        match strategy {
            MergeStrategy::Similarity => self.similarity_threshold,
            MergeStrategy::Difference => self.difference_threshold,
            MergeStrategy::Off => f64::INFINITY,
        }
    }

    /// Refuses values and combinations that have no meaning.
    ///
    /// # Errors
    /// A threshold or `loss_factor` that is not finite, `max_merge_level` of 0, counts over 2^32 - 1, a window without
    /// causal attention, and every setting that [`MergeRule::Reference`] or [`Criterion::ObservedMass`] does not know.
    pub fn check(&self, causal: bool) -> Result<()> {
        for (name, value) in [
            ("similarity_threshold", self.similarity_threshold),
            ("difference_threshold", self.difference_threshold),
            ("loss_factor", self.loss_factor),
        ] {
            if !value.is_finite() {
                bail!("{name}: expected a finite number, got {value}; the defaults are CompressionConfig::default()")
            }
        }
        if self.max_merge_level == 0 {
            bail!("max_merge_level: expected at least 1, got 0; use MergeStrategy::Off to merge nothing")
        }
        let largest = u32::MAX as usize;
        if self.window > largest || self.sinks > largest || self.max_merge_level > largest {
            bail!(
                "window, sinks and max_merge_level: expected at most {largest}, got {}, {} and {}; a window of all \
                 tokens folds nothing",
                self.window,
                self.sinks,
                self.max_merge_level
            )
        }
        if !causal && self.window != 0 {
            bail!(
                "window: expected 0 for non-causal attention, got {}; set window to 0 or causal to true",
                self.window
            )
        }
        if self.rule == MergeRule::Reference {
            self.check_reference_rule()?
        }
        if self.criterion == Criterion::ObservedMass {
            self.check_observed_mass(causal)?
        }
        Ok(())
    }

    /// Refuses strategies without thresholds where the criterion has no default for them.
    ///
    /// # Errors
    /// [`Criterion::ObservedMass`] with a head that is not off and has no threshold of its own.
    pub fn check_strategies(&self, strategies: &HeadStrategies) -> Result<()> {
        let needed = self.criterion == Criterion::ObservedMass && !strategies.all_off();
        if needed && !strategies.has_thresholds() {
            bail!(
                "thresholds: expected one per head for Criterion::ObservedMass, whose scores depend on the model, got \
                 none; calibrate them, or give them with HeadStrategies::with_thresholds"
            )
        }
        Ok(())
    }

    fn check_observed_mass(&self, causal: bool) -> Result<()> {
        let got = if !causal {
            "attention that is not causal".to_string()
        } else if self.fold != Fold::Drop {
            format!("fold {:?}", self.fold)
        } else if self.group_rule != GroupRule::Unanimous {
            format!("group_rule {:?}", self.group_rule)
        } else if self.window < 2 {
            format!("window {}", self.window)
        } else {
            return Ok(());
        };
        bail!(
            "Criterion::ObservedMass: expected causal attention, fold Drop, group_rule Unanimous and a window of at least \
             2, got {got}; use Criterion::KeyKey for everything it does not have"
        )
    }

    fn check_reference_rule(&self) -> Result<()> {
        let got = if self.criterion != Criterion::QueryKey {
            format!("criterion {:?}", self.criterion)
        } else if self.group_rule != GroupRule::PerQueryHead {
            format!("group_rule {:?}", self.group_rule)
        } else if self.sinks != 0 {
            format!("sinks {}", self.sinks)
        } else if self.window != 0 {
            format!("window {}", self.window)
        } else {
            return Ok(());
        };
        bail!(
            "MergeRule::Reference: expected criterion QueryKey, group_rule PerQueryHead, sinks 0 and window 0, got {got}; \
             use MergeRule::Causal for everything the published reference does not have"
        )
    }
}

/// Dropout on the softmax weights, drawn from Philox 4x32-10 so that every device and the backward pass see one mask.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The probability that a weight is set to 0, in `[0, 1)`; the others are scaled by `1 / (1 - p)`.
    pub p: f64,
    /// The generator's key. The same seed draws the same mask: change it from step to step.
    pub seed: u64,
}

/// The options of one attention call that have nothing to do with compression. [`Default`] is plain causal attention.
#[derive(Clone, Debug)]
pub struct AttentionOptions {
    /// Factor on `query . key`; `None` is `1 / sqrt(head_dim)`.
    pub softmax_scale: Option<f64>,
    /// Whether a row sees only tokens up to itself. Default true.
    pub causal: bool,
    /// Dropout on the softmax weights; `None` (default) for none.
    pub dropout: Option<Dropout>,
    /// Added to the logit of every visible column, by the column's token index: any shape that broadcasts to
    /// `(B, H, N, N)`, in any float dtype. It receives no gradient.
    ///
    /// A finite bias of any size, the dtype's minimum included, is finite: a row whose every logit is that minimum is
    /// the softmax of equal logits. Minus infinity hides a column from a row. A row that sees nothing is zeros and
    /// sends no gradient.
    ///
    /// Under [`MergeRule::Causal`] two neighbours merge only where the later one's row sees both. Minus infinity at any
    /// other column that a row would see, in a head that hides tokens, is an error on the CPU: a bias does not say which of
    /// the tokens that were folded together a row may see, and `sinks` and `window` count from the first token, padding or
    /// not. On CUDA seeing it would mean waiting for the device, so it is not looked for: do not give such a bias.
    /// Left-padded batches and packed documents with merging: give each sequence its own call, or keep their heads
    /// [`MergeStrategy::Off`].
    pub bias: Option<Tensor>,
    /// The order of the axes of query, key, value and output tensors, at every function that takes these options.
    /// Default [`TensorLayout::HeadsFirst`]: (B, H, N, D). The bias is (B, H, N, N) in either, and the arrays of
    /// [`crate::reference`] are (B, H, N, D).
    pub layout: TensorLayout,
    /// Whether gradients must be the same bits every time. Default false: on CUDA in f16 and bf16, for head sizes up to 128, the
    /// gradient of the query is then added up in whatever order its parts arrive, and both passes take a quarter less
    /// time. Everything else, and everything on the CPU, is the same bits every time either way.
    pub deterministic: bool,
}

impl Default for AttentionOptions {
    fn default() -> Self {
        Self {
            softmax_scale: None,
            causal: true,
            dropout: None,
            bias: None,
            layout: TensorLayout::HeadsFirst,
            deterministic: false,
        }
    }
}

impl AttentionOptions {
    /// The factor on `query . key` for this head dimension.
    pub fn scale(&self, head_dim: usize) -> f64 {
        self.softmax_scale.unwrap_or_else(|| 1.0 / (head_dim as f64).sqrt())
    }

    /// Refuses a scale that is not finite, a dropout probability outside `[0, 1)`, and a bias that is not a float or
    /// asks for a gradient.
    ///
    /// # Errors
    /// As above.
    pub fn check(&self) -> Result<()> {
        if let Some(scale) = self.softmax_scale {
            if !scale.is_finite() {
                bail!("softmax_scale: expected a finite number, got {scale}; None gives 1/sqrt(head_dim)")
            }
        }
        if let Some(Dropout { p, .. }) = self.dropout {
            if !(0.0..1.0).contains(&p) {
                bail!("dropout: expected a probability p with 0 <= p < 1, got {p}; None turns dropout off")
            }
        }
        if let Some(bias) = &self.bias {
            if !bias.dtype().is_float() {
                bail!(
                    "bias: expected a float dtype, got {:?}; convert it with to_dtype",
                    bias.dtype()
                )
            }
            if bias.track_op() {
                bail!("bias: expected a tensor without gradient, got a tracked one; no gradient would reach it, pass bias.detach()")
            }
        }
        Ok(())
    }
}
