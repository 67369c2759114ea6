//! Weights whose matrices pass through a function before the model gets them.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use crate::weights::{Linear, Part, Weights};

/// Weights whose matrices `form` changes, such as by another form for single tokens.
pub struct Formed<'w> {
    pub inner: &'w mut dyn Weights,
    pub form: &'w dyn Fn(Linear) -> Result<Linear>,
}

impl Weights for Formed<'_> {
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
        (self.form)(self.inner.table(path, rows, columns)?)
    }

    fn linear(&mut self, path: &str, rows: usize, columns: usize) -> Result<Linear> {
        (self.form)(self.inner.linear(path, rows, columns)?)
    }

    fn part(&mut self, path: &str, whole: [usize; 2], part: &Part) -> Result<Linear> {
        (self.form)(self.inner.part(path, whole, part)?)
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
