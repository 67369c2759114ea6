//! A second form of each matrix, for single tokens: they read every weight once and are bound by memory, so that fewer
//! bytes a weight take less time. Prompts are bound by arithmetic and keep the first form.

#[path = "steps/blocks.rs"]
mod blocks;
#[path = "steps/packed.rs"]
mod packed;

use std::sync::Arc;

use anyhow::Result;
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::DType;

use crate::weights::{Linear, Product};
use packed::Packed;

/// The form of the matrices for single tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepFormat {
    /// A file's own blocks of 4 or 8 bits by our own product, where prompts go through floats; else that of prompts.
    Own,
    /// That of prompts.
    Prompt,
    /// 4 or 8 bits a weight, by our own product.
    Packed,
    /// By candle: a file's own blocks where candle has a fast kernel for them, else Q8_0 made while loading.
    Fast,
    Q8_0,
    /// Q8_0 where the columns are no multiple of 256.
    Q4K,
}

/// Whether candle 0.11 multiplies blocks of this type by vector instructions on x86 and ARM.
fn is_fast(dtype: GgmlDType) -> bool {
    use GgmlDType::{Q2K, Q3K, Q4K, Q4_0, Q5K, Q6K, Q8_0};
    matches!(dtype, Q4_0 | Q8_0 | Q2K | Q3K | Q4K | Q5K | Q6K)
}

/// Whether blocks of this type are taken as they are.
fn has_packed_blocks(dtype: GgmlDType) -> bool {
    use GgmlDType::{Q4K, Q4_0, Q4_1, Q8_0};
    matches!(dtype, Q4_0 | Q4_1 | Q4K | Q8_0)
}

impl StepFormat {
    /// The matrix with this form for single tokens.
    pub fn with_step(self, linear: Linear) -> Result<Linear> {
        match self {
            Self::Own => match linear.held_blocks().is_some_and(has_packed_blocks) {
                true => packed(linear),
                false => Ok(linear.into_prompt()),
            },
            Self::Prompt => Ok(linear.into_prompt()),
            Self::Packed => packed(linear),
            Self::Fast => {
                let own = linear.step().blocks().filter(|dtype| is_fast(*dtype));
                quantized(linear, own.unwrap_or(GgmlDType::Q8_0))
            }
            Self::Q8_0 => quantized(linear, GgmlDType::Q8_0),
            Self::Q4K => quantized(linear, GgmlDType::Q4K),
        }
    }
}

fn packed(linear: Linear) -> Result<Linear> {
    let weight = match linear.step() {
        Linear::Quantized {
            weight: QMatMul::QTensor(tensor),
            ..
        } => Packed::of_quantized(tensor)?,
        other => Packed::of_floats(&other.weight()?)?,
    };
    let weight: Arc<dyn Product> = Arc::new(weight);
    let bias = linear.bias().cloned();
    Ok(linear.with_step(Linear::Own { weight, bias }))
}

/// By candle's product of these blocks; as the prompt's where no blocks fit the columns.
fn quantized(linear: Linear, wanted: GgmlDType) -> Result<Linear> {
    let columns = linear.weight()?.dim(1)?;
    let fits = |dtype: &GgmlDType| columns.is_multiple_of(dtype.block_size());
    let Some(dtype) = [wanted, GgmlDType::Q8_0].into_iter().find(fits) else {
        return Ok(linear.into_prompt());
    };
    if linear.step().blocks() == Some(dtype) {
        return Ok(linear);
    }
    let floats = linear.weight()?.to_dtype(DType::F32)?;
    let weight = QMatMul::from_qtensor(QTensor::quantize(&floats, dtype)?)?;
    let bias = linear.bias().cloned();
    Ok(linear.with_step(Linear::Quantized { weight, bias }))
}
