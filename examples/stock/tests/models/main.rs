//! candle-transformers' models on the stand-in: dense outside a session, compressed inside one.

mod batches;
#[allow(dead_code)]
#[path = "../../../../tests/llama/fixture.rs"]
mod fixture;
#[allow(dead_code)]
#[path = "../../../../tests/llama/kinds.rs"]
mod kinds;
mod ours;
mod rules;
mod runs;
mod truncate;
mod zoo;

include!("../../../llama/decoder.rs");

use anyhow::{Context, Result};
use candle_sfattention::session::{ModelCache, Session};
use candle_sfattention::{CompressionConfig, HeadStrategies, MergeStrategy};
use runs::{
    bits, entries, flat, largest_difference, options, run, run_in, session, steps, BOTH_CACHES, COUNTS, TOKENS,
};
use serde_json::json;
use zoo::{Model, OwnCache, Zoo, NAMES};

#[test]
fn without_a_session_every_model_is_its_plain_path() -> Result<()> {
    for name in NAMES {
        let zoo = Zoo::new(name);
        let plain = run(zoo.model(false, OwnCache::Kept)?.as_mut(), OwnCache::Kept, &[0])?;
        let flash = run(zoo.model(true, OwnCache::Kept)?.as_mut(), OwnCache::Kept, &[0]).context(name)?;
        let difference = largest_difference(&plain, &flash).context(name)?;
        println!("{name}: {difference:e}");
        assert!(difference <= 2e-5, "{name}: {difference:e}");
    }
    Ok(())
}

#[test]
fn a_session_that_hides_nothing_is_the_plain_path() -> Result<()> {
    for name in NAMES {
        let zoo = Zoo::new(name);
        let plain = run(zoo.model(false, OwnCache::Kept)?.as_mut(), OwnCache::Kept, &[0])?;
        for (own, model_cache) in BOTH_CACHES {
            let mut session = session(&zoo, MergeStrategy::Off, model_cache)?;
            let off = run_in(&mut session, zoo.model(true, own)?.as_mut(), own, &[0]).context(name)?;
            let difference = largest_difference(&plain, &off).context(name)?;
            println!("{name}, {own:?}: {difference:e}");
            assert!(difference <= 2e-5, "{name}, {own:?}: {difference:e}");
        }
    }
    Ok(())
}

/// The session's cache gets the same rows either way.
#[test]
fn ours_alone_is_ours_beside_the_models_cache_bit_for_bit() -> Result<()> {
    for name in NAMES {
        let zoo = Zoo::new(name);
        let mut runs = Vec::new();
        for (own, model_cache) in BOTH_CACHES {
            let mut session = session(&zoo, MergeStrategy::Similarity, model_cache)?;
            let logits = run_in(&mut session, zoo.model(true, own)?.as_mut(), own, &[0]).context(name)?;
            assert_eq!(session.seq_len(), TOKENS, "{name}");
            let share = session.bytes() as f64 / session.bytes_dense() as f64;
            println!("{name}, {own:?}: {share:.2} of the bytes");
            // Small heads have large bookkeeping; the entries tell.
            assert!(
                entries(&session) < TOKENS * zoo.kv_heads() * zoo::LAYERS,
                "{name}: nothing was hidden"
            );
            runs.push(logits);
        }
        assert_eq!(bits(&runs[0]), bits(&runs[1]), "{name}");
    }
    Ok(())
}

