//! Stand-ins for architectures without such instructions.

use super::gradients::Differentials;
use super::{Kernel, Product, Strip};

pub(super) fn product(_: Kernel, _: Product) {
    unreachable!("there is no kernel")
}

pub(super) fn softmax(_: Strip, _: &mut [f32], _: &mut [f32]) {
    unreachable!("there is no kernel")
}

pub(super) fn differentiate(_: Differentials) {
    unreachable!("there is no kernel")
}
