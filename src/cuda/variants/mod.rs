//! Variants of the tensor-core kernels: the same code compiled for a padded head size, rows of a block and columns of a
//! tile. Each type here says which variant a call takes, and its launch shape.

pub(super) mod backward;
pub(super) mod forward;
