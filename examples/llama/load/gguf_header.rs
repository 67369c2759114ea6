//! The header of a GGUF file. Every size is checked against the file's length before anything is allocated for it.

use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use anyhow::{anyhow, bail, ensure, Context, Result};
use candle_core::quantized::gguf_file::{Content, Value, VersionedMagic};
use candle_core::quantized::GgmlDType;

const DEFAULT_ALIGNMENT: u64 = 32;
/// ggml's bound.
const MOST_AXES: u32 = 4;
/// Lists of lists: no known file goes deeper than one.
const MOST_LEVELS: usize = 4;

/// One tensor's place in its file.
#[derive(Clone, Debug)]
pub struct Entry {
    pub dtype: GgmlDType,
    /// Outermost axis first.
    pub shape: Vec<usize>,
    /// Bytes from the file's beginning.
    pub start: u64,
}

/// A file's metadata, and the places of its tensors.
pub struct Header {
    /// The metadata; tensors are in `tensors` instead.
    pub content: Content,
    pub tensors: HashMap<String, Entry>,
}

impl Header {
    /// Reads the header and compares the file's length with it, so that a broken download is noticed before loading.
    pub fn read(path: &Path) -> Result<Self> {
        let read = || -> Result<Self> {
            let file = File::open(path)?;
            let len = file.metadata()?.len();
            let mut reader = Reader {
                inner: BufReader::new(file),
                position: 0,
                len,
                wide: true,
            };
            read_header(&mut reader)
        };
        read().with_context(|| format!("{}", path.display()))
    }
}

fn damaged(why: impl Display) -> anyhow::Error {
    anyhow!("expected a whole GGUF file, got a damaged or truncated one ({why}); fetch it again")
}

/// Counts the bytes that it reads, so that no allocation exceeds the rest of the file.
struct Reader<R> {
    inner: R,
    position: u64,
    len: u64,
    /// Whether lengths have 64 bits: all versions but the first.
    wide: bool,
}

impl<R: Read> Reader<R> {
    fn left(&self) -> u64 {
        self.len.saturating_sub(self.position)
    }

    /// Refuses `count` items of at least `size` bytes each if the file is too short for them.
    fn hold(&self, count: u64, size: u64, what: &str) -> Result<()> {
        match count.checked_mul(size).is_some_and(|bytes| bytes <= self.left()) {
            true => Ok(()),
            false => Err(damaged(format_args!(
                "{count} {what} at byte {}, {} bytes before its end",
                self.position,
                self.left()
            ))),
        }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.hold(bytes.len() as u64, 1, "bytes")?;
        self.inner.read_exact(bytes)?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn length(&mut self) -> Result<u64> {
        match self.wide {
            true => self.u64(),
            false => self.u32().map(u64::from),
        }
    }

    /// Some writers end strings with zeros; some strings are not UTF-8.
    fn string(&mut self) -> Result<String> {
        let len = self.length()?;
        self.hold(len, 1, "bytes of a string")?;
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes)?;
        while bytes.last() == Some(&0) {
            bytes.pop();
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn value(&mut self, kind: u32, level: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.bytes()?)),
            1 => Value::I8(i8::from_le_bytes(self.bytes()?)),
            2 => Value::U16(u16::from_le_bytes(self.bytes()?)),
            3 => Value::I16(i16::from_le_bytes(self.bytes()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.bytes()?)),
            6 => Value::F32(f32::from_le_bytes(self.bytes()?)),
            7 => match self.bytes()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(damaged(format_args!("a truth value {other}"))),
            },
            8 => Value::String(self.string()?),
            9 => self.list(level)?,
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.bytes()?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes()?)),
            other => return Err(damaged(format_args!("a value of type {other}"))),
        })
    }

    fn list(&mut self, level: usize) -> Result<Value> {
        let (kind, len) = (self.u32()?, self.length()?);
        let prefix = if self.wide { 8 } else { 4 };
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            10..=12 => 8,
            8 => prefix,
            9 => 4 + prefix,
            _ => 4,
        };
        self.hold(len, least, "list entries")?;
        if level >= MOST_LEVELS {
            return Err(damaged("lists in lists in lists"));
        }
        Ok(Value::Array(
            (0..len).map(|_| self.value(kind, level + 1)).collect::<Result<_>>()?,
        ))
    }
}

fn read_header<R: Read>(reader: &mut Reader<R>) -> Result<Header> {
    let magic = version(reader)?;
    reader.wide = magic != VersionedMagic::GgufV1;
    let (tensors, pairs) = (reader.length()?, reader.length()?);
    // A key has at least a name's length, a type and a byte of value; a tensor, at least a name's length, the number of
    // axes, the type and the offset.
    let prefix = if reader.wide { 8 } else { 4 };
    reader.hold(pairs, prefix + 5, "metadata keys")?;
    reader.hold(tensors, prefix + 16, "tensors")?;
    let mut metadata = HashMap::new();
    for _ in 0..pairs {
        let key = reader.string()?;
        let kind = reader.u32()?;
        let value = reader.value(kind, 0)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(damaged(format_args!("the key {key} twice")));
        }
    }
    let alignment = alignment(&metadata)?;
    let listed: Vec<Listed> = (0..tensors).map(|_| Listed::read(reader)).collect::<Result<_>>()?;
    let data = reader.position.div_ceil(alignment) * alignment;
    Ok(Header {
        tensors: place(listed, data, alignment, reader.len)?,
        content: Content {
            magic,
            metadata,
            tensor_infos: HashMap::new(),
            tensor_data_offset: data,
        },
    })
}

