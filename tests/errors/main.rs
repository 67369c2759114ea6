//! The crate's refusals: an error says what was expected, what came, and what to do, in that order.

#[path = "../common/mod.rs"]
mod common;
mod json;
mod layer;
mod settings;
mod tensors;

use candle_core::{DType, Device, Tensor};
use candle_sfattention::{AttentionOptions, CompressionConfig, HeadStrategies, MergePlan, MergeStrategy};
use common::inputs::Shape;

const CPU: &Device = &Device::Cpu;
const SHAPE: Shape = Shape(2, 4, 2, 6, 8);

/// Asserts an error that matches `pattern`, "subject: expected this, got that; do so", with … for any text.
#[track_caller]
fn refused<T>(result: candle_core::Result<T>, pattern: &str) {
    in_order(pattern, [": expected ", " got ", "; "]);
    match result {
        Ok(_) => panic!("accepted, instead of: {pattern}"),
        // With RUST_BACKTRACE set, a backtrace starts on the second line.
        Err(error) => in_order(error.to_string().lines().next().unwrap_or_default(), pattern.split('…')),
    }
}

/// Asserts that `text` has the pieces, in this order.
#[track_caller]
fn in_order<'a>(text: &str, pieces: impl IntoIterator<Item = &'a str>) {
    let mut rest = text;
    for piece in pieces {
        let Some((_, after)) = rest.split_once(piece) else {
            panic!("no {piece:?} (in its place) in: {text}")
        };
        rest = after;
    }
}

fn similarity() -> HeadStrategies {
    HeadStrategies::uniform(MergeStrategy::Similarity)
}

fn config(change: impl FnOnce(&mut CompressionConfig)) -> CompressionConfig {
    let mut config = CompressionConfig::default();
    change(&mut config);
    config
}

fn options(change: impl FnOnce(&mut AttentionOptions)) -> AttentionOptions {
    let mut options = AttentionOptions::default();
    change(&mut options);
    options
}

fn zeros(dims: &[usize]) -> Tensor {
    Tensor::zeros(dims, DType::F32, CPU).unwrap()
}

fn codes(dims: &[usize]) -> HeadStrategies {
    HeadStrategies::from_tensor(&Tensor::zeros(dims, DType::U32, CPU).unwrap()).unwrap()
}

fn plan(shape: Shape, config: &CompressionConfig) -> candle_core::Result<MergePlan> {
    let bits = Tensor::zeros((shape.0, shape.1, shape.3 - 1), DType::U8, CPU)?;
    MergePlan::from_indicators(&bits, config)
}
