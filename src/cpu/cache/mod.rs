//! One step of a KV cache: what a list keeps, decides, and shows to rows.

pub(crate) mod budget;
pub(crate) mod bytes;
pub(crate) mod columns;
pub(crate) mod decide;
pub(crate) mod decode;
pub(crate) mod entries;
pub(crate) mod list;
pub(crate) mod piece;
pub(crate) mod range;
pub(crate) mod settings;
pub(crate) mod step;
