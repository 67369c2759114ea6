//! Matrix products of a tile in registers, for every instruction set: `C (M, N) = A (M, K) · B (K, N)`, or the product
//! added to C or to one number for each row.
//!
//! B and C lie by rows, which are the vector axis. Single numbers of A are spread over a register, so A may have any
//! strides and nothing is ever packed. All operands should lie in the first two levels of the cache; the sizes of tiles
//! ensure that.

use crate::cpu::number::element::Accumulator;
use crate::cpu::number::rows::HeadRows;
use pulp::Simd;

/// The left operand.
#[derive(Clone, Copy)]
pub(crate) enum Left<'a, A> {
    /// Number (m, k) is `data[m * row + k * step]`.
    Grid { data: &'a [A], row: usize, step: usize },
    /// Rows at any addresses.
    Rows(&'a [&'a [A]]),
}

impl<'a, A> From<&HeadRows<'a, A>> for Left<'a, A> {
    fn from(rows: &HeadRows<'a, A>) -> Self {
        Self::Grid {
            data: rows.data,
            row: rows.stride,
            step: 1,
        }
    }
}

/// The numbers that a product is added to.
#[derive(Clone, Copy)]
pub(crate) enum Onto<'a, A> {
    Zero,
    /// One number for each row of C.
    Rows(&'a [A]),
    /// The numbers that C holds.
    C,
}

/// One product. Rows of B and C are `ldb` and `ldc` apart.
pub(crate) struct Product<'a, A> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Left<'a, A>,
    pub b: &'a [A],
    pub ldb: usize,
    pub c: &'a mut [A],
    pub ldc: usize,
    pub onto: Onto<'a, A>,
}

impl<A> Product<'_, A> {
    /// Panics where an index would leave its slice; the kernels rely on this check.
    pub fn check(&self) {
        assert!(self.m > 0 && self.n > 0 && self.k > 0);
        match self.a {
            Left::Grid { data, row, step } => assert!((self.m - 1) * row + (self.k - 1) * step < data.len()),
            Left::Rows(rows) => assert!(self.m <= rows.len() && rows.iter().all(|row| self.k <= row.len())),
        }
        if let Onto::Rows(numbers) = self.onto {
            assert!(self.m <= numbers.len());
        }
        assert!(self.n <= self.ldb && (self.k - 1) * self.ldb + self.n <= self.b.len());
        assert!(self.n <= self.ldc && (self.m - 1) * self.ldc + self.n <= self.c.len());
    }
}

/// Rows of A that are multiplied at once. Four registers of B make 24 sums; with the registers of B and one of A they
/// leave three of 32 registers. Two registers of B make 12 sums of 16 registers. Either way more multiply-adds are in
/// flight than the latency of one needs.
pub(crate) const ROWS: usize = 6;

/// Computes M rows by V registers of C.
///
/// # Safety
/// [`Product::check`] has passed, `row + M <= m`, and `column + V * lanes <= n`.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
unsafe fn block<A: Accumulator, S: Simd, const M: usize, const V: usize>(
    simd: S,
    product: &mut Product<A>,
    row: usize,
    column: usize,
) {
    let Product {
        k, a, ldb, ldc, onto, ..
    } = *product;
    // SAFETY: the caller's promise bounds every address: A's (row + M - 1, k - 1), B's (k - 1, column + V registers),
    // C's (row + M - 1, column + V registers), and the number of row row + M - 1. Registers are read and written
    // unaligned, and any bits are a float.
    unsafe {
        let (a, a_step): ([*const A; M], usize) = match a {
            Left::Grid { data, row: a_row, step } => {
                (std::array::from_fn(|m| data.as_ptr().add((row + m) * a_row)), step)
            }
            Left::Rows(rows) => (std::array::from_fn(|m| rows.get_unchecked(row + m).as_ptr()), 1),
        };
        let mut b = product.b.as_ptr().add(column);
        let c = product.c.as_mut_ptr().add(row * ldc + column);
        let mut sums = [[A::zeros(simd); V]; M];
        if let Onto::Rows(numbers) = onto {
            for m in 0..M {
                sums[m] = [A::splat(simd, *numbers.get_unchecked(row + m)); V];
            }
        }
        for k in 0..k {
            let mut columns = [A::zeros(simd); V];
            for v in 0..V {
                columns[v] = b.cast::<A::Floats<S>>().add(v).read_unaligned();
            }
            for m in 0..M {
                let x = A::splat(simd, *a[m].add(k * a_step));
                for v in 0..V {
                    sums[m][v] = A::mul_add(simd, x, columns[v], sums[m][v]);
                }
            }
            b = b.wrapping_add(ldb);
        }
        let one = A::splat(simd, A::ONE);
        for m in 0..M {
            let target = c.add(m * ldc).cast::<A::Floats<S>>();
            for v in 0..V {
                let target = target.add(v);
                let sum = match onto {
                    Onto::C => A::mul_add(simd, one, target.read_unaligned(), sums[m][v]),
                    _ => sums[m][v],
                };
                target.write_unaligned(sum);
            }
        }
    }
}

/// Computes all rows by V registers of C.
///
/// # Safety
/// As for one block.
#[inline(always)]
unsafe fn strip<A: Accumulator, S: Simd, const V: usize>(simd: S, product: &mut Product<A>, column: usize) {
    let mut row = 0;
    // SAFETY: no block goes past row m; the caller promises the rest.
    unsafe {
        while row + ROWS <= product.m {
            block::<A, S, ROWS, V>(simd, product, row, column);
            row += ROWS;
        }
        if row + 4 <= product.m {
            block::<A, S, 4, V>(simd, product, row, column);
            row += 4;
        }
        if row + 2 <= product.m {
            block::<A, S, 2, V>(simd, product, row, column);
            row += 2;
        }
        if row < product.m {
            block::<A, S, 1, V>(simd, product, row, column);
        }
    }
}

/// Makes the product, unless its rows are no whole number of this instruction set's registers.
#[inline(always)]
fn run<A: Accumulator, S: Simd>(simd: S, product: &mut Product<A>) -> bool {
    let lanes = A::lanes::<S>();
    if lanes < 4 || !product.n.is_multiple_of(lanes) {
        return false;
    }
    product.check();
    let mut column = 0;
    // SAFETY: the product was checked, and no strip goes past column n.
    unsafe {
        while S::REGISTER_COUNT >= 32 && column + 4 * lanes <= product.n {
            strip::<A, S, 4>(simd, product, column);
            column += 4 * lanes;
        }
        while column + 2 * lanes <= product.n {
            strip::<A, S, 2>(simd, product, column);
            column += 2 * lanes;
        }
        while column < product.n {
            strip::<A, S, 1>(simd, product, column);
            column += lanes;
        }
    }
    true
}

/// [`run`] as code for one instruction set.
pub(crate) struct Multiply<'p, 'a, A>(pub &'p mut Product<'a, A>);

impl<A: Accumulator> pulp::WithSimd for Multiply<'_, '_, A> {
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> bool {
        run(simd, self.0)
    }
}
