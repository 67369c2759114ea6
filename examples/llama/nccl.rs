//! Ranks on GPUs of one machine, one GPU each, that sum by NCCL. Numbers of the host go through shared memory, as the
//! ranks are threads of one process. This file is type-checked; it has not run on GPUs yet.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{anyhow, bail, Context, Result};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::cuda_backend::cudarc::nccl::safe::NcclType;
use candle_core::cuda_backend::cudarc::nccl::{result, sys};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Device, Error, Layout, Shape, Tensor};

use crate::ranks::{run_by, Communicator, EndedEarly, Ranks, ThreadRank};

/// Runs `each` on `world` ranks, rank r on the GPU `first + r`; see [`crate::ranks::run`].
///
/// # Errors
/// A GPU that is not there, an error of NCCL, or that of a rank.
pub fn run<T: Send>(world: usize, first: usize, each: impl Fn(&Ranks) -> Result<T> + Sync) -> Result<T> {
    let lines = &Arc::new(Lines {
        of_ranks: (0..world).map(|_| Mutex::new(None)).collect(),
        aborted_by: OnceLock::new(),
    });
    let each = |ranks: &Ranks| {
        each(ranks).map_err(|error| match lines.aborted_by.get() {
            // A sum that was aborted leaves errors behind on its GPU.
            Some(rank) => error.context(EndedEarly { rank: *rank }),
            None => error,
        })
    };
    run_by(
        world,
        |seat| {
            let ordinal = first + seat.rank();
            let rank = NcclRank::connect(seat, lines.clone(), ordinal);
            Ok(Arc::new(rank.with_context(|| format!("cuda:{ordinal}"))?))
        },
        each,
    )
}

/// NCCL's end of one rank.
struct Line(sys::ncclComm_t);

// SAFETY: NCCL lets any thread use a communicator, one at a time; the mutex around each sees to that.
unsafe impl Send for Line {}

struct Lines {
    /// None before a rank is connected and after it is aborted.
    of_ranks: Vec<Mutex<Option<Line>>>,
    /// The rank that ended first.
    aborted_by: OnceLock<usize>,
}

impl Lines {
    /// Ends all sums that are going on, and refuses more: kernels of the other ranks would wait for this one for ever.
    fn abort(&self, rank: usize) {
        self.aborted_by.get_or_init(|| rank);
        for line in &self.of_ranks {
            let line = line.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(Line(comm)) = line {
                // SAFETY: `comm` came from `comm_init_rank`, and was taken out of its place: nothing uses it any more.
                // Its error has no reader: the run already ends.
                let _ = unsafe { result::comm_abort(comm) };
            }
        }
    }
}

/// One rank and its GPU.
struct NcclRank {
    seat: ThreadRank,
    lines: Arc<Lines>,
}

impl NcclRank {
    /// Meets the other ranks, then connects to them.
    fn connect(seat: ThreadRank, lines: Arc<Lines>, ordinal: usize) -> Result<Self> {
        let device = Device::new_cuda(ordinal)?;
        let stream = device.as_cuda_device()?.cuda_stream();
        stream.context().bind_to_thread().w()?;
        let id = match seat.rank() {
            0 => result::get_uniqueid().map_err(failed)?,
            _ => sys::ncclUniqueId { internal: [0; 128] },
        };
        // Every rank is there and has its GPU: NCCL waits for all of them.
        let bytes = seat.all_gather(id.internal.iter().map(|byte| f64::from(*byte)).collect())?;
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        for (byte, number) in id.internal.iter_mut().zip(&bytes[0]) {
            *byte = *number as _;
        }
        let mut comm = MaybeUninit::uninit();
        let (rank, world) = (seat.rank(), seat.world());
        // SAFETY: NCCL writes the communicator where it returns success; the rank is below the world, and each rank of
        // one id is connected once.
        let comm = unsafe {
            result::comm_init_rank(comm.as_mut_ptr(), world as i32, id, rank as i32).map_err(failed)?;
            comm.assume_init()
        };
        *lines.of_ranks[rank].lock().unwrap_or_else(PoisonError::into_inner) = Some(Line(comm));
        let rank = Self { seat, lines };
        // NCCL connects by the first sum, for which it waits on the host.
        rank.all_reduce_sum(&Tensor::zeros(1, DType::F32, &device)?)?;
        device.synchronize()?;
        Ok(rank)
    }
}

