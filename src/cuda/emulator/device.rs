//! [`Gpu`] on the CPU: kernels compiled by g++ run under the emulator of `cuda/emu`.

use crate::cuda::on_gpu::{Gpu, Kernel, Launch, Number, Params};
use candle_core::{bail, Result};
use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::marker::PhantomData;

thread_local! {
    static WARPGROUPS: Cell<Option<usize>> = const { Cell::new(None) };
    static LAUNCHES: Cell<usize> = const { Cell::new(0) };
}

/// Runs a closure on a device that has warpgroups (capability 9.0), for this thread's launches. Up to `short` tokens
/// the kernels of small blocks run.
pub(crate) fn with_warpgroups<R>(short: usize, run: impl FnOnce() -> R) -> R {
    struct Restored(Option<usize>);
    impl Drop for Restored {
        fn drop(&mut self) {
            WARPGROUPS.set(self.0);
        }
    }
    let _restored = Restored(WARPGROUPS.replace(Some(short)));
    run()
}

/// The kernels that this thread has launched so far.
pub(crate) fn launches() -> usize {
    LAUNCHES.get()
}

/// The emulator. It has no state besides [`with_warpgroups`] and [`launches`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Emulator;

/// A buffer of the device, and which of its bytes have been written.
pub(crate) struct EmuSlice<T> {
    /// Aligned for the widest vector that a kernel loads.
    data: Vec<u128>,
    written: Vec<u8>,
    len: usize,
    holds: PhantomData<T>,
}

impl<T: Number> EmuSlice<T> {
    fn new(len: usize, fill: u8) -> Self {
        let bytes = len * size_of::<T>();
        Self {
            data: vec![u128::from_ne_bytes([fill; 16]); bytes.div_ceil(16)],
            written: vec![0; bytes],
            len,
            holds: PhantomData,
        }
    }

    /// The numbers that the kernels left in the buffer.
    ///
    /// # Errors
    /// An element that no kernel has written.
    pub fn download(&self) -> Result<Vec<T>> {
        if let Some(byte) = self.written.iter().position(|written| *written == 0) {
            bail!(
                "output: expected every element to be written, got {} of {} left alone",
                byte / size_of::<T>(),
                self.len
            )
        }
        // SAFETY: `data` holds at least `len` elements of T, aligned to 16 bytes; a Number may have any bits.
        Ok(unsafe { std::slice::from_raw_parts(self.data.as_ptr().cast::<T>(), self.len) }.to_vec())
    }
}

/// An argument as C sees it; the same as `emu::Argument`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawArgument {
    data: *const c_void,
    bytes: usize,
    written: *const u8,
    kind: usize,
}

const VALUE: usize = 0;
const READ: usize = 1;
const WRITE: usize = 2;

/// One argument, borrowed until the launch is over.
pub(crate) struct EmuArg<'a> {
    raw: RawArgument,
    borrowed: PhantomData<&'a mut ()>,
}

impl EmuArg<'_> {
    fn new(data: *const c_void, bytes: usize, written: *const u8, kind: usize) -> Self {
        Self {
            raw: RawArgument {
                data,
                bytes,
                written,
                kind,
            },
            borrowed: PhantomData,
        }
    }
}

/// Memory that the emulator knows by its address.
pub(crate) struct EmuMemory(EmuSlice<u8>);

impl EmuMemory {
    /// Writes numbers at a byte, a multiple of their size.
    pub fn put<T: Number>(&mut self, byte: usize, numbers: &[T]) {
        let bytes = byte..byte + size_of_val(numbers);
        self.0.written[bytes.clone()].fill(1);
        // SAFETY: the line above has checked that these bytes lie in the buffer, and the two do not overlap.
        unsafe {
            let to = self.0.data.as_mut_ptr().cast::<u8>().add(bytes.start);
            std::ptr::copy_nonoverlapping(numbers.as_ptr().cast::<u8>(), to, bytes.len())
        }
    }
}

impl Drop for EmuMemory {
    fn drop(&mut self) {
        // SAFETY: the emulator only compares the address.
        unsafe { emu_forget(self.0.data.as_ptr().cast()) }
    }
}

extern "C" {
    fn emu_register(data: *mut u8, written: *mut u8, bytes: usize);
    fn emu_forget(data: *const u8);
    /// Bytes of shared memory; 0 for a kernel that declares none, or that does not exist.
    fn emu_shared_bytes(name: *const c_char) -> usize;
    fn emu_launch(
        name: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared_bytes: usize,
        early: bool,
        arguments: *const RawArgument,
        count: usize,
        message: *mut c_char,
        capacity: usize,
    ) -> c_int;
}

impl Gpu for Emulator {
    type Slice<T: Number> = EmuSlice<T>;
    type Memory = EmuMemory;
    type Arg<'a> = EmuArg<'a>;

