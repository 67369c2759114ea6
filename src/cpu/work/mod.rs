//! Work shared among threads, and outputs that are written piece by piece.

pub(crate) mod output;
pub(crate) mod tasks;
