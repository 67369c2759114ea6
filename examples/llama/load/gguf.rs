//! GGUF files of the architectures in [`Architecture`], with their own tokenizer. On the CPU quantized weights stay
//! quantized.

use std::path::Path;

use anyhow::{bail, Context, Result};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Device, Tensor};
use serde_json::json;

use super::gguf_config::config;
use super::gguf_kind::Architecture;
use super::gguf_tensors::{self, Tensors};
use super::gguf_tokenizer::text;
use super::text::{Edge, Text};
use super::{Checkpoint, LoadOptions};
use crate::weights::{Linear, Part, Weights};

/// The options are those of [`Checkpoint::open`].
pub fn open(path: &Path, options: LoadOptions) -> Result<Checkpoint> {
    let name = path.display();
    let (content, mut tensors) = gguf_tensors::open(path)?;
    let architecture = Architecture::of(&content).with_context(|| format!("{name}"))?;
    let config = config(&content, architecture, &mut tensors).with_context(|| format!("{name}"))?;
    let text = text(&content).with_context(|| format!("{name}: tokenizer"))?;
    Ok(Checkpoint {
        config,
        companions: companions(&content, &text)?,
        text,
        weights: Box::new(GgufWeights {
            tensors,
            architecture,
            options,
        }),
    })
}

/// The tokenizer_config.json of an equivalent folder.
fn companions(content: &Content, text: &Text) -> Result<Vec<(String, Vec<u8>)>> {
    let token = |edge: Edge| edge.id.and_then(|id| text.tokenizer.id_to_token(id));
    let template = match content.metadata.get("tokenizer.chat_template") {
        Some(template) => Some(template.to_string().context("tokenizer.chat_template")?),
        None => None,
    };
    let config = json!({
        "chat_template": template,
        "bos_token": token(text.bos),
        "eos_token": token(text.eos),
        "add_bos_token": text.bos.add,
        "add_eos_token": text.eos.add,
    });
    Ok(vec![(
        "tokenizer_config.json".into(),
        serde_json::to_vec_pretty(&config)?,
    )])
}

pub(super) fn metadata<'a>(content: &'a Content, key: &str) -> Result<&'a Value> {
    content
        .metadata
        .get(key)
        .with_context(|| format!("{key}: expected this metadata, found none; the file is damaged"))
}

pub(super) fn string<'a>(content: &'a Content, key: &str) -> Result<&'a str> {
    Ok(metadata(content, key)?.to_string().with_context(|| key.to_string())?)
}

pub(super) fn count(content: &Content, key: &str) -> Result<usize> {
    whole(metadata(content, key)?, key)
}

/// A count, in any integer type.
pub(super) fn whole(value: &Value, key: &str) -> Result<usize> {
    let wide = match *value {
        Value::I8(v) => i128::from(v),
        Value::I16(v) => i128::from(v),
        Value::I32(v) => i128::from(v),
        Value::I64(v) => i128::from(v),
        _ => i128::from(value.to_u64().with_context(|| key.to_string())?),
    };
    usize::try_from(wide)
        .ok()
        .with_context(|| format!("{key}: expected a count, got {wide}; the file is damaged"))
}

pub(super) fn count_or(content: &Content, key: &str, default: usize) -> Result<usize> {
    match content.metadata.contains_key(key) {
        true => count(content, key),
        false => Ok(default),
    }
}

/// The tensors under their Hugging Face names.
struct GgufWeights {
    tensors: Tensors,
    architecture: Architecture,
    options: LoadOptions,
}

impl GgufWeights {
    /// On the device, in the dtype of the activations.
    fn floats(&self, tensor: &QTensor) -> Result<Tensor> {
        let floats = tensor.dequantize(&Device::Cpu)?.to_dtype(self.options.dtype)?;
        Ok(floats.to_device(&self.options.device)?)
    }

