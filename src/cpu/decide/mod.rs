//! Decisions: cosines of neighbours, the attention that a token was given, scores, and the compression loss.

pub(crate) mod cosine;
pub(crate) mod heads;
pub(crate) mod loss;
pub(crate) mod observe;
pub(crate) mod score;
