//! The interface of a GPU for launchers: buffers, and launches of kernels by name.

#[cfg(feature = "cuda")]
use crate::instructions::{choose, Choice};
use crate::problem::RowLayout;
use candle_core::{Layout, Result, WithDType};
use half::{bf16, f16};
#[cfg(feature = "cuda")]
use std::sync::LazyLock;

/// An element of a buffer: every bit pattern is a value.
pub(crate) trait Number: WithDType + DeviceNumber + Default {}

#[cfg(feature = "cuda")]
pub(crate) trait DeviceNumber:
    candle_core::cuda_backend::CudaDType
    + candle_core::cuda_backend::cudarc::driver::DeviceRepr
    + candle_core::cuda_backend::cudarc::driver::ValidAsZeroBits
{
}
#[cfg(not(feature = "cuda"))]
pub(crate) trait DeviceNumber {}

macro_rules! number {
    ($($type:ty),*) => {
        $(
            impl DeviceNumber for $type {}
            impl Number for $type {}
        )*
    };
}
number!(u8, u32, i64, f32, f64, f16, bf16);

/// A dtype that q, k and v may have on a GPU.
pub(crate) trait GpuElement: Number {
    /// The end of the names of this dtype's kernels.
    const SUFFIX: &'static str;
    /// Whether tensor cores multiply it.
    const HALF: bool = true;
}

impl GpuElement for f32 {
    const SUFFIX: &'static str = "f32";
    const HALF: bool = false;
}
impl GpuElement for f16 {
    const SUFFIX: &'static str = "f16";
}
impl GpuElement for bf16 {
    const SUFFIX: &'static str = "bf16";
}

/// A tensor's buffer and where its rows start in it.
pub(crate) type Source<'a, G, T> = (&'a <G as Gpu>::Slice<T>, RowLayout);

/// The starts of a tensor's rows. An axis of size 1 may have any stride, which no kernel reads: it is 0 here, so that
/// no kernel's alignment depends on it.
pub(crate) fn row_layout(layout: &Layout) -> RowLayout {
    let mut rows = RowLayout::new(layout);
    for (stride, &size) in rows.strides.iter_mut().zip(layout.dims()) {
        if size == 1 {
            *stride = 0;
        }
    }
    rows
}

/// One kernel of `cuda/*.cu`: its name is unique over all files.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub name: String,
    /// Whether the kernel may start while the launch before it ends: it then waits by itself, see
    /// `hw::wait_for_previous`.
    pub early: bool,
}

impl Kernel {
    /// A kernel that reads no q, k or v.
    pub fn plain(name: &str) -> Self {
        Self {
            name: name.to_string(),
            early: false,
        }
    }

    /// A kernel for one dtype.
    pub fn of<T: GpuElement>(name: &str) -> Self {
        Self {
            name: format!("{name}_{}", T::SUFFIX),
            early: false,
        }
    }

    /// The same kernel, started early: every block calls `hw::wait_for_previous` before it touches memory.
    pub fn early(self) -> Self {
        Self { early: true, ..self }
    }
}

/// The shape of one launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch {
    /// Blocks: up to 2^31 - 1, 65535 and 65535.
    pub grid: [usize; 3],
    /// Threads of a block, a multiple of 32.
    pub threads: usize,
    /// Dynamic shared memory of a block, in bytes, beyond the kernel's `SHARED_BYTES` in cuda/lib/kernel.cuh.
    pub shared_bytes: usize,
}

impl Launch {
    /// A warp per token of every head or list, 4 warps a block: the shape of most small kernels.
    pub fn warps(tokens: usize, lists: usize) -> Self {
        Self {
            grid: [tokens.div_ceil(4), lists, 1],
            threads: 128,
            shared_bytes: 0,
        }
    }
}

/// Whether kernels for warpgroups may be chosen: yes, unless the environment variable says "off".
///
/// # Errors
/// A value of the variable other than "on" and "off".
#[cfg(feature = "cuda")]
pub(crate) fn warpgroups_wanted() -> Result<bool> {
    static WANTED: LazyLock<Choice<bool>> =
        LazyLock::new(|| choose("SFATTENTION_WGMMA", &[("on", true), ("off", false)], true));
    match &*WANTED {
        Ok(wanted) => Ok(*wanted),
        Err(message) => candle_core::bail!("{message}"),
    }
}

