//! [`Gpu`] on a CUDA device, on candle's own stream.

use super::on_gpu::{warpgroups_wanted, Gpu, Kernel, Launch, Number, Params};
use super::ptx::PackedKernel;
use candle_core::cuda_backend::cudarc::driver::{
    sys::{
        cuLaunchKernelEx, CUdevice_attribute_enum, CUdeviceptr, CUfunction_attribute_enum, CUlaunchAttribute,
        CUlaunchAttributeID, CUlaunchConfig,
    },
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop,
};
use candle_core::{CudaDevice, Result};
use std::ffi::c_void;
use std::sync::Arc;

/// More than this much shared memory must be asked for, kernel by kernel.
const SHARED_BYTES_AS_IS: usize = 48 << 10;

/// The PTX target (sm_90) from which on kernels wait for the launch before: `hw::wait_for_previous` is empty below.
const WAITS_BY_ITSELF: i32 = 90;

/// The only compute capability that runs PTX for sm_90a.
const HAS_WARPGROUPS: (i32, i32) = (9, 0);

/// The most tokens for which more and smaller blocks are faster: `forward_wgmma_short_64` and the like.
const SHORT: usize = 1024;

/// A device, with its stream held so that arguments can borrow it.
pub(crate) struct Cuda {
    device: CudaDevice,
    stream: Arc<CudaStream>,
}

impl Cuda {
    pub fn new(device: &CudaDevice) -> Self {
        Self {
            device: device.clone(),
            stream: device.cuda_stream(),
        }
    }
}

/// One argument; the guard records the buffer's use on the stream when the launch is over.
pub(crate) enum CudaArg<'a> {
    // No code reads the guard: it acts when it is dropped.
    Buffer(CUdeviceptr, #[allow(dead_code)] Option<SyncOnDrop<'a>>),
    /// The first byte of a struct.
    Value(&'a u8),
}

impl CudaArg<'_> {
    /// The address of the argument for the driver, which only reads it.
    fn pointer(&self) -> *mut c_void {
        match self {
            Self::Buffer(pointer, _) => std::ptr::from_ref(pointer).cast_mut().cast(),
            Self::Value(first) => std::ptr::from_ref(*first).cast_mut().cast(),
        }
    }
}

/// The attribute that lets a launch start while the launch before it on the stream ends: programmatic dependent launch.
fn starts_early() -> CUlaunchAttribute {
    // SAFETY: a struct of integers and a union of integers, for which zeros are valid.
    let mut attribute: CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    attribute
}

impl Gpu for Cuda {
    type Slice<T: Number> = CudaSlice<T>;
    type Memory = CudaSlice<u8>;
    type Arg<'a> = CudaArg<'a>;

    fn alloc<T: Number>(&self, len: usize) -> Result<CudaSlice<T>> {
        // SAFETY: a Number may have any bits, and the next kernel fills the buffer.
        unsafe { self.device.alloc(len) }
    }

    fn zeros<T: Number>(&self, len: usize) -> Result<CudaSlice<T>> {
        self.device.alloc_zeros(len)
    }

    fn upload<T: Number>(&self, data: &[T]) -> Result<CudaSlice<T>> {
        self.device.clone_htod(data)
    }

    fn memory(&self, bytes: usize) -> Result<CudaSlice<u8>> {
        self.alloc(bytes)
    }

    fn address(&self, memory: &CudaSlice<u8>) -> u64 {
        memory.device_ptr(&self.stream).0
    }

    fn download<T: Number>(&self, slice: &CudaSlice<T>) -> Result<Vec<T>> {
        self.device.clone_dtoh(slice)
    }

    fn shared_limit(&self) -> Result<usize> {
        let attribute = CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let bytes = self.stream.context().attribute(attribute);
        usize::try_from(bytes.map_err(candle_core::Error::wrap)?).map_err(candle_core::Error::wrap)
    }

    fn shared_bytes(&self, kernel: &Kernel) -> Result<usize> {
        Ok(PackedKernel::find(kernel)?.shared_bytes)
    }

    fn multiprocessors(&self) -> Result<usize> {
        let attribute = CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let count = self.stream.context().attribute(attribute);
        usize::try_from(count.map_err(candle_core::Error::wrap)?).map_err(candle_core::Error::wrap)
    }

    fn warpgroups(&self) -> Result<Option<usize>> {
        let context = self.stream.context();
        let (major, minor) = context.compute_capability().map_err(candle_core::Error::wrap)?;
        let has = (major, minor) == HAS_WARPGROUPS && warpgroups_wanted()?;
        Ok(has.then_some(SHORT))
    }

    fn read<'a, T: Number>(&'a self, slice: &'a CudaSlice<T>) -> CudaArg<'a> {
        let (pointer, guard) = slice.device_ptr(&self.stream);
        CudaArg::Buffer(pointer, Some(guard))
    }

    fn write<'a, T: Number>(&'a self, slice: &'a mut CudaSlice<T>) -> CudaArg<'a> {
        let (pointer, guard) = slice.device_ptr_mut(&self.stream);
        CudaArg::Buffer(pointer, Some(guard))
    }

    fn absent<'a>(&'a self) -> CudaArg<'a> {
        CudaArg::Buffer(0, None)
    }

    fn value<'a, P: Params>(&'a self, params: &'a P) -> CudaArg<'a> {
        // SAFETY: the first byte of a live struct without padding.
        CudaArg::Value(unsafe { &*std::ptr::from_ref(params).cast::<u8>() })
    }

    fn launch(&self, kernel: &Kernel, launch: Launch, args: &[CudaArg<'_>]) -> Result<()> {
        // A module of its own for every kernel: a first call waits for the driver to compile what it runs.
        let packed = PackedKernel::find(kernel)?;
        let module = format!("candle-sfattention-{}", kernel.name);
        let function = self
            .device
            .get_or_load_custom_func(&kernel.name, &module, packed.text()?)?;
        let failed = |error| candle_core::Error::Msg(format!("kernel {}: {error} ({launch:?})", kernel.name));
        let size = |value: usize| u32::try_from(value).map_err(candle_core::Error::wrap);
        let shared_bytes = packed.shared_bytes + launch.shared_bytes;
        if shared_bytes > SHARED_BYTES_AS_IS {
            let attribute = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let granted = function.set_attribute(attribute, size(shared_bytes)? as i32);
            granted.map_err(failed)?;
        }
        let version = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PTX_VERSION;
        let early = kernel.early && function.get_attribute(version).map_err(failed)? >= WAITS_BY_ITSELF;
        let mut attribute = starts_early();
        let config = CUlaunchConfig {
            gridDimX: size(launch.grid[0])?,
            gridDimY: size(launch.grid[1])?,
            gridDimZ: size(launch.grid[2])?,
            blockDimX: size(launch.threads)?,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: size(shared_bytes)?,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut attribute,
            numAttrs: early.into(),
        };
        let mut pointers: Vec<*mut c_void> = args.iter().map(CudaArg::pointer).collect();
        self.stream.context().bind_to_thread().map_err(failed)?;
        // SAFETY: the launcher passes the arguments of the kernel's signature (in tests the emulator checks their
        // count, sizes, which buffers are written and every access), and `args` keeps all of them alive until the
        // launch is enqueued.
        let launched = unsafe {
            cuLaunchKernelEx(
                &config,
                function.cu_function(),
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        launched.result().map_err(failed)
    }
}
