//! A second form of each matrix, for single tokens: they read every weight once and are bound by memory, so that fewer
//! bytes a weight take less time. Prompts are bound by arithmetic and keep the first form.

use anyhow::Result;
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Device, Tensor};

use crate::weights::{Linear, Weights};

/// The form of the matrices for single tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepFormat {
    /// That of prompts.
    Prompt,
    /// A file's own blocks where candle has a fast kernel for them, else Q8_0 made while loading.
    Fast,
    Q8_0,
    /// Q8_0 where the columns are no multiple of 256.
    Q4K,
}

/// Whether candle 0.11 multiplies blocks of this type by vector instructions on x86 and ARM.
pub fn is_fast(dtype: GgmlDType) -> bool {
    use GgmlDType::{Q2K, Q3K, Q4K, Q4_0, Q5K, Q6K, Q8_0};
    matches!(dtype, Q4_0 | Q8_0 | Q2K | Q3K | Q4K | Q5K | Q6K)
}

/// Weights with a second form of each matrix.
pub struct StepWeights<'w> {
    pub inner: &'w mut dyn Weights,
    pub format: StepFormat,
}

impl StepWeights<'_> {
    fn with_step(&self, linear: Linear) -> Result<Linear> {
        let (prompt, own) = match linear {
            Linear::Split { prompt, step } => (*prompt, Some(*step)),
            linear => (linear, None),
        };
        let held = own.as_ref().unwrap_or(&prompt).blocks();
        let dtype = match self.format {
            StepFormat::Prompt => return Ok(prompt),
            StepFormat::Fast if held.is_some_and(is_fast) => held.unwrap_or(GgmlDType::Q8_0),
            StepFormat::Fast | StepFormat::Q8_0 => GgmlDType::Q8_0,
            StepFormat::Q4K => GgmlDType::Q4K,
        };
        let columns = prompt.weight()?.dim(1)?;
        let dtype = match columns.is_multiple_of(dtype.block_size()) {
            true => dtype,
            false => GgmlDType::Q8_0,
        };
        let step = match own {
            Some(own) if held == Some(dtype) => own,
            None if held == Some(dtype) => return Ok(prompt),
            _ if !columns.is_multiple_of(dtype.block_size()) => return Ok(prompt),
            _ => Linear::Quantized {
                weight: quantized(&prompt.weight()?, dtype)?,
                bias: prompt.bias().cloned(),
            },
        };
        Ok(Linear::Split {
            prompt: Box::new(prompt),
            step: Box::new(step),
        })
    }
}

fn quantized(weight: &Tensor, dtype: GgmlDType) -> Result<QMatMul> {
    let floats = weight.to_dtype(DType::F32)?;
    Ok(QMatMul::from_qtensor(QTensor::quantize(&floats, dtype)?)?)
}

impl Weights for StepWeights<'_> {
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
        let table = self.inner.table(path, rows, columns)?;
        self.with_step(table)
    }

    fn linear(&mut self, path: &str, rows: usize, columns: usize) -> Result<Linear> {
        let linear = self.inner.linear(path, rows, columns)?;
        self.with_step(linear)
    }

    fn vector(&mut self, path: &str, len: usize) -> Result<Tensor> {
        self.inner.vector(path, len)
    }

    fn check_all_read(&mut self) -> Result<()> {
        self.inner.check_all_read()
    }
}
