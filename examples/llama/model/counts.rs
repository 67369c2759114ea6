//! Pairs seen and hidden.

use anyhow::Result;
use candle_sfattention::MergeStats;

use crate::ranks::Ranks;

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

    /// The counts of all ranks.
    pub fn over(&self, ranks: &Ranks) -> Result<Self> {
        let own = self
            .layers
            .iter()
            .flat_map(|&(pairs, hidden)| [pairs as f64, hidden as f64]);
        let mut layers = vec![(0, 0); self.layers.len()];
        for numbers in ranks.gather(own.collect())? {
            for (layer, numbers) in layers.iter_mut().zip(numbers.chunks_exact(2)) {
                *layer = (layer.0 + numbers[0] as usize, layer.1 + numbers[1] as usize);
            }
        }
        Ok(Self { layers })
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
