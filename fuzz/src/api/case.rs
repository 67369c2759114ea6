//! The case that one input draws. Its `Debug` form is the one line of a fault's report.

use super::one_in;
use super::seen::Seen;
use arbitrary::{Result, Unstructured};
use candle_core::DType;
use candle_sfattention::{CompressionConfig, Criterion, Dropout, Fold, GroupRule, MergeRule, MergeStrategy};

/// How one of q, k and v lies in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Layout {
    Contiguous,
    /// A transposed view of (B, N, H, D).
    TokenMajor,
    /// A part of rows of D + 3.
    PartOfRows,
    /// A part of N + 5 tokens.
    PartOfTokens,
    /// A part of H + 2 heads of a (B, N, H + 2, D).
    Fused,
    /// The same numbers for every batch row, head or token, by a stride of 0.
    SameBatch,
    SameHeads,
    SameTokens,
    /// A transposed view of (B, H, D, N), which the crate may refuse.
    Turned,
}

const LAYOUTS: [Layout; 12] = [
    Layout::Contiguous,
    Layout::Contiguous,
    Layout::Contiguous,
    Layout::TokenMajor,
    Layout::TokenMajor,
    Layout::PartOfRows,
    Layout::PartOfTokens,
    Layout::Fused,
    Layout::SameBatch,
    Layout::SameHeads,
    Layout::SameTokens,
    Layout::Turned,
];

/// A bias's entries, beside small numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mask {
    Small,
    /// Minus infinity for one column in five.
    Hides,
    /// Minus infinity for the first tokens of a batch row: left padding.
    Padding,
    /// The dtype's least finite number, for one column in five.
    Least,
    /// The dtype's least finite number everywhere.
    AllLeast,
}

#[derive(Clone, Copy, Debug)]
pub struct Bias {
    pub mask: Mask,
    /// Which axes of (B, H, N, N) have their full size; the others are 1.
    pub axes: [bool; 4],
    pub dtype: DType,
    /// Leading axes that are left out.
    pub without: usize,
}

/// An entry of q, k or v that is not finite.
#[derive(Clone, Copy, Debug)]
pub struct Bad {
    pub tensor: usize,
    pub token: usize,
    pub value: f64,
}

#[derive(Clone, Debug)]
pub struct Case {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub tokens: usize,
    pub dim: usize,
    pub dtype: DType,
    pub layouts: [Layout; 3],
    /// The size of the entries of q and k.
    pub size: f64,
    /// How alike neighbours are: 0 are random, 2 are equal.
    pub alike: u8,
    pub bad: Option<Bad>,
    pub strategies: Vec<MergeStrategy>,
    pub per_batch: bool,
    pub thresholds: Option<f64>,
    pub config: CompressionConfig,
    pub scale: Option<f64>,
    pub causal: bool,
    pub dropout: Option<Dropout>,
    pub bias: Option<Bias>,
    /// Lengths of the cache's chunks, repeated; and whether a chunk's rows are computed.
    pub chunks: Vec<(usize, bool)>,
    pub storage: Option<DType>,
    /// Whether the cache is taken apart into its batch rows and put together after each chunk.
    pub regroups: bool,
    /// Dtypes of query, key and value of another run of the cache.
    pub mixed: Option<[DType; 3]>,
    pub seen: Seen,
    /// Rows that are computed: the last ones where the call is causal.
    pub queries: usize,
    pub value_dim: usize,
    pub seed: u64,
}

