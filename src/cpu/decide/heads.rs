//! The heads that share a list of a KV cache.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The batch row and heads that a list serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ListHeads {
    pub batch: usize,
    pub kv_head: usize,
    /// Query heads.
    pub heads: Range<usize>,
}
