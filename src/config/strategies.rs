//! Each head's strategy and threshold: uniform, per head, or per batch row and head.

use super::{CompressionConfig, MergeStrategy};
use candle_core::{bail, DType, Result, Tensor};
use serde::{Deserialize, Serialize};

/// One head's decision test: its strategy and its threshold, with the defaults filled in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadTest {
    /// The test of a pair.
    pub strategy: MergeStrategy,
    /// The bound of the strict comparison; not read by [`MergeStrategy::Off`].
    pub threshold: f64,
}

/// Each head's strategy and, if given, its own threshold: the same for all heads, per head `(H)`, or per batch row and
/// head `(B, H)`. H counts query heads. Deserialising refuses tables without whole rows and thresholds that are not
/// finite.
///
/// ```
/// use candle_sfattention::{HeadStrategies, MergeStrategy::*};
/// let everywhere = HeadStrategies::uniform(Similarity);
/// let mixed = HeadStrategies::per_head(vec![Similarity, Difference, Off, Off]);
/// # let _ = (everywhere, mixed);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "HeadTables")]
pub struct HeadStrategies {
    pub(super) strategies: Table<MergeStrategy>,
    pub(super) thresholds: Option<Table<f64>>,
}

/// [`HeadStrategies`] as they are read, before they are checked.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HeadTables {
    pub(super) strategies: Table<MergeStrategy>,
    pub(super) thresholds: Option<Table<f64>>,
}

impl TryFrom<HeadTables> for HeadStrategies {
    type Error = candle_core::Error;

    fn try_from(HeadTables { strategies, thresholds }: HeadTables) -> Result<Self> {
        strategies.check_rows("strategies")?;
        if let Some(table) = &thresholds {
            table.check_rows("thresholds")?;
            check_finite(table.values())?;
        }
        Ok(Self { strategies, thresholds })
    }
}

fn check_finite(thresholds: &[f64]) -> Result<()> {
    if let Some(bad) = thresholds.iter().find(|t| !t.is_finite()) {
        bail!("thresholds: expected finite numbers, got {bad}; use MergeStrategy::Off for a head that never merges")
    }
    Ok(())
}

/// A row-major table that broadcasts over the axes it lacks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Table<T> {
    Uniform(T),
    PerHead(Vec<T>),
    PerBatchHead { heads: usize, values: Vec<T> },
}

impl<T: Copy> Table<T> {
    fn from_rows(what: &str, dims: &[usize], values: Vec<T>) -> Result<Self> {
        match *dims {
            [_] => Ok(Self::PerHead(values)),
            [_, heads] => Ok(Self::PerBatchHead { heads, values }),
            _ => bail!("{what}: expected shape (heads) or (batch, heads), got {dims:?}; reshape it"),
        }
    }

    /// Checks a table's shape; `batch` is None where it is not yet known.
    fn check(&self, what: &str, batch: Option<usize>, heads: usize) -> Result<()> {
        let rows_fit = |len: usize| batch.is_none_or(|batch| len == batch * heads);
        let got = match self {
            Self::Uniform(_) => return Ok(()),
            Self::PerHead(values) if values.len() == heads => return Ok(()),
            Self::PerBatchHead { heads: h, values } if *h == heads && rows_fit(values.len()) => return Ok(()),
            Self::PerHead(values) => format!("({})", values.len()),
            Self::PerBatchHead { heads: h, values } => format!("({}, {h})", values.len() / (*h).max(1)),
        };
        let batch = batch.map_or("batch".to_string(), |batch| batch.to_string());
        bail!("{what}: expected shape ({heads}) or ({batch}, {heads}), got {got}; give one entry per query head")
    }

    /// The number of batch rows, where there are rows.
    pub(super) fn batch(&self) -> Option<usize> {
        match self {
            Self::Uniform(_) | Self::PerHead(_) => None,
            Self::PerBatchHead { heads, values } => Some(values.len() / (*heads).max(1)),
        }
    }

    pub(super) fn heads(&self) -> Option<usize> {
        match self {
            Self::Uniform(_) => None,
            Self::PerHead(values) => Some(values.len()),
            Self::PerBatchHead { heads, .. } => Some(*heads),
        }
    }

    fn values(&self) -> &[T] {
        match self {
            Self::Uniform(value) => std::slice::from_ref(value),
            Self::PerHead(values) | Self::PerBatchHead { values, .. } => values,
        }
    }

    /// Refuses values that are not whole rows of heads.
    fn check_rows(&self, what: &str) -> Result<()> {
        match self {
            Self::PerBatchHead { heads, values } if *heads == 0 || values.len() % heads != 0 => bail!(
                "{what}: expected whole rows of {heads} heads, got {} values; give one per batch row and head",
                values.len()
            ),
            _ => Ok(()),
        }
    }

    /// The table of one batch row alone.
    fn row(&self, batch: usize) -> Self {
        match self {
            Self::Uniform(value) => Self::Uniform(*value),
            Self::PerHead(values) => Self::PerHead(values.clone()),
            Self::PerBatchHead { heads, values } => Self::PerHead(values[batch * heads..][..*heads].to_vec()),
        }
    }