    /// Always floats on a GPU. There candle multiplies quantized weights by one row with another kernel than by many,
    /// and the two round differently, so that a token decoded alone would differ from the same token in a prompt.
    fn product(&self, weight: QTensor, bias: Option<Tensor>) -> Result<Linear> {
        if !self.options.device.is_cpu() {
            return Ok(Linear::Float(candle_nn::Linear::new(self.floats(&weight)?, bias)));
        }
        if !self.options.dequantize {
            let weight = QMatMul::from_qtensor(weight)?;
            return Ok(Linear::Quantized { weight, bias });
        }
        let floats = Linear::Quantized {
            weight: QMatMul::Tensor(self.floats(&weight)?),
            bias: bias.clone(),
        };
        if weight.dtype().block_size() == 1 {
            return Ok(floats);
        }
        // Single tokens may read the file's own blocks.
        let weight = QMatMul::from_qtensor(weight)?;
        Ok(floats.with_step(Linear::Quantized { weight, bias }))
    }
}

impl Weights for GgufWeights {
    fn dtype(&self) -> DType {
        self.options.dtype
    }

    fn device(&self) -> Device {
        self.options.device.clone()
    }

    fn len(&self) -> usize {
        self.tensors.len()
    }

    fn shape(&self, path: &str) -> Option<Vec<usize>> {
        let shape = self
            .tensors
            .shape(&format!("{}.weight", self.architecture.tensor(path)));
        shape.map(<[usize]>::to_vec)
    }

    fn table(&mut self, path: &str, rows: usize, columns: usize) -> Result<Linear> {
        let weight = self
            .tensors
            .read(&format!("{}.weight", self.architecture.tensor(path)), &[rows, columns])?;
        self.product(weight, None)
    }

    fn linear(&mut self, path: &str, rows: usize, columns: usize) -> Result<Linear> {
        let weight = self
            .tensors
            .read(&format!("{}.weight", self.architecture.tensor(path)), &[rows, columns])?;
        let bias = format!("{}.bias", self.architecture.tensor(path));
        let bias = match self.tensors.shape(&bias) {
            Some(_) => Some(self.tensors.read(&bias, &[rows])?),
            None => None,
        };
        let bias = bias.map(|bias| self.floats(&bias)).transpose()?;
        self.product(weight, bias)
    }

    /// Reads only the part.
    fn part(&mut self, path: &str, whole: [usize; 2], part: &Part) -> Result<Linear> {
        let name = self.architecture.tensor(path);
        let weight = format!("{name}.weight");
        let weight = match self.tensors.read_part(&weight, whole, part)? {
            Some(blocks) => blocks,
            // A rank's columns begin or end within a block.
            None if self.options.dequantize || !self.options.device.is_cpu() => {
                let floats = part.cut(&self.tensors.read(&weight, &whole)?.dequantize(&Device::Cpu)?)?;
                QTensor::quantize(&floats, GgmlDType::F32)?
            }
            None => bail!(
                "{weight}: expected columns of a rank in whole blocks of the file, got {} of {}; give --dequantize, or \
                 fewer ranks",
                part.len(),
                whole[1]
            ),
        };
        let bias = format!("{name}.bias");
        let bias = match self.tensors.shape(&bias) {
            Some(_) => Some(self.tensors.read(&bias, &whole[..1])?),
            None => None,
        };
        let bias = bias.map(|bias| self.floats(&bias)).transpose()?;
        self.product(weight, part.bias(bias)?)
    }

    fn vector(&mut self, path: &str, len: usize) -> Result<Tensor> {
        let tensor = self
            .tensors
            .read(&format!("{}.weight", self.architecture.tensor(path)), &[len])?;
        self.floats(&tensor)
    }

    fn bias(&mut self, path: &str, len: usize) -> Result<Tensor> {
        let tensor = self
            .tensors
            .read(&format!("{}.bias", self.architecture.tensor(path)), &[len])?;
        self.floats(&tensor)
    }

    fn check_all_read(&mut self) -> Result<()> {
        self.tensors.check_all_read()
    }
}
