//! No such instructions on this architecture.

use super::{Kernel, Product, Split};

pub(super) fn kernels() -> Vec<Kernel> {
    Vec::new()
}

pub(super) fn product(_: Kernel, _: Product) {
    unreachable!("there is no kernel")
}

pub(super) struct Strip<'a> {
    pub tile: &'a [f32],
    pub leading: usize,
    pub first: usize,
    pub count: usize,
    pub factor: f32,
    pub split: Split,
    pub weights: &'a mut [u16],
    pub plane: usize,
    pub output: &'a mut [f32],
}

pub(super) fn softmax(_: Strip, _: &mut [f32], _: &mut [f32]) {
    unreachable!("there is no kernel")
}
