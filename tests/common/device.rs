//! The GPU that the device tests run on.

use anyhow::{bail, Result};
use candle_core::Device;
use std::sync::OnceLock;

/// The first GPU, one device for all tests of a binary; None, with a message, if there is none.
///
/// # Errors
/// No GPU, with `SFA_REQUIRE_GPU` set.
pub fn gpu() -> Result<Option<Device>> {
    static GPU: OnceLock<Option<Device>> = OnceLock::new();
    let device = GPU.get_or_init(|| match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("no GPU: {error}");
            None
        }
    });
    match device {
        Some(device) => Ok(Some(device.clone())),
        None if std::env::var_os("SFA_REQUIRE_GPU").is_some() => bail!("no GPU, and SFA_REQUIRE_GPU is set"),
        None => {
            println!("skipped: no GPU");
            Ok(None)
        }
    }
}
