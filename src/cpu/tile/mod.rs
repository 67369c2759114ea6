//! Tiles of logits: products, the online softmax, and the same in bf16 pairs.

pub(crate) mod bf16;
pub(crate) mod gemm_tile;
pub(crate) mod product;
pub(crate) mod softcap;
pub(crate) mod softmax;
pub(crate) mod transpose;
