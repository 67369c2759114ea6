//! The windows of a text that are scored, and those that calibration reads.

use anyhow::{ensure, Result};

/// The use of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Score,
    Calibrate,
}

/// Every `context` tokens of a text are a slot: even slots are scored, odd ones calibrated on, so that no slot is ever
/// both. Returns `count` slots for `purpose`, spread over the text.
pub fn spread(tokens: &[u32], context: usize, count: usize, purpose: Purpose) -> Result<Vec<&[u32]>> {
    let pairs = tokens.len() / context / 2;
    ensure!(
        (1..=pairs).contains(&count),
        "windows: expected 1 to {pairs}, half of those that the text has, got {count}; give a longer text or fewer \
         windows"
    );
    let odd = usize::from(purpose == Purpose::Calibrate);
    let slot = |i: usize| 2 * ((2 * i + odd) * pairs / (2 * count)) + odd;
    Ok((0..count).map(|i| &tokens[slot(i) * context..][..context]).collect())
}
