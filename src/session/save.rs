//! A session as a folder: a file for each layer's cache, and `session.json`, which names them.

use super::{check_rules, LayerRules, ModelCache, Session};
use crate::cache::{CompressedKvCache, PrefixKey};
use crate::calibrate::ModelShape;
use crate::files::replace;
use candle_core::{bail, Device, Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The format that `session.json` names.
const FORMAT: &str = "candle-sfattention session 1";
/// The file that names the others. It is written last, so that a save which stops early leaves the old session.
const INDEX: &str = "session.json";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    format: String,
    model: ModelShape,
    model_cache: ModelCache,
    rules: Vec<LayerRules>,
    /// Files of one save share it.
    generation: u64,
    /// The key of a saved prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    prefix: Option<PrefixKey>,
}

impl Index {
    fn read(folder: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(folder.join(INDEX))?;
        let index: Self = serde_json::from_str(&text).map_err(Error::wrap)?;
        if index.format != FORMAT {
            bail!("format: expected {FORMAT:?}, got {:?}", index.format)
        }
        index.model.check()?;
        check_rules(&index.rules, index.model.layers)?;
        Ok(index)
    }

    fn file(&self, layer: usize) -> String {
        format!("layer-{layer:03}.{}.safetensors", self.generation)
    }

    fn files(&self) -> impl Iterator<Item = String> + '_ {
        (0..self.model.layers).map(|layer| self.file(layer))
    }
}

impl Session {
    /// Writes the session to a folder, which is made if it does not exist. A session that was saved there before is
    /// replaced when all files of the new one are on the disk.
    ///
    /// # Errors
    /// A session whose last pass failed between two layers, or as [`CompressedKvCache::save`].
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.save_as(folder.as_ref(), None)
    }

    /// The key under which [`Self::save_prefix`] writes a session of these settings and tokens. `model` names all else
    /// that decides keys and values: the checkpoint and the dtype.
    ///
    /// # Errors
    /// No token.
    pub fn prefix_key(&self, model: &str, tokens: &[u32]) -> Result<PrefixKey> {
        PrefixKey::new(model, &self.layers, tokens)
    }

    /// [`Self::save`] under a key.
    ///
    /// # Errors
    /// A session that holds another number of tokens than the key names, or as [`Self::save`].
    pub fn save_prefix(&self, folder: impl AsRef<Path>, key: &PrefixKey) -> Result<()> {
        key.check_tokens(self.seq_len())?;
        self.save_as(folder.as_ref(), Some(key))
    }

    fn save_as(&self, folder: &Path, prefix: Option<&PrefixKey>) -> Result<()> {
        self.check_whole()?;
        std::fs::create_dir_all(folder).map_err(|error| not_saved(folder, &error))?;
        let old = Index::read(folder).ok();
        let index = Index {
            format: FORMAT.into(),
            model: self.shape,
            model_cache: self.model_cache,
            rules: self.rules.clone(),
            generation: old.as_ref().map_or(0, |old| old.generation.wrapping_add(1)),
            prefix: prefix.cloned(),
        };
        for (layer, cache) in self.layers.iter().enumerate() {
            cache.save(folder.join(index.file(layer)))?;
        }
        let text = serde_json::to_string_pretty(&index).map_err(Error::wrap)?;
        let written = replace(&folder.join(INDEX), |file| std::fs::write(file, text));
        written.map_err(|error| not_saved(folder, &error))?;
        // A file that stays costs room and nothing else.
        for file in old.iter().flat_map(Index::files) {
            let _ = std::fs::remove_file(folder.join(file));
        }
        Ok(())
    }

    /// Reads a session that [`Self::save`] wrote.
    ///
    /// # Errors
    /// A folder without a session, layers that are of another model or hold different numbers of tokens, or as
    /// [`CompressedKvCache::load`].
    pub fn load(folder: impl AsRef<Path>, device: &Device) -> Result<Self> {
        Self::load_as(folder.as_ref(), None, device)
    }

    /// [`Self::load`] of a folder that [`Self::save_prefix`] wrote under the same key.
    ///
    /// # Errors
    /// A session of another key or of none, or as [`Self::load`].
    pub fn load_prefix(folder: impl AsRef<Path>, key: &PrefixKey, device: &Device) -> Result<Self> {
        Self::load_as(folder.as_ref(), Some(key), device)
    }

    fn load_as(folder: &Path, prefix: Option<&PrefixKey>, device: &Device) -> Result<Self> {
        let index = Index::read(folder).map_err(|error| {
            Error::msg(format!(
                "load {}: expected a folder that Session::save wrote, got {error}; save the session again",
                folder.display()
            ))
        })?;
        if let Some(prefix) = prefix {
            let refused = |error| Error::msg(format!("load {}: {error}", folder.display()));
            prefix.check_saved(index.prefix.as_ref()).map_err(refused)?;
        }
        let mut layers = Vec::new();
        for file in index.files() {
            let cache = CompressedKvCache::load(folder.join(file), device)?;
            cache.strategies().check_heads(index.model.heads)?;
            layers.push(cache);
        }
        let seen = layers.iter().map(CompressedKvCache::seq_len);
        let (least, most) = (seen.clone().min().unwrap_or(0), seen.max().unwrap_or(0));
        if least != most {
            bail!(
                "load {}: expected layers that hold the same tokens, got {least} to {most}; save the session again",
                folder.display()
            )
        }
        Ok(Self {
            shape: index.model,
            model_cache: index.model_cache,
            rules: index.rules,
            layers,
            broken: false,
        })
    }
}

fn not_saved(folder: &Path, error: &std::io::Error) -> Error {
    Error::msg(format!(
        "save {}: expected to write the folder, got {error}; choose one that may be written to and has room",
        folder.display()
    ))
}
