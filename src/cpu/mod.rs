//! The CPU path: `decide` and `fold` prepare columns, `forward` attends to them.

pub(crate) mod block;
pub(crate) mod cached;
pub(crate) mod decide;
mod decode;
mod element;
pub(crate) mod fold;
pub(crate) mod forward;
mod gemm_tile;
pub(crate) mod list;
pub(crate) mod loss;
mod philox;
mod softmax;

pub(crate) use element::{Accumulator, Element};

use crate::problem::RowLayout;

/// A (batch, head, token) grid of contiguous rows in somebody else's buffer: any strides but the last.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    data: &'a [T],
    layout: RowLayout,
}

impl<'a, T> Rows<'a, T> {
    pub fn new(data: &'a [T], layout: RowLayout) -> Self {
        Self { data, layout }
    }

    /// The rows of one (batch, head).
    pub fn head(&self, batch: usize, head: usize) -> HeadRows<'a, T> {
        let [batch_stride, head_stride, stride] = self.layout.strides;
        let start = self.layout.offset + batch * batch_stride + head * head_stride;
        HeadRows {
            data: &self.data[start..],
            stride,
            dim: self.layout.dim,
        }
    }
}

/// The rows of one head: row t is `data[t * stride..][..dim]`.
#[derive(Clone, Copy)]
pub(crate) struct HeadRows<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
    pub dim: usize,
}

impl<'a, T> HeadRows<'a, T> {
    /// A compact buffer of rows.
    pub fn compact(data: &'a [T], dim: usize) -> Self {
        Self { data, stride: dim, dim }
    }

    #[inline(always)]
    pub fn row(&self, token: usize) -> &'a [T] {
        &self.data[token * self.stride..][..self.dim]
    }

    /// The rows from `token` on; for a tile's base.
    pub fn skip(&self, token: usize) -> Self {
        Self {
            data: self.data.get(token * self.stride..).unwrap_or(&[]),
            ..*self
        }
    }
}
