//! What a cache stores its entries in.

use candle_core::{bail, DType, Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;

/// How a cache stores keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Storage {
    /// 64 bits, for f64 inputs.
    F64,
    /// 32 bits.
    F32,
    /// 16 bits, up to 65504.
    F16,
    /// 16 bits with f32's range.
    BF16,
    /// Closed chains in 8 bits: a sign, 4 bits of exponent and 3 of mantissa, times a scale for each entry and head.
    F8E4M3,
    /// Closed chains in 8 bits: whole numbers from -127 to 127, times a scale for each entry and head.
    I8,
}

impl Storage {
    /// Every storage.
    pub const ALL: [Self; 6] = [Self::F64, Self::F32, Self::F16, Self::BF16, Self::F8E4M3, Self::I8];

    /// The dtype of the stored numbers; None of 8-bit entries, whose window and open chain keep the dtype of the keys.
    pub const fn dtype(self) -> Option<DType> {
        match self {
            Self::F64 => Some(DType::F64),
            Self::F32 => Some(DType::F32),
            Self::F16 => Some(DType::F16),
            Self::BF16 => Some(DType::BF16),
            Self::F8E4M3 | Self::I8 => None,
        }
    }

    /// The code of 8-bit entries.
    pub(crate) const fn code(self) -> Option<ByteCode> {
        match self {
            Self::F64 | Self::F32 | Self::F16 | Self::BF16 => None,
            Self::F8E4M3 => Some(ByteCode::F8E4M3),
            Self::I8 => Some(ByteCode::I8),
        }
    }

    /// The name, as in files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F8E4M3 => "f8e4m3",
            Self::I8 => "i8",
        }
    }
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Storage {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match Self::ALL.into_iter().find(|storage| storage.name() == name) {
            Some(storage) => Ok(storage),
            None => bail!("storage: expected f64, f32, f16, bf16, f8e4m3 or i8, got {name:?}; choose one of these"),
        }
    }
}

impl TryFrom<String> for Storage {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<Storage> for String {
    fn from(storage: Storage) -> Self {
        storage.name().into()
    }
}

impl TryFrom<DType> for Storage {
    type Error = Error;

    fn try_from(dtype: DType) -> Result<Self> {
        dtype.as_str().parse()
    }
}

/// A number in 8 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ByteCode {
    F8E4M3,
    I8,
}