fn version<R: Read>(reader: &mut Reader<R>) -> Result<VersionedMagic> {
    const BIG_ENDIAN: &str =
        "GGUF: expected a little-endian file, got a big-endian one, which is not supported; convert it with \
         gguf_convert_endian.py of the gguf package";
    match &reader.bytes::<4>()? {
        b"GGUF" => {}
        b"FUGG" => bail!(BIG_ENDIAN),
        old @ (b"lmgg" | b"fmgg" | b"tjgg" | b"algg") => bail!(
            "expected a GGUF file, got one of the format {}, which is older and not supported; convert it to GGUF",
            old.iter().rev().map(|&byte| char::from(byte)).collect::<String>()
        ),
        other => return Err(damaged(format_args!("its first bytes are {other:02x?}"))),
    }
    match reader.u32()? {
        1 => Ok(VersionedMagic::GgufV1),
        2 => Ok(VersionedMagic::GgufV2),
        3 => Ok(VersionedMagic::GgufV3),
        swapped if (1..=0xffff).contains(&swapped.swap_bytes()) => bail!(BIG_ENDIAN),
        other => bail!("GGUF version: expected 1 to 3, got {other}, which is not supported; convert the model anew"),
    }
}

fn alignment(metadata: &HashMap<String, Value>) -> Result<u64> {
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(value) => value.to_u64().context("general.alignment")?,
    };
    ensure!(
        alignment.is_power_of_two() && alignment <= 1 << 20,
        "general.alignment: expected a power of two up to 2^20, got {alignment}; the file is damaged"
    );
    Ok(alignment)
}

/// A tensor as the header lists it.
struct Listed {
    name: String,
    shape: Vec<usize>,
    kind: u32,
    offset: u64,
}

impl Listed {
    fn read<R: Read>(reader: &mut Reader<R>) -> Result<Self> {
        let name = reader.string()?;
        let axes = reader.u32()?;
        if axes > MOST_AXES {
            return Err(damaged(format_args!("{name} has {axes} axes")));
        }
        let shape = (0..axes).map(|_| Ok(usize::try_from(reader.length()?)?));
        let mut shape = shape.collect::<Result<Vec<_>>>()?;
        shape.reverse();
        Ok(Self {
            name,
            shape,
            kind: reader.u32()?,
            offset: reader.u64()?,
        })
    }

    /// The tensor's size in bytes.
    fn size(&self, dtype: GgmlDType) -> Result<u64> {
        let block = dtype.block_size();
        let row = self.shape.last().copied().unwrap_or(1);
        ensure!(
            row.is_multiple_of(block),
            "{}: expected rows of a multiple of {block} values, as {dtype:?} packs them, got {row}; the file is \
             damaged",
            self.name
        );
        let count = self
            .shape
            .iter()
            .try_fold(1u64, |product, &axis| product.checked_mul(axis as u64));
        let bytes = count.and_then(|count| (count / block as u64).checked_mul(dtype.type_size() as u64));
        bytes
            .filter(|&bytes| bytes > 0)
            .ok_or_else(|| damaged(format_args!("{} has the shape {:?}", self.name, self.shape)))
    }
}

/// The place of each tensor: one after another from byte `data` on, each at a multiple of the alignment.
fn place(listed: Vec<Listed>, data: u64, alignment: u64, len: u64) -> Result<HashMap<String, Entry>> {
    let mut names = HashSet::new();
    let mut entries = HashMap::with_capacity(listed.len());
    let (mut offset, mut end) = (0u64, data);
    for tensor in listed {
        let dtype = supported(tensor.kind).with_context(|| tensor.name.clone())?;
        let size = tensor.size(dtype)?;
        if tensor.offset != offset {
            return Err(damaged(format_args!(
                "{} is not behind the tensor before it",
                tensor.name
            )));
        }
        let start = data.checked_add(offset).ok_or_else(|| damaged("offsets"))?;
        end = start.checked_add(size).ok_or_else(|| damaged("sizes"))?;
        offset = offset
            .checked_add(size)
            .and_then(|end| end.checked_next_multiple_of(alignment))
            .ok_or_else(|| damaged("sizes"))?;
        if !names.insert(tensor.name.clone()) {
            return Err(damaged(format_args!("the tensor {} twice", tensor.name)));
        }
        let shape = tensor.shape;
        entries.insert(tensor.name, Entry { dtype, shape, start });
    }
    ensure!(
        end <= len,
        "expected at least {end} bytes, as its header says, got {len}: the file is truncated; fetch it again"
    );
    Ok(entries)
}

/// The dtype, if candle can compute with it.
fn supported(kind: u32) -> Result<GgmlDType> {
    Ok(match kind {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        other => bail!(
            "expected values of type F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K, got {}, which is \
             not supported; take the model in another quantization",
            type_name(other)
        ),
    })
}

/// ggml's name of a type that candle cannot compute with.
fn type_name(kind: u32) -> String {
    let name = match kind {
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36 => "IQ4_NL_4_4",
        37 => "IQ4_NL_4_8",
        38 => "IQ4_NL_8_8",
        39 => "MXFP4",
        40 => "NVFP4",
        other => return format!("type {other}"),
    };
    name.into()
}
