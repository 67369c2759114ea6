//! candle-transformers' models on the stand-in: dense outside a session, compressed inside one.

mod zoo;

use anyhow::{ensure, Context, Result};
use candle_sfattention::session::{LayerRules, ModelCache, Session, SessionOptions};
use candle_sfattention::{CompressionConfig, HeadStrategies, MergeStrategy};
use serde_json::json;
use zoo::{run, steps, Model, OwnCache, Zoo, NAMES};

fn session(zoo: &Zoo, strategy: MergeStrategy, model_cache: ModelCache) -> Result<Session> {
    let config = CompressionConfig {
        window: 8,
        ..CompressionConfig::pretrained()
    };
    let options = SessionOptions {
        model_cache,
        ..Default::default()
    };
    let strategies = HeadStrategies::uniform(strategy);
    Ok(Session::uniform(zoo.shape(), &strategies, &config, options)?)
}

/// Logits of each step inside the session.
fn run_in(session: &mut Session, model: &mut dyn Model, own: OwnCache) -> Result<Vec<Vec<f32>>> {
    let mut logits = Vec::new();
    steps(|tokens, position| {
        if own == OwnCache::Cleared {
            model.clear();
        }
        let output = session.scope(|| model.step(tokens, position))?;
        logits.push(output.flatten_all()?.to_vec1::<f32>()?);
        Ok(())
    })?;
    Ok(logits)
}

fn largest_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> Result<f32> {
    ensure!(
        a.len() == b.len() && !a.is_empty(),
        "steps: {} and {}",
        a.len(),
        b.len()
    );
    let mut largest = 0f32;
    for (x, y) in a.iter().flatten().zip(b.iter().flatten()) {
        ensure!((x - y).is_finite(), "{x} and {y}");
        largest = largest.max((x - y).abs());
    }
    let spread = a.iter().flatten().fold(0f32, |most, x| most.max(x.abs()));
    ensure!(spread > 1e-2, "logits of at most {spread} prove nothing");
    Ok(largest)
}

#[test]
fn without_a_session_every_model_is_its_plain_path() -> Result<()> {
    for name in NAMES {
        let zoo = Zoo::new(name);
        let plain = run(zoo.model(false, OwnCache::Kept)?.as_mut(), OwnCache::Kept)?;
        let flash = run(zoo.model(true, OwnCache::Kept)?.as_mut(), OwnCache::Kept).context(name)?;
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
        let plain = run(zoo.model(false, OwnCache::Kept)?.as_mut(), OwnCache::Kept)?;
        for (own, model_cache) in [
            (OwnCache::Kept, ModelCache::Kept),
            (OwnCache::Cleared, ModelCache::Cleared),
        ] {
            let mut session = session(&zoo, MergeStrategy::Off, model_cache)?;
            let off = run_in(&mut session, zoo.model(true, own)?.as_mut(), own).context(name)?;
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
        for (own, model_cache) in [
            (OwnCache::Kept, ModelCache::Kept),
            (OwnCache::Cleared, ModelCache::Cleared),
        ] {
            let mut session = session(&zoo, MergeStrategy::Similarity, model_cache)?;
            let logits = run_in(&mut session, zoo.model(true, own)?.as_mut(), own).context(name)?;
            assert_eq!(session.seq_len(), 101, "{name}");
            let share = session.bytes() as f64 / session.bytes_dense() as f64;
            println!("{name}, {own:?}: {share:.2} of the bytes");
            // Small heads have large bookkeeping; the entries tell.
            let kept: usize = session.layers().iter().flat_map(|layer| layer.lens().concat()).sum();
            assert!(kept < 101 * zoo.kv_heads() * zoo::LAYERS, "{name}: nothing was hidden");
            runs.push(logits);
        }
        let bits = |run: &Vec<Vec<f32>>| run.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&runs[0]), bits(&runs[1]), "{name}");
    }
    Ok(())
}