/// A struct that a kernel takes by value.
///
/// # Safety
/// `#[repr(C)]`, without padding, and the same as the kernel's parameter in `cuda/lib/params.cuh`.
pub(crate) unsafe trait Params: Copy {}

/// A device, or the emulator in its place.
pub(crate) trait Gpu {
    /// An owned buffer.
    type Slice<T: Number>;
    /// Owned memory that kernels find by its address, in a table, and that no argument names. Kernels run on one
    /// stream, and it is freed on that stream.
    type Memory: Send + Sync;
    /// One argument of a launch.
    type Arg<'a>
    where
        Self: 'a;

    /// A buffer for a kernel to fill; its numbers are undefined until then.
    fn alloc<T: Number>(&self, len: usize) -> Result<Self::Slice<T>>;
    /// A buffer of zeros.
    fn zeros<T: Number>(&self, len: usize) -> Result<Self::Slice<T>>;
    /// A copy of host data.
    fn upload<T: Number>(&self, data: &[T]) -> Result<Self::Slice<T>>;

    /// `bytes` bytes of memory, undefined until kernels write it.
    fn memory(&self, bytes: usize) -> Result<Self::Memory>;
    /// The address of memory: `memory_at` in cuda/lib/memory.cuh.
    fn address(&self, memory: &Self::Memory) -> u64;

    /// The numbers of a buffer; waits for the device.
    fn download<T: Number>(&self, slice: &Self::Slice<T>) -> Result<Vec<T>>;

    /// A buffer that the kernel only reads.
    fn read<'a, T: Number>(&'a self, slice: &'a Self::Slice<T>) -> Self::Arg<'a>;
    /// A buffer that the kernel writes.
    fn write<'a, T: Number>(&'a self, slice: &'a mut Self::Slice<T>) -> Self::Arg<'a>;
    /// A null pointer, for a buffer that this launch does not need.
    fn absent<'a>(&'a self) -> Self::Arg<'a>;
    /// A struct by value.
    fn value<'a, P: Params>(&'a self, params: &'a P) -> Self::Arg<'a>;

    /// The most shared memory that a block can ask for, in bytes.
    ///
    /// # Errors
    /// An error of the driver.
    fn shared_limit(&self) -> Result<usize>;

    /// The dynamic shared memory of a block of the kernel by `SHARED_BYTES` in cuda/lib/kernel.cuh, in bytes.
    ///
    /// # Errors
    /// A kernel that does not exist.
    fn shared_bytes(&self, kernel: &Kernel) -> Result<usize>;

    /// The number of multiprocessors, which run blocks side by side.
    ///
    /// # Errors
    /// An error of the driver.
    fn multiprocessors(&self) -> Result<usize>;

    /// Some where the device has products of warpgroups (wgmma) and the kernels of `cuda/*_sm90a.cu` run. The number is
    /// the most tokens for which the kernels of small blocks run.
    ///
    /// # Errors
    /// An error of the driver, or an invalid value of `SFATTENTION_WGMMA`.
    fn warpgroups(&self) -> Result<Option<usize>>;

    /// Starts a kernel; does not wait for it.
    ///
    /// # Errors
    /// An error of the driver or the emulator, with the kernel's name.
    fn launch(&self, kernel: &Kernel, launch: Launch, args: &[Self::Arg<'_>]) -> Result<()>;

    /// [`Self::read`] of a buffer that may be absent.
    fn read_some<'a, T: Number>(&'a self, slice: Option<&'a Self::Slice<T>>) -> Self::Arg<'a> {
        match slice {
            Some(slice) => self.read(slice),
            None => self.absent(),
        }
    }

    /// [`Self::write`] of a buffer that may be absent.
    fn write_some<'a, T: Number>(&'a self, slice: Option<&'a mut Self::Slice<T>>) -> Self::Arg<'a> {
        match slice {
            Some(slice) => self.write(slice),
            None => self.absent(),
        }
    }
}
