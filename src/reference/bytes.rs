//! Rows in 8 bits.

use super::attend::{attention_with_far, output_dims};
use super::{Array4, Indicators};
use crate::config::{AttentionOptions, ByteCode, CompressionConfig, Storage};
use candle_core::{bail, Result};

/// The numbers that a row of 8-bit entries stands for. The scale is the row's largest absolute value over the code's
/// largest number (127 or 448), rounded up to bf16; each number over the scale is rounded to the nearest code, ties to
/// the even one. A row that is not finite is NaN, a row of zeros zeros.
///
/// # Errors
/// A storage that is not of 8 bits.
pub fn in_bytes(row: &[f64], storage: Storage) -> Result<Vec<f64>> {
    let Some(code) = storage.code() else {
        bail!("storage: expected i8 or f8e4m3, got {storage}; other dtypes need no scale")
    };
    if row.iter().any(|x| !x.is_finite()) {
        return Ok(vec![f64::NAN; row.len()]);
    }
    let most = match code {
        ByteCode::I8 => 127.0,
        ByteCode::F8E4M3 => 448.0,
    };
    let largest = row.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
    if largest == 0.0 {
        return Ok(vec![0.0; row.len()]);
    }
    let scale = round_up(largest / most);
    let nearest = |x: f64| match code {
        ByteCode::I8 => x.round_ties_even().clamp(-127.0, 127.0),
        ByteCode::F8E4M3 => nearest_f8(x),
    };
    Ok(row.iter().map(|x| scale * nearest(x / scale)).collect())
}

/// The least bf16 number, of at least the smallest normal one, that is not below a positive number.
fn round_up(x: f64) -> f64 {
    let exponent = x.log2().floor().max(-126.0);
    let unit = (exponent - 7.0).exp2();
    (x / unit).ceil() * unit
}

/// The nearest of ±(1 + m/8)·2^e for -6 <= e <= 8, ±(m/8)·2^-6, up to 448.
fn nearest_f8(x: f64) -> f64 {
    let exponent = x.abs().log2().floor().max(-6.0);
    let unit = (exponent - 3.0).exp2();
    ((x / unit).round_ties_even() * unit).clamp(-448.0, 448.0)
}

/// [`super::attention`] over a cache of 8-bit entries: the far columns of each row are [`in_bytes`], its edge and its
/// near columns are not. A token of a head that never hides is a far column as soon as the next one comes.
///
/// # Errors
/// As [`super::attention`], or a storage that is not of 8 bits.
pub fn attention_in_bytes(
    (q, k, v): (&Array4, &Array4, &Array4),
    indicators: &Indicators,
    storage: Storage,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<Array4> {
    in_bytes(&[], storage)?;
    let code = |rows: &mut Vec<Vec<f64>>| {
        for row in rows {
            // The storage is one of 8 bits.
            *row = in_bytes(row, storage).unwrap_or_default();
        }
    };
    let output = attention_with_far((q, k, v), indicators, &code, config, options)?;
    debug_assert_eq!(output.dims, output_dims(q, v));
    Ok(output)
}
