//! Stock models inside a session against the llama example's decoder: the same weights and the same policy give the
//! same logits, lists and bytes.

use crate::fixture;
use crate::kinds::{Kind, KINDS};
use crate::load::{Checkpoint, LoadOptions};
use crate::model::{HiddenCounts, Llama};
use crate::runs::{self, entries, flat, options, steps};
use crate::zoo::{load, OwnCache, NAMES};
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sfattention::calibrate::{CalibrationFigures, LayerPolicy, PolicyOptions};
use candle_sfattention::session::{LayerRules, ModelCache, Session, SessionOptions};
use candle_sfattention::{
    AttentionOptions, CompressedAttention, CompressionConfig, GroupRule, MergeStrategy, ModelShape, Policy,
};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Tokens that layers which slide see: more than the window that is never compressed.
const SLIDING: usize = 24;
const TOKENS: usize = 100;

/// The name of the model of candle-transformers that calls flash attention; its Qwen2 has none.
fn stock(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Llama => Some("llama"),
        Kind::Mistral => Some("mistral"),
        Kind::Qwen2 => None,
        Kind::Qwen3 => Some("qwen3"),
        Kind::Gemma => Some("gemma"),
        Kind::Gemma2 => Some("gemma2"),
        Kind::Gemma3 => Some("gemma3"),
        Kind::Granite => Some("granite"),
        Kind::Helium => Some("helium"),
        Kind::StableLm => Some("stable_lm"),
    }
}

/// A policy whose thresholds differ between all heads that decide, each times `factor`; one head hides nothing.
fn policy(
    model: ModelShape,
    config: CompressionConfig,
    strategy: MergeStrategy,
    threshold: f64,
    factor: f64,
) -> Result<Policy> {
    let units = match config.group_rule {
        GroupRule::Unanimous => model.kv_heads,
        GroupRule::PerQueryHead => model.heads,
    };
    let layer = |layer: usize| {
        let mut strategies = vec![strategy; units];
        if layer == 1 && units > 1 {
            strategies[units - 1] = MergeStrategy::Off;
        }
        LayerPolicy {
            strategies,
            thresholds: (0..units)
                .map(|unit| factor * threshold * (1.0 + 0.2 * unit as f64 + 0.1 * layer as f64))
                .collect(),
            hidden_ratios: vec![0.0; units],
            errors: vec![0.0; units],
        }
    };
    Ok(Policy::new(PolicyOptions {
        fingerprint: "random".into(),
        model,
        config,
        layers: (0..model.layers).map(layer).collect(),
        probe: None,
        calibration: CalibrationFigures {
            target: 0.0,
            hidden_ratio: 0.0,
            hidden_ratio_of_all: 0.0,
            error: 0.0,
            windows: 0,
            tokens: 0,
        },
    })?)
}

/// A policy of each criterion and fold.
fn policies(model: ModelShape, factor: f64) -> Result<[Policy; 3]> {
    let windowed = |config| CompressionConfig { window: 8, ..config };
    let of = |config, strategy, threshold| policy(model, windowed(config), strategy, threshold, factor);
    // Every query head of a group adds its mass.
    let mass = 2.15 * (model.heads / model.kv_heads) as f64;
    Ok([
        of(CompressionConfig::pretrained(), MergeStrategy::Similarity, 0.2)?,
        of(CompressionConfig::calibrated(), MergeStrategy::Similarity, mass)?,
        of(CompressionConfig::default(), MergeStrategy::Difference, 0.2)?,
    ])
}

/// The decoder with the policy's attention.
fn ours(folder: &Path, policy: &Policy) -> Result<Llama> {
    let path = folder.to_str().context("a path of text")?;
    let mut checkpoint = Checkpoint::open(path, LoadOptions::default())?;
    let config = &policy.parts().config;
    let strategies = policy.head_strategies(&checkpoint.config.shape())?.into_iter();
    let attention = |s| CompressedAttention::new(s, config.clone(), AttentionOptions::default());
    let attention = strategies.map(attention).collect::<candle_core::Result<Vec<_>>>()?;
    checkpoint.load(attention)
}

fn ensure_same(ours: &Tensor, theirs: &Tensor, what: &str) -> Result<()> {
    let (ours, theirs) = (flat(ours)?, flat(theirs)?);
    ensure!(
        ours.len() == theirs.len(),
        "{what}: {} and {}",
        ours.len(),
        theirs.len()
    );
    let scale = theirs.iter().fold(0f32, |most, logit| most.max(logit.abs()));
    ensure!(scale > 1.0, "{what}: logits near 0 show nothing: {scale}");
    for (id, (a, b)) in ours.iter().zip(&theirs).enumerate() {
        ensure!(
            (a - b).abs() <= 2e-5 * scale,
            "{what}, token {id}: {a} and {b} of {scale}"
        );
    }
    Ok(())
}

