//! Columns: where a row's columns come from, how tokens are folded into them, and how a block of rows meets them.

pub(crate) mod block;
pub(crate) mod chain;
pub(crate) mod far;
pub(crate) mod source;
pub(crate) mod tiles;
