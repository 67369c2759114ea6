//! Opening a checkpoint: a GGUF file, a folder of Hugging Face files, or a model id of the Hugging Face hub.

mod formed;
mod fp8;
mod gguf;
mod gguf_config;
mod gguf_header;
mod gguf_kind;
mod gguf_tensors;
mod gguf_tokenizer;
mod hf;
mod hf_config;
mod hf_kind;
mod hf_tensors;
mod hf_text_part;
pub mod hf_tokenizer;
mod hub;
pub mod pre_tokenizer;
mod sentencepiece;
pub mod text;
mod unread;

use std::path::Path;

use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device};
use candle_sfattention::CompressedAttention;

use crate::model::{Llama, LlamaConfig};
use crate::ranks::Ranks;
use crate::weights::{Linear, Weights};

pub use self::formed::Formed;
#[allow(unused_imports)] // not every program makes weights
pub use self::hf::shape;
use self::text::{Start, Text};

/// How weights are held.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// The dtype of weights and activations; f32 for GGUF files on the CPU.
    pub dtype: DType,
    /// Whether a GGUF file's quantized matrices become floats. On a GPU they always do, so that one kernel serves
    /// prompts and single tokens.
    pub dequantize: bool,
    pub device: Device,
}

/// Floats in f32, on the CPU.
impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            dequantize: true,
            device: Device::Cpu,
        }
    }
}

/// A checkpoint whose header and tokenizer are read, but not its weights.
pub struct Checkpoint {
    pub config: LlamaConfig,
    pub text: Text,
    /// Names and contents of a Hugging Face folder's files about the framing of texts, except the tokenizer. An export
    /// copies them.
    #[allow(dead_code)] // the train example does so
    pub companions: Vec<(String, Vec<u8>)>,
    weights: Box<dyn Weights>,
}

impl Checkpoint {
    /// `model` is an existing `.gguf` file, an existing folder, or else `OWNER/NAME` on the hub.
    pub fn open(model: &str, options: LoadOptions) -> Result<Self> {
        let LoadOptions { dtype, device, .. } = &options;
        let path = Path::new(model);
        let checkpoint = if path.is_dir() {
            hf::open(&hf::Files::in_folder(path)?, *dtype, device)?
        } else if path.exists() {
            ensure!(
                has_gguf_extension(path),
                "model: expected a .gguf file, a folder or a model id, got the file {model}; \
                 for safetensors give the folder with config.json and tokenizer.json"
            );
            ensure!(
                *dtype == DType::F32 || !device.is_cpu(),
                "dtype: expected f32 for a GGUF file on the CPU, whose weights stay quantized, got {}; leave --dtype \
                 out",
                dtype.as_str()
            );
            gguf::open(path, options)?
        } else if is_model_id(model) && !has_gguf_extension(path) {
            hf::open(&hf::Files::from_hub(model)?, *dtype, device)?
        } else {
            bail!(
                "model: expected a .gguf file, a folder or a model id OWNER/NAME, got {model}, which does not exist; \
                 examples/llama/fetch.sh fetches a small one"
            )
        };
        let held = |checkpoint: &Self| {
            checkpoint.config.check()?;
            checkpoint.config.check_held(checkpoint.weights.as_ref())
        };
        held(&checkpoint).with_context(|| model.to_string())?;
        Ok(checkpoint)
    }

    /// Loads the weights; `attention` holds one entry per layer.
    pub fn load(&mut self, attention: Vec<CompressedAttention>) -> Result<Llama> {
        let whole = Ranks::default();
        self.load_formed(attention, &|linear| Ok(linear.into_prompt()), &whole)
    }

    /// As [`Self::load`], with each matrix as `form` gives it, such as with another form for single tokens; the shard
    /// of one rank. `attention` is that of the rank's heads.
    pub fn load_formed(
        &mut self,
        attention: Vec<CompressedAttention>,
        form: &dyn Fn(Linear) -> Result<Linear>,
        ranks: &Ranks,
    ) -> Result<Llama> {
        self.read(|inner, config| Llama::load(&mut Formed { inner, form }, config, attention, ranks))
    }

    /// Gives the weights to `read`, which must read all of them.
    pub fn read<T>(&mut self, read: impl FnOnce(&mut dyn Weights, &LlamaConfig) -> Result<T>) -> Result<T> {
        let result = read(self.weights.as_mut(), &self.config)?;
        self.weights.check_all_read()?;
        Ok(result)
    }

    /// Token ids of `text`; `special` adds the tokens around a text, such as BOS.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let ids = self.text.encode(text, special)?;
        self.check_ids(&ids)?;
        Ok(ids)
    }

    /// What [`Self::encode`] adds before a text, for sequences that are made of pieces of texts.
    pub fn start(&self) -> Result<Start> {
        let start = self.text.start()?;
        self.check_ids(start.tokens())?;
        Ok(start)
    }

    fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let vocabulary = self.config.vocab_size;
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
            let token = self.text.tokenizer.id_to_token(*id).unwrap_or_default();
            bail!(
                "tokenizer: expected ids below {vocabulary}, the vocabulary of the weights, got {id} for {token:?}; \
                 the tokenizer belongs to another checkpoint, or the embedding was not enlarged for its added tokens"
            );
        }
        Ok(())
    }
}

fn has_gguf_extension(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// `OWNER/NAME` in the hub's alphabet, and not a path such as `./NAME`.
fn is_model_id(model: &str) -> bool {
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    model
        .split_once('/')
        .is_some_and(|(owner, name)| part(owner) && part(name))
}