impl Drop for NcclRank {
    fn drop(&mut self) {
        // After an error, or once every rank has finished.
        self.lines.abort(self.rank());
    }
}

fn failed(error: result::NcclError) -> anyhow::Error {
    anyhow!("NCCL: {error:?}")
}

impl Communicator for NcclRank {
    fn rank(&self) -> usize {
        self.seat.rank()
    }

    fn world(&self) -> usize {
        self.seat.world()
    }

    fn all_reduce_sum(&self, xs: &Tensor) -> Result<Tensor> {
        let line = self.lines.of_ranks[self.rank()]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(line) = &*line else {
            // Another rank has ended: the error says so.
            self.seat.all_gather(Vec::new())?;
            bail!("NCCL: expected ranks that go on, got the end of one; its error is the run's")
        };
        Ok(xs.contiguous()?.apply_op1_no_bwd(&SumOp(line))?)
    }

    fn all_gather(&self, numbers: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        self.seat.all_gather(numbers)
    }

    fn finish(&self) -> Result<()> {
        self.seat.finish()
    }
}

/// The sum over all ranks, on the stream of the tensor's device.
struct SumOp<'l>(&'l Line);

impl SumOp<'_> {
    fn sum<T: CudaDType + DeviceRepr + NcclType>(
        &self,
        xs: &CudaStorage,
        [start, end]: [usize; 2],
    ) -> candle_core::Result<CudaStorage> {
        let device = xs.device().clone();
        let stream: Arc<CudaStream> = device.cuda_stream();
        let own = xs.as_cuda_slice::<T>()?.slice(start..end);
        // SAFETY: the sum is written whole before anything reads it.
        let mut sum = unsafe { device.alloc::<T>(end - start) }?;
        {
            let (from, _read) = own.device_ptr(&stream);
            let (to, _written) = sum.device_ptr_mut(&stream);
            // SAFETY: both buffers hold `end - start` numbers of this type on the communicator's GPU, and the guards
            // keep them until the stream has passed.
            let queued = unsafe {
                result::all_reduce(
                    from as *const c_void,
                    to as *mut c_void,
                    end - start,
                    T::as_nccl_type(),
                    sys::ncclRedOp_t::ncclSum,
                    self.0 .0,
                    stream.cu_stream() as _,
                )
            };
            queued.map_err(|error| Error::msg(format!("NCCL: {error:?}")))?;
        }
        Ok(CudaStorage::wrap_cuda_slice(sum, device))
    }
}

impl CustomOp1 for SumOp<'_> {
    fn name(&self) -> &'static str {
        "all-reduce"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        candle_core::bail!("all-reduce: expected a tensor on a GPU, got one on the CPU; use ranks of threads there")
    }

    fn cuda_fwd(&self, xs: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!(
                "all-reduce: expected a contiguous tensor, got strides {:?}",
                layout.stride()
            )
        };
        let sum = match xs.dtype() {
            DType::F32 => self.sum::<f32>(xs, [start, end]),
            DType::F64 => self.sum::<f64>(xs, [start, end]),
            DType::F16 => self.sum::<half::f16>(xs, [start, end]),
            DType::BF16 => self.sum::<half::bf16>(xs, [start, end]),
            dtype => candle_core::bail!("all-reduce: expected f32, f64, f16 or bf16, got {dtype:?}; convert it"),
        }?;
        Ok((sum, layout.shape().clone()))
    }
}
