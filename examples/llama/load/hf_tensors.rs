//! The tensors of safetensors files.

use std::path::PathBuf;

use anyhow::{anyhow, bail, ensure, Context, Result};
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, TensorView};

use super::fp8::{is_of_activations, scaled, Quantization};
use super::hf_text_part::Names;
use super::unread::Unread;
use crate::weights::Part;

pub struct Tensors {
    /// The tensors' origin, for messages.
    name: String,
    files: MmapedSafetensors,
    count: usize,
    quantization: Option<Quantization>,
    names: Names,
    unread: Unread,
}

impl Tensors {
    pub fn open(paths: &[PathBuf], quantization: Option<Quantization>) -> Result<Self> {
        // SAFETY: the maps are only read, and live no longer than this process; a checkpoint that another process
        // rewrites meanwhile is beyond what mapping a file can guarantee.
        let files = unsafe { MmapedSafetensors::multi(paths) };
        let name = paths[0].display().to_string();
        let files = files.with_context(|| {
            format!("{name}: expected whole safetensors files, got a damaged or truncated one; fetch it again")
        })?;
        let mut names: Vec<String> = files.tensors().into_iter().map(|(name, _)| name).collect();
        let count = names.len();
        names.sort();
        for pair in names.windows(2) {
            ensure!(
                pair[0] != pair[1],
                "{name}: expected each tensor in one file, got {} in two; fetch the checkpoint again",
                pair[0]
            );
        }
        let mut unread = Unread::new(names);
        unread.pass(|name| is_buffer(name) || (quantization.is_some() && is_of_activations(name)));
        Ok(Self {
            name,
            files,
            count,
            quantization,
            names: Names::Plain,
            unread,
        })
    }

    /// From now on names are those of a text model whose tensors lie beside a part for images.
    pub fn take_text_part(&mut self) {
        let names = Names::of(|held| self.files.get(held).is_ok());
        self.unread.pass(|held| names.is_of_images(held));
        self.names = names;
    }

    pub fn len(&self) -> usize {
        self.count
    }

    fn view(&self, name: &str) -> Option<TensorView<'_>> {
        self.files.get(&self.names.held(name)).ok()
    }

    /// Loads a tensor on the CPU, which then counts as read.
    fn load(&mut self, name: &str) -> Result<Tensor> {
        let held = self.names.held(name);
        let tensor = self.files.load(&held, &Device::Cpu)?;
        self.unread.take(&held);
        Ok(tensor)
    }

    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.view(name).map(|view| view.shape().to_vec())
    }

    /// Reads the tensor as floats on the CPU; it must have this shape, and then counts as read, with its scale.
    pub fn read(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let kind = self.checked(name, shape)?;
        let tensor = self.load(name)?;
        match kind {
            Dtype::F8_E4M3 => self
                .scaled(name, &tensor)
                .with_context(|| format!("{}: {name}", self.name)),
            _ => Ok(tensor),
        }
    }

    /// As [`Self::read`], a part of the matrix: no other part is read from the file, unless FP8 has scales for blocks.
    pub fn read_part(&mut self, name: &str, shape: &[usize], part: &Part) -> Result<Tensor> {
        let kind = self.checked(name, shape)?;
        let Some(view) = self.view(name).filter(|_| kind != Dtype::F8_E4M3) else {
            return part.cut(&self.read(name, shape)?);
        };
        let slices = match part {
            Part::Rows(rows) => view.sliced_data(&[rows.clone().into(), (..).into()]),
            Part::Columns(columns) => view.sliced_data(&[(..).into(), columns.clone().into()]),
        };
        let slices = slices.map_err(|error| anyhow!("{}: {name}: {error:?}", self.name))?;
        let shape = slices.newshape();
        let bytes = slices.collect::<Vec<&[u8]>>().concat();
        let tensor = Tensor::from_raw_buffer(&bytes, kind.try_into()?, &shape, &Device::Cpu)?;
        let held = self.names.held(name);
        self.unread.take(&held);
        Ok(tensor)
    }

    /// The kind of numbers of a tensor, which must be floats of this shape.
    fn checked(&self, name: &str, shape: &[usize]) -> Result<Dtype> {
        let Some(view) = self.view(name) else {
            bail!(
                "{}: expected {name} of shape {shape:?}, found none; fetch the checkpoint again",
                self.name
            )
        };
        ensure!(
            view.shape() == shape,
            "{}: expected {name} of shape {shape:?}, got {:?}; config.json does not fit, fetch the checkpoint again",
            self.name,
            view.shape()
        );
        let kind = view.dtype();
        use Dtype::{BF16, F16, F32, F64, F8_E4M3};
        ensure!(
            matches!(kind, F64 | F32 | F16 | BF16 | F8_E4M3),
            "{}: {name}: expected F64, F32, F16, BF16 or F8_E4M3, got {kind:?}, which is not supported; use the \
             unquantized checkpoint or a GGUF file",
            self.name
        );
        Ok(kind)
    }

    /// FP8 values times their scale; the plain values without `quantization_config` and scale.
    fn scaled(&mut self, name: &str, values: &Tensor) -> Result<Tensor> {
        let names = ["_scale", "_scale_inv"].map(|suffix| format!("{name}{suffix}"));
        let found: Vec<String> = names.into_iter().filter(|name| self.view(name).is_some()).collect();
        let scale = match &found[..] {
            [] => {
                ensure!(
                    self.quantization.is_none(),
                    "expected {name}_scale or {name}_scale_inv beside FP8 weights, found neither; fetch the checkpoint \
                     again"
                );
                return Ok(values.to_dtype(DType::F32)?);
            }
            [scale] => scale,
            _ => bail!("expected one scale, got {}; not supported", found.join(" and ")),
        };
        let tensor = self.load(scale)?;
        ensure!(
            matches!(tensor.dtype(), DType::F64 | DType::F32 | DType::F16 | DType::BF16),
            "{scale}: expected F64, F32, F16 or BF16, got {}, which is not supported",
            tensor.dtype().as_str()
        );
        let quantization = self.quantization.clone().unwrap_or_default();
        scaled(values, &tensor, &quantization).with_context(|| scale.clone())
    }

    /// Marks the tensor `copy` as read if it equals `of`, which the model reads instead.
    pub fn pass_copy(&mut self, copy: &str, of: &str) -> Result<()> {
        if !self.unread.contains(&self.names.held(copy)) {
            return Ok(());
        }
        let same = match (self.view(copy), self.view(of)) {
            (Some(a), Some(b)) => a.dtype() == b.dtype() && a.shape() == b.shape() && a.data() == b.data(),
            _ => false,
        };
        ensure!(
            same,
            "{}: {copy}: expected the values of {of}, as tie_word_embeddings says, got others; set tie_word_embeddings \
             to false in config.json where {copy} is meant",
            self.name
        );
        self.unread.take(&self.names.held(copy));
        Ok(())
    }

    /// An error that names the unread tensors, if there are any.
    pub fn check_all_read(&self) -> Result<()> {
        self.unread.check().with_context(|| self.name.clone())
    }
}

/// Whether a tensor is a buffer that older versions of transformers saved and no version reads: rotations, which follow
/// from config.json.
fn is_buffer(name: &str) -> bool {
    ["inv_freq", "cos_cached", "sin_cached"]
        .iter()
        .any(|buffer| name.ends_with(&format!("rotary_emb.{buffer}")))
}