    fn alloc<T: Number>(&self, len: usize) -> Result<EmuSlice<T>> {
        Ok(EmuSlice::new(len, 0xff))
    }

    fn zeros<T: Number>(&self, len: usize) -> Result<EmuSlice<T>> {
        let mut slice = EmuSlice::new(len, 0);
        slice.written.fill(1);
        Ok(slice)
    }

    fn upload<T: Number>(&self, data: &[T]) -> Result<EmuSlice<T>> {
        let mut slice = self.zeros(data.len())?;
        // SAFETY: the new buffer holds as many bytes as `data`, and the two do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(
                data.as_ptr().cast::<u8>(),
                slice.data.as_mut_ptr().cast::<u8>(),
                size_of_val(data),
            )
        }
        Ok(slice)
    }

    fn memory(&self, bytes: usize) -> Result<EmuMemory> {
        let mut memory = EmuMemory(self.alloc(bytes)?);
        let EmuMemory(slice) = &mut memory;
        // SAFETY: both vectors keep their places and lengths, no reference to their contents is made, and they live
        // until `emu_forget`.
        unsafe { emu_register(slice.data.as_mut_ptr().cast(), slice.written.as_mut_ptr(), bytes) };
        Ok(memory)
    }

    fn address(&self, memory: &EmuMemory) -> u64 {
        memory.0.data.as_ptr() as u64
    }

    fn download<T: Number>(&self, slice: &EmuSlice<T>) -> Result<Vec<T>> {
        slice.download()
    }

    fn shared_limit(&self) -> Result<usize> {
        Ok(usize::MAX)
    }

    fn shared_bytes(&self, kernel: &Kernel) -> Result<usize> {
        let name = CString::new(kernel.name.as_str()).map_err(candle_core::Error::wrap)?;
        // SAFETY: a string that ends with a zero and outlives the call.
        Ok(unsafe { emu_shared_bytes(name.as_ptr()) })
    }

    fn multiprocessors(&self) -> Result<usize> {
        // The multiprocessors of an H100: work that is split there is split here. With warpgroups only 3, so that a
        // block handles several pieces of work in turn even where a test has few.
        Ok(if WARPGROUPS.get().is_some() { 3 } else { 132 })
    }

    fn warpgroups(&self) -> Result<Option<usize>> {
        Ok(WARPGROUPS.get())
    }

    fn read<'a, T: Number>(&'a self, slice: &'a EmuSlice<T>) -> EmuArg<'a> {
        EmuArg::new(
            slice.data.as_ptr().cast(),
            slice.written.len(),
            slice.written.as_ptr(),
            READ,
        )
    }

    fn write<'a, T: Number>(&'a self, slice: &'a mut EmuSlice<T>) -> EmuArg<'a> {
        let (data, written) = (slice.data.as_mut_ptr(), slice.written.as_mut_ptr());
        EmuArg::new(data.cast_const().cast(), slice.written.len(), written, WRITE)
    }

    fn absent<'a>(&'a self) -> EmuArg<'a> {
        EmuArg::new(std::ptr::null(), 0, std::ptr::null(), WRITE)
    }

    fn value<'a, P: Params>(&'a self, params: &'a P) -> EmuArg<'a> {
        EmuArg::new(
            std::ptr::from_ref(params).cast(),
            size_of::<P>(),
            std::ptr::null(),
            VALUE,
        )
    }

    fn launch(&self, kernel: &Kernel, launch: Launch, args: &[EmuArg<'_>]) -> Result<()> {
        LAUNCHES.set(LAUNCHES.get() + 1);
        let name = CString::new(kernel.name.as_str()).map_err(candle_core::Error::wrap)?;
        let raw: Vec<RawArgument> = args.iter().map(|arg| arg.raw).collect();
        let mut grid = [0u32; 3];
        for (target, blocks) in grid.iter_mut().zip(launch.grid) {
            *target = u32::try_from(blocks).map_err(candle_core::Error::wrap)?;
        }
        let block = [launch.threads as u32, 1, 1];
        let mut message = [0 as c_char; 1024];
        // SAFETY: every argument points to as many bytes as it says, for as long as the borrows in `args` last. The
        // emulator checks each access of the kernel against that, and only writes to arguments of kind WRITE.
        let failed = unsafe {
            emu_launch(
                name.as_ptr(),
                grid.as_ptr(),
                block.as_ptr(),
                launch.shared_bytes,
                kernel.early,
                raw.as_ptr(),
                raw.len(),
                message.as_mut_ptr(),
                message.len(),
            )
        };
        if failed != 0 {
            // SAFETY: the emulator ends its message with a zero within the capacity.
            let text = unsafe { CStr::from_ptr(message.as_ptr()) };
            bail!("kernel {}: {}", kernel.name, text.to_string_lossy())
        }
        Ok(())
    }
}
