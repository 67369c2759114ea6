//! The llama example's decoder beside candle-transformers' models, and the peer that runs them.

include!("../../../examples/llama/decoder.rs");

#[allow(dead_code)]
#[path = "../../../tests/common/again.rs"]
mod again;
#[allow(dead_code)]
#[path = "../../../tests/llama/fixture.rs"]
mod fixture;
#[allow(dead_code)]
#[path = "../../../tests/llama/kinds.rs"]
mod kinds;
#[path = "../../../examples/llama/sampling.rs"]
mod sampling;

mod candle_llama;
mod every_kind;
mod llama;
