//! The shard of a model that one rank holds: its shape, and the parts of the matrices that are split.

use anyhow::{bail, ensure, Result};
use candle_core::{DType, Device, Tensor};

use super::config::LlamaConfig;
use crate::ranks::Ranks;
use crate::weights::{Linear, Part, Weights};

impl LlamaConfig {
    /// The shape of one of `world` ranks: its heads, and its part of the feed-forward part's inner numbers.
    ///
    /// # Errors
    /// KV heads or inner numbers that are no multiple of the ranks.
    pub fn shard(&self, world: usize) -> Result<Self> {
        for (name, count) in [
            ("KV heads", self.kv_heads),
            ("inner numbers of a feed-forward part", self.intermediate_size),
        ] {
            ensure!(
                world > 0 && count.is_multiple_of(world),
                "tensor-parallel: expected a divisor of the model's {count} {name}, got {world} ranks; take another \
                 number of ranks"
            );
        }
        Ok(Self {
            heads: self.heads / world,
            kv_heads: self.kv_heads / world,
            intermediate_size: self.intermediate_size / world,
            ..self.clone()
        })
    }
}

/// Weights of one rank. The matrices before heads and before inner numbers are cut by rows, those after them by
/// columns; a sum over the ranks follows their products. Embeddings, norms and the output matrix are whole.
pub struct ShardWeights<'w> {
    pub inner: &'w mut dyn Weights,
    pub ranks: &'w Ranks,
}

impl Weights for ShardWeights<'_> {
    fn dtype(&self) -> DType {
        self.inner.dtype()
    }

    fn device(&self) -> Device {
        self.inner.device()
    }

    fn len(&self) -> usize {
        self.inner.len()
    }

    fn shape(&self, path: &str) -> Option<Vec<usize>> {
        self.inner.shape(path)
    }

    fn table(&mut self, path: &str, rows: usize, columns: usize) -> Result<Linear> {
        self.inner.table(path, rows, columns)
    }

    /// The rank's part; `rows` and `columns` are its own.
    fn linear(&mut self, path: &str, rows: usize, columns: usize) -> Result<Linear> {
        let (rank, world) = (self.ranks.rank(), self.ranks.world());
        let own = |count: usize| rank * count..(rank + 1) * count;
        match path.rsplit('.').next() {
            Some("q_proj" | "k_proj" | "v_proj" | "gate_proj" | "up_proj") => {
                self.inner.part(path, [rows * world, columns], &Part::Rows(own(rows)))
            }
            Some("o_proj" | "down_proj") => {
                self.inner
                    .part(path, [rows, columns * world], &Part::Columns(own(columns)))
            }
            _ => bail!(
                "tensor-parallel: expected matrices of attention and of a gated feed-forward part, got {path}, which \
                 this program cannot split yet; leave --tensor-parallel out"
            ),
        }
    }

    fn vector(&mut self, path: &str, len: usize) -> Result<Tensor> {
        self.inner.vector(path, len)
    }

    fn bias(&mut self, path: &str, len: usize) -> Result<Tensor> {
        self.inner.bias(path, len)
    }

    fn check_all_read(&mut self) -> Result<()> {
        self.inner.check_all_read()
    }
}
