//! The llama example's drafts: the text is the one without them, whatever the caches do.

use crate::binary::{assert_error, llama, number, report, text};
use crate::draft::{look_up, rollback};
use crate::fixture::Fixture;
use crate::kinds::{Kind, HEADS};
use crate::load::{Checkpoint, LoadOptions};
use crate::model::Llama;
use crate::policy::policy;
use crate::sampling::Sampler;
use crate::session::Session;
use crate::sliding;
use crate::stats::Stats;
use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use candle_sfattention::{
    AttentionOptions, CacheOptions, CompressedAttention, CompressionConfig, HeadStrategies, MergeStrategy,
};
use std::sync::OnceLock;

/// It repeats itself.
const PROMPT: &str = "the sea of the whale, the sea of the ship, the sea of the whale, ";
/// As many tokens as fit the context.
const TOKENS: usize = 70;
const DRAFT: usize = 4;

#[test]
fn a_draft_is_what_followed_the_same_tokens() {
    // The last four stood at the beginning; the last two later too.
    let text = [1, 2, 3, 4, 5, 6, 7, 3, 4, 8, 1, 2, 3, 4];
    assert_eq!(look_up(&text, 3), [5, 6, 7]);
    // The latest of two places.
    assert_eq!(look_up(&[1, 2, 5, 1, 2, 6, 1, 2], 2), [6, 1]);
    // The text ends before the draft does.
    assert_eq!(look_up(&[9, 1, 2, 3, 1, 2], 7), [3, 1, 2, 3, 1, 2, 3]);
    assert_eq!(look_up(&[7, 7, 7], 3), [7, 7, 7]);
    for text in [&[][..], &[1], &[1, 1], &[1, 2, 3, 4], &[1, 2, 3, 2]] {
        assert!(look_up(text, 3).is_empty(), "{text:?}");
    }
    assert!(look_up(&[7, 7, 7], 0).is_empty());
}

/// What a sequence became: its tokens after the prompt, the entries of every layer's lists, and its stats.
struct Text {
    tokens: Vec<u32>,
    entries: Vec<Vec<Vec<usize>>>,
    stats: Stats,
    /// The least distance of the two largest logits.
    apart: f32,
}

/// Continues a prompt, with drafts of `draft` tokens, or without.
fn continued(model: &Llama, prompt: &[u32], draft: usize, temperature: f64) -> Result<Text> {
    let options = CacheOptions {
        rollback: rollback(draft),
        ..Default::default()
    };
    let mut session = Session::cached(model, &options, Some(512))?;
    let mut sampler = Sampler::new(temperature, None, 5)?;
    let mut apart = f32::INFINITY;
    let mut choose = |logits: &Tensor| {
        let mut sorted = logits.to_vec1::<f32>()?;
        sorted.sort_by(|a, b| b.total_cmp(a));
        apart = apart.min(sorted[0] - sorted[1]);
        sampler.sample(logits)
    };
    let mut all = prompt.to_vec();
    all.push(choose(&session.prefill(prompt)?)?);
    while all.len() < prompt.len() + TOKENS {
        let last = *all.last().context("a token")?;
        let count = draft.min(prompt.len() + TOKENS - all.len() - 1);
        match draft {
            0 => all.push(choose(&session.step(last)?)?),
            _ => {
                let draft = look_up(&all, count);
                all.extend(session.step_drafted(last, &draft, &mut choose)?);
            }
        }
    }
    let stats = session.stats(TOKENS)?;
    let caches = session.into_caches().context("caches")?;
    Ok(Text {
        tokens: all[prompt.len()..].to_vec(),
        entries: caches.iter().map(|cache| cache.lens()).collect(),
        stats,
        apart,
    })
}

fn model(folder: &str, strategies: &HeadStrategies, config: &CompressionConfig) -> Result<(Llama, Vec<u32>)> {
    let mut checkpoint = Checkpoint::open(folder, LoadOptions::default())?;
    let prompt = checkpoint.encode(PROMPT, true)?;
    let layer = || CompressedAttention::new(strategies.clone(), config.clone(), AttentionOptions::default());
    let layers = (0..checkpoint.config.layers).map(|_| layer());
    let attention = layers.collect::<candle_core::Result<Vec<_>>>()?;
    Ok((checkpoint.load(attention)?, prompt))
}

/// A random Llama whose layers add less than its embedding, so that greedy text repeats itself.
fn repeating() -> &'static str {
    static FOLDER: OnceLock<String> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let (kind, folder) = (Kind::Llama, Fixture::get().folder.join("repeating"));
        let mut weights = kind.weights();
        for (name, weight) in &mut weights {
            if name.contains("o_proj") || name.contains("down_proj") {
                *weight = (&*weight * 0.3).unwrap();
            }
        }
        kind.write_folder(&folder, &kind.config(0), &weights);
        folder.to_str().unwrap().into()
    })
}