impl Case {
    pub fn draw(u: &mut Unstructured) -> Result<Self> {
        let kv_heads = u.int_in_range(1..=2)?;
        let heads = kv_heads * u.int_in_range(1..=3)?;
        let batch = u.int_in_range(1..=2)?;
        let tokens = match one_in(u, 3)? {
            true => u.int_in_range(1..=5)?,
            false => u.int_in_range(1..=80)?,
        };
        let dim = match one_in(u, 2)? {
            true => *u.choose(&[1, 8, 16, 32, 40])?,
            false => u.int_in_range(1..=40)?,
        };
        let dtype = *u.choose(&[DType::F32, DType::F64, DType::F16, DType::BF16])?;
        let causal = !one_in(u, 5)?;
        let config = config(u, causal, &[heads, kv_heads])?;
        let per_batch = one_in(u, 6)?;
        let count = if per_batch { batch * heads } else { heads };
        let strategies = match one_in(u, 3)? {
            true => (0..count)
                .map(|_| Ok(*u.choose(&MergeStrategy::ALL)?))
                .collect::<Result<_>>()?,
            false => vec![*u.choose(&MergeStrategy::ALL)?; count],
        };
        let needed = config.criterion.needs_thresholds();
        let seen = Seen::draw(u, [batch, tokens], dtype)?;
        Ok(Self {
            layouts: [*u.choose(&LAYOUTS)?, *u.choose(&LAYOUTS)?, *u.choose(&LAYOUTS)?],
            size: *u.choose(&[1.0, 1.0, 1.0, 0.0, 1e-3, 30.0, 300.0])?,
            alike: u.int_in_range(0..=2)?,
            bad: match one_in(u, 6)? {
                true => Some(Bad {
                    tensor: u.int_in_range(0..=2)?,
                    token: u.int_in_range(0..=tokens - 1)?,
                    value: *u.choose(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY])?,
                }),
                false => None,
            },
            thresholds: match needed || one_in(u, 4)? {
                true => Some(*u.choose(&[0.05, 0.2, 0.6, 1.5])?),
                false => None,
            },
            scale: *u.choose(&[None, None, None, Some(0.3), Some(0.0), Some(-0.2), Some(2.0)])?,
            dropout: match one_in(u, 5)? {
                true => Some(Dropout {
                    p: *u.choose(&[0.0, 0.1, 0.5])?,
                    seed: u.arbitrary()?,
                }),
                false => None,
            },
            bias: match one_in(u, 3)? {
                true => Some(bias(u, dtype)?),
                false => None,
            },
            chunks: (0..u.int_in_range(1..=3)?)
                .map(|_| {
                    let few = one_in(u, 2)?;
                    Ok((u.int_in_range(1..=if few { 2 } else { 70 })?, !one_in(u, 6)?))
                })
                .collect::<Result<_>>()?,
            storage: match (dtype, one_in(u, 3)?) {
                (DType::F64, _) | (_, false) => None,
                _ => Some(*u.choose(&[DType::F32, DType::F16, DType::BF16])?),
            },
            regroups: one_in(u, 3)?,
            mixed: match (dtype, one_in(u, 3)?) {
                (DType::F64, _) | (_, false) => None,
                _ => {
                    let dtypes = [DType::F32, DType::F16, DType::BF16];
                    Some([*u.choose(&dtypes)?, *u.choose(&dtypes)?, *u.choose(&dtypes)?])
                }
            },
            queries: match seen.segments.is_none() && one_in(u, 5)? {
                true => u.int_in_range(1..=tokens)?,
                false => tokens,
            },
            value_dim: match one_in(u, 5)? {
                true => u.int_in_range(1..=40)?,
                false => dim,
            },
            seed: u64::from(u.arbitrary::<u16>()?),
            seen,
            batch,
            heads,
            kv_heads,
            tokens,
            dim,
            dtype,
            strategies,
            per_batch,
            config,
            causal,
        })
    }

    pub fn is_cached(&self) -> bool {
        self.causal && self.config.rule.is_causal() && self.queries == self.tokens
    }

    pub fn is_off(&self) -> bool {
        self.strategies.iter().all(|strategy| strategy.is_off())
    }
}

/// Settings that the crate takes.
fn config(u: &mut Unstructured, causal: bool, [heads, kv_heads]: &[usize; 2]) -> Result<CompressionConfig> {
    let threshold = *u.choose(&[0.05, 0.3, 0.6, 1.0, 2.5])?;
    let config = CompressionConfig {
        similarity_threshold: threshold,
        difference_threshold: threshold,
        max_merge_level: u.int_in_range(1..=7)?,
        ..Default::default()
    };
    if heads == kv_heads && one_in(u, 8)? {
        return Ok(CompressionConfig {
            rule: MergeRule::Reference,
            fold: *u.choose(&[Fold::PairSum, Fold::Mean, Fold::Drop])?,
            ..config
        });
    }
    let sinks = if one_in(u, 2)? { u.int_in_range(0..=6)? } else { 0 };
    if causal && one_in(u, 5)? {
        return Ok(CompressionConfig {
            criterion: Criterion::ObservedMass,
            fold: Fold::Drop,
            group_rule: GroupRule::Unanimous,
            window: u.int_in_range(2..=40)?,
            sinks,
            ..config
        });
    }
    Ok(CompressionConfig {
        criterion: *u.choose(&[Criterion::QueryKey, Criterion::KeyKey])?,
        fold: *u.choose(&[Fold::PairSum, Fold::Mean, Fold::Drop])?,
        group_rule: *u.choose(&[GroupRule::PerQueryHead, GroupRule::Unanimous])?,
        window: match causal && one_in(u, 2)? {
            true => *u.choose(&[1, 2, 5, 17, 33, 90])?,
            false => 0,
        },
        sinks,
        ..config
    })
}

fn bias(u: &mut Unstructured, dtype: DType) -> Result<Bias> {
    Ok(Bias {
        mask: *u.choose(&[
            Mask::Small,
            Mask::Small,
            Mask::Hides,
            Mask::Padding,
            Mask::Least,
            Mask::AllLeast,
        ])?,
        axes: [u.arbitrary()?, u.arbitrary()?, u.arbitrary()?, u.arbitrary()?],
        dtype: if one_in(u, 2)? { DType::F32 } else { dtype },
        without: u.int_in_range(0..=3)?,
    })
}
