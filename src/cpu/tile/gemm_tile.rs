//! The matrix products of a tile: in our own registers (`product.rs`), or, for widths that these do not serve, through
//! the gemm crate.

use crate::cpu::number::element::Accumulator;
use crate::cpu::number::rows::HeadRows;
use crate::cpu::tile::product::{Left, Multiply, Onto, Product};
use crate::instructions::arch;
use gemm::{gemm, Parallelism};
use std::ops::Range;

/// A tile of scores or weights: column c holds one key's entry for every row of the block, `leading` apart.
pub(crate) struct Tile<'a, A> {
    pub data: &'a mut [A],
    pub leading: usize,
    pub columns: usize,
    /// The rows that are computed; entries of the others are undefined.
    pub rows: Range<usize>,
}

/// `tile[r, c] = query[r] . key[c] (+ added[c])` for keys of `dim` numbers; `queries` is (D, leading), transposed so
/// that rows are the vector axis.
pub(crate) fn scores<A: Accumulator>(
    tile: &mut Tile<A>,
    queries: &[A],
    (keys, dim): (Left<A>, usize),
    added: Option<&[A]>,
) {
    let first = tile.rows.start;
    multiply(Product {
        m: tile.columns,
        n: tile.rows.len(),
        k: dim,
        a: keys,
        b: &queries[first..],
        ldb: tile.leading,
        c: &mut tile.data[first..],
        ldc: tile.leading,
        onto: added.map_or(Onto::Zero, Onto::Rows),
    })
}

/// `output[r] += sum_c tile[r, c] * value[c]`; `output` is (leading, width), and values are padded to `width`.
pub(crate) fn accumulate<A: Accumulator>(output: &mut [A], width: usize, tile: &Tile<A>, values: &HeadRows<A>) {
    let first = tile.rows.start;
    multiply(Product {
        m: tile.rows.len(),
        n: width,
        k: tile.columns,
        a: Left::Grid {
            data: &tile.data[first..],
            row: 1,
            step: tile.leading,
        },
        b: values.data,
        ldb: values.stride,
        c: &mut output[first * width..],
        ldc: width,
        onto: Onto::C,
    })
}

/// `target[c] += sum_r tile[r, c] * row[r]`; `target` is (columns, width), `rows` (leading, width).
pub(crate) fn accumulate_columns<A: Accumulator>(target: &mut [A], width: usize, tile: &Tile<A>, rows: &[A]) {
    let first = tile.rows.start;
    multiply(Product {
        m: tile.columns,
        n: width,
        k: tile.rows.len(),
        a: Left::Grid {
            data: &tile.data[first..],
            row: tile.leading,
            step: 1,
        },
        b: &rows[first * width..],
        ldb: width,
        c: target,
        ldc: width,
        onto: Onto::C,
    })
}

fn multiply<A: Accumulator>(mut product: Product<A>) {
    if arch().dispatch(Multiply(&mut product)) {
        return;
    }
    product.check();
    let Product {
        m,
        n,
        k,
        a,
        b,
        ldb,
        c,
        ldc,
        onto,
    } = product;
    if let Onto::Rows(numbers) = onto {
        for (row, number) in c.chunks_mut(ldc).zip(&numbers[..m]) {
            row[..n].fill(*number);
        }
    }
    // Rows are copied together for one product. Its sums do not depend on where the rows were.
    let together: Vec<A>;
    let (a, a_row, a_step) = match a {
        Left::Grid { data, row, step } => (data, row, step),
        Left::Rows(rows) => {
            together = rows.iter().take(m).flat_map(|row| &row[..k]).copied().collect();
            (&together[..], k, 1)
        }
    };
    // SAFETY: the check bounds every index of the three operands, and nothing else borrows C.
    unsafe {
        gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            ldc as isize,
            !matches!(onto, Onto::Zero),
            a.as_ptr(),
            a_step as isize,
            a_row as isize,
            b.as_ptr(),
            1,
            ldb as isize,
            A::ONE,
            A::ONE,
            false,
            false,
            false,
            Parallelism::None,
        )
    }
}