/// candle-transformers 0.11.1 passes neither the softcap nor the window to `flash_attn`: its two paths differ.
#[test]
fn candles_flash_path_drops_gemmas_softcap_and_window() -> Result<()> {
    for (name, changes) in [
        ("gemma2", json!({"attn_logit_softcapping": 0.01})),
        ("gemma3", json!({"attn_logit_softcapping": 0.01})),
        ("gemma3", json!({"sliding_window": 8})),
    ] {
        let zoo = Zoo::new(name);
        let mut logits = Vec::new();
        for flash in [false, true] {
            let mut model = zoo.model_with(flash, OwnCache::Kept, changes.clone())?;
            let mut all = Vec::new();
            steps(|tokens, position| {
                if position == 0 {
                    all.push(model.step(tokens, 0)?.flatten_all()?.to_vec1::<f32>()?);
                }
                Ok(())
            })?;
            logits.push(all);
        }
        let difference = largest_difference(&logits[0], &logits[1])?;
        println!("{name}, {changes}: {difference:e}");
        assert!(
            difference > 1e-3,
            "{name}, {changes}: the paths agree now ({difference:e})"
        );
    }
    Ok(())
}

/// A session's rules bring back what the flash path drops. The plain path's mask of a window of 8 shows 9 tokens.
#[test]
fn rules_of_layers_bring_back_softcap_and_window() -> Result<()> {
    let rules = |sliding_window, softcap| LayerRules {
        sliding_window,
        softcap,
    };
    for (name, changes, rules) in [
        (
            "gemma2",
            json!({"attn_logit_softcapping": 0.01}),
            [rules(None, Some(0.01)); 2],
        ),
        (
            "gemma3",
            json!({"sliding_window": 8}),
            [rules(Some(9), None), rules(None, None)],
        ),
        (
            "gemma3",
            json!({"sliding_window": 8, "attn_logit_softcapping": 0.01}),
            [rules(Some(9), Some(0.01)), rules(None, Some(0.01))],
        ),
    ] {
        let zoo = Zoo::new(name);
        let off = HeadStrategies::uniform(MergeStrategy::Off);
        let options = SessionOptions {
            model_cache: ModelCache::Cleared,
            rules: rules.into(),
            ..Default::default()
        };
        let mut session = Session::uniform(zoo.shape(), &off, &CompressionConfig::pretrained(), options.clone())?;
        let mut plain = zoo.model_with(false, OwnCache::Kept, changes.clone())?;
        let mut flash = zoo.model_with(true, OwnCache::Kept, changes.clone())?;
        let (mut expected, mut got) = (Vec::new(), Vec::new());
        steps(|tokens, position| {
            if position == 0 {
                expected.push(plain.step(tokens, 0)?.flatten_all()?.to_vec1::<f32>()?);
                let output = session.scope(|| flash.step(tokens, 0))?;
                got.push(output.flatten_all()?.to_vec1::<f32>()?);
            }
            Ok(())
        })?;
        let difference = largest_difference(&expected, &got)?;
        println!("{name}, {changes}: {difference:e}");
        assert!(difference <= 2e-5, "{name}, {changes}: {difference:e}");
        let short = SessionOptions {
            rules: rules[..1].into(),
            ..options
        };
        let refused = Session::uniform(zoo.shape(), &off, &CompressionConfig::pretrained(), short);
        let message = refused.err().context("accepted")?.to_string();
        assert!(message.contains("rules: expected none or 2, got 1"), "{message}");
    }
    Ok(())
}

#[test]
fn a_call_that_does_not_fit_is_refused() -> Result<()> {
    let zoo = Zoo::new("llama");
    let refused = |session: &mut Session, model: &mut dyn Model, parts: &[&str]| {
        let mut error = None;
        let result = steps(|tokens, position| {
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
        let (config, options) = (
            CompressionConfig::pretrained(),
            SessionOptions {
                model_cache,
                ..Default::default()
            },
        );
        let off = HeadStrategies::uniform(MergeStrategy::Off);
        Ok(Session::uniform(
            serde_json::from_value(shape)?,
            &off,
            &config,
            options,
        )?)
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
    steps(|tokens, position| {
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
    assert_eq!(session.seq_len(), 101);
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
    steps(|tokens, position| {
        model.clear();
        let logits = session.scope(|| model.step(tokens, position))?;
        if let Some(resumed) = &mut resumed {
            model.clear();
            let again = resumed.scope(|| model.step(tokens, position))?;
            assert_eq!(
                logits.flatten_all()?.to_vec1::<f32>()?,
                again.flatten_all()?.to_vec1::<f32>()?
            );
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
