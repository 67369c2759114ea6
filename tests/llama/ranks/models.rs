//! Models on 1, 2 and 3 ranks: logits, hidden tokens and caches are those of one rank.

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    AttentionOptions, CompressedAttention, CompressedKvCache, CompressionConfig, GroupRule, HeadStrategies,
    MergeStrategy,
};

use super::{model, KV_HEADS};
use crate::fixture::Fixture;
use crate::kinds::{Kind, KINDS};
use crate::load::{Checkpoint, LoadOptions};
use crate::model::{HiddenCounts, LlamaConfig};
use crate::ranks::{run, Ranks};
use crate::stats::{Hidden, KvUse};
use crate::weights::Pass;

const TOKENS: [u32; 40] = [
    3, 77, 12, 200, 41, 41, 5, 130, 251, 8, 99, 64, 17, 180, 2, 90, 33, 33, 210, 71, 150, 28, 9, 119, 3, 77, 12, 200,
    41, 41, 5, 130, 251, 8, 99, 64, 17, 180, 2, 90,
];

/// What the ranks computed together.
#[derive(Debug, PartialEq)]
struct Outcome {
    /// Of all tokens at once, and through caches.
    logits: [Vec<f32>; 2],
    hidden_ratios: Vec<f64>,
    kv_bytes: usize,
    kv_bytes_dense: usize,
    /// Of each layer: the lists of all ranks, in the order of the heads.
    lens: Vec<Vec<f64>>,
}

/// The settings of a run.
#[derive(Clone)]
struct Setting {
    strategies: HeadStrategies,
    config: CompressionConfig,
    options: LoadOptions,
}

impl Setting {
    fn new(strategies: HeadStrategies, config: CompressionConfig) -> Self {
        Self {
            strategies,
            config,
            options: LoadOptions::default(),
        }
    }

    fn attention(&self, model: &LlamaConfig, ranks: &Ranks) -> Result<Vec<CompressedAttention>> {
        let own = self.strategies.shard(ranks.rank(), ranks.world(), model.kv_heads)?;
        let attention = CompressedAttention::new(own, self.config.clone(), AttentionOptions::default())?;
        Ok(vec![attention; model.layers])
    }
}

fn lens(caches: &[CompressedKvCache], ranks: &Ranks) -> Result<Vec<Vec<f64>>> {
    let layer = |cache: &CompressedKvCache| {
        let own = cache.lens().concat().into_iter().map(|len| len as f64);
        Ok(ranks.gather(own.collect())?.concat())
    };
    caches.iter().map(layer).collect()
}

fn outcome(path: &str, world: usize, setting: &Setting) -> Result<Outcome> {
    run(world, |ranks| {
        let mut checkpoint = Checkpoint::open(path, setting.options.clone())?;
        let attention = setting.attention(&checkpoint.config, ranks)?;
        let model = checkpoint.load_formed(attention, &|linear| Ok(linear.into_prompt()), ranks)?;
        let mut counts = HiddenCounts::default();
        let hidden = model.forward(&TOKENS, &mut counts)?;
        let all = model.logits(&hidden, 0, TOKENS.len())?.flatten_all()?.to_vec1()?;
        let mut caches = model.caches(&Default::default())?;
        let mut rows = vec![model.forward_cached(&TOKENS[..29], &mut caches)?];
        for token in &TOKENS[29..] {
            rows.push(model.forward_as(&[*token], &mut caches, Pass::Step)?);
        }
        let cached = model.logits(&Tensor::cat(&rows, 1)?, 0, TOKENS.len())?;
        let kv = KvUse::of(&caches, &model)?;
        let mut hidden_ratios = Hidden::of(&counts, &model)?.hidden_ratio_per_layer;
        hidden_ratios.extend(kv.hidden().hidden_ratio_per_layer);
        Ok(Outcome {
            logits: [all, cached.flatten_all()?.to_vec1()?],
            hidden_ratios,
            kv_bytes: kv.kv_bytes,
            kv_bytes_dense: kv.kv_bytes_dense,
            lens: lens(&caches, ranks)?,
        })
    })
}

/// The same but for rounding of the logits, which is at most `tolerance`.
fn assert_alike(name: &str, got: &Outcome, expected: &Outcome, tolerance: f32) {
    for (got, expected) in got.logits.iter().zip(&expected.logits) {
        assert_eq!(got.len(), expected.len(), "{name}");
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() <= tolerance, "{name}: {got} for {expected}");
        }
    }
    assert_eq!(got.hidden_ratios, expected.hidden_ratios, "{name}");
    assert_eq!(
        (got.kv_bytes, got.kv_bytes_dense, &got.lens),
        (expected.kv_bytes, expected.kv_bytes_dense, &expected.lens),
        "{name}"
    );
}

fn merging(group_rule: GroupRule) -> CompressionConfig {
    CompressionConfig {
        similarity_threshold: 0.7,
        difference_threshold: 0.3,
        window: 6,
        group_rule,
        ..CompressionConfig::pretrained()
    }
}

