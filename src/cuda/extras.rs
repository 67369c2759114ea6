//! Options that the lean kernels leave out: a bias, dropout, a softcap and sink logits.

use super::on_gpu::Gpu;
use super::operands::BiasBuffer;
use crate::config::AttentionOptions;

/// Whether an option excludes the lean kernels.
pub(crate) fn has_extras(options: &AttentionOptions) -> bool {
    options.bias.is_some() || options.dropout.is_some() || options.softcap.is_some() || options.sink_logits.is_some()
}

/// c * log2(e) of a softcap; 0 without one. A softcap stays within the range of f32, and so do its logits.
pub(crate) fn softcap_in_base_2(options: &AttentionOptions) -> f32 {
    let c = options.softcap.map(|c| c.clamp(1e-30, 1e30));
    (c.unwrap_or(0.0) * std::f64::consts::LOG2_E) as f32
}

/// The numbers of one call's options, most of them on the device.
pub(crate) struct ExtraBuffers<'a, G: Gpu> {
    /// The bias as a view whose row axis starts at the call's first row.
    pub bias: Option<BiasBuffer<'a, G>>,
    /// Sink logits (H) in f32.
    pub sinks: Option<&'a G::Slice<f32>>,
    /// The scores of a cache's new tokens, where the caller gives them.
    pub scores: Option<ScoreBuffer<'a, G>>,
    /// Dropout counts heads over all batch rows, rows and tokens from these on.
    pub drawn_from: [u32; 3],
}

/// Scores (lists, new tokens) in f32.
pub(crate) struct ScoreBuffer<'a, G: Gpu> {
    pub data: &'a G::Slice<f32>,
    /// The score of the first list's first token.
    pub first: usize,
    /// Scores from list to list.
    pub stride: usize,
}

impl<G: Gpu> ScoreBuffer<'_, G> {
    /// The scores from a token on.
    pub fn from(self, token: usize) -> Self {
        Self {
            first: self.first + token,
            ..self
        }
    }
}

impl<G: Gpu> Clone for ScoreBuffer<'_, G> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<G: Gpu> Copy for ScoreBuffer<'_, G> {}

impl<G: Gpu> ExtraBuffers<'_, G> {
    /// No numbers.
    pub fn none() -> Self {
        Self {
            bias: None,
            sinks: None,
            scores: None,
            drawn_from: [0; 3],
        }
    }
}

impl<G: Gpu> Clone for ExtraBuffers<'_, G> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<G: Gpu> Copy for ExtraBuffers<'_, G> {}
