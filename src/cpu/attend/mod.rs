//! Attention of one call, forward and backward.

pub(crate) mod backward;
pub(crate) mod forward;
pub(crate) mod head_gradients;
pub(crate) mod input;
pub(crate) mod sinks;
pub(crate) mod worker;