/// A strategy for each of 6 query heads: the third KV head is dense.
fn mixed() -> Result<HeadStrategies> {
    let codes = Tensor::new(&[0u32, 0, 1, 1, 2, 2], &Device::Cpu)?;
    let thresholds = Tensor::new(&[0.8f64, 0.7, 0.3, 0.4, 0.0, 0.0], &Device::Cpu)?;
    Ok(HeadStrategies::from_tensor(&codes)?.with_thresholds(&thresholds)?)
}

#[test]
fn three_ranks_compute_as_one() -> Result<()> {
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let similar = HeadStrategies::uniform(MergeStrategy::Similarity);
    for (name, setting, hides) in [
        ("dense", Setting::new(off, merging(GroupRule::Unanimous)), false),
        ("merging", Setting::new(similar, merging(GroupRule::Unanimous)), true),
        ("mixed", Setting::new(mixed()?, merging(GroupRule::Unanimous)), true),
        (
            "per query head",
            Setting::new(mixed()?, merging(GroupRule::PerQueryHead)),
            true,
        ),
    ] {
        for (file, dequantize) in [
            ("three", true),
            ("biased", true),
            ("f32.gguf", true),
            ("q8.gguf", false),
        ] {
            let setting = Setting {
                options: LoadOptions {
                    dequantize,
                    ..Default::default()
                },
                ..setting.clone()
            };
            let name = format!("{name} {file}");
            let one = outcome(&model(file), 1, &setting)?;
            assert_eq!(
                one.hidden_ratios.iter().all(|ratio| *ratio > 0.02),
                hides,
                "{name}: {one:?}"
            );
            let three = outcome(&model(file), 3, &setting)?;
            assert_alike(&name, &three, &one, if dequantize { 1e-4 } else { 1e-3 });
        }
    }
    Ok(())
}

/// In halves the outputs of o_proj and down_proj are rounded on each rank.
#[test]
fn halves_are_as_close_as_halves_are() -> Result<()> {
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let wide = Setting::new(off, merging(GroupRule::Unanimous));
    let halves = Setting {
        options: LoadOptions {
            dtype: DType::BF16,
            ..Default::default()
        },
        ..wide.clone()
    };
    let path = model("biased");
    let error = |outcome: &Outcome, exact: &Outcome| {
        let pairs = outcome.logits[0].iter().zip(&exact.logits[0]);
        pairs.map(|(x, y)| (x - y).powi(2)).sum::<f32>().sqrt()
    };
    let exact = outcome(&path, 1, &wide)?;
    let one = outcome(&path, 1, &halves)?;
    let three = outcome(&path, 3, &halves)?;
    let (one, three) = (error(&one, &exact), error(&three, &exact));
    ensure!(one > 0.0 && three <= 1.5 * one, "{three} for {one}");
    Ok(())
}

/// Every kind of model that the example reads, as a folder and as a GGUF file; Gemma 3's one KV head is refused.
#[test]
fn every_kind_on_two_ranks_computes_as_one() -> Result<()> {
    let similar = HeadStrategies::uniform(MergeStrategy::Similarity);
    let setting = Setting::new(similar, merging(GroupRule::Unanimous));
    for kind in KINDS {
        let weights = kind.weights();
        let folder = Fixture::get().folder.join(format!("ranks-{}", kind.model_type()));
        kind.write_folder(&folder, &kind.config(16), &weights);
        let mut models = vec![folder];
        if kind.architecture().is_some() {
            let file = Fixture::get().folder.join(format!("ranks-{}.gguf", kind.model_type()));
            kind.write_gguf(&file, 16, &weights, candle_core::quantized::GgmlDType::F32);
            models.push(file);
        }
        for path in models {
            let path = path.to_str().unwrap();
            if kind == Kind::Gemma3 {
                let error = format!("{:#}", outcome(path, 2, &setting).unwrap_err());
                assert!(
                    error.contains("expected at most 1 ranks, one for each KV head, got 2"),
                    "{error}"
                );
                continue;
            }
            let one = outcome(path, 1, &setting)?;
            assert_alike(path, &outcome(path, 2, &setting)?, &one, 2e-4);
        }
    }
    Ok(())
}

/// Rank 1 alone fails, while the others load and run: its error ends all of them.
#[test]
fn an_error_of_one_rank_is_the_error_of_the_run() {
    let setting = Setting::new(
        HeadStrategies::uniform(MergeStrategy::Off),
        merging(GroupRule::Unanimous),
    );
    let path = model("three");
    let result = run(KV_HEADS, |ranks| {
        let mut checkpoint = Checkpoint::open(&path, LoadOptions::default())?;
        let mut attention = setting.attention(&checkpoint.config, ranks)?;
        if ranks.rank() == 1 {
            attention.pop();
        }
        let model = checkpoint.load_formed(attention, &|linear| Ok(linear.into_prompt()), ranks)?;
        model.forward(&TOKENS, &mut HiddenCounts::default())
    });
    let error = format!("{:#}", result.unwrap_err());
    assert_eq!(
        error,
        "rank 1 of 3: attention: expected 2 layers, got 1; give one per layer"
    );
}
