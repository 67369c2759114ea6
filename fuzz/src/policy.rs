//! Bytes as a policy. If it can be read, it must be written, read back the same, and give every layer its strategies.

use crate::edits::edit;
use arbitrary::Unstructured;
use candle_sfattention::{CompressionConfig, Policy};
use serde_json::json;

pub fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut file = match input.int_in_range(0..=2u8) {
        Ok(0) => return read(input.take_rest()),
        Ok(1) => valid(CompressionConfig::calibrated(), 2),
        _ => valid(CompressionConfig::default(), 4),
    };
    let _ = edit(&mut file, &mut input);
    read(&file)
}

fn read(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(policy) = Policy::from_json(text) else { return };
    // A policy that came from JSON has only numbers that JSON can hold.
    let json = policy.to_json().expect("a policy that was read can be written");
    let again = Policy::from_json(&json).expect("a policy that was written can be read");
    assert_eq!(again, policy);
    let model = policy.parts().model;
    let layers = policy.head_strategies(&model).expect("a policy fits its own model");
    assert_eq!(layers.len(), model.layers);
    for strategies in layers {
        strategies.check(1, model.heads).expect("one strategy per head");
    }
}

/// Two layers of four heads and two KV heads.
fn valid(config: CompressionConfig, entries: usize) -> Vec<u8> {
    let layer = json!({
        "strategies": vec!["similarity"; entries],
        "thresholds": vec![0.125; entries],
        "hidden_ratios": vec![0.5; entries],
        "errors": vec![0.25; entries]
    });
    let figures = json!({
        "target": 0.5, "hidden_ratio": 0.5, "hidden_ratio_of_all": 0.25, "error": 1.5, "windows": 2, "tokens": 128
    });
    let parts = json!({
        "fingerprint": "0", "model": {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}, "config": config,
        "layers": [layer, layer], "calibration": figures
    });
    json!({"format": "candle-sfattention policy 1", "policy": parts})
        .to_string()
        .into()
}

#[test]
fn the_files_that_are_edited_are_valid() {
    for file in [
        valid(CompressionConfig::calibrated(), 2),
        valid(CompressionConfig::default(), 4),
    ] {
        Policy::from_json(std::str::from_utf8(&file).unwrap()).unwrap();
    }
}
