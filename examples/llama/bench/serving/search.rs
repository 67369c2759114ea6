//! The largest number of rows that a device has room for, found by trying.

use anyhow::{Error, Result};

/// The most rows that are tried.
pub const MOST_ROWS: usize = 1 << 16;

/// The most rows for which `fits` succeeds, and the error of a larger number: twice as many each time until memory
/// ends, then halfway between. No error: [`MOST_ROWS`] fit.
///
/// # Errors
/// One row fails, and not for want of memory.
pub fn most_rows(mut fits: impl FnMut(usize) -> Result<()>) -> Result<(usize, Option<Error>)> {
    let mut most = 0;
    let mut least_failed = None;
    loop {
        let rows = match &least_failed {
            None if most == MOST_ROWS => return Ok((most, None)),
            None => (2 * most).max(1),
            Some((failed, _)) if most + 1 < *failed => most + (failed - most) / 2,
            Some(_) => break,
        };
        match fits(rows) {
            Ok(()) => most = rows,
            Err(error) if rows == 1 && !is_out_of_memory(&error) => return Err(error),
            Err(error) => least_failed = Some((rows, error)),
        }
    }
    Ok((most, least_failed.map(|(_, error)| error)))
}

/// Whether a device said that its memory ended.
pub fn is_out_of_memory(error: &Error) -> bool {
    says_out_of_memory(&format!("{error:#}"))
}

/// [`is_out_of_memory`] of an error's text: drivers and libraries have no other sign in common.
pub fn says_out_of_memory(text: &str) -> bool {
    let text = text.to_lowercase().replace('_', " ");
    ["out of memory", "alloc failed"].iter().any(|sign| text.contains(sign))
}