/// Drafts are accepted and refused, and the text, the entries and the number of tokens in the caches are those without
/// drafts. The two likeliest tokens are apart by far more than rounding, so that equality is no luck.
#[test]
fn drafts_change_neither_text_nor_caches() -> Result<()> {
    let small = |config: CompressionConfig| CompressionConfig {
        window: 8,
        sinks: 2,
        similarity_threshold: 0.9,
        ..config
    };
    let (pretrained, calibrated) = (
        small(CompressionConfig::pretrained()),
        small(CompressionConfig::calibrated()),
    );
    let [off, similar] = [MergeStrategy::Off, MergeStrategy::Similarity].map(HeadStrategies::uniform);
    let thresholds = Tensor::full(2.5f64, HEADS, &Device::Cpu)?;
    let masses = similar.clone().with_thresholds(&thresholds)?;
    for (name, folder, strategies, config) in [
        ("off", repeating(), &off, &pretrained),
        ("merging", repeating(), &similar, &pretrained),
        ("observed mass", repeating(), &masses, &calibrated),
        ("sliding", sliding::gemma(), &off, &pretrained),
        ("sliding, merging", sliding::gemma(), &similar, &pretrained),
    ] {
        let (model, prompt) = model(folder, strategies, config)?;
        let (mut accepted, mut refused) = (0, 0);
        for temperature in [0.0, 0.7] {
            let plain = continued(&model, &prompt, 0, temperature)?;
            assert!(plain.stats.draft.is_none());
            assert!(temperature > 0.0 || plain.apart > 1e-3, "{name}: {}", plain.apart);
            let hidden = plain.stats.hidden.hidden_ratio;
            assert_eq!(hidden > 0.1, *strategies != off, "{name}: {hidden}");
            for count in [1, DRAFT, 9] {
                let name = format!("{name}, temperature {temperature}, drafts of {count}");
                let drafted = continued(&model, &prompt, count, temperature)?;
                assert_eq!(drafted.tokens, plain.tokens, "{name}");
                assert_eq!(drafted.entries, plain.entries, "{name}");
                let (kv, plain_kv) = (drafted.stats.kv.context("kv")?, plain.stats.kv.as_ref().context("kv")?);
                assert_eq!(kv.kv_tokens, plain_kv.kv_tokens, "{name}");
                assert_eq!(kv.kv_bytes, plain_kv.kv_bytes, "{name}");
                let draft = drafted.stats.draft.context("drafts")?;
                assert_eq!(draft.passes + draft.accepted, TOKENS - 1, "{name}");
                accepted += draft.accepted;
                refused += draft.drafted - draft.accepted;
            }
        }
        assert!(
            accepted > 0 && refused > 0,
            "{name}: {accepted} accepted, {refused} refused"
        );
    }
    Ok(())
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// The command's text and the stats of its caches are those without --draft, in every form of the weights; the end says
/// what became of the drafts.
#[test]
fn the_command_drafts() {
    let llama_policy = format!("--strategy {}", policy());
    let sliding_policy = format!("--strategy {}", sliding::calibrated().0);
    let merging = "--similarity-threshold 0.9 --window 8";
    let hf = Fixture::get().path("hf");
    for (name, model, flags) in [
        ("dense", repeating(), "--dense"),
        ("merging", repeating(), merging),
        ("sampled", repeating(), "--dense --temperature 0.8 --top-p 0.9 --seed 3"),
        ("packed", repeating(), "--dense --decode-weights packed"),
        ("policy", &hf, &llama_policy),
        ("sliding", sliding::gemma(), &sliding_policy),
    ] {
        // To the end of the context, or less.
        for most in ["400", "17"] {
            let args = ["generate", "--model", model, "--prompt", PROMPT, "--max-tokens", most];
            let args = [&args[..], &words(flags)].concat();
            let name = format!("drafts_{name}_{most}");
            let plain = report(&format!("{name}_none"), &args);
            let drafted = report(&name, &[&args[..], &["--draft", "4"]].concat());
            assert_eq!(drafted["text"], plain["text"], "{flags}");
            for key in ["kv_tokens", "kv_bytes", "entries_per_layer", "generated_tokens"] {
                assert_eq!(drafted["stats"][key], plain["stats"][key], "{flags}: {key}");
            }
            assert!(plain["stats"]["draft"].is_null());
            let draft = &drafted["stats"]["draft"];
            assert!(number(draft, "drafted") >= number(draft, "accepted"), "{draft}");
            assert!(number(&drafted["stats"], "decode_tokens_per_second") > 0.0);
        }
    }
    let args = ["generate", "--model", repeating(), "--prompt", PROMPT, "--dense"];
    let output = llama(&[&args[..], &words("--max-tokens 30 --draft 4")].concat());
    let said = text(&output.stderr);
    let line = said
        .lines()
        .find(|line| line.starts_with("drafts "))
        .unwrap_or_default();
    assert!(
        line.contains(" tokens accepted, ") && line.contains(" tokens a pass"),
        "{said}"
    );
    let drafted = line.split_whitespace().nth(3).and_then(|x| x.parse::<usize>().ok());
    assert!(drafted.is_some_and(|drafted| drafted > 0), "{line}");
}

#[test]
fn drafts_that_cannot_be_are_refused() {
    let prompts = Fixture::get().path("drafts.prompts.txt");
    std::fs::write(&prompts, "the sea\nof ship").unwrap();
    let refused = |flags: &str, parts: &[&str]| {
        let args = ["generate", "--model", repeating()];
        assert_error(&[&args[..], &words(flags)].concat(), parts);
    };
    refused(
        "--draft 0",
        &["draft: expected at least 1 token, got 0", "leave --draft out"],
    );
    refused("--draft 4 --no-cache", &["draft: expected KV caches", "got --no-cache"]);
    refused(
        "--draft 4 --preset reference",
        &["draft: expected KV caches", "the rule reference"],
    );
    refused(
        &format!("--draft 4 --batch {prompts}"),
        &["draft: expected one prompt, got --draft 4 beside --batch", "--prompt"],
    );
}
