//! The CPU path: `decide` and `fold` prepare columns, `forward` attends to them.

pub(crate) mod aligned;
pub(crate) mod attend;
pub(crate) mod backward;
pub(crate) mod bias;
pub(crate) mod block;
pub(crate) mod cached;
pub(crate) mod columns;
pub(crate) mod decide;
pub(crate) mod decode;
pub(crate) mod dispatch;
pub(crate) mod element;
pub(crate) mod exp2;
pub(crate) mod far;
pub(crate) mod finite;
pub(crate) mod fold;
pub(crate) mod forward;
pub(crate) mod gemm_tile;
pub(crate) mod halves;
pub(crate) mod heads;
pub(crate) mod input;
pub(crate) mod lanes;
pub(crate) mod list;
pub(crate) mod list_columns;
pub(crate) mod list_decide;
pub(crate) mod list_range;
pub(crate) mod loss;
pub(crate) mod observe;
pub(crate) mod output;
pub(crate) mod pairs;
pub(crate) mod panels;
pub(crate) mod philox;
pub(crate) mod product;
pub(crate) mod registers;
pub(crate) mod rows;
pub(crate) mod softmax;
pub(crate) mod source;
pub(crate) mod sums;
pub(crate) mod tasks;
pub(crate) mod transpose;
pub(crate) mod vectorized;

pub(crate) use dispatch::{arch, check_environment};
#[cfg(feature = "cuda")]
pub(crate) use dispatch::{choose, Choice};
pub(crate) use element::{Accumulator, Element};
pub(crate) use rows::{HeadRows, Rows};
pub(crate) use vectorized::{dot, outlined, vectorized};
