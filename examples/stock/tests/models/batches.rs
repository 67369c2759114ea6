//! Batches: rows of other tokens, all of one length.

use crate::runs::{entries, largest_difference, run, run_in, session, tokens, Logits, BOTH_CACHES, TOKENS};
use crate::zoo::{OwnCache, Zoo, LAYERS, NAMES};
use anyhow::{Context, Result};
use candle_sfattention::session::ModelCache;
use candle_sfattention::MergeStrategy;

const BATCHES: [&[usize]; 2] = [&[0, 1], &[0, 1, 2]];

/// The logits of one row of a batch of `rows`.
fn row(logits: &Logits, row: usize, rows: usize) -> Logits {
    let part = |all: &Vec<f32>| {
        let len = all.len() / rows;
        all[row * len..(row + 1) * len].to_vec()
    };
    logits.iter().map(part).collect()
}

#[test]
fn a_batch_that_hides_nothing_is_the_plain_path() -> Result<()> {
    for (name, rows) in NAMES.into_iter().flat_map(|name| BATCHES.map(|rows| (name, rows))) {
        let zoo = Zoo::new(name);
        let plain = run(zoo.model(false, OwnCache::Kept)?.as_mut(), OwnCache::Kept, rows).context(name)?;
        let dense = run(zoo.model(true, OwnCache::Kept)?.as_mut(), OwnCache::Kept, rows).context(name)?;
        let difference = largest_difference(&plain, &dense)?;
        assert!(difference <= 2e-5, "{name}, {rows:?}, no session: {difference:e}");
        for (own, model_cache) in BOTH_CACHES {
            let mut session = session(&zoo, MergeStrategy::Off, model_cache)?;
            let off = run_in(&mut session, zoo.model(true, own)?.as_mut(), own, rows).context(name)?;
            let difference = largest_difference(&plain, &off).context(name)?;
            println!("{name}, {rows:?}, {own:?}: {difference:e}");
            assert!(difference <= 2e-5, "{name}, {rows:?}, {own:?}: {difference:e}");
        }
    }
    Ok(())
}

#[test]
fn each_row_of_a_compressed_batch_is_that_row_alone() -> Result<()> {
    for (name, rows) in NAMES.into_iter().flat_map(|name| BATCHES.map(|rows| (name, rows))) {
        let zoo = Zoo::new(name);
        for (own, model_cache) in BOTH_CACHES {
            let mut together = session(&zoo, MergeStrategy::Similarity, model_cache)?;
            let all = run_in(&mut together, zoo.model(true, own)?.as_mut(), own, rows).context(name)?;
            let mut bytes = 0;
            for (index, seed) in rows.iter().enumerate() {
                let mut alone = session(&zoo, MergeStrategy::Similarity, model_cache)?;
                let expected = run_in(&mut alone, zoo.model(true, own)?.as_mut(), own, &[*seed]).context(name)?;
                let difference = largest_difference(&expected, &row(&all, index, rows.len()))?;
                println!("{name}, row {index} of {rows:?}, {own:?}: {difference:e}");
                assert!(difference <= 2e-5, "{name}, row {index} of {rows:?}: {difference:e}");
                for (together, alone) in together.layers().iter().zip(alone.layers()) {
                    assert_eq!(
                        together.lens()[index],
                        alone.lens()[0],
                        "{name}, row {index} of {rows:?}"
                    );
                }
                assert!(
                    entries(&alone) < TOKENS * zoo.kv_heads() * LAYERS,
                    "{name}: nothing was hidden"
                );
                bytes += alone.bytes();
                // The rows' numbers are told apart.
                let others = row(&all, (index + 1) % rows.len(), rows.len());
                assert!(largest_difference(&expected, &others)? > 1e-2, "{name}: rows alike");
            }
            assert_eq!(together.bytes(), bytes, "{name}, {rows:?}");
        }
    }
    Ok(())
}

#[test]
fn a_batch_that_changes_is_refused_and_changes_nothing() -> Result<()> {
    let zoo = Zoo::new("mistral");
    let mut session = session(&zoo, MergeStrategy::Similarity, ModelCache::Cleared)?;
    let mut model = zoo.model(true, OwnCache::Cleared)?;
    let prompt = tokens(&[0, 1], 0..30)?;
    session.scope(|| model.step(&prompt, 0))?;
    let bytes = session.bytes();
    for rows in [&[0][..], &[0, 1, 2]] {
        model.clear();
        let next = tokens(rows, 30..31)?;
        let message = session.scope(|| model.step(&next, 30)).err().context("accepted")?;
        let message = message.to_string();
        let got = format!("got {}", rows.len());
        for part in ["session: expected a batch of 2 rows", &got, "reset()"] {
            assert!(message.contains(part), "{part:?} is not in {message}");
        }
        assert_eq!((session.bytes(), session.seq_len()), (bytes, 30));
    }
    model.clear();
    let next = tokens(&[0, 1], 30..31)?;
    session.scope(|| model.step(&next, 30))?;
    // Another batch begins after a reset.
    session.reset();
    model.clear();
    let other = tokens(&[0, 1, 2], 0..30)?;
    session.scope(|| model.step(&other, 0))?;
    assert_eq!(session.seq_len(), 30);
    Ok(())
}
