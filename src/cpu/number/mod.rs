//! Numbers: what may be stored, what sums are kept in, registers of any instruction set, rows of them.

pub(crate) mod aligned;
pub(crate) mod bias;
pub(crate) mod element;
pub(crate) mod exp2;
pub(crate) mod finite;
pub(crate) mod halves;
pub(crate) mod lanes;
pub(crate) mod panels;
pub(crate) mod philox;
pub(crate) mod registers;
pub(crate) mod rows;
pub(crate) mod vectorized;
