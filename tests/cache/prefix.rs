//! Saved prefixes: found by a key of model, settings and tokens, and refused under any other.

use crate::common::files::TempFile;
use crate::common::inputs::Shape;
use crate::common::saved::bits;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::session::{attend_next_layer, ModelCache, Session, SessionOptions};
use candle_sfattention::{
    CacheOptions, CompressedKvCache, CompressionConfig, HeadStrategies, MergeStrategy, ModelShape, PrefixKey,
};
use std::collections::HashSet;

const TOKENS: [u32; 9] = [5, 1, 70_000, 3, 3, 3, 12, 0, 9];

fn cache(config: CompressionConfig, storage: Option<DType>) -> Result<CompressedKvCache> {
    let options = CacheOptions {
        storage: storage.map(TryInto::try_into).transpose()?,
        ..Default::default()
    };
    Ok(CompressedKvCache::new(
        HeadStrategies::uniform(MergeStrategy::Similarity),
        config,
        options,
    )?)
}

/// A key changes with each part of what it names, and with nothing else.
#[test]
fn keys_name_model_settings_and_tokens() -> Result<()> {
    let config = CompressionConfig::pretrained();
    let own = cache(config.clone(), None)?.prefix_key("model", &TOKENS)?;
    let window = CompressionConfig {
        window: config.window + 1,
        ..config.clone()
    };
    let off = CompressedKvCache::new(
        HeadStrategies::uniform(MergeStrategy::Off),
        config.clone(),
        Default::default(),
    )?;
    let mut other = TOKENS;
    other[2] += 1;
    let keys = [
        own.clone(),
        cache(config.clone(), None)?.prefix_key("model2", &TOKENS)?,
        cache(config.clone(), None)?.prefix_key("model", &other)?,
        cache(config.clone(), None)?.prefix_key("model", &TOKENS[..8])?,
        cache(config.clone(), Some(DType::BF16))?.prefix_key("model", &TOKENS)?,
        cache(window, None)?.prefix_key("model", &TOKENS)?,
        off.prefix_key("model", &TOKENS)?,
    ];
    assert_eq!(
        keys.iter().map(PrefixKey::as_str).collect::<HashSet<_>>().len(),
        keys.len()
    );
    assert!(keys.iter().all(|key| key.as_str().len() == 64));
    // What a cache holds does not depend on its limits, nor on tokens that it holds already.
    let limits = CacheOptions {
        max_entries: Some(77),
        rollback: 5,
        ..Default::default()
    };
    let mut same = CompressedKvCache::new(HeadStrategies::uniform(MergeStrategy::Similarity), config, limits)?;
    let [q, k, v] = Shape(1, 2, 1, 4, 8).qkv(1, DType::F32)?;
    same.append_and_attend(&q, &k, &v, &Default::default())?;
    assert_eq!(same.prefix_key("model", &TOKENS)?.as_str(), own.as_str());
    // The key of this release, so that a later one cannot change its meaning unseen.
    assert_eq!(
        own.as_str(),
        "3e2e78777b7f90560217d73e22586e8af812a372c9497937f141e4bebc3ed3cb"
    );
    assert!(same.prefix_key("model", &[]).is_err());
    let read: PrefixKey = serde_json::from_str(&serde_json::to_string(&own)?)?;
    assert_eq!(read.as_str(), own.as_str());
    assert!(serde_json::from_str::<PrefixKey>("\"../../x\"").is_err());
    Ok(())
}

