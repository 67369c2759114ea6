//! The model's configuration in a GGUF file's metadata. A key that nothing reads is an error, unless it changes
//! nothing.

use std::cell::RefCell;
use std::collections::BTreeSet;

use anyhow::{bail, ensure, Context, Result};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::Device;

use super::gguf::whole;
use super::gguf_kind::{Architecture, GgufShape};
use super::gguf_tensors::Tensors;
use super::unread::list;
use crate::model::{LayerOptions, LlamaConfig, Sliding, MOST_LAYERS};
use crate::rope::RopeScaling;

/// Keys that do not change the computation.
const HARMLESS: [&str; 4] = [
    // How the file was made.
    "tensor_data_layout",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    // About experts; there are none.
    "expert_used_count",
];

/// The keys `ARCHITECTURE.*`, and the set of them that was read.
struct Keys<'a> {
    content: &'a Content,
    architecture: Architecture,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    fn new(content: &'a Content, architecture: Architecture) -> Self {
        Self {
            content,
            architecture,
            read: RefCell::default(),
        }
    }

    /// The whole key.
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name())
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        let key = self.name(key);
        let value = self.content.metadata.get(&key);
        self.read.borrow_mut().insert(key);
        value
    }

    fn count(&self, key: &str) -> Result<usize> {
        self.optional_count(key)?.with_context(|| {
            format!(
                "{}: expected this metadata, found none; the file is damaged",
                self.name(key)
            )
        })
    }

    /// A count, or a list of equal counts per layer.
    fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        let name = self.name(key);
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) => {
                let counts = values.iter().map(|value| whole(value, &name));
                let counts = counts.collect::<Result<BTreeSet<usize>>>()?;
                ensure!(
                    counts.len() == 1,
                    "{name}: expected the same count for every layer, got {counts:?}; not supported"
                );
                Ok(counts.first().copied())
            }
            Some(value) => whole(value, &name).map(Some),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        Ok(match self.get(key) {
            None => None,
            Some(Value::F32(value)) => Some(f64::from(*value)),
            Some(Value::F64(value)) => Some(*value),
            Some(value) => bail!(
                "{}: expected a number, got {value:?}; the file is damaged",
                self.name(key)
            ),
        })
    }

    /// A factor, which llama.cpp leaves out where the key is 0 or absent.
    fn factor(&self, key: &str) -> Result<Option<f64>> {
        Ok(self.number(key)?.filter(|factor| *factor != 0.0))
    }

    fn required(&self, key: &str) -> Result<f64> {
        self.number(key)?.with_context(|| {
            format!(
                "{}: expected this metadata, found none; the file is damaged",
                self.name(key)
            )
        })
    }

    /// Refuses unread keys, except 0 and false, which llama.cpp treats as absent.
    fn check_all_read(&self) -> Result<()> {
        let read = self.read.borrow();
        let silent = |value: &Value| match value {
            Value::Bool(on) => !on,
            Value::F32(value) => *value == 0.0,
            Value::F64(value) => *value == 0.0,
            Value::I8(0) | Value::I16(0) | Value::I32(0) | Value::I64(0) => true,
            value => value.to_u64().is_ok_and(|value| value == 0),
        };
        let left = self.content.metadata.iter().filter(|(key, value)| {
            key.strip_prefix(&self.name(""))
                .is_some_and(|key| !HARMLESS.contains(&key))
                && !read.contains(*key)
                && !silent(value)
        });
        let mut left: Vec<&str> = left.map(|(key, _)| key.as_str()).collect();
        left.sort_unstable();
        ensure!(
            left.is_empty(),
            "metadata: expected keys of a plain {}, got also {}, which is not supported; use a plain model",
            self.architecture.name(),
            list(left.into_iter())
        );
        Ok(())
    }
}

