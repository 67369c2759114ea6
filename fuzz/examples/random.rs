//! Runs a target on random inputs, without libFuzzer and its instrumentation: `random TARGET SECONDS [SEED] [LONGEST]`.

use std::time::{Duration, Instant};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize, default: u64| args.get(index).map_or(default, |x| x.parse().expect("a number"));
    let target = match args.first().map(String::as_str) {
        Some("api") => candle_sfattention_fuzz::api::run,
        Some("cache_file") => candle_sfattention_fuzz::cache_file::run,
        Some("policy") => candle_sfattention_fuzz::policy::run,
        Some("gguf") => candle_sfattention_fuzz::gguf::run,
        Some("hf_folder") => candle_sfattention_fuzz::hf_folder::run,
        other => panic!("expected api, cache_file, policy, gguf or hf_folder, got {other:?}"),
    };
    let (seconds, mut state, longest) = (number(1, 60), number(2, 1), number(3, 200) as usize);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut runs = 0u64;
    while Instant::now() < end {
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize
        };
        let length = 1 + next() % longest;
        let input: Vec<u8> = (0..length).map(|_| next() as u8).collect();
        if std::env::var_os("SFATTENTION_FUZZ_GO_ON").is_some() {
            let _ = std::panic::catch_unwind(|| target(&input));
        } else {
            target(&input);
        }
        runs += 1;
    }
    println!("{runs} inputs");
}