#[test]
fn a_prefix_is_loaded_under_its_own_key_only() -> Result<()> {
    let mut original = cache(CompressionConfig::pretrained(), None)?;
    let [q, k, v] = Shape(1, 2, 1, 10, 8).qkv(1, DType::F32)?;
    let rows = |x: &Tensor, start, count| x.narrow(2, start, count);
    let key = original.prefix_key("model", &TOKENS)?;
    let file = TempFile::new();
    let message = original.save_prefix(&file.0, &key).unwrap_err().to_string();
    assert!(message.contains("9 tokens"), "{message}");
    original.append_and_attend(
        &rows(&q, 0, 9)?,
        &rows(&k, 0, 9)?,
        &rows(&v, 0, 9)?,
        &Default::default(),
    )?;
    original.save_prefix(&file.0, &key)?;
    // A key that came as text names no number of tokens.
    let text: PrefixKey = key.as_str().to_string().try_into()?;
    for key in [&key, &text] {
        let mut loaded = CompressedKvCache::load_prefix(&file.0, key, &Device::Cpu)?;
        let token = [rows(&q, 9, 1)?, rows(&k, 9, 1)?, rows(&v, 9, 1)?];
        let got = loaded.append_and_attend(&token[0], &token[1], &token[2], &Default::default())?;
        let expected = original
            .fork()
            .append_and_attend(&token[0], &token[1], &token[2], &Default::default())?;
        assert_eq!(bits(&got)?, bits(&expected)?);
    }
    let other = original.prefix_key("another model", &TOKENS)?;
    let message = CompressedKvCache::load_prefix(&file.0, &other, &Device::Cpu)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains(other.as_str()) && message.contains(key.as_str()),
        "{message}"
    );
    // A file without a key; one with a key is a saved cache like any other.
    assert_eq!(CompressedKvCache::load(&file.0, &Device::Cpu)?.seq_len(), 9);
    original.save(&file.0)?;
    let message = CompressedKvCache::load_prefix(&file.0, &key, &Device::Cpu)
        .unwrap_err()
        .to_string();
    assert!(message.contains("got none"), "{message}");
    Ok(())
}

/// A session forks, goes back and is found by its key, as its layers do.
#[test]
fn sessions_fork_go_back_and_have_keys() -> Result<()> {
    let shape = ModelShape {
        layers: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 8,
    };
    let options = SessionOptions {
        model_cache: ModelCache::Cleared,
        cache: CacheOptions {
            rollback: 4,
            ..Default::default()
        },
        ..Default::default()
    };
    let config = CompressionConfig {
        window: 3,
        similarity_threshold: 0.4,
        ..CompressionConfig::pretrained()
    };
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let mut session = Session::uniform(shape, &strategies, &config, options)?;
    let [q, k, v] = Shape(1, 2, 1, 40, 8).qkv(1, DType::F32)?;
    let run = |session: &mut Session, start: usize, count: usize| -> Result<Vec<u64>> {
        let rows = |x: &Tensor| x.narrow(2, start, count);
        let (q, k, v) = (rows(&q)?, rows(&k)?, rows(&v)?);
        let last = session.scope(|| {
            let mut last = q.clone();
            for _ in 0..2 {
                last = attend_next_layer(&q, &k, &v, &Default::default()).expect("a session runs")?;
            }
            Ok::<_, candle_core::Error>(last)
        })?;
        bits(&last)
    };
    run(&mut session, 0, 20)?;
    let mut fork = session.fork();
    let expected = run(&mut session, 20, 3)?;
    session.truncate(20)?;
    assert_eq!(run(&mut session, 20, 3)?, expected);
    assert_eq!(run(&mut fork, 20, 3)?, expected);
    let tokens: Vec<u32> = (0..23).collect();
    let key = session.prefix_key("tiny", &tokens)?;
    let folder = std::env::temp_dir().join(format!("sfattention-{}-{}", std::process::id(), key.as_str()));
    session.save_prefix(&folder, &key)?;
    let mut loaded = Session::load_prefix(&folder, &key, &Device::Cpu)?;
    let other = session.prefix_key("tiny", &tokens[1..])?;
    let refused = Session::load_prefix(&folder, &other, &Device::Cpu)
        .map(|_| ())
        .unwrap_err()
        .to_string();
    std::fs::remove_dir_all(&folder)?;
    assert!(refused.contains("expected the key"), "{refused}");
    assert_eq!(run(&mut loaded, 23, 1)?, run(&mut session, 23, 1)?);
    Ok(())
}