    pub(super) fn get(&self, batch: usize, head: usize) -> T {
        match self {
            Self::Uniform(value) => *value,
            Self::PerHead(values) => values[head],
            Self::PerBatchHead { heads, values } => values[batch * heads + head],
        }
    }
}

impl HeadStrategies {
    /// Every head of every batch row uses `strategy`.
    pub fn uniform(strategy: MergeStrategy) -> Self {
        Self {
            strategies: Table::Uniform(strategy),
            thresholds: None,
        }
    }

    /// One strategy per query head, the same for every batch row.
    pub fn per_head(strategies: Vec<MergeStrategy>) -> Self {
        Self {
            strategies: Table::PerHead(strategies),
            thresholds: None,
        }
    }

    /// Reads strategy codes (0 similarity, 1 difference, 2 off) from a u32, u8 or i64 tensor of shape `(H)` or
    /// `(B, H)`.
    ///
    /// # Errors
    /// Another dtype, another rank, or an unknown code.
    pub fn from_tensor(codes: &Tensor) -> Result<Self> {
        if !matches!(codes.dtype(), DType::U32 | DType::U8 | DType::I64) {
            bail!(
                "strategy tensor: expected dtype u32, u8 or i64, got {:?}; convert it with to_dtype",
                codes.dtype()
            )
        }
        let flat = codes.flatten_all()?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let strategies = flat.into_iter().map(MergeStrategy::from_code).collect::<Result<_>>()?;
        Ok(Self {
            strategies: Table::from_rows("strategy tensor", codes.dims(), strategies)?,
            thresholds: None,
        })
    }

    /// Gives every head a threshold of its own, from a float tensor of shape `(H)` or `(B, H)`. The entries of heads
    /// that are [`MergeStrategy::Off`] are not read, but must be finite like the others.
    ///
    /// # Errors
    /// A dtype that is not a float, another rank, or a value that is not finite.
    pub fn with_thresholds(mut self, thresholds: &Tensor) -> Result<Self> {
        if !thresholds.dtype().is_float() {
            bail!(
                "thresholds: expected a float dtype, got {:?}; convert them with to_dtype",
                thresholds.dtype()
            )
        }
        let flat = thresholds.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        check_finite(&flat)?;
        self.thresholds = Some(Table::from_rows("thresholds", thresholds.dims(), flat)?);
        Ok(self)
    }

    /// Refuses tables that do not fit `batch` rows of `heads` query heads.
    ///
    /// # Errors
    /// A strategy or threshold table of another shape.
    pub fn check(&self, batch: usize, heads: usize) -> Result<()> {
        self.check_tables(Some(batch), heads)
    }

    /// Refuses tables that do not have one column per query head, where the batch is not known yet.
    pub(crate) fn check_heads(&self, heads: usize) -> Result<()> {
        self.check_tables(None, heads)
    }

    fn check_tables(&self, batch: Option<usize>, heads: usize) -> Result<()> {
        self.strategies.check("strategies", batch, heads)?;
        // Two tables with batch rows have the same number of them.
        let batch = match &self.strategies {
            Table::PerBatchHead { heads, values } => batch.or(Some(values.len() / (*heads).max(1))),
            _ => batch,
        };
        match &self.thresholds {
            Some(table) => table.check("thresholds", batch, heads),
            None => Ok(()),
        }
    }

    /// The test of one query head, after [`Self::check`].
    pub fn test(&self, config: &CompressionConfig, batch: usize, head: usize) -> HeadTest {
        let strategy = self.strategies.get(batch, head);
        let threshold = match &self.thresholds {
            Some(table) => table.get(batch, head),
            None => config.default_threshold(strategy),
        };
        HeadTest { strategy, threshold }
    }

    /// The strategies of one batch row alone, after [`Self::check`].
    pub(crate) fn of_row(&self, batch: usize) -> Self {
        Self {
            strategies: self.strategies.row(batch),
            thresholds: self.thresholds.as_ref().map(|table| table.row(batch)),
        }
    }

    /// Strategies and thresholds that give each head of each batch row its test: whole rows of `heads` tests.
    #[cfg(any(feature = "cuda", feature = "cuda-emu"))]
    pub(crate) fn of_tests(tests: &[HeadTest], heads: usize) -> Self {
        Self {
            strategies: Table::PerBatchHead {
                heads,
                values: tests.iter().map(|test| test.strategy).collect(),
            },
            thresholds: Some(Table::PerBatchHead {
                heads,
                values: tests.iter().map(|test| test.threshold).collect(),
            }),
        }
    }

    /// The number of query heads, where one of the tables says it.
    pub(crate) fn heads(&self) -> Option<usize> {
        self.strategies
            .heads()
            .or(self.thresholds.as_ref().and_then(Table::heads))
    }

    /// Whether heads have thresholds of their own.
    pub fn has_thresholds(&self) -> bool {
        self.thresholds.is_some()
    }

    /// Whether every head is [`MergeStrategy::Off`].
    pub fn all_off(&self) -> bool {
        let off = |strategy: &MergeStrategy| strategy.is_off();
        self.strategies.values().iter().all(off)
    }
}
