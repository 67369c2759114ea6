//! Products of bf16 pairs by Intel's AMX: tiles of 16 rows of 64 bytes, in eight registers of their own.

use crate::cpu::tile::bf16::{PairProduct, PAD};
use std::arch::asm;

/// Palette 1: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

const CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Makes the product with AMX.
///
/// # Safety
/// [`usable`] must have returned true.
pub(crate) unsafe fn product(product: PairProduct) {
    product.check();
    let PairProduct {
        m,
        n,
        c,
        ldc,
        a,
        lda,
        b,
        ldb,
        steps,
        accumulate,
    } = product;
    if steps.is_empty() {
        return;
    }
    // SAFETY: the caller vouches for the instructions; the configuration is valid and lives through the call.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIGURATION, options(nostack, readonly)) };
    for row in (0..m).step_by(PAD) {
        for column in (0..n).step_by(PAD) {
            // SAFETY: `check` bounds rows row..row + 32 of A in every step, pairs 0..16 of columns column..column + 32
            // of B in every step, and the same rows and columns of C, which nothing else borrows. The tiles are
            // configured.
            unsafe {
                square(
                    c.as_mut_ptr().add(row * ldc + column),
                    ldc * size_of::<f32>(),
                    a.as_ptr().add(row * lda).cast(),
                    lda * size_of::<u16>(),
                    b.as_ptr().add(2 * column).cast(),
                    ldb * size_of::<u16>(),
                    steps,
                    accumulate,
                )
            }
        }
    }
    // SAFETY: as above; it releases the tiles' state, so that threads switch without it.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// 32 rows by 32 columns of a product: tiles 0 to 3 sum, 4 and 5 hold rows of A, 6 and 7 pairs of B.
///
/// # Safety
/// See [`product`]; strides are in bytes, and `steps` is not empty.
#[allow(clippy::too_many_arguments)]
unsafe fn square(
    c: *mut f32,
    ldc: usize,
    a: *const u8,
    lda: usize,
    b: *const u8,
    ldb: usize,
    steps: &[crate::cpu::tile::bf16::PairStep],
    accumulate: bool,
) {
    // SAFETY: loads and stores stay within the caller's bounds; all tiles are declared as clobbered.
    unsafe {
        asm!(
            "lea {low}, [{c} + {ldc}*8]",
            "lea {low}, [{low} + {ldc}*8]",
            "test {accumulate:l}, {accumulate:l}",
            "jz 3f",
            "tileloadd tmm0, [{c} + {ldc}*1]",
            "tileloadd tmm1, [{c} + {ldc}*1 + 64]",
            "tileloadd tmm2, [{low} + {ldc}*1]",
            "tileloadd tmm3, [{low} + {ldc}*1 + 64]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "mov {x}, [{step}]",
            "mov {y}, [{step} + 8]",
            "lea {x}, [{a} + {x}*2]",
            "lea {y}, [{b} + {y}*2]",
            "tileloadd tmm6, [{y} + {ldb}*1]",
            "tileloadd tmm4, [{x} + {lda}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{y} + {ldb}*1 + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "lea {x}, [{x} + {lda}*8]",
            "lea {x}, [{x} + {lda}*8]",
            "tileloadd tmm5, [{x} + {lda}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {step}, 16",
            "cmp {step}, {end}",
            "jne 2b",
            "tilestored [{c} + {ldc}*1], tmm0",
            "tilestored [{c} + {ldc}*1 + 64], tmm1",
            "tilestored [{low} + {ldc}*1], tmm2",
            "tilestored [{low} + {ldc}*1 + 64], tmm3",
            c = in(reg) c,
            ldc = in(reg) ldc,
            low = out(reg) _,
            accumulate = in(reg) u64::from(accumulate),
            a = in(reg) a,
            lda = in(reg) lda,
            b = in(reg) b,
            ldb = in(reg) ldb,
            x = out(reg) _,
            y = out(reg) _,
            step = inout(reg) steps.as_ptr() => _,
            end = in(reg) steps.as_ptr().add(steps.len()),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    }
}
