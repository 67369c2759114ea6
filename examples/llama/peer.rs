//! candle-transformers' own quantized llama, which `bench` measures beside ours.

use std::fs::File;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::{ModelWeights, MAX_SEQ_LEN};

use crate::finite;
use crate::stats::{memory, Hidden, Stats};

/// The tokens that it holds, for any file.
pub const CONTEXT: usize = MAX_SEQ_LEN;

/// Runs the first `prompt` tokens at once, as its callers do (it has no mask for a later chunk), then one at a time.
/// Also returns the memory held after loading the weights.
pub fn measure(model: &str, tokens: &[u32], prompt: usize) -> Result<(Option<u64>, Stats)> {
    let mut file = File::open(model).with_context(|| format!("peer: {model}"))?;
    let content = Content::read(&mut file).with_context(|| {
        format!("peer: expected a GGUF file for candle's quantized llama, got {model}; leave --peer out")
    })?;
    let mut weights = ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
    let loaded = memory("VmRSS");
    let mut forward = |tokens: &[u32], position: usize| -> Result<f64> {
        let start = Instant::now();
        let logits = weights.forward(&Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?, position)?;
        let seconds = start.elapsed().as_secs_f64();
        finite::check("candle's logits", &logits, position + tokens.len() - 1)?;
        Ok(seconds)
    };
    let prefill = forward(&tokens[..prompt], 0)?;
    let mut decode = 0.0;
    for position in prompt..tokens.len() {
        decode += forward(&tokens[position..position + 1], position)?;
    }
    let rest = tokens.len() - prompt;
    let stats = Stats {
        prompt_tokens: prompt,
        generated_tokens: rest,
        prefill_tokens_per_second: Some(prompt as f64 / prefill),
        decode_tokens_per_second: (rest > 0).then(|| rest as f64 / decode),
        kv: None,
        hidden: Hidden {
            hidden_ratio: 0.0,
            hidden_ratio_per_layer: Vec::new(),
        },
        peak_rss_bytes: memory("VmHWM"),
    };
    Ok((loaded, stats))
}
