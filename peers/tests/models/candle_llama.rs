//! The program `candle_llama`: its row and its refusals. And the llama example's sampling against candle-transformers'.

use std::process::{Command, Output};

use crate::fixture::{Fixture, CONTEXT};
use crate::sampling::Sampler;
use candle_core::{Device, Tensor};
use candle_transformers::generation::LogitsProcessor;

fn candle_llama(model: &str, prompt: usize) -> Output {
    let fixture = Fixture::get();
    let (model, prose, prompt) = (fixture.path(model), fixture.path("text.txt"), prompt.to_string());
    let mut command = Command::new(env!("CARGO_BIN_EXE_candle_llama"));
    command.args([
        "--model", &model, "--text", &prose, "--prompt", &prompt, "--decode", "8",
    ]);
    command.output().unwrap()
}

#[test]
fn it_prints_the_row_of_bench() {
    let output = candle_llama("q8.gguf", 32);
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        stdout.starts_with("prompt  attention   prefill tok/s  decode tok/s  "),
        "{stdout}"
    );
    let rows = stdout.lines().filter(|line| line.starts_with("    32  candle "));
    assert_eq!(rows.count(), 1, "{stdout}");
}

#[test]
fn it_refuses_in_one_line() {
    for (model, prompt, parts) in [
        ("hf", 32, ["model: ", "a GGUF file"]),
        ("q8.gguf", 0, ["prompt and decode: expected at least 1", "got 0"]),
        (
            "q8.gguf",
            CONTEXT,
            ["expected at most 128 tokens together", "got 136; lower --prompt"],
        ),
    ] {
        let output = candle_llama(model, prompt);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{model}, {prompt}: {stderr}");
        for part in parts {
            assert!(stderr.contains(part), "{model}, {prompt}: {part:?} is not in {stderr}");
        }
    }
}

/// The same seed draws the same tokens from the same logits, whatever the temperature and the share.
#[test]
fn the_examples_sampling_is_candles() {
    let cases = [
        (0.0, None),
        (0.7, None),
        (0.7, Some(0.9)),
        (2.0, Some(0.3)),
        (1.0, Some(1.0)),
        (1e-8, Some(0.5)),
    ];
    for (seed, (temperature, top_p)) in (0..20).flat_map(|seed| cases.map(|case| (seed, case))) {
        let mut ours = Sampler::new(temperature, top_p, seed).unwrap();
        let mut theirs = LogitsProcessor::new(seed, Some(temperature), top_p);
        for _ in 0..20 {
            let logits = Tensor::randn(0f32, 3.0, 200, &Device::Cpu).unwrap();
            let expected = theirs.sample(&logits).unwrap();
            assert_eq!(
                ours.sample(&logits).unwrap(),
                expected,
                "{temperature}, {top_p:?}, seed {seed}"
            );
        }
    }
}
