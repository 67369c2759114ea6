//! The heads of one rank, where a model's heads are split over ranks.

use super::strategies::Table;
use super::HeadStrategies;
use candle_core::{bail, Result};
use std::ops::Range;

/// The KV heads of one rank: rank r of w has the heads r·Hk/w up to (r + 1)·Hk/w.
///
/// # Errors
/// A rank that the world does not have, or KV heads that are no multiple of the world.
pub(crate) fn kv_heads_of(rank: usize, world: usize, kv_heads: usize) -> Result<Range<usize>> {
    if rank >= world {
        bail!("rank: expected one below the world of {world}, got {rank}; ranks count from 0")
    }
    if world > kv_heads {
        bail!(
            "world: expected at most {kv_heads} ranks, one for each KV head, got {world}; take fewer ranks, as KV \
             heads are not repeated"
        )
    }
    if !kv_heads.is_multiple_of(world) {
        bail!(
            "world: expected a divisor of the {kv_heads} KV heads, got {world}, which leaves {} over; take another \
             number of ranks",
            kv_heads % world
        )
    }
    let each = kv_heads / world;
    Ok(rank * each..(rank + 1) * each)
}

impl<T: Copy + PartialEq> Table<T> {
    /// The columns of some heads; `share` is their part of all: (the part's index, the number of parts).
    fn shard(&self, (index, parts): (usize, usize)) -> Self {
        let own = |row: &[T]| {
            let each = row.len() / parts;
            row[index * each..][..each].to_vec()
        };
        match self {
            Self::Uniform(value) => Self::Uniform(*value),
            Self::PerHead(values) => Self::PerHead(own(values)),
            Self::PerBatchHead { heads, values } => Self::PerBatchHead {
                heads: heads / parts,
                values: values.chunks_exact(*heads).flat_map(own).collect(),
            },
        }
    }

    /// The columns of all parts, one after another; each part has this number of heads.
    fn joined(parts: &[&Self], heads: usize) -> Result<Self> {
        let (first, total) = (parts[0], heads * parts.len());
        let uniform = |part: &&Self| matches!(part, Self::Uniform(_)) && *part == first;
        if parts.iter().all(uniform) {
            return Ok(first.clone());
        }
        let batches: Vec<usize> = parts.iter().filter_map(|part| part.batch()).collect();
        if batches.iter().any(|batch| *batch != batches[0]) {
            bail!(
                "cat_heads: expected strategies of equal batches, got {batches:?} rows; join caches of the same \
                 sequences"
            )
        }
        let row = |batch: usize| {
            let of_part = move |part: &&Self| {
                let part = (*part).clone();
                (0..heads).map(move |head| part.get(batch, head))
            };
            parts.iter().flat_map(of_part)
        };
        Ok(match batches.first() {
            None => Self::PerHead(row(0).collect()),
            Some(batch) => Self::PerBatchHead {
                heads: total,
                values: (0..*batch).flat_map(row).collect(),
            },
        })
    }
}

impl HeadStrategies {
    /// The strategies and thresholds of the heads of rank `rank` of `world`, for a layer of `kv_heads` KV heads that
    /// is split over ranks. The query heads of a KV head stay together: a table (H) becomes (H / world), and (B, H)
    /// becomes (B, H / world); one strategy for all heads stays as it is. A tensor (B, H, N, D) is cut alike by
    /// `narrow(1, rank * H / world, H / world)`. The [`CompressionConfig`](super::CompressionConfig) is the same on
    /// all ranks.
    ///
    /// ```
    /// use candle_sfattention::{HeadStrategies, MergeStrategy::*};
    /// // 4 query heads on 2 KV heads.
    /// let all = HeadStrategies::per_head(vec![Similarity, Similarity, Off, Difference]);
    /// assert_eq!(all.shard(1, 2, 2)?, HeadStrategies::per_head(vec![Off, Difference]));
    /// assert!(all.shard(0, 3, 2).is_err());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// A rank that the world does not have, more ranks than KV heads, KV heads that are no multiple of the ranks, or a
    /// table whose heads are no multiple of the KV heads.
    pub fn shard(&self, rank: usize, world: usize, kv_heads: usize) -> Result<Self> {
        kv_heads_of(rank, world, kv_heads)?;
        for (what, heads) in [
            ("strategies", self.strategies.heads()),
            ("thresholds", self.thresholds.as_ref().and_then(Table::heads)),
        ] {
            if let Some(heads) = heads.filter(|heads| *heads == 0 || !heads.is_multiple_of(kv_heads)) {
                bail!(
                    "{what}: expected a multiple of the {kv_heads} KV heads, got {heads} query heads; give the KV \
                     heads of the layer before it is split"
                )
            }
        }
        Ok(Self {
            strategies: self.strategies.shard((rank, world)),
            thresholds: self.thresholds.as_ref().map(|table| table.shard((rank, world))),
        })
    }

    /// The strategies of all heads, from parts that have this number of query heads each.
    ///
    /// # Errors
    /// Parts with thresholds beside parts without, or tables of different batches.
    pub(crate) fn joined(parts: &[&Self], heads: usize) -> Result<Self> {
        let strategies: Vec<_> = parts.iter().map(|part| &part.strategies).collect();
        let thresholds: Vec<_> = parts.iter().filter_map(|part| part.thresholds.as_ref()).collect();
        let thresholds = match thresholds.len() {
            0 => None,
            some if some == parts.len() => Some(Table::joined(&thresholds, heads)?),
            some => bail!(
                "cat_heads: expected thresholds in all {} caches or in none, got them in {some}; join caches of one \
                 model",
                parts.len()
            ),
        };
        Ok(Self {
            strategies: Table::joined(&strategies, heads)?,
            thresholds,
        })
    }
}
