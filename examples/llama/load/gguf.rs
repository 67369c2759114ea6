//! GGUF files of architecture `llama`, with their own tokenizer. Quantized weights stay quantized.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context, Result};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{DType, Device, Tensor};

use super::gguf_tokenizer::text;
use super::{Checkpoint, LoadOptions};
use crate::model::LlamaConfig;
use crate::rope::{Pairing, RopeScaling};
use crate::weights::{Linear, Weights};

/// The options are those of [`Checkpoint::open`].
pub fn open(path: &Path, options: LoadOptions) -> Result<Checkpoint> {
    let name = path.display();
    let mut file = BufReader::new(File::open(path).with_context(|| format!("{name}"))?);
    let content = Content::read(&mut file).with_context(|| {
        format!("{name}: expected a whole GGUF file, got a damaged or truncated one; fetch it again")
    })?;
    check_architecture(&content).with_context(|| format!("{name}"))?;
    check_size(&content, file.get_ref().metadata()?.len()).with_context(|| format!("{name}"))?;
    let text = text(&content).with_context(|| format!("{name}: tokenizer"))?;
    let mut weights = GgufWeights {
        path: path.into(),
        content,
        file,
        options,
    };
    Ok(Checkpoint {
        config: config(&mut weights).with_context(|| format!("{name}"))?,
        text,
        weights: Box::new(weights),
    })
}

fn check_architecture(content: &Content) -> Result<()> {
    let architecture = string(content, "general.architecture")?;
    ensure!(
        architecture == "llama",
        "architecture: expected llama, got {architecture}; this example runs Llama checkpoints only"
    );
    let experts = count_or(content, "llama.expert_count", 0)?;
    ensure!(
        experts <= 1,
        "experts: expected a dense Llama, got {experts} experts; mixtures are not supported"
    );
    Ok(())
}

/// Compares the file's length to what its own header says, so that a broken download is seen before it is loaded.
fn check_size(content: &Content, len: u64) -> Result<()> {
    let end = content.tensor_infos.values().map(|info| {
        let blocks = info
            .shape
            .dims()
            .iter()
            .fold(1u64, |product, &dim| product.saturating_mul(dim as u64))
            / info.ggml_dtype.block_size() as u64;
        content
            .tensor_data_offset
            .saturating_add(info.offset)
            .saturating_add(blocks.saturating_mul(info.ggml_dtype.type_size() as u64))
    });
    let expected = end.max().unwrap_or(0);
    ensure!(
        expected <= len,
        "expected at least {expected} bytes, as its header says, got {len}: the file is truncated; fetch it again"
    );
    Ok(())
}

fn config(weights: &mut GgufWeights) -> Result<LlamaConfig> {
    let content = &weights.content;
    let required = |key: &str| count(content, &format!("llama.{key}"));
    let optional = |key: &str, default| count_or(content, &format!("llama.{key}"), default);
    let hidden_size = required("embedding_length")?;
    let heads = required("attention.head_count")?;
    ensure!(
        heads > 0,
        "llama.attention.head_count: expected at least 1, got 0; the file is damaged"
    );
    let head_dim = optional("attention.key_length", hidden_size / heads)?;
    for key in ["attention.value_length", "rope.dimension_count"] {
        let got = optional(key, head_dim)?;
        ensure!(
            got == head_dim,
            "llama.{key}: expected the head dimension {head_dim}, got {got}; not supported"
        );
    }
    let Some(embedding) = content.tensor_infos.get("token_embd.weight") else {
        bail!("token_embd.weight: expected this tensor, found none; the file is damaged")
    };
    let vocab_size = embedding.shape.dims().first().copied().unwrap_or(0);
    let rope_theta = match content.metadata.get("llama.rope.freq_base") {
        Some(value) => f64::from(value.to_f32()?),
        None => 10_000.0,
    };
    let config = LlamaConfig {
        hidden_size,
        intermediate_size: required("feed_forward_length")?,
        vocab_size,
        layers: required("block_count")?,
        heads,
        kv_heads: optional("attention.head_count_kv", heads)?,
        head_dim,
        rms_norm_eps: f64::from(metadata(content, "llama.attention.layer_norm_rms_epsilon")?.to_f32()?),
        rope_theta,
        rope_scaling: RopeScaling::None,
        rope_pairing: Pairing::Interleaved,
        context_length: required("context_length")?,
        attention_bias: content.tensor_infos.contains_key("blk.0.attn_q.bias"),
        mlp_bias: content.tensor_infos.contains_key("blk.0.ffn_up.bias"),
        tied: !content.tensor_infos.contains_key("output.weight"),
    };
    Ok(LlamaConfig {
        rope_scaling: rope_scaling(weights)?,
        ..config
    })
}

