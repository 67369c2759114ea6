//! Pairs seen and hidden.

use candle_sfattention::MergeStats;

/// Pairs seen and hidden, per layer, over all counted calls.
#[derive(Clone, Debug, Default)]
pub struct HiddenCounts {
    layers: Vec<(usize, usize)>,
}

impl HiddenCounts {
    pub(super) fn add(&mut self, layer: usize, stats: &MergeStats) {
        if self.layers.len() <= layer {
            self.layers.resize(layer + 1, (0, 0));
        }
        let (pairs, hidden) = &mut self.layers[layer];
        *pairs += stats.pairs;
        *hidden += stats.hidden;
    }

    /// Hidden pairs / pairs, over all heads and layers.
    pub fn ratio(&self) -> f64 {
        let (pairs, hidden) = self
            .layers
            .iter()
            .fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1));
        hidden as f64 / pairs.max(1) as f64
    }

    /// Hidden pairs / pairs over all heads of each layer.
    pub fn ratio_per_layer(&self) -> Vec<f64> {
        self.layers
            .iter()
            .map(|&(pairs, hidden)| hidden as f64 / pairs.max(1) as f64)
            .collect()
    }
}
