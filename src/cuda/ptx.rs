//! The kernels of `cuda/` as build.rs packed them: each kernel's PTX is a module of its own, compressed until a device
//! first asks for it. A first call opens the kernels that it runs and no others.

use super::on_gpu::Kernel;
use candle_core::{bail, Result};
use std::sync::OnceLock;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// One kernel.
pub(super) struct PackedKernel {
    name: &'static str,
    /// Dynamic shared memory of a block, by `SHARED_BYTES` in cuda/lib/kernel.cuh.
    pub shared_bytes: usize,
    text_bytes: usize,
    compressed: &'static [u8],
    /// The PTX once it was opened: candle takes it at every launch, and reads it at a device's first.
    text: OnceLock<String>,
}

impl PackedKernel {
    const fn new(name: &'static str, shared_bytes: usize, text_bytes: usize, compressed: &'static [u8]) -> Self {
        Self {
            name,
            shared_bytes,
            text_bytes,
            compressed,
            text: OnceLock::new(),
        }
    }

    /// # Errors
    /// A kernel that does not exist.
    pub fn find(kernel: &Kernel) -> Result<&'static Self> {
        match KERNELS.binary_search_by_key(&kernel.name.as_str(), |packed| packed.name) {
            Ok(found) => Ok(&KERNELS[found]),
            Err(_) => bail!(
                "kernel {}: expected one of cuda/*/*.cu; this is a defect of the crate, please report it",
                kernel.name
            ),
        }
    }

    /// The kernel's PTX.
    ///
    /// # Errors
    /// Bytes that are not those of the build.
    pub fn text(&self) -> Result<&str> {
        if let Some(text) = self.text.get() {
            return Ok(text);
        }
        let opened = self.open()?;
        Ok(self.text.get_or_init(|| opened))
    }

    fn open(&self) -> Result<String> {
        let text = zstd::bulk::decompress(self.compressed, self.text_bytes).map_err(candle_core::Error::wrap)?;
        String::from_utf8(text).map_err(candle_core::Error::wrap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    /// Needs no device. Prints what the kernels take in a binary and how long the largest take to open.
    #[test]
    fn every_kernel_opens_to_its_own_module() -> Result<()> {
        let (mut opened, mut packed, mut text) = (Vec::new(), 0, 0);
        for kernel in &KERNELS {
            let start = Instant::now();
            let module = kernel.open()?;
            opened.push((module.len(), start.elapsed(), kernel.name));
            let entries = module.matches(".entry ").count();
            assert_eq!(entries, 1, "{}", kernel.name);
            assert!(
                module.contains(&format!(".visible .entry {}(", kernel.name)),
                "{}",
                kernel.name
            );
            assert!(
                module.starts_with("//") && module.contains("\n.version "),
                "{}",
                kernel.name
            );
            assert!(!module.contains("shared_bytes_of_"), "{}", kernel.name);
            // A kernel that reaches dynamic shared memory declares it; that of cache_attend depends on the call.
            let shares = module.contains("[shared_bytes") || module.contains(", shared_bytes");
            let by_call = kernel.name.starts_with("cache_attend_");
            assert_eq!(kernel.shared_bytes > 0, shares && !by_call, "{}", kernel.name);
            packed += kernel.compressed.len();
            text += module.len();
        }
        assert!(KERNELS.is_sorted_by_key(|kernel| kernel.name));
        opened.sort();
        println!("{} kernels: {text} bytes of PTX in {packed}", KERNELS.len());
        for (bytes, time, name) in opened.iter().rev().take(5) {
            println!("{name}: {bytes} bytes in {} us", time.as_micros());
        }
        Ok(())
    }
}
