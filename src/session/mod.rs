//! Sessions: compressed attention for models that call a free function with query, key and value, and pass no settings.
//!
//! Candle-transformers' models call `candle_flash_attn::flash_attn` once a layer. A [`Session`] holds one
//! [`CompressedKvCache`] a layer. Inside [`Session::scope`] call number n of [`attend_next_layer`] is layer n. The
//! crate `candle-flash-attn` of this repository's folder `compat` is candle's crate of that name with
//! [`attend_next_layer`] inside.

mod call;
mod save;

pub use call::{attend_next_layer, is_running};

use crate::cache::{CacheOptions, CompressedKvCache};
use crate::calibrate::{ModelShape, Policy};
use crate::config::{AttentionOptions, CompressionConfig, HeadStrategies};
use call::{Running, Scope};
use candle_core::{bail, Error, Result};
use serde::{Deserialize, Serialize};

/// The keys and values that the model passes to attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelCache {
    /// All tokens so far: the model keeps its own cache beside the session's. The model runs as it is, and its own
    /// cache saves no memory.
    #[default]
    Kept,
    /// The tokens of the call alone: the model's own cache is off (`use_kv_cache = false`) or is cleared before each
    /// call (`clear_kv_cache()`). The session's cache is the only one. The model must rotate keys before it caches
    /// them, and take positions from its caller.
    Cleared,
}

/// What a layer's attention does beside its call's arguments. Candle-transformers 0.11.1's Gemma 2 and 3 pass neither
/// their window nor their softcap to `flash_attn`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerRules {
    /// [`AttentionOptions::sliding_window`](crate::AttentionOptions) where the call names none.
    pub sliding_window: Option<usize>,
    /// [`AttentionOptions::softcap`](crate::AttentionOptions) where the call names none.
    pub softcap: Option<f64>,
}

/// The settings of a [`Session`], apart from its layers'.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SessionOptions {
    /// The keys and values that the model passes.
    pub model_cache: ModelCache,
    /// The storage of each layer's cache.
    pub cache: CacheOptions,
    /// The rules of each layer; empty where calls say all.
    pub rules: Vec<LayerRules>,
}

/// A [`CompressedKvCache`] for each layer of a model that calls attention as a free function.
///
/// ```
/// use candle_core::{Device, Result, Tensor};
/// use candle_sfattention::session::{attend_next_layer, ModelCache, Session, SessionOptions};
/// use candle_sfattention::{CompressionConfig, HeadStrategies, MergeStrategy, ModelShape};
///
/// // Stands for a model of two layers whose attention is a free function.
/// fn model(tokens: usize) -> Result<Tensor> {
///     let mut xs = Tensor::randn(0f32, 1., (1, 4, tokens, 16), &Device::Cpu)?;
///     for _ in 0..2 {
///         xs = attend_next_layer(&xs, &xs, &xs, &Default::default()).expect("a session runs")?;
///     }
///     Ok(xs)
/// }
///
/// let shape = ModelShape { layers: 2, heads: 4, kv_heads: 4, head_dim: 16 };
/// let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
/// let options = SessionOptions { model_cache: ModelCache::Cleared, ..Default::default() };
/// let mut session = Session::uniform(shape, &strategies, &CompressionConfig::pretrained(), options)?;
/// session.scope(|| model(100))?;
/// session.scope(|| model(1))?;
/// assert_eq!(session.seq_len(), 101);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Session {
    shape: ModelShape,
    model_cache: ModelCache,
    /// One per layer, or none.
    rules: Vec<LayerRules>,
    layers: Vec<CompressedKvCache>,
    /// Whether a forward pass ended after some layers: the caches then hold different numbers of tokens.
    broken: bool,
}

impl Session {
    /// The settings of a calibrated policy.
    ///
    /// # Errors
    /// As [`CompressedKvCache::new`].
    pub fn new(policy: &Policy, options: SessionOptions) -> Result<Self> {
        let parts = policy.parts();
        let strategies = policy.head_strategies(&parts.model)?.into_iter();
        let settings = strategies.map(|strategies| (strategies, parts.config.clone()));
        Self::per_layer(parts.model, settings.collect(), options)
    }

    /// The same settings for all layers.
    ///
    /// # Errors
    /// As [`Self::per_layer`].
    pub fn uniform(
        model: ModelShape,
        strategies: &HeadStrategies,
        config: &CompressionConfig,
        options: SessionOptions,
    ) -> Result<Self> {
        let layer = || (strategies.clone(), config.clone());
        Self::per_layer(model, (0..model.layers).map(|_| layer()).collect(), options)
    }

