//! The device of a run, shared with the train example.

use std::fmt;
use std::str::FromStr;

use candle_core::Device;

/// A device by its name on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Cpu,
    Cuda(usize),
}

impl Place {
    /// # Errors
    /// A GPU that is not there, or a build without CUDA.
    pub fn open(self) -> anyhow::Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(_) if !cfg!(feature = "cuda") => {
                anyhow::bail!("device: expected cpu in this build, got {self}; build with --features cuda")
            }
            Self::Cuda(index) => Device::new_cuda(index)
                .map_err(|error| anyhow::anyhow!("device: expected a GPU for {self}, got {error}; use --device cpu")),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:")) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(index)) => index
                .parse()
                .map(Self::Cuda)
                .map_err(|error| format!("{index}: {error}")),
            _ => Err("expected cpu, cuda or cuda:N".into()),
        }
    }
}
