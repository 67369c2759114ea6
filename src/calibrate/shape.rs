//! [`ModelShape`]: the sizes that a policy or a probe is for.

use candle_core::{bail, Result};
use serde::{Deserialize, Serialize};

/// The most heads of a layer and numbers of a head. A file of a few bytes can name any number, and later code makes as
/// many entries.
const LARGEST: usize = 1 << 16;

/// The sizes of a model's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelShape {
    /// Layers with attention.
    pub layers: usize,
    /// H: query heads.
    pub heads: usize,
    /// Hk: key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// D: size of one head's vectors.
    pub head_dim: usize,
}

impl ModelShape {
    /// Refuses sizes of 0 or beyond [`LARGEST`], and heads that are no multiple of the KV heads.
    pub(crate) fn check(&self) -> Result<()> {
        let sizes = [self.layers, self.heads, self.kv_heads, self.head_dim];
        if sizes.contains(&0) || !self.heads.is_multiple_of(self.kv_heads) {
            bail!(
                "model: expected sizes of at least 1 and KV heads that divide the heads, got {self:?}; see its config"
            )
        }
        if self.heads.max(self.head_dim) > LARGEST {
            bail!("model: expected heads and head_dim of at most {LARGEST}, got {self:?}; see its config")
        }
        Ok(())
    }
}
