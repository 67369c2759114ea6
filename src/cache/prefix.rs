//! Saved prefixes: a file is found by a key of all that decides what a cache holds, and refused under another key.

use super::CompressedKvCache;
use candle_core::{bail, Device, Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::path::Path;

/// Raised whenever equal inputs lead to other caches.
const FORMAT: &str = "candle-sfattention prefix 1";

/// The key of a saved prefix: SHA-256 of the model's name, the settings of each layer and the tokens. Decisions are
/// causal, so that equal keys mean equal caches. Its text is 64 hexadecimal digits, fit for a file's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PrefixKey {
    text: String,
    /// None of a key that was read as text.
    tokens: Option<usize>,
}

impl PrefixKey {
    /// `settings` are those of each layer.
    pub(crate) fn new<'c>(
        model: &str,
        layers: impl IntoIterator<Item = &'c CompressedKvCache>,
        tokens: &[u32],
    ) -> Result<Self> {
        if tokens.is_empty() {
            bail!("tokens: expected at least one for the key of a prefix, got none; an empty cache needs no file")
        }
        let mut hash = Sha256::new();
        let mut part = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        part(FORMAT.as_bytes());
        part(model.as_bytes());
        for layer in layers {
            part(layer.settings_text()?.as_bytes());
        }
        part(&tokens.iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<_>>());
        let digits = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self {
            text: digits,
            tokens: Some(tokens.len()),
        })
    }

    /// The key's 64 hexadecimal digits.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Refuses a cache that holds another number of tokens than the key names.
    pub(crate) fn check_tokens(&self, seq_len: usize) -> Result<()> {
        match self.tokens {
            Some(tokens) if tokens != seq_len => bail!(
                "prefix: expected a cache of the key's {tokens} tokens, got one of {seq_len}; save it when it holds \
                 exactly the prefix, or make the key of all its tokens"
            ),
            _ => Ok(()),
        }
    }

    /// Refuses what was saved under another key, or under none.
    pub(crate) fn check_saved(&self, saved: Option<&Self>) -> Result<()> {
        match saved {
            Some(saved) if saved.text == self.text => Ok(()),
            Some(saved) => bail!(
                "prefix: expected the key {self}, got {saved}; it is of another model, other settings or other tokens"
            ),
            None => bail!("prefix: expected the key {self}, got none; save it with save_prefix"),
        }
    }
}

impl fmt::Display for PrefixKey {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<PrefixKey> for String {
    fn from(key: PrefixKey) -> Self {
        key.text
    }
}

impl TryFrom<String> for PrefixKey {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if text.len() != 64 || !text.bytes().all(digit) {
            bail!("prefix: expected a key of 64 hexadecimal digits, got {text:?}; make it with prefix_key")
        }
        Ok(Self { text, tokens: None })
    }
}

impl CompressedKvCache {
    /// The key under which [`Self::save_prefix`] writes a cache of these settings and tokens. `model` names all else
    /// that decides the keys and values: the checkpoint, the layer, the dtype. [`CacheOptions::max_entries`] and
    /// [`CacheOptions::rollback`] have no part in it.
    ///
    /// [`CacheOptions::max_entries`]: super::CacheOptions::max_entries
    /// [`CacheOptions::rollback`]: super::CacheOptions::rollback
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_sfattention::{CompressedKvCache, CompressionConfig, HeadStrategies, MergeStrategy};
    /// # let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    /// # let new = || CompressedKvCache::new(strategies.clone(), CompressionConfig::pretrained(), Default::default());
    /// let (folder, tokens) = (std::env::temp_dir(), [17u32, 4, 99]);
    /// let mut cache = new()?;
    /// let key = cache.prefix_key("smollm2-135m, layer 0, f32", &tokens)?;
    /// let x = Tensor::zeros((1, 2, 3, 64), candle_core::DType::F32, &Device::Cpu)?;
    /// cache.append_and_attend(&x, &x, &x, &Default::default())?;
    /// cache.save_prefix(folder.join(key.as_str()), &key)?;
    ///
    /// let again = CompressedKvCache::load_prefix(folder.join(key.as_str()), &key, &Device::Cpu)?;
    /// assert_eq!(again.seq_len(), 3);
    /// let other = new()?.prefix_key("smollm2-135m, layer 0, f32", &[17, 4, 98])?;
    /// assert!(CompressedKvCache::load_prefix(folder.join(key.as_str()), &other, &Device::Cpu).is_err());
    /// # std::fs::remove_file(folder.join(key.as_str()))?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// No token.
    pub fn prefix_key(&self, model: &str, tokens: &[u32]) -> Result<PrefixKey> {
        PrefixKey::new(model, [self], tokens)
    }

    /// [`Self::save`] under a key.
    ///
    /// # Errors
    /// A cache that holds another number of tokens than the key names, or as [`Self::save`].
    pub fn save_prefix(&self, path: impl AsRef<Path>, key: &PrefixKey) -> Result<()> {
        key.check_tokens(self.seq_len())?;
        self.save_as(path.as_ref(), Some(key))
    }

    /// [`Self::load`] of a file that [`Self::save_prefix`] wrote under the same key.
    ///
    /// # Errors
    /// A file of another key or of none, or as [`Self::load`].
    pub fn load_prefix(path: impl AsRef<Path>, key: &PrefixKey, device: &Device) -> Result<Self> {
        Self::load_as(path.as_ref(), Some(key), device)
    }
}
