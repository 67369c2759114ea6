//! The tensors of a GGUF file, or of all parts of a split one.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context, Result};
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::quantized::gguf_file::{Content, TensorInfo};
use candle_core::quantized::QTensor;
use candle_core::{Device, Shape};

use super::gguf::count_or;
use super::gguf_header::{Entry, Header};
use super::unread::Unread;
use crate::weights::Part;

pub struct Tensors {
    parts: Vec<(PathBuf, BufReader<File>)>,
    /// By name: the index of the part that holds the tensor, and its entry there.
    entries: HashMap<String, (usize, Entry)>,
    unread: Unread,
}

/// The metadata, and the tensors of all parts. `path` is the file, or its first part.
pub fn open(path: &Path) -> Result<(Content, Tensors)> {
    let first = Header::read(path)?;
    let count = count_or(&first.content, "split.count", 1)?.max(1);
    let paths = match count {
        1 => vec![path.to_path_buf()],
        count => part_paths(path, count_or(&first.content, "split.no", 0)?, count)?,
    };
    let content = first.content;
    let mut tensors = Tensors {
        parts: Vec::new(),
        entries: HashMap::new(),
        unread: Unread::default(),
    };
    tensors.add(path, first.tensors)?;
    for (number, path) in paths.iter().enumerate().skip(1) {
        let part = Header::read(path)?;
        check_part(&content, &part.content, number, count).with_context(|| format!("{}", path.display()))?;
        tensors.add(path, part.tensors)?;
    }
    if count > 1 {
        let expected = count_or(&content, "split.tensors.count", tensors.entries.len())?;
        ensure!(
            tensors.entries.len() == expected,
            "{}: expected {expected} tensors in its {count} parts, got {}; fetch all parts again",
            path.display(),
            tensors.entries.len()
        );
    }
    tensors.unread = Unread::new(tensors.entries.keys().cloned());
    Ok((content, tensors))
}

/// The parts' paths, from NAME-00001-of-0000N.gguf, which `path` must be.
fn part_paths(path: &Path, number: usize, count: usize) -> Result<Vec<PathBuf>> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let suffix = |number: usize| format!("-{:05}-of-{count:05}.gguf", number + 1);
    let Some(stem) = name.strip_suffix(&suffix(number)) else {
        bail!(
            "{}: expected the name NAME{}, as it is part {} of {count} of a split GGUF file, got {name}; give it its \
             name back and put the other parts beside it",
            path.display(),
            suffix(number),
            number + 1
        )
    };
    let paths: Vec<PathBuf> = (0..count)
        .map(|number| path.with_file_name(format!("{stem}{}", suffix(number))))
        .collect();
    ensure!(
        number == 0,
        "{}: expected the first part of a split GGUF file, got part {} of {count}; give {}",
        path.display(),
        number + 1,
        paths[0].display()
    );
    for part in &paths {
        ensure!(
            part.is_file(),
            "{}: expected this part of a GGUF file split into {count}, found no such file; fetch all parts",
            part.display()
        );
    }
    Ok(paths)
}

/// The bytes of numbers in whole blocks.
fn bytes_of(entry: &Entry, numbers: usize) -> usize {
    numbers / entry.dtype.block_size() * entry.dtype.type_size()
}

/// Checks that a further part belongs to the first, and has no metadata that the first lacks.
fn check_part(first: &Content, part: &Content, number: usize, count: usize) -> Result<()> {
    let got = (count_or(part, "split.no", 0)?, count_or(part, "split.count", 1)?);
    ensure!(
        got == (number, count),
        "expected part {} of {count} of a split GGUF file, got part {} of {}; fetch all parts again",
        number + 1,
        got.0.saturating_add(1),
        got.1
    );
    for (key, value) in &part.metadata {
        let same = || {
            first
                .metadata
                .get(key)
                .is_some_and(|first| format!("{first:?}") == format!("{value:?}"))
        };
        ensure!(
            key.starts_with("split.") || same(),
            "{key}: expected metadata of the first part alone, got it in part {} too; fetch all parts again",
            number + 1
        );
    }
    Ok(())
}