fn rope_scaling(weights: &mut GgufWeights) -> Result<RopeScaling> {
    if weights.content.tensor_infos.contains_key("rope_freqs.weight") {
        let factors = weights.tensor("rope_freqs.weight")?.dequantize(&Device::Cpu)?;
        return Ok(RopeScaling::Factors(factors.flatten_all()?.to_vec1()?));
    }
    let content = &weights.content;
    let kind = match content.metadata.get("llama.rope.scaling.type") {
        Some(value) => value.to_string()?.as_str(),
        None => "none",
    };
    match kind {
        "none" => Ok(RopeScaling::None),
        "linear" => {
            let factor = metadata(content, "llama.rope.scaling.factor")?.to_f32()?;
            Ok(RopeScaling::Linear(f64::from(factor)))
        }
        other => bail!("llama.rope.scaling.type: expected none or linear, got {other}; not supported"),
    }
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

/// A count in whichever integer type the writer chose.
pub(super) fn count(content: &Content, key: &str) -> Result<usize> {
    let value = metadata(content, key)?;
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

/// The tensors of an open GGUF file, read one at a time.
struct GgufWeights {
    path: PathBuf,
    content: Content,
    file: BufReader<File>,
    options: LoadOptions,
}

impl GgufWeights {
    fn tensor(&mut self, name: &str) -> Result<QTensor> {
        let tensor = self.content.tensor(&mut self.file, name, &Device::Cpu);
        tensor.with_context(|| format!("{}: {name}", self.path.display()))
    }

    /// On the device, in the dtype of the activations.
    fn floats(&self, tensor: &QTensor) -> Result<Tensor> {
        let floats = tensor.dequantize(&Device::Cpu)?.to_dtype(self.options.dtype)?;
        Ok(floats.to_device(&self.options.device)?)
    }

    fn shaped(&mut self, name: &str, shape: &[usize]) -> Result<QTensor> {
        let tensor = self.tensor(name)?;
        let got = tensor.shape().dims();
        ensure!(
            got == shape,
            "{}: {name}: expected shape {shape:?}, got {got:?}; the file is damaged",
            self.path.display()
        );
        Ok(tensor)
    }
}

impl Weights for GgufWeights {
    fn dtype(&self) -> DType {
        self.options.dtype
    }

    fn device(&self) -> Device {
        self.options.device.clone()
    }

    fn linear(&mut self, path: &str, rows: usize, columns: usize, bias: bool) -> Result<Linear> {
        let name = gguf_name(path);
        let weight = self.shaped(&format!("{name}.weight"), &[rows, columns])?;
        let bias = match bias {
            true => Some(self.shaped(&format!("{name}.bias"), &[rows])?),
            false => None,
        };
        let bias = bias.map(|bias| self.floats(&bias)).transpose()?;
        if !self.options.device.is_cpu() {
            return Ok(Linear::Float(candle_nn::Linear::new(self.floats(&weight)?, bias)));
        }
        let weight = match self.options.dequantize {
            true => QMatMul::Tensor(self.floats(&weight)?),
            false => QMatMul::from_qtensor(weight)?,
        };
        Ok(Linear::Quantized { weight, bias })
    }

    fn vector(&mut self, path: &str, len: usize) -> Result<Tensor> {
        let tensor = self.shaped(&format!("{}.weight", gguf_name(path)), &[len])?;
        self.floats(&tensor)
    }
}

/// `model.layers.3.self_attn.q_proj` -> `blk.3.attn_q`.
fn gguf_name(path: &str) -> String {
    let Some((layer, part)) = path.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
        return match path {
            "model.embed_tokens" => "token_embd",
            "model.norm" => "output_norm",
            "lm_head" => "output",
            other => other,
        }
        .into();
    };
    let part = match part {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => other,
    };
    format!("blk.{layer}.{part}")
}
