//! Temporary files, and saved caches taken apart.

use anyhow::{Context, Result};
use safetensors::tensor::TensorView;
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A file of its own for each test, removed with it.
pub struct TempFile(pub PathBuf);

impl TempFile {
    pub fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let (process, next) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self(std::env::temp_dir().join(format!("sfattention-cache-{process}-{next}.safetensors")))
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A file taken apart: metadata, its JSON, and tensors.
#[derive(PartialEq)]
pub struct Contents {
    pub metadata: BTreeMap<String, String>,
    pub cache: Value,
    pub tensors: BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>,
}

impl Contents {
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path)?;
        let (_, header) = SafeTensors::read_metadata(&bytes)?;
        let metadata = header.metadata().clone().context("no metadata")?;
        let file = SafeTensors::deserialize(&bytes)?;
        let owned = |view: TensorView| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        Ok(Self {
            cache: serde_json::from_str(&metadata["cache"])?,
            metadata: metadata
                .into_iter()
                .filter(|(name, _)| name != "cache" && name != "checksum")
                .collect(),
            tensors: file
                .iter()
                .map(|(name, view)| (name.to_string(), owned(view)))
                .collect(),
        })
    }

    /// The checksum that `CompressedKvCache::save` writes for these contents with `cache` as their header.
    pub fn checksum(&self, cache: &str) -> String {
        let mut bytes = Vec::new();
        let text = |bytes: &mut Vec<u8>, text: &str| {
            bytes.extend((text.len() as u64).to_le_bytes());
            bytes.extend(text.as_bytes());
        };
        for part in ["candle-sfattention kv-cache", "1", cache] {
            text(&mut bytes, part);
        }
        for (name, (dtype, shape, data)) in &self.tensors {
            text(&mut bytes, name);
            text(&mut bytes, &dtype.to_string());
            for number in std::iter::once(&shape.len()).chain(shape) {
                bytes.extend((*number as u64).to_le_bytes());
            }
            bytes.extend(data);
        }
        format!("{:08x}", crc32fast::hash(&bytes))
    }

    /// Writes the file with a checksum that fits, so that its contents are judged.
    pub fn write(&self, path: &Path) -> Result<()> {
        let cache = self.cache.to_string();
        let mut metadata: HashMap<_, _> = self.metadata.clone().into_iter().collect();
        metadata.insert("checksum".into(), self.checksum(&cache));
        metadata.insert("cache".into(), cache);
        self.write_as(path, metadata)
    }

    /// Writes the file with these metadata instead of its own.
    pub fn write_as(&self, path: &Path, metadata: HashMap<String, String>) -> Result<()> {
        let tensors = self.tensors.iter();
        let views = tensors
            .map(|(name, (dtype, shape, data))| Ok((name, TensorView::new(*dtype, shape.clone(), data)?)))
            .collect::<Result<Vec<_>>>()?;
        Ok(safetensors::serialize_to_file(views, Some(metadata), path)?)
    }

    pub fn set(&mut self, pointer: &str, value: impl Into<Value>) {
        *self.cache.pointer_mut(pointer).expect(pointer) = value.into();
    }

    pub fn tensor(&mut self, name: &str) -> &mut (safetensors::Dtype, Vec<usize>, Vec<u8>) {
        self.tensors.get_mut(name).expect(name)
    }

    /// Swaps the axes of a tensor: the same bytes in another shape.
    pub fn turn(&mut self, name: &str) {
        self.tensor(name).1.reverse();
    }

    /// Sets one number of a u32 tensor.
    pub fn set_u32(&mut self, name: &str, index: usize, value: u32) {
        self.tensor(name).2[4 * index..4 * index + 4].copy_from_slice(&value.to_le_bytes());
    }
}