impl Tensors {
    fn add(&mut self, path: &Path, tensors: HashMap<String, Entry>) -> Result<()> {
        let file = File::open(path).with_context(|| format!("{}", path.display()))?;
        for (name, entry) in tensors {
            ensure!(
                self.entries.insert(name.clone(), (self.parts.len(), entry)).is_none(),
                "{}: expected tensors that no other part has, got {name}; fetch all parts again",
                path.display()
            );
        }
        self.parts.push((path.into(), BufReader::new(file)));
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|(_, entry)| entry.shape.as_slice())
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Reads the tensor, which must have this shape, and marks it as read.
    pub fn read(&mut self, name: &str, shape: &[usize]) -> Result<QTensor> {
        let (file, entry) = self.checked(name, shape)?;
        let tensor = self.read_rows(file, &entry, 0..shape[0]);
        self.unread.take(name);
        tensor.with_context(|| format!("{}: {name}", self.parts[file].0.display()))
    }

    /// As [`Self::read`], a part of the matrix. Of columns that begin or end within a block, nothing is read.
    pub fn read_part(&mut self, name: &str, shape: [usize; 2], part: &Part) -> Result<Option<QTensor>> {
        let (file, entry) = self.checked(name, &shape)?;
        let block = entry.dtype.block_size();
        let edges = match part {
            Part::Rows(_) => [0, shape[1]],
            Part::Columns(columns) => [columns.start, columns.end],
        };
        if edges.iter().any(|edge| !edge.is_multiple_of(block)) {
            return Ok(None);
        }
        let tensor = match part {
            Part::Rows(rows) => self.read_rows(file, &entry, rows.clone()),
            Part::Columns(columns) => self.read_columns(file, &entry, columns.clone()),
        };
        self.unread.take(name);
        let tensor = tensor.with_context(|| format!("{}: {name}", self.parts[file].0.display()))?;
        Ok(Some(tensor))
    }

    /// The part of the file that holds a tensor, and its entry there, which must have this shape.
    fn checked(&self, name: &str, shape: &[usize]) -> Result<(usize, Entry)> {
        let first = self.parts[0].0.display();
        let Some((part, entry)) = self.entries.get(name) else {
            bail!("{first}: expected {name} of shape {shape:?}, found none; fetch the checkpoint again")
        };
        ensure!(
            entry.shape == shape,
            "{}: {name}: expected shape {shape:?}, got {:?}; the file is damaged",
            self.parts[*part].0.display(),
            entry.shape
        );
        Ok((*part, entry.clone()))
    }

    /// Some rows, which lie one after another.
    fn read_rows(&mut self, file: usize, entry: &Entry, rows: Range<usize>) -> Result<QTensor> {
        let mut shape = entry.shape.clone();
        let row = shape[1..].iter().product::<usize>();
        shape[0] = rows.len();
        let info = TensorInfo {
            ggml_dtype: entry.dtype,
            shape: Shape::from(shape),
            offset: entry.start + bytes_of(entry, rows.start * row) as u64,
        };
        Ok(info.read(&mut self.parts[file].1, 0, &Device::Cpu)?)
    }

    /// Some columns, in whole blocks.
    fn read_columns(&mut self, file: usize, entry: &Entry, columns: Range<usize>) -> Result<QTensor> {
        let (rows, width) = (entry.shape[0], entry.shape[1]);
        let (file, own) = (&mut self.parts[file].1, bytes_of(entry, columns.len()));
        let mut blocks = vec![0; rows * own];
        for (row, blocks) in blocks.chunks_exact_mut(own).enumerate() {
            let start = entry.start + bytes_of(entry, row * width + columns.start) as u64;
            file.seek(SeekFrom::Start(start))?;
            file.read_exact(blocks)?;
        }
        Ok(qtensor_from_ggml(
            entry.dtype,
            &blocks,
            vec![rows, columns.len()],
            &Device::Cpu,
        )?)
    }

    /// An error that names the unread tensors, if there are any.
    pub fn check_all_read(&self) -> Result<()> {
        self.unread
            .check()
            .with_context(|| format!("{}", self.parts[0].0.display()))
    }
}
