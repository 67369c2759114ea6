//! A checkpoint's weights as floats, in the terms of a Hugging Face folder.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::Tensor;

use crate::model::LlamaConfig;
use crate::rope::Pairing;
use crate::weights::{Linear, Weights};

/// Every tensor of the checkpoint, by its Hugging Face name. Heads whose coordinates `2i` and `2i + 1` are rotated
/// together are reordered, so that `i` and `i + D/2` are.
pub fn all_weights(weights: &mut dyn Weights, config: &LlamaConfig) -> Result<BTreeMap<String, Tensor>> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut all = BTreeMap::new();
    let mut add = |path: &str, linear: Linear, turn: bool| -> Result<()> {
        let turned = |tensor: &Tensor| match turn {
            true => halves(tensor, config.head_dim),
            false => Ok(tensor.clone()),
        };
        all.insert(format!("{path}.weight"), turned(&linear.weight()?)?);
        if let Some(bias) = linear.bias() {
            all.insert(format!("{path}.bias"), turned(bias)?);
        }
        Ok(())
    };
    let embedding = "model.embed_tokens";
    add(embedding, weights.table(embedding, config.vocab_size, hidden)?, false)?;
    if !config.tied {
        add("lm_head", weights.table("lm_head", config.vocab_size, hidden)?, false)?;
    }
    let interleaved = config.rope_pairing == Pairing::Interleaved;
    for layer in 0..config.layers {
        for (part, rows, columns, rotated) in [
            ("self_attn.q_proj", queries, hidden, true),
            ("self_attn.k_proj", keys, hidden, true),
            ("self_attn.v_proj", keys, hidden, false),
            ("self_attn.o_proj", hidden, queries, false),
            ("mlp.gate_proj", inner, hidden, false),
            ("mlp.up_proj", inner, hidden, false),
            ("mlp.down_proj", hidden, inner, false),
        ] {
            let path = format!("model.layers.{layer}.{part}");
            add(&path, weights.linear(&path, rows, columns)?, rotated && interleaved)?;
        }
    }
    let norms = (0..config.layers).flat_map(|layer| {
        ["input_layernorm", "post_attention_layernorm"].map(|norm| format!("model.layers.{layer}.{norm}"))
    });
    for path in norms.chain(["model.norm".to_string()]) {
        all.insert(format!("{path}.weight"), weights.vector(&path, hidden)?);
    }
    Ok(all)
}

/// Rows of heads whose coordinates `2i` and `2i + 1` are rotated together -> `i` and `i + D/2`.
fn halves(rows: &Tensor, head_dim: usize) -> Result<Tensor> {
    let pairs = rows.reshape((rows.dim(0)? / head_dim, head_dim / 2, 2, ()))?;
    Ok(pairs.transpose(1, 2)?.contiguous()?.reshape(rows.shape())?)
}
