//! What caches hold at the end of a sequence, counted from plans.

use std::ops::AddAssign;

use anyhow::Result;
use candle_sfattention::MergePlan;
use serde::{Deserialize, Serialize};

use crate::model::LayerCall;

/// What the caches of some layers hold at the end of a sequence, in f32.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Held {
    /// Lists of entries, one a KV head, or one a query head where these decide apart.
    pub lists: usize,
    /// Entries with nothing hidden.
    pub entries: usize,
    /// Of these, those left out.
    pub dropped: usize,
    pub bytes: usize,
    /// Bytes with nothing hidden, in one list a KV head.
    pub bytes_dense: usize,
}

impl Held {
    pub fn hidden_ratio(&self) -> f64 {
        self.dropped as f64 / self.entries.max(1) as f64
    }

    pub fn of_dense(&self) -> f64 {
        self.bytes as f64 / self.bytes_dense.max(1) as f64
    }

    /// Entries that a list keeps, the mean.
    pub fn entries_a_list(&self) -> f64 {
        (self.entries - self.dropped) as f64 / self.lists.max(1) as f64
    }

    /// What the cache of one layer holds after a pruning that drops as many tokens of each KV head.
    fn pruned(call: &LayerCall, dropped: usize) -> Result<Self> {
        let (kv_heads, head_dim) = (call.qkv[1].dim(1)?, call.qkv[1].dim(3)?);
        let first = first(call)?;
        let entries = call.qkv[1].dim(2)? - first;
        // A layer that slides is not pruned.
        let dropped = if call.options.sliding_window.is_some() {
            0
        } else {
            dropped
        };
        let row = 2 * head_dim * size_of::<f32>();
        Ok(Self {
            lists: kv_heads,
            entries: kv_heads * entries,
            dropped: kv_heads * dropped,
            bytes: kv_heads * (entries - dropped) * row,
            bytes_dense: kv_heads * entries * row,
        })
    }

    /// What the cache of one layer holds.
    fn of(call: &LayerCall, plan: &MergePlan, per_query_head: bool) -> Result<Self> {
        let [q, k, _] = call.qkv;
        let (heads, kv_heads, head_dim, tokens) = (q.dim(1)?, k.dim(1)?, q.dim(3)?, q.dim(2)?);
        let first = first(call)?;
        let entries = tokens - first;
        // A hidden token counts as kept until it has left the window.
        let left = (tokens - 1).saturating_sub(plan.config().window);
        let row = 2 * head_dim * size_of::<f32>();
        let mut held = Self {
            bytes_dense: kv_heads * entries * row,
            ..Self::default()
        };
        let step = if per_query_head { 1 } else { heads / kv_heads };
        for bits in plan.indicators().to_vec3::<u8>()?[0].iter().step_by(step) {
            let dropped = bits[..left].iter().skip(first).filter(|bit| **bit == 1).count();
            held.lists += 1;
            held.entries += entries;
            held.dropped += dropped;
            held.bytes += (entries - dropped) * row;
        }
        Ok(held)
    }
}

/// The first token that a layer holds. One that slides keeps what its next row sees, in this cache and the dense one.
fn first(call: &LayerCall) -> Result<usize> {
    let tokens = call.qkv[1].dim(2)?;
    let most = call.options.sliding_window.map_or(tokens, |window| window - 1);
    Ok(tokens.saturating_sub(most))
}

impl AddAssign for Held {
    fn add_assign(&mut self, other: Self) {
        self.lists += other.lists;
        self.entries += other.entries;
        self.dropped += other.dropped;
        self.bytes += other.bytes;
        self.bytes_dense += other.bytes_dense;
    }
}

/// What all layers hold, by kind of layer.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Kept {
    /// Layers that see all tokens.
    pub whole: Held,
    /// Layers that slide.
    pub sliding: Held,
}

impl Kept {
    pub fn add(&mut self, call: &LayerCall, plan: &MergePlan, per_query_head: bool) -> Result<()> {
        self.add_layer(call, Held::of(call, plan, per_query_head)?);
        Ok(())
    }

    /// After a pruning that drops as many tokens of each KV head.
    pub fn add_pruned(&mut self, call: &LayerCall, dropped: usize) -> Result<()> {
        self.add_layer(call, Held::pruned(call, dropped)?);
        Ok(())
    }

    fn add_layer(&mut self, call: &LayerCall, held: Held) {
        match call.options.sliding_window {
            Some(_) => self.sliding += held,
            None => self.whole += held,
        }
    }

    pub fn all(&self) -> Held {
        let mut all = self.whole;
        all += self.sliding;
        all
    }
}

impl AddAssign for Kept {
    fn add_assign(&mut self, other: Self) {
        self.whole += other.whole;
        self.sliding += other.sliding;
    }
}
