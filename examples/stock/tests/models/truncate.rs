//! Cutting a session back.

use crate::runs::{bits, config, entries, flat, options, run_in, session, tokens, Logits, COUNTS, TOKENS};
use crate::zoo::{Model, OwnCache, Zoo, LAYERS};
use anyhow::{Context, Result};
use candle_sfattention::session::{ModelCache, Session};
use candle_sfattention::{HeadStrategies, MergeStrategy};

const PROMPT: usize = COUNTS[0];

/// The calls after the prompt.
fn go_on(session: &mut Session, model: &mut dyn Model) -> Result<Logits> {
    let (mut logits, mut position) = (Vec::new(), PROMPT);
    for count in &COUNTS[1..] {
        model.clear();
        let new = tokens(&[0], position..position + count)?;
        logits.push(flat(&session.scope(|| model.step(&new, position))?)?);
        position += count;
    }
    Ok(logits)
}

fn refused(session: &mut Session, tokens: usize, parts: &[&str]) -> Result<()> {
    let before: Vec<_> = session
        .layers()
        .iter()
        .map(|layer| (layer.seq_len(), layer.lens()))
        .collect();
    let message = session.truncate(tokens).err().context("cut back")?.to_string();
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message}");
    }
    let after: Vec<_> = session
        .layers()
        .iter()
        .map(|layer| (layer.seq_len(), layer.lens()))
        .collect();
    assert_eq!(before, after, "{message}");
    Ok(())
}

#[test]
fn a_session_that_hides_nothing_goes_on_from_any_token() -> Result<()> {
    for name in ["llama", "mistral", "qwen3"] {
        let zoo = Zoo::new(name);
        let mut session = session(&zoo, MergeStrategy::Off, ModelCache::Cleared)?;
        let mut model = zoo.model(true, OwnCache::Cleared)?;
        let logits = run_in(&mut session, model.as_mut(), OwnCache::Cleared, &[0])?;
        refused(&mut session, TOKENS + 1, &["at most the 101 tokens", "got 102"])?;
        session.truncate(TOKENS)?;
        session.truncate(PROMPT)?;
        assert_eq!(session.seq_len(), PROMPT);
        assert_eq!(entries(&session), PROMPT * LAYERS * zoo.kv_heads());
        let again = go_on(&mut session, model.as_mut())?;
        assert_eq!(bits(&again), bits(&logits[1..].to_vec()), "{name}");
        // Nothing of the sequence stays.
        session.truncate(0)?;
        let again = run_in(&mut session, model.as_mut(), OwnCache::Cleared, &[0])?;
        assert_eq!(bits(&again), bits(&logits), "{name}");
    }
    Ok(())
}

/// A clone from before goes on in its place.
#[test]
fn a_session_that_hides_tokens_is_not_cut_back() -> Result<()> {
    let zoo = Zoo::new("llama");
    let mut session = session(&zoo, MergeStrategy::Similarity, ModelCache::Cleared)?;
    let mut model = zoo.model(true, OwnCache::Cleared)?;
    let prompt = tokens(&[0], 0..PROMPT)?;
    session.scope(|| model.step(&prompt, 0))?;
    let mut before = session.clone();
    let logits = go_on(&mut session, model.as_mut())?;
    refused(
        &mut session,
        PROMPT,
        &["layer 0", "expected 0 or all 101 tokens", "got 90", "fork()"],
    )?;
    session.truncate(TOKENS)?;
    assert_eq!(bits(&go_on(&mut before, model.as_mut())?), bits(&logits));
    session.truncate(0)?;
    assert_eq!((session.seq_len(), session.bytes()), (0, 0));
    session.scope(|| model.step(&prompt, 0))?;
    Ok(())
}

/// One layer that merges, or whose window has let tokens go, keeps all layers as they are.
#[test]
fn one_layer_that_cannot_be_cut_back_keeps_all() -> Result<()> {
    let zoo = Zoo::new("llama");
    let [off, on] = [MergeStrategy::Off, MergeStrategy::Similarity].map(|s| (HeadStrategies::uniform(s), config()));
    let settings = vec![off, on];
    let mut session = Session::per_layer(zoo.shape(), settings, options(ModelCache::Cleared))?;
    let mut model = zoo.model(true, OwnCache::Cleared)?;
    run_in(&mut session, model.as_mut(), OwnCache::Cleared, &[0])?;
    refused(&mut session, PROMPT, &["layer 1", "a cache that merges"])?;

    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let mut windowed = options(ModelCache::Cleared);
    windowed.rules = vec![Default::default(); LAYERS];
    windowed.rules[1].sliding_window = Some(9);
    let mut session = Session::uniform(zoo.shape(), &off, &config(), windowed)?;
    run_in(&mut session, model.as_mut(), OwnCache::Cleared, &[0])?;
    refused(&mut session, PROMPT, &["layer 1", "left the sliding window"])
}

/// The session cannot cut the model's cache back: the next call says so.
#[test]
fn beside_the_models_cache_both_must_be_cut_back() -> Result<()> {
    let zoo = Zoo::new("mistral");
    let mut session = session(&zoo, MergeStrategy::Off, ModelCache::Kept)?;
    let mut model = zoo.model(true, OwnCache::Kept)?;
    run_in(&mut session, model.as_mut(), OwnCache::Kept, &[0])?;
    session.truncate(PROMPT)?;
    let next = tokens(&[0], PROMPT..PROMPT + 1)?;
    let message = session.scope(|| model.step(&next, PROMPT)).err().context("accepted")?;
    let message = message.to_string();
    for part in ["expected keys of 91 tokens", "got 102", "cut the model's cache back"] {
        assert!(message.contains(part), "{part:?} is not in {message}");
    }
    assert_eq!(session.seq_len(), PROMPT);
    Ok(())
}
