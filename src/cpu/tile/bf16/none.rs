//! Stand-ins for architectures without such instructions.

use crate::cpu::tile::bf16::Differentials;
use crate::cpu::tile::bf16::{PairInstructions, PairProduct, Strip};

pub(crate) fn product(_: PairInstructions, _: PairProduct) {
    unreachable!("there is no kernel")
}

pub(crate) fn softmax(_: Strip, _: &mut [f32], _: &mut [f32]) {
    unreachable!("there is no kernel")
}

pub(crate) fn differentiate(_: Differentials) {
    unreachable!("there is no kernel")
}