/// A stock model's weights and settings.
struct Case {
    kind: Kind,
    name: &'static str,
    folder: PathBuf,
    weights: HashMap<String, Tensor>,
}

impl Case {
    fn new(kind: Kind, name: &'static str) -> Self {
        let folder = fixture::Fixture::get().folder.join(format!("ours-{name}"));
        let weights = kind.weights();
        kind.write_folder(&folder, &kind.config(SLIDING), &weights);
        Self {
            kind,
            name,
            folder,
            weights,
        }
    }

    /// Both models over the same calls; the entries that are kept.
    fn run(&self, policy: &Policy, counts: &[usize]) -> Result<usize> {
        let ours = ours(&self.folder, policy)?;
        let mut caches = ours.caches(&Default::default())?;
        let config = self.kind.config(SLIDING);
        let rules = ours.windows().into_iter().map(|sliding_window| LayerRules {
            sliding_window,
            softcap: config["attn_logit_softcapping"].as_f64(),
        });
        let options = SessionOptions {
            rules: rules.collect(),
            ..options(ModelCache::Cleared)
        };
        let mut session = Session::new(policy, options)?;
        let mut config = config.clone();
        config["use_flash_attn"] = true.into();
        config["use_cache"] = false.into();
        let vb = VarBuilder::from_tensors(self.kind.folded(&self.weights), DType::F32, &Device::Cpu);
        let mut theirs = load(self.name, config, true, OwnCache::Cleared, vb)?;
        steps(&[0], counts, |tokens, position| {
            let what = format!("{} tokens at {position}", tokens.dim(1)?);
            theirs.clear();
            let logits = session.scope(|| theirs.step(tokens, position))?;
            let hidden = ours.forward_cached(&tokens.flatten_all()?.to_vec1::<u32>()?, &mut caches)?;
            ensure_same(&ours.last_logits(&hidden)?, &logits, &what)?;
            for (layer, (theirs, ours)) in session.layers().iter().zip(&caches).enumerate() {
                ensure!(theirs.lens() == ours.lens(), "{what}, layer {layer}: lists");
                ensure!(theirs.bytes() == ours.bytes(), "{what}, layer {layer}: bytes");
            }
            let end = position + tokens.dim(1)?;
            if end == TOKENS {
                // The same from one plan of the whole sequence.
                let all = runs::tokens(&[0], 0..end)?.flatten_all()?.to_vec1::<u32>()?;
                let hidden = ours.forward(&all, &mut HiddenCounts::default())?;
                ensure_same(&ours.last_logits(&hidden)?, &logits, "the whole sequence")?;
            }
            Ok(())
        })?;
        ensure!(session.seq_len() == TOKENS, "tokens: {}", session.seq_len());
        Ok(entries(&session))
    }
}

#[test]
fn compressed_stock_models_are_our_own_decoder() -> Result<()> {
    let mut names: Vec<&str> = KINDS.into_iter().filter_map(stock).collect();
    let mut all = NAMES;
    names.sort_unstable();
    all.sort_unstable();
    assert_eq!(names, all, "every stock model");
    for kind in KINDS {
        let Some(name) = stock(kind) else { continue };
        let case = Case::new(kind, name);
        let shape = Checkpoint::open(case.folder.to_str().context("a path")?, LoadOptions::default())?
            .config
            .shape();
        let off = policy(shape, CompressionConfig::pretrained(), MergeStrategy::Off, 0.0, 1.0)?;
        let dense = case.run(&off, &[TOKENS])?;
        // Rounding decides nothing: thresholds a little lower or higher hide the same tokens.
        let [lower, higher] = [1.0 - 1e-4, 1.0 + 1e-4].map(|factor| policies(shape, factor));
        for ((policy, lower), higher) in policies(shape, 1.0)?.into_iter().zip(lower?).zip(higher?) {
            let config = &policy.parts().config;
            let what = format!("{name}, {:?}, {:?}", config.criterion, config.fold);
            let whole = [TOKENS];
            let kept = case.run(&policy, &whole).with_context(|| what.clone())?;
            println!("{what}: {kept} of {dense} entries");
            // Query heads that decide apart keep a list each.
            let dense = match policy.parts().config.group_rule {
                GroupRule::Unanimous => dense,
                GroupRule::PerQueryHead => dense * shape.heads / shape.kv_heads,
            };
            assert!(kept * 10 < dense * 9, "{what}: {kept} of {dense} entries");
            for other in [&lower, &higher] {
                assert_eq!(
                    case.run(other, &whole)?,
                    kept,
                    "{what}: a threshold is too near a decision"
                );
            }
            let chunks = [1, 13, 40, 2, 29, 15];
            for counts in [&chunks[..], &[1; TOKENS]] {
                let again = case
                    .run(&policy, counts)
                    .with_context(|| format!("{what}, {counts:?}"))?;
                assert_eq!(again, kept, "{what}, {counts:?}");
            }
        }
    }
    Ok(())
}
