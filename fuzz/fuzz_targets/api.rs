#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| candle_sfattention_fuzz::api::run(data));
