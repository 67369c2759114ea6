//! Weights of a model: their source, and matrices as floats or still quantized.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{bail, Context, Result};
use candle_core::quantized::{GgmlDType, QMatMul};
use candle_core::{DType, Device, Module, Tensor};

/// The source of a model's weights. Paths are Hugging Face's, without `.weight` and `.bias`.
pub trait Weights {
    /// The dtype of activations.
    fn dtype(&self) -> DType;
    /// The device of the weights.
    fn device(&self) -> Device {
        Device::Cpu
    }
    /// The number of tensors.
    fn len(&self) -> usize;
    /// The shape of `PATH.weight`, if there is one; known before any weight is loaded.
    fn shape(&self, path: &str) -> Option<Vec<usize>>;
    /// The matrix `PATH.weight` of shape `(rows, columns)`, which has no bias.
    fn table(&mut self, path: &str, rows: usize, columns: usize) -> Result<Linear>;
    /// The matrix `PATH.weight` of shape `(rows, columns)`, and `PATH.bias` of shape `(rows)` if it exists.
    fn linear(&mut self, path: &str, rows: usize, columns: usize) -> Result<Linear>;
    /// A part of the matrix `PATH.weight` of shape `(rows, columns)`, and its bias. This one reads the whole matrix,
    /// which must be floats, and keeps the part.
    fn part(&mut self, path: &str, [rows, columns]: [usize; 2], part: &Part) -> Result<Linear> {
        part.of(&self.linear(path, rows, columns)?)
            .with_context(|| path.to_string())
    }
    /// The vector `PATH.weight`.
    fn vector(&mut self, path: &str, len: usize) -> Result<Tensor>;
    /// The vector `PATH.bias`.
    fn bias(&mut self, path: &str, len: usize) -> Result<Tensor>;
    /// An error that names the unread tensors, if there are any: without them the model computes something else.
    fn check_all_read(&mut self) -> Result<()>;
}

/// A part of a matrix, and of the bias `(rows)` beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Some rows, and their biases.
    Rows(Range<usize>),
    /// Some columns. Products of all such parts are summed, so that only the first one has the bias.
    Columns(Range<usize>),
}

impl Part {
    /// A copy of the part, which keeps nothing else of the matrix in memory.
    pub fn cut(&self, matrix: &Tensor) -> Result<Tensor> {
        let (axis, range) = match self {
            Self::Rows(rows) => (0, rows),
            Self::Columns(columns) => (1, columns),
        };
        Ok(matrix.narrow(axis, range.start, range.len())?.force_contiguous()?)
    }

    /// Its rows or columns.
    pub fn len(&self) -> usize {
        match self {
            Self::Rows(range) | Self::Columns(range) => range.len(),
        }
    }

    /// The part's bias.
    pub fn bias(&self, bias: Option<Tensor>) -> Result<Option<Tensor>> {
        let Some(bias) = bias else { return Ok(None) };
        Ok(match self {
            Self::Rows(rows) => Some(bias.narrow(0, rows.start, rows.len())?.force_contiguous()?),
            Self::Columns(columns) => (columns.start == 0).then_some(bias),
        })
    }

    /// The part of a matrix of floats.
    fn of(&self, linear: &Linear) -> Result<Linear> {
        match linear {
            Linear::Float(linear) => Ok(Linear::Float(candle_nn::Linear::new(
                self.cut(linear.weight())?,
                self.bias(linear.bias().cloned())?,
            ))),
            Linear::Quantized { .. } | Linear::Own { .. } | Linear::Split { .. } => {
                bail!("expected a matrix of floats to take a part of, got one in another form; load the whole model")
            }
        }
    }
}

/// What a product is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Many tokens of one sequence.
    Prompt,
    /// One token, or a few.
    Step,
}

/// A matrix `(rows, columns)` with a product of its own.
#[allow(dead_code)] // not every program has one
pub trait Product: Debug + Send + Sync {
    /// f32 `xs (.., columns) -> (.., rows)`.
    fn multiply(&self, xs: &Tensor) -> Result<Tensor>;
    /// The matrix in f32.
    fn floats(&self) -> Result<Tensor>;
}

/// A matrix `(rows, columns)`, as floats or still quantized.
#[derive(Clone, Debug)]
pub enum Linear {
    Float(candle_nn::Linear),
    Quantized {
        weight: QMatMul,
        bias: Option<Tensor>,
    },
    #[allow(dead_code)] // not every program has one
    Own {
        weight: Arc<dyn Product>,
        bias: Option<Tensor>,
    },
    /// Two forms of one matrix, one for each [`Pass`].
    Split {
        prompt: Box<Linear>,
        step: Box<Linear>,
    },
}

