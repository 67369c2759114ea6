//! Softcap and sliding window. Candle-transformers 0.11.1 passes neither to `flash_attn`; a session's rules do.

use crate::runs::{flat, largest_difference, options, steps, tokens, Logits, COUNTS, TOKENS};
use crate::zoo::{OwnCache, Zoo};
use anyhow::{Context, Result};
use candle_sfattention::session::{LayerRules, ModelCache, Session, SessionOptions};
use candle_sfattention::{CompressionConfig, HeadStrategies, MergeStrategy};
use serde_json::{json, Value};

/// Tokens that a row sees in the models' own masks, whose window is one less.
const SEEN: usize = 9;
const SOFTCAP: f64 = 0.01;
const WINDOW: Option<usize> = Some(SEEN);
const CAP: Option<f64> = Some(SOFTCAP);

const fn rules(sliding_window: Option<usize>, softcap: Option<f64>) -> LayerRules {
    LayerRules {
        sliding_window,
        softcap,
    }
}

/// A model, what its config says of softcap and window, and the rules of its two layers.
fn cases() -> [(&'static str, Value, [LayerRules; 2]); 8] {
    let (window, softcap) = (json!(SEEN - 1), json!(SOFTCAP));
    [
        (
            "gemma2",
            json!({"attn_logit_softcapping": softcap}),
            [rules(None, CAP); 2],
        ),
        ("gemma2", json!({"sliding_window": window}), [rules(WINDOW, None); 2]),
        (
            "gemma2",
            json!({"sliding_window": window, "attn_logit_softcapping": softcap}),
            [rules(WINDOW, CAP); 2],
        ),
        (
            "gemma3",
            json!({"attn_logit_softcapping": softcap}),
            [rules(None, CAP); 2],
        ),
        (
            "gemma3",
            json!({"sliding_window": window}),
            [rules(WINDOW, None), rules(None, None)],
        ),
        (
            "gemma3",
            json!({"sliding_window": window, "attn_logit_softcapping": softcap}),
            [rules(WINDOW, CAP), rules(None, CAP)],
        ),
        ("mistral", json!({"sliding_window": window}), [rules(WINDOW, None); 2]),
        // Its window is longer than the sequence.
        ("mistral", json!({"sliding_window": 4096}), [rules(Some(4097), None); 2]),
    ]
}

/// The model's own attention over the whole sequence up to the end of each call. Token by token it would see more: in
/// Gemma 2 and Mistral a token that comes alone has no mask.
fn plain(zoo: &Zoo, changes: &Value) -> Result<Logits> {
    let mut model = zoo.model_with(false, OwnCache::Kept, changes.clone())?;
    let mut logits = Vec::new();
    steps(&[0], &COUNTS, |new, position| {
        model.clear();
        let all = tokens(&[0], 0..position + new.dim(1)?)?;
        logits.push(flat(&model.step(&all, 0)?)?);
        Ok(())
    })?;
    Ok(logits)
}

fn session(zoo: &Zoo, rules: &[LayerRules]) -> candle_core::Result<Session> {
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let options = SessionOptions {
        rules: rules.into(),
        ..options(ModelCache::Cleared)
    };
    Session::uniform(zoo.shape(), &off, &CompressionConfig::pretrained(), options)
}

/// The model's calls of `flash_attn` inside a session with these rules.
fn flash(zoo: &Zoo, changes: &Value, rules: &[LayerRules]) -> Result<(Logits, Session)> {
    let mut session = session(zoo, rules)?;
    let mut model = zoo.model_with(true, OwnCache::Cleared, changes.clone())?;
    let mut logits = Vec::new();
    steps(&[0], &COUNTS, |tokens, position| {
        model.clear();
        logits.push(flat(&session.scope(|| model.step(tokens, position))?)?);
        Ok(())
    })?;
    Ok((logits, session))
}

#[test]
fn rules_of_layers_are_the_plain_path_in_every_call() -> Result<()> {
    for (name, changes, rules) in cases() {
        let zoo = Zoo::new(name);
        let expected = plain(&zoo, &changes)?;
        let (with, session) = flash(&zoo, &changes, &rules)?;
        let difference = largest_difference(&expected, &with)?;
        println!("{name}, {changes}: {difference:e}");
        assert!(difference <= 2e-5, "{name}, {changes}: {difference:e}");
        for (layer, rules) in session.layers().iter().zip(rules) {
            // The next row is one of those that its window shows.
            let kept = rules.sliding_window.map_or(TOKENS, |window| TOKENS.min(window - 1));
            let lens = layer.lens().concat();
            assert!(lens.iter().all(|len| *len == kept), "{name}, {changes}: {lens:?}");
        }
        let refused = self::session(&zoo, &rules[..1]);
        let message = refused.err().context("accepted")?.to_string();
        assert!(message.contains("rules: expected none or 2, got 1"), "{message}");
    }
    Ok(())
}

/// The day they agree, the rules above are no longer needed.
#[test]
fn without_rules_the_flash_path_drops_softcap_and_window() -> Result<()> {
    for (name, changes, rules) in cases() {
        let zoo = Zoo::new(name);
        let (without, _) = flash(&zoo, &changes, &[])?;
        let difference = largest_difference(&plain(&zoo, &changes)?, &without)?;
        println!("{name}, {changes}: {difference:e}");
        let reaches = |rules: &LayerRules| rules.softcap.is_some() || rules.sliding_window.is_some_and(|l| l < TOKENS);
        assert_eq!(
            difference > 1e-3,
            rules.iter().any(reaches),
            "{name}, {changes}: {difference:e}"
        );
    }
    Ok(())
}

/// A rotating cache hands on its window alone.
#[test]
fn a_model_whose_own_cache_forgets_is_refused_beside_it() -> Result<()> {
    let zoo = Zoo::new("gemma3");
    let changes = json!({"sliding_window": SEEN - 1});
    let mut model = zoo.model_with(true, OwnCache::Kept, changes)?;
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let kept = options(ModelCache::Kept);
    let mut session = Session::uniform(zoo.shape(), &off, &CompressionConfig::pretrained(), kept)?;
    let prompt = tokens(&[0], 0..20)?;
    session.scope(|| model.step(&prompt, 0))?;
    let next = tokens(&[0], 20..21)?;
    let message = session.scope(|| model.step(&next, 20)).err().context("accepted")?;
    let message = message.to_string();
    for part in ["expected keys of 21 tokens", "got 8", "ModelCache::Cleared"] {
        assert!(message.contains(part), "{part:?} is not in {message}");
    }
    Ok(())
}
