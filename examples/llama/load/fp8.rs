//! FP8 weights with their scales, as `fp8`, `fbgemm_fp8` and `compressed-tensors` checkpoints keep them.
//!
//! A weight is its 8-bit value times the scale of its block: the whole matrix, a row, or a block such as 128 x 128.
//! Both `weight_scale` and `weight_scale_inv` are factors, despite the second's name. Scales of activations and of
//! cached keys only tell how to round these, and this example does not round them: [`is_of_activations`] recognizes
//! such tensors.

use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;

/// The part of `quantization_config` that concerns weights.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Quantization {
    /// Rows and columns of weights that share a scale; None: the scale's shape tells.
    block: Option<[usize; 2]>,
}

/// The default block of `weight_scale_inv`.
const USUAL_BLOCK: [usize; 2] = [128, 128];

impl Quantization {
    pub fn read(config: &Value) -> Result<Self> {
        let word = |key: &str| config.get(key).and_then(Value::as_str);
        let block = match (word("quant_method"), word("format")) {
            (Some("fp8"), _) => {
                let format = word("fmt").unwrap_or("e4m3");
                ensure!(
                    format == "e4m3",
                    "quantization_config: expected fmt e4m3, got {format}; not supported"
                );
                block(config.get("weight_block_size"))?
            }
            (Some("fbgemm_fp8"), _) => None,
            (Some("compressed-tensors"), Some("float-quantized" | "naive-quantized")) => compressed_block(config)?,
            (method, format) => bail!(
                "quantization_config: expected fp8, fbgemm_fp8, or compressed-tensors of format float-quantized, got \
                 {}{}; not supported, use the unquantized checkpoint or a GGUF file",
                method.unwrap_or("no quant_method"),
                format.map_or_else(String::new, |format| format!(" of format {format}"))
            ),
        };
        Ok(Self { block })
    }

    /// The block of a scale of this shape, for a matrix of `rows` and `columns`.
    fn block(&self, scale: &[usize], rows: usize, columns: usize) -> Result<[usize; 2]> {
        let fits = |[high, wide]: [usize; 2]| *scale == [rows.div_ceil(high), columns.div_ceil(wide)];
        let (whole, row) = ([rows, columns], [1, columns]);
        match (self.block, scale) {
            (_, [] | [1]) => Some(whole),
            (_, [len]) if *len == rows => Some(row),
            (Some(block), _) if fits(block) => Some(block),
            (None, _) => [whole, row, USUAL_BLOCK].into_iter().find(|&block| fits(block)),
            _ => None,
        }
        .with_context(|| {
            format!(
                "expected a scale of one value, of {rows} rows, or per block of {:?} values of a matrix ({rows}, \
                 {columns}), got shape {scale:?}; not supported",
                self.block.unwrap_or(USUAL_BLOCK)
            )
        })
    }
}

/// The block size of the groups of compressed-tensors, which must agree.
fn compressed_block(config: &Value) -> Result<Option<[usize; 2]>> {
    for key in ["transform_config", "sparsity_config"] {
        let empty = config.get(key).is_none_or(|value| {
            value.is_null()
                || value.as_object().is_some_and(serde_json::Map::is_empty)
                || value.get("format").and_then(Value::as_str) == Some("dense")
        });
        ensure!(
            empty,
            "quantization_config: expected no {key}, got one; not supported, use the unquantized checkpoint"
        );
    }
    let groups = config.get("config_groups").and_then(Value::as_object);
    let mut found: Option<Option<[usize; 2]>> = None;
    for (name, group) in groups.into_iter().flatten() {
        let weights = &group["weights"];
        if weights.is_null() {
            continue;
        }
        let plain = weights.get("num_bits").is_none_or(|bits| bits == 8)
            && weights.get("type").is_none_or(|kind| kind == "float")
            && weights.get("symmetric").is_none_or(|on| on == true);
        ensure!(
            plain,
            "quantization_config: expected symmetric float weights of 8 bits in {name}, got {weights}; not supported"
        );
        let here = match weights.get("group_size").and_then(Value::as_u64) {
            Some(size) if size > 0 => Some([1, usize::try_from(size)?]),
            _ => block(weights.get("block_structure"))?,
        };
        ensure!(
            found.is_none_or(|found| found == here),
            "quantization_config: expected one block size for all weights, got another in {name}; not supported"
        );
        found = Some(here);
    }
    Ok(found.flatten())
}

fn block(size: Option<&Value>) -> Result<Option<[usize; 2]>> {
    let Some(size) = size.filter(|size| !size.is_null()) else {
        return Ok(None);
    };
    let sides = size.as_array().map(Vec::as_slice).unwrap_or_default();
    let side = |side: &Value| {
        side.as_u64()
            .and_then(|side| usize::try_from(side).ok())
            .filter(|&side| side > 0)
    };
    match sides {
        [high, wide] => side(high).zip(side(wide)).map(|(high, wide)| [high, wide]),
        _ => None,
    }
    .with_context(|| format!("quantization_config: expected a block of rows and columns, got {size}"))
    .map(Some)
}

/// Whether a tensor of a quantized checkpoint only tells how to round activations or cached keys and values.
pub fn is_of_activations(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    matches!(
        last,
        "input_scale"
            | "input_scale_ub"
            | "output_scale"
            | "k_scale"
            | "v_scale"
            | "q_scale"
            | "kv_scale"
            | "prob_scale"
    )
}

/// The weight in f32, on the CPU: FP8 values times the scale of their block.
pub fn scaled(weight: &Tensor, scale: &Tensor, quantization: &Quantization) -> Result<Tensor> {
    let shape = weight.dims().to_vec();
    let (rows, columns) = match shape[..] {
        [columns] => (1, columns),
        [rows, columns] => (rows, columns),
        _ => bail!("expected a matrix or a vector, got shape {shape:?}"),
    };
    let [high, wide] = quantization.block(scale.dims(), rows, columns)?;
    let across = columns.div_ceil(wide);
    let scales = scale.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    ensure!(
        scales.iter().all(|scale| scale.is_finite()),
        "expected finite scales, got others; fetch the checkpoint again"
    );
    let mut values = weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    for (row, values) in values.chunks_mut(columns).enumerate() {
        let scales = &scales[row / high * across..][..across];
        for (block, scale) in values.chunks_mut(wide).zip(scales) {
            block.iter_mut().for_each(|value| *value *= scale);
        }
    }
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}