pub fn config(content: &Content, architecture: Architecture, tensors: &mut Tensors) -> Result<LlamaConfig> {
    let keys = Keys::new(content, architecture);
    let hidden_size = keys.count("embedding_length")?;
    let heads = keys.count("attention.head_count")?;
    ensure!(
        heads > 0,
        "{}: expected at least 1, got 0; the file is damaged",
        keys.name("attention.head_count")
    );
    let head_dim = keys
        .optional_count("attention.key_length")?
        .unwrap_or(hidden_size / heads);
    let rotated = keys.optional_count("rope.dimension_count")?.unwrap_or(head_dim);
    let values = keys.optional_count("attention.value_length")?.unwrap_or(head_dim);
    let whole = if architecture.rotates_a_part() {
        head_dim
    } else {
        rotated
    };
    for (key, got) in [("attention.value_length", values), ("rope.dimension_count", whole)] {
        ensure!(
            got == head_dim,
            "{}: expected the head dimension {head_dim}, got {got}; not supported",
            keys.name(key)
        );
    }
    let Some(&[vocab_size, _]) = tensors.shape("token_embd.weight") else {
        bail!("token_embd.weight: expected this matrix, found none; the file is damaged")
    };
    let said = keys.optional_count("vocab_size")?.unwrap_or(vocab_size);
    ensure!(
        said == vocab_size,
        "{}: expected {vocab_size}, the rows of token_embd.weight, got {said}; the file is damaged",
        keys.name("vocab_size")
    );
    // A dense model may name one expert.
    keys.optional_count("expert_count")?;
    let causal = keys.get("attention.causal");
    ensure!(
        causal.is_none_or(|causal| matches!(causal, Value::Bool(true))),
        "{}: expected true, got {causal:?}; not supported",
        keys.name("attention.causal")
    );
    let has_bias = |parts: &[&str]| {
        let of_part = |name: &str| parts.iter().any(|part| name.ends_with(&format!(".{part}.bias")));
        tensors.names().any(of_part)
    };
    let layers = keys.count("block_count")?;
    let shape = GgufShape {
        hidden_size,
        layers,
        heads,
    };
    let layer = LayerOptions {
        rotated: (rotated != head_dim).then_some(rotated),
        ..layer(&keys, &shape)?
    };
    let config = LlamaConfig {
        hidden_size,
        intermediate_size: keys.count("feed_forward_length")?,
        vocab_size,
        layers,
        heads,
        kv_heads: keys.optional_count("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        norm_eps: keys.required(architecture.eps_key())?,
        rope_theta: keys.number("rope.freq_base")?.unwrap_or(architecture.rope_theta()),
        rope_scaling: RopeScaling::None,
        rope_pairing: architecture.pairing(),
        context_length: keys.count("context_length")?,
        attention_bias: has_bias(&["attn_q", "attn_k", "attn_v", "attn_output"]),
        mlp_bias: has_bias(&["ffn_gate", "ffn_up", "ffn_down"]),
        tied: tensors.shape("output.weight").is_none(),
        layer,
    };
    let rope_scaling = rope_scaling(&keys, tensors, rotated / 2)?;
    keys.check_all_read()?;
    Ok(LlamaConfig { rope_scaling, ..config })
}

/// What the layers do, by the architecture and the keys that only some architectures have; defaults as in llama.cpp.
fn layer(keys: &Keys, shape: &GgufShape) -> Result<LayerOptions> {
    let plain = keys.architecture.layer(shape);
    Ok(match keys.architecture {
        Architecture::Llama | Architecture::Qwen2 | Architecture::Qwen3 | Architecture::Gemma => plain,
        Architecture::Gemma2 => LayerOptions {
            softcap: Some(keys.number("attn_logit_softcapping")?.unwrap_or(50.0)),
            final_softcap: Some(keys.number("final_logit_softcapping")?.unwrap_or(30.0)),
            sliding: sliding(keys, shape.layers)?,
            ..plain
        },
        Architecture::Gemma3 => LayerOptions {
            sliding: sliding(keys, shape.layers).context("gemma3.attention.sliding_window")?,
            ..plain
        },
        Architecture::Granite => {
            let key = "rope.scaling.finetuned";
            let rotates = keys.get(key);
            ensure!(
                rotates.is_none_or(|rotates| matches!(rotates, Value::Bool(true))),
                "{}: expected true, as in a Granite that rotates its keys, got {rotates:?}; not supported",
                keys.name(key)
            );
            LayerOptions {
                embedding_scale: keys.factor("embedding_scale")?,
                residual_scale: keys.factor("residual_scale")?,
                softmax_scale: keys.factor("attention.scale")?,
                logit_divisor: Some(keys.required("logit_scale")?),
                ..plain
            }
        }
        Architecture::StableLm => {
            // As llama.cpp, which sees parts in parallel by a norm that is missing: files say true without them too.
            keys.get("use_parallel_residual");
            plain
        }
    })
}

/// As in llama.cpp: the last layer of each `attention.sliding_window_pattern`, 2 by default for Gemma 2 and 6 for
/// Gemma 3, does not slide; a list says of each layer whether it slides. The others' theta is `rope.freq_base_swa`; by
/// default Gemma 2's is that of all layers, Gemma 3's 10,000.
fn sliding(keys: &Keys, layers: usize) -> Result<Option<Sliding>> {
    let gemma2 = keys.architecture == Architecture::Gemma2;
    ensure!(
        (1..=MOST_LAYERS).contains(&layers),
        "number of layers: expected 1 to {MOST_LAYERS}, got {layers} for block_count; the file is damaged"
    );
    let window = match keys.optional_count("attention.sliding_window")? {
        None if gemma2 => 4096,
        _ => keys.count("attention.sliding_window")?,
    };
    if window == 0 {
        return Ok(None);
    }
    const PATTERN: &str = "attention.sliding_window_pattern";
    let slides: Vec<bool> = match keys.get(PATTERN) {
        Some(Value::Array(values)) => values
            .iter()
            .map(|value| match value {
                Value::Bool(slides) => Ok(*slides),
                other => Ok(whole(other, PATTERN)? != 0),
            })
            .collect::<Result<_>>()?,
        value => {
            let default = if gemma2 { 2 } else { 6 };
            let pattern = value.map_or(Ok(default), |value| whole(value, PATTERN))?;
            (0..layers)
                .map(|layer| pattern == 0 || !(layer + 1).is_multiple_of(pattern))
                .collect()
        }
    };
    Ok(Some(Sliding {
        window,
        layers: slides,
        rope_theta: keys.number("rope.freq_base_swa")?.or((!gemma2).then_some(10_000.0)),
    }))
}

/// As in llama.cpp: a factor without a type is linear, `scale_linear` is the factor's old name, and factors per
/// frequency (`rope_freqs.weight`) multiply with it.
fn rope_scaling(keys: &Keys, tensors: &mut Tensors, half: usize) -> Result<RopeScaling> {
    let factor = linear_factor(keys)?;
    const FREQUENCIES: &str = "rope_freqs.weight";
    if tensors.shape(FREQUENCIES).is_some() {
        let factors = tensors.read(FREQUENCIES, &[half])?.dequantize(&Device::Cpu)?;
        let factors = factors.to_vec1::<f32>()?.into_iter().map(f64::from);
        return Ok(RopeScaling::Factors(factors.map(|each| each * factor).collect()));
    }
    Ok(match factor {
        1.0 => RopeScaling::None,
        factor => RopeScaling::Linear(factor),
    })
}

fn linear_factor(keys: &Keys) -> Result<f64> {
    let a = keys.architecture.name();
    let kind = match keys.get("rope.scaling.type") {
        Some(value) => Some(
            value
                .to_string()
                .with_context(|| keys.name("rope.scaling.type"))?
                .as_str(),
        ),
        None => None,
    };
    ensure!(
        matches!(kind, None | Some("none" | "linear")),
        "{a}.rope.scaling.type: expected none or linear, got {}; not supported",
        kind.unwrap_or_default()
    );
    let attention = keys.number("rope.scaling.attn_factor")?.unwrap_or(1.0);
    ensure!(
        attention == 1.0,
        "{a}.rope.scaling.attn_factor: expected 1, got {attention}; not supported"
    );
    // 0 means no factor.
    let factor = |key: &str| Ok::<_, anyhow::Error>(keys.number(key)?.filter(|&factor| factor != 0.0));
    let (new, old) = (factor("rope.scaling.factor")?, factor("rope.scale_linear")?);
    if let (Some(new), Some(old)) = (new, old) {
        ensure!(
            new == old,
            "{a}.rope.scale_linear: expected {a}.rope.scaling.factor, {new}, got {old}; the file contradicts itself"
        );
    }
    let Some(factor) = new.or(old) else {
        ensure!(
            kind != Some("linear"),
            "{a}.rope.scaling.factor: expected a factor beside the type linear, found none; the file is damaged"
        );
        return Ok(1.0);
    };
    ensure!(
        factor.is_finite() && factor > 0.0,
        "{a}.rope.scaling.factor: expected a number above 0, got {factor}; the file is damaged"
    );
    ensure!(
        kind != Some("none") || factor == 1.0,
        "{a}.rope.scaling.type: expected linear beside the factor {factor}, got none; the file contradicts itself"
    );
    Ok(factor)
}
