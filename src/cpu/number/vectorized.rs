//! Loops compiled for the instruction set of this process.

use crate::cpu::number::element::Accumulator;
use crate::cpu::number::panels;
use crate::instructions::arch;
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

/// Runs `body` for an instruction set as a function of its own, which stands once in the binary for any number of
/// calls. A kernel that is inlined at each call is compiled for each call, and compiling kernels is most of this
/// crate's build.
#[inline(never)]
pub(crate) fn outlined<S: Simd, W: WithSimd>(simd: S, body: W) -> W::Output {
    simd.vectorize(body)
}

/// The dot product of two rows; always this function, so that a decision is the same everywhere.
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
