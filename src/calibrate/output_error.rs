//! The error of a layer's output.

use super::pass::PassSettings;
use candle_core::{bail, DType, Result, Tensor};

/// The squared error of a layer's output that each unit's heads cause alone.
pub(super) struct OutputError<'a> {
    settings: &'a PassSettings,
    /// WᵀW of each unit's columns of the projection.
    grams: Option<Vec<Tensor>>,
}

impl<'a> OutputError<'a> {
    pub fn new(settings: &'a PassSettings, projection: Option<&Tensor>) -> Result<Self> {
        let Some(projection) = projection else {
            return Ok(Self { settings, grams: None });
        };
        let (columns, width) = (
            settings.model.heads * settings.model.head_dim,
            settings.heads_per_unit * settings.model.head_dim,
        );
        if projection.rank() != 2 || projection.dim(1)? != columns {
            bail!(
                "projection: expected shape (hidden, {columns}), one column per head and dimension, got {:?}; give the \
                 output projection's weight",
                projection.dims()
            )
        }
        let projection = projection.to_dtype(DType::F32)?;
        let gram = |unit: usize| -> Result<Tensor> {
            let part = projection.narrow(1, unit * width, width)?.contiguous()?;
            part.t()?.matmul(&part)
        };
        let grams = (0..settings.units()).map(gram).collect::<Result<_>>()?;
        Ok(Self {
            settings,
            grams: Some(grams),
        })
    }

    /// The squared error per unit of a difference of outputs (1, H, N, D).
    pub fn per_unit(&self, difference: &Tensor) -> Result<Vec<f64>> {
        let (heads, width) = (
            self.settings.heads_per_unit,
            self.settings.heads_per_unit * self.settings.model.head_dim,
        );
        let one = |unit: usize| -> Result<f64> {
            let part = difference.to_dtype(DType::F32)?.narrow(1, unit * heads, heads)?;
            let rows = part.squeeze(0)?.transpose(0, 1)?.contiguous()?;
            let rows = rows.reshape(((), width))?;
            let squares = match &self.grams {
                Some(grams) => (rows.matmul(&grams[unit])? * &rows)?,
                None => rows.sqr()?,
            };
            squares.sum_all()?.to_dtype(DType::F64)?.to_scalar()
        };
        (0..self.settings.units()).map(one).collect()
    }
}