impl Linear {
    /// `xs (.., columns) -> (.., rows)`, in the form for prompts.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.through(xs, Pass::Prompt)
    }

    /// `xs (.., columns) -> (.., rows)`.
    pub fn through(&self, xs: &Tensor, pass: Pass) -> Result<Tensor> {
        match self {
            Self::Float(linear) => Ok(linear.forward(xs)?),
            // Their products take and give f32.
            Self::Quantized { weight, bias } => {
                let ys = weight.forward(&xs.to_dtype(DType::F32)?)?;
                plus(ys.to_dtype(xs.dtype())?, bias.as_ref())
            }
            Self::Own { weight, bias } => {
                let ys = weight.multiply(&xs.to_dtype(DType::F32)?)?;
                plus(ys.to_dtype(xs.dtype())?, bias.as_ref())
            }
            Self::Split { prompt, step } => match pass {
                Pass::Prompt => prompt.through(xs, pass),
                Pass::Step => step.through(xs, pass),
            },
        }
    }

    /// The matrix `(rows, columns)` as floats.
    pub fn weight(&self) -> Result<Tensor> {
        Ok(match self {
            Self::Float(linear) => linear.weight().clone(),
            Self::Quantized { weight, .. } => match weight {
                QMatMul::QTensor(tensor) => tensor.dequantize(&Device::Cpu)?,
                QMatMul::Tensor(tensor) | QMatMul::TensorF16(tensor) => tensor.clone(),
            },
            Self::Own { weight, .. } => weight.floats()?,
            Self::Split { prompt, .. } => prompt.weight()?,
        })
    }

    /// The type of its blocks; None of floats.
    #[allow(dead_code)] // not read by the train example
    pub fn blocks(&self) -> Option<GgmlDType> {
        match self {
            Self::Quantized {
                weight: QMatMul::QTensor(tensor),
                ..
            } => Some(tensor.dtype()),
            Self::Quantized { .. } | Self::Own { .. } | Self::Float(_) => None,
            Self::Split { prompt, .. } => prompt.blocks(),
        }
    }

    /// The blocks that were kept beside floats, for single tokens; None where prompts go through blocks too.
    #[allow(dead_code)] // not read by every program
    pub fn held_blocks(&self) -> Option<GgmlDType> {
        match self {
            Self::Split { prompt, step } if prompt.blocks().is_none() => step.blocks(),
            Self::Split { .. } | Self::Float(_) | Self::Quantized { .. } | Self::Own { .. } => None,
        }
    }

    /// The bias `(rows)`, if there is one.
    #[allow(dead_code)] // not read by every program
    pub fn bias(&self) -> Option<&Tensor> {
        match self {
            Self::Float(linear) => linear.bias(),
            Self::Quantized { bias, .. } | Self::Own { bias, .. } => bias.as_ref(),
            Self::Split { prompt, .. } => prompt.bias(),
        }
    }

    /// The rows `ids (n) -> (n, columns)`: the matrix as an embedding table.
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Float(linear) => Ok(linear.weight().index_select(ids, 0)?),
            Self::Quantized { weight, .. } => Ok(weight.embedding(ids)?),
            Self::Own { weight, .. } => Ok(weight.floats()?.index_select(ids, 0)?),
            Self::Split { prompt, .. } => prompt.rows(ids),
        }
    }

    /// The form for single tokens.
    #[allow(dead_code)] // not read by every program
    pub fn step(&self) -> &Self {
        match self {
            Self::Split { step, .. } => step,
            Self::Float(_) | Self::Quantized { .. } | Self::Own { .. } => self,
        }
    }

    /// The form for prompts alone.
    pub fn into_prompt(self) -> Self {
        match self {
            Self::Split { prompt, .. } => *prompt,
            Self::Float(_) | Self::Quantized { .. } | Self::Own { .. } => self,
        }
    }

    /// With this form for single tokens.
    pub fn with_step(self, step: Self) -> Self {
        Self::Split {
            prompt: Box::new(self.into_prompt()),
            step: Box::new(step),
        }
    }
}

fn plus(ys: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) => Ok(ys.broadcast_add(bias)?),
        None => Ok(ys),
    }
}
