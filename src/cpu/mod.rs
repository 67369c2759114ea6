//! The CPU path: `decide` and `fold` prepare columns, `forward` attends to them.

mod aligned;
mod attend;
pub(crate) mod backward;
pub(crate) mod bias;
mod block;
pub(crate) mod cached;
pub(crate) mod columns;
pub(crate) mod decide;
mod decode;
mod dispatch;
mod element;
mod exp2;
mod far;
pub(crate) mod fold;
pub(crate) mod forward;
mod gemm_tile;
mod halves;
mod lanes;
pub(crate) mod list;
mod list_columns;
mod list_decide;
pub(crate) mod list_range;
pub(crate) mod loss;
pub(crate) mod observe;
mod output;
mod pairs;
mod panels;
mod philox;
mod product;
mod registers;
mod softmax;
mod sums;
mod tasks;
mod transpose;

pub(crate) use dispatch::{arch, check_environment};
#[cfg(feature = "cuda")]
pub(crate) use dispatch::{choose, Choice};
pub(crate) use element::{Accumulator, Element};

use crate::problem::RowLayout;
use pulp::{Simd, WithSimd};

/// Runs `body` compiled for the best instruction set of this machine. The closure must be `#[inline(always)]`; it is
/// called through `FnMut`, since the shim around a borrowed closure's `FnOnce` would not be inlined.
pub(crate) fn vectorized<R>(body: impl FnMut() -> R) -> R {
    struct Body<F>(F);
    impl<R, F: FnMut() -> R> WithSimd for Body<F> {
        type Output = R;
        #[inline(always)]
        fn with_simd<S: Simd>(mut self, _: S) -> R {
            (self.0)()
        }
    }
    arch().dispatch(Body(body))
}

/// Runs `body` for an instruction set as a function of its own, which stands once in the binary however often it is called.
/// A kernel that is inlined at each call is compiled for each, and compiling kernels is most of this crate's build.
#[inline(never)]
pub(crate) fn outlined<S: Simd, W: WithSimd>(simd: S, body: W) -> W::Output {
    simd.vectorize(body)
}

/// The dot product of two rows; always this one, so that a decision falls the same way wherever it is taken.
pub(crate) fn dot<A: Accumulator>(a: &[A], b: &[A]) -> A {
    struct Dot<'a, A>(&'a [A], &'a [A]);
    impl<A: Accumulator> WithSimd for Dot<'_, A> {
        type Output = A;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> A {
            panels::dot(simd, self.0, self.1)
        }
    }
    arch().dispatch(Dot(a, b))
}

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

/// How far ahead a stream over rows prefetches. Of 0.5, 1, 2 and 4 KiB, 2 KiB was fastest.
const PREFETCH_BYTES: usize = 2048;

/// The rows of one head: row t is `data[t * stride..][..dim]`.
#[derive(Clone, Copy)]
pub(crate) struct HeadRows<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
    pub dim: usize,
}

impl<T> Default for HeadRows<'_, T> {
    fn default() -> Self {
        Self {
            data: &[],
            stride: 0,
            dim: 0,
        }
    }
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

    /// Asks for row `token`'s cache lines as a stream reaches them: what lies [`PREFETCH_BYTES`] further on is fetched.
    /// Reading 256 MiB in two threads, the hardware alone gave 16.8 GB/s, and 23.5 GB/s with this.
    #[inline(always)]
    pub fn prefetch(&self, token: usize) {
        self.ask_for(token, PREFETCH_BYTES)
    }

    /// Asks for row `token`'s cache lines; it need not be there.
    #[inline(always)]
    pub fn prefetch_row(&self, token: usize) {
        self.ask_for(token, 0)
    }

    #[inline(always)]
    fn ask_for(&self, token: usize, ahead: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
            let start = self.data.as_ptr().wrapping_add(token * self.stride).cast::<i8>();
            for line in (0..self.dim * size_of::<T>()).step_by(64) {
                // SAFETY: a prefetch touches no memory, whatever its address, and SSE is part of x86-64.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(line + ahead)) }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (token, ahead);
    }

    /// Whether each row is whole registers of any instruction set, and no row overlaps the next one. Tokens may lie nearer to
    /// each other than D numbers, or one token may stand for all.
    pub fn are_padded(&self) -> bool {
        self.dim == aligned::padded(self.dim) && self.stride >= self.dim
    }

    /// The same rows where nothing needs widening.
    pub fn as_acc(&self) -> Option<HeadRows<'a, T::Acc>>
    where
        T: Element,
    {
        let &Self { data, stride, dim } = self;
        T::as_acc(data).map(|data| HeadRows { data, stride, dim })
    }

    /// The rows from `token` on; for a tile's base.
    pub fn skip(&self, token: usize) -> Self {
        Self {
            data: self.data.get(token * self.stride..).unwrap_or(&[]),
            ..*self
        }
    }
}
