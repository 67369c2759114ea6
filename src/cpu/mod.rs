//! The CPU path. A room uses those above it in this list, and none below:
//!
//! - `number`: numbers, registers, rows;
//! - `work`: threads and outputs;
//! - `tile`: products and the softmax of a tile of logits;
//! - `columns`: far columns, edges, raw rows, and the blocks of rows that read them;
//! - `decide`: which tokens are hidden;
//! - `attend`: attention of one call and its gradients;
//! - `cache`: one step of a KV cache.

pub(crate) mod attend;
pub(crate) mod cache;
pub(crate) mod columns;
pub(crate) mod decide;
pub(crate) mod number;
pub(crate) mod tile;
pub(crate) mod work;
