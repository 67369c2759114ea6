//! Operands that several kernels take: folded columns, a bias, and the size that a head is padded to.

use super::on_gpu::{Gpu, GpuElement};

/// The folded columns of one call; see `cuda/lib/params.cuh` for the shapes.
pub(crate) struct ColumnBuffers<G: Gpu, T: GpuElement> {
    /// Far columns that a list has room for.
    pub capacity: usize,
    /// None where only the lists of tokens exist: kernels then read raw keys and values.
    pub far_k: Option<G::Slice<T>>,
    pub far_v: Option<G::Slice<T>>,
    pub far_ln: Option<G::Slice<f32>>,
    pub far_index: G::Slice<u32>,
    pub far_before: G::Slice<u32>,
    /// None where folding changes no token.
    pub folded_k: Option<G::Slice<T>>,
    pub folded_v: Option<G::Slice<T>>,
    pub folded_ln: Option<G::Slice<f32>>,
}

/// The part of a call's rows and tokens that one launch computes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Part {
    /// Rows before it have queries of zeros and are left out; the bias starts with it.
    pub first_row: usize,
    /// Dropout counts heads over all batch rows, rows and tokens from these on.
    pub drawn_from: [u32; 3],
}

/// An additive bias in f32 as a strided (B, H, N, N) view.
pub(crate) struct BiasBuffer<'a, G: Gpu> {
    pub data: &'a G::Slice<f32>,
    pub offset: usize,
    pub strides: [usize; 4],
}

impl<G: Gpu> Clone for BiasBuffer<'_, G> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<G: Gpu> Copy for BiasBuffer<'_, G> {}

/// The kernels' template for a head size: its padded size.
pub(crate) fn padded(head_dim: usize) -> usize {
    match head_dim {
        0..=64 => 64,
        65..=128 => 128,
        _ => 256,
    }
}