    /// Settings for each layer, in the order in which the model calls attention.
    ///
    /// # Errors
    /// Another number of settings or rules than of layers, rules that have no meaning, a model shape that has no
    /// meaning, strategies for another number of heads, or as [`CompressedKvCache::new`].
    pub fn per_layer(
        model: ModelShape,
        settings: Vec<(HeadStrategies, CompressionConfig)>,
        options: SessionOptions,
    ) -> Result<Self> {
        model.check()?;
        if settings.len() != model.layers {
            bail!(
                "settings: expected {}, got {}; give one per layer of the model",
                model.layers,
                settings.len()
            )
        }
        check_rules(&options.rules, model.layers)?;
        let layer = |(strategies, config): (HeadStrategies, CompressionConfig)| {
            strategies.check_heads(model.heads)?;
            CompressedKvCache::new(strategies, config, options.cache.clone())
        };
        Ok(Self {
            shape: model,
            model_cache: options.model_cache,
            rules: options.rules,
            layers: settings.into_iter().map(layer).collect::<Result<_>>()?,
            broken: false,
        })
    }

    /// Runs one forward pass of the model: `forward` must call attention once for each layer. Only calls on this thread
    /// are the session's.
    ///
    /// # Errors
    /// Those of `forward`; a number of calls that is not the number of layers; a session inside another's scope; a
    /// session whose last pass failed between two layers, until [`Self::reset`].
    pub fn scope<R, E: From<Error>>(
        &mut self,
        forward: impl FnOnce() -> std::result::Result<R, E>,
    ) -> std::result::Result<R, E> {
        self.check_whole()?;
        let layers = self.shape.layers;
        // Whatever ends the pass early, a panic too, leaves the session broken.
        self.broken = true;
        let scope = Scope::enter(self)?;
        let result = forward();
        let calls = scope.leave();
        // A call that fails changes nothing.
        self.broken = !(calls == layers || calls == 0);
        if result.is_ok() && calls != layers {
            return Err(Error::msg(format!(
                "session: expected {layers} calls of attention in the scope, one a layer, got {calls}; run one forward \
                 pass of the model in each scope, with flash attention switched on in its config"
            ))
            .into());
        }
        result
    }

    fn check_whole(&self) -> Result<()> {
        if self.broken {
            bail!(
                "session: expected layers that hold the same tokens, got a session whose last forward pass failed \
                 between two layers; reset() it and start the sequence again, or keep a fork() from before"
            )
        }
        Ok(())
    }

    /// The shape of the model.
    pub fn model(&self) -> &ModelShape {
        &self.shape
    }

    /// The cache of each layer.
    pub fn layers(&self) -> &[CompressedKvCache] {
        &self.layers
    }

    /// Tokens seen so far.
    pub fn seq_len(&self) -> usize {
        self.layers.first().map_or(0, CompressedKvCache::seq_len)
    }

    /// Bytes in use by all layers: see [`CompressedKvCache::bytes`].
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(CompressedKvCache::bytes).sum()
    }

    /// Bytes that keys and values of all tokens would take: see [`CompressedKvCache::bytes_dense`].
    pub fn bytes_dense(&self) -> usize {
        self.layers.iter().map(CompressedKvCache::bytes_dense).sum()
    }

    /// Another session of the same tokens, which shares what is stored: see [`CompressedKvCache::fork`].
    pub fn fork(&self) -> Self {
        self.clone()
    }

    /// Forgets all tokens: for a new sequence.
    pub fn reset(&mut self) {
        self.layers.iter_mut().for_each(CompressedKvCache::reset);
        self.broken = false;
    }

    /// Cuts all layers back to the first `tokens` tokens, exactly: to none, which is [`Self::reset`]; to all; and to
    /// any number where every head of every layer is [`MergeStrategy::Off`](crate::MergeStrategy) and no sliding window
    /// has let go of a token that the next row sees. Folded tokens cannot be taken apart: a session that hides tokens
    /// goes back by [`CacheOptions::rollback`] tokens, as a draft of several tokens needs, or to a [`Self::fork`].
    ///
    /// Under [`ModelCache::Kept`] the model's own cache must be cut back too; else the next call is an error.
    ///
    /// # Errors
    /// As [`CompressedKvCache::truncate`], for any layer, which the error names; no layer is then changed.
    pub fn truncate(&mut self, tokens: usize) -> Result<()> {
        self.check_whole()?;
        for (index, layer) in self.layers.iter().enumerate() {
            let named = |error| Error::msg(format!("session: layer {index}: {error}"));
            layer.check_truncate(tokens).map_err(named)?;
        }
        self.layers.iter_mut().try_for_each(|cache| cache.truncate(tokens))
    }

    fn take_running(&mut self) -> Running {
        Running {
            shape: self.shape,
            model_cache: self.model_cache,
            rules: self.rules.clone(),
            layers: std::mem::take(&mut self.layers),
            calls: 0,
        }
    }
}

/// Refuses rules for another number of layers, and windows and softcaps that have no meaning.
fn check_rules(rules: &[LayerRules], layers: usize) -> Result<()> {
    if !(rules.is_empty() || rules.len() == layers) {
        bail!(
            "rules: expected none or {layers}, got {}; give one per layer of the model",
            rules.len()
        )
    }
    let options = |rules: &LayerRules| AttentionOptions {
        sliding_window: rules.sliding_window,
        softcap: rules.softcap,
        ..Default::default()
    };
    rules.iter().try_for_each(|rules| options(rules).check())
}