#[test]
fn a_call_that_does_not_fit_is_refused() -> Result<()> {
    let zoo = Zoo::new("llama");
    let refused = |session: &mut Session, model: &mut dyn Model, parts: &[&str]| {
        let mut error = None;
        let result = steps(&[0], &COUNTS, |tokens, position| {
            if error.is_none() {
                error = session.scope(|| model.step(tokens, position)).err();
            }
            Ok(())
        });
        assert!(result.is_ok());
        let text = error.map_or("no error".into(), |error| error.to_string());
        for part in parts {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    };
    let of = |changes: serde_json::Value, model_cache| -> Result<Session> {
        let mut shape = serde_json::to_value(zoo.shape())?;
        for (name, value) in changes.as_object().into_iter().flatten() {
            shape[name] = value.clone();
        }
        let (config, off) = (
            CompressionConfig::pretrained(),
            HeadStrategies::uniform(MergeStrategy::Off),
        );
        let shape = serde_json::from_value(shape)?;
        Ok(Session::uniform(shape, &off, &config, options(model_cache))?)
    };
    let kept = || zoo.model(true, OwnCache::Kept);
    for (changes, model_cache, mut model, parts) in [
        (
            json!({"layers": 3}),
            ModelCache::Kept,
            kept()?,
            &["expected 3 calls", "got 2"][..],
        ),
        (
            json!({"layers": 1}),
            ModelCache::Kept,
            kept()?,
            &["expected 1 calls", "got another one"],
        ),
        (
            json!({"kv_heads": 1}),
            ModelCache::Kept,
            kept()?,
            &["1 KV heads", "differ within a group"],
        ),
        (
            json!({"head_dim": 32}),
            ModelCache::Kept,
            kept()?,
            &["of 32 numbers", "16"],
        ),
        (
            json!({}),
            ModelCache::Kept,
            zoo.model(true, OwnCache::Cleared)?,
            &["expected keys of 91 tokens", "got 1", "ModelCache::Cleared"],
        ),
        (
            json!({}),
            ModelCache::Cleared,
            kept()?,
            &["expected keys of 1 tokens", "got 91", "ModelCache::Kept"],
        ),
        (
            json!({}),
            ModelCache::Kept,
            zoo.model(false, OwnCache::Kept)?,
            &["expected 2 calls", "got 0", "flash attention switched on"],
        ),
    ] {
        refused(&mut of(changes, model_cache)?, model.as_mut(), parts);
    }
    Ok(())
}

#[test]
fn a_pass_that_fails_between_two_layers_breaks_the_session_until_reset() -> Result<()> {
    let zoo = Zoo::new("llama");
    let mut session = session(&zoo, MergeStrategy::Off, ModelCache::Cleared)?;
    let mut model = zoo.model(true, OwnCache::Cleared)?;
    steps(&[0], &COUNTS, |tokens, position| {
        if position == 0 {
            let q = candle_core::Tensor::zeros((1, 90, 4, 16), candle_core::DType::F32, tokens.device())?;
            let fails = session.scope(|| {
                candle_flash_attn::flash_attn(&q, &q, &q, 1.0, true)?;
                candle_flash_attn::flash_attn(&q, &q, &q, 1.0, false)
            });
            assert!(fails.unwrap_err().to_string().contains("expected causal attention"));
            let again = session.scope(|| model.step(tokens, position)).unwrap_err();
            assert!(again.to_string().contains("failed between two layers"), "{again}");
            assert!(session.save(std::env::temp_dir().join("never")).is_err());
            session.reset();
        }
        session.scope(|| model.step(tokens, position))?;
        Ok(())
    })?;
    assert_eq!(session.seq_len(), TOKENS);
    // A panic too, and other calls on the thread are dense again.
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        session.scope(|| -> candle_core::Result<()> { panic!("on purpose") })
    }));
    assert!(caught.is_err() && !candle_sfattention::session::is_running());
    assert_eq!(session.layers().len(), zoo::LAYERS);
    Ok(())
}

#[test]
fn a_saved_session_goes_on_bit_for_bit() -> Result<()> {
    let zoo = Zoo::new("mistral");
    let folder = std::env::temp_dir().join(format!("stock-session-{}", std::process::id()));
    let mut session = session(&zoo, MergeStrategy::Similarity, ModelCache::Cleared)?;
    let (mut model, mut resumed) = (zoo.model(true, OwnCache::Cleared)?, None::<Session>);
    steps(&[0], &COUNTS, |tokens, position| {
        model.clear();
        let logits = session.scope(|| model.step(tokens, position))?;
        if let Some(resumed) = &mut resumed {
            model.clear();
            let again = resumed.scope(|| model.step(tokens, position))?;
            assert_eq!(flat(&logits)?, flat(&again)?);
        }
        session.save(&folder)?;
        resumed = Some(Session::load(&folder, tokens.device())?);
        // One save replaces the other.
        assert_eq!(std::fs::read_dir(&folder)?.count(), zoo::LAYERS + 1);
        Ok(())
    })?;
    std::fs::remove_file(folder.join("session.json"))?;
    assert!(Session::load(&folder, &candle_core::Device::Cpu).is_err());
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}
