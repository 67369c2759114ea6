//! The llama example without arguments: the model it ships, with no network and no files but its own.

use std::fs;

use crate::binary::{llama, text};

#[test]
fn no_arguments_run_the_shipped_model() {
    let output = llama(&[]);
    let (prose, stats) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{stats}");
    assert!(prose.starts_with("The whale rose") && prose.len() > 400, "{prose}");
    let after = |label: &str| {
        let line = stats.lines().find(|line| line.starts_with(label)).unwrap_or_default();
        let first = line.trim_start_matches(label).split_whitespace().next();
        first
            .and_then(|x| x.parse::<f64>().ok())
            .unwrap_or_else(|| panic!("{label}: not a number in {stats}"))
    };
    assert!(after("hidden ratio") > 0.3, "{stats}");
    assert!(after("KV cache") > 0.0, "{stats}");
    assert!(
        stats.contains("of 211 tokens") && stats.contains("MiB dense"),
        "{stats}"
    );
    // The stats tell how to run a bigger model.
    assert!(stats.contains("fetch.sh") && stats.contains("--model"), "{stats}");
    // Sampling is seeded: the same text again.
    assert_eq!(text(&llama(&[]).stdout), prose);
}

#[test]
fn the_shipped_model_is_small() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/llama/assets");
    let sizes = fs::read_dir(folder)
        .unwrap()
        .map(|file| file.unwrap().metadata().unwrap().len());
    assert!(sizes.sum::<u64>() <= 5_000_000);
}
