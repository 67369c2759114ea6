//! The decoding launcher on CPU tensors under the emulator: for tests.

use super::device::{EmuArg, EmuMemory, EmuSlice, Emulator};
use crate::config::Fold;
use crate::cuda::cache::pages::{page_bytes, PAGE};
use crate::cuda::decode::{decode as launch, DecodeCall, StateArgs};
use crate::cuda::fold::fold_code;
use crate::cuda::on_gpu::{Gpu, GpuElement, Number};
use crate::cuda::params::{BiasEntries, CacheParams, Rows, Sizes, NO_SLIDE};
use crate::problem::{Problem, RowLayout};
use candle_core::{DType, Device, Result, Tensor};

/// Columns of one kind: keys (lists, capacity, D), values (lists, capacity, Dv), ln n (lists, capacity) in f32, and
/// each list's length.
pub struct DecodeStore {
    /// The keys.
    pub keys: Tensor,
    /// The values.
    pub values: Tensor,
    /// ln n; None where all are 0.
    pub ln: Option<Tensor>,
    /// The number of columns of each list.
    pub lengths: Vec<u32>,
}

struct HeldColumns<T> {
    keys: EmuSlice<T>,
    values: EmuSlice<T>,
    ln: Option<EmuSlice<f32>>,
    lengths: EmuSlice<u32>,
    capacity: usize,
}

/// The same in pages.
struct HeldPages {
    table: EmuSlice<i64>,
    stride: usize,
    lengths: EmuSlice<u32>,
    _memory: EmuMemory,
}

/// Decodes one row for each of the queries (lists * group, D) under the emulator.
///
/// # Errors
/// An error of the launchers or the emulator.
pub fn decode(queries: &Tensor, far: &DecodeStore, local: Option<&DecodeStore>, scale: f64) -> Result<Tensor> {
    match queries.dtype() {
        DType::F16 => decode_as::<half::f16>(queries, far, local, scale),
        DType::BF16 => decode_as::<half::bf16>(queries, far, local, scale),
        _ => decode_as::<f32>(queries, far, local, scale),
    }
}

fn decode_as<T: GpuElement>(
    queries: &Tensor,
    far: &DecodeStore,
    local: Option<&DecodeStore>,
    scale: f64,
) -> Result<Tensor> {
    let ((rows, head_dim), value_dim) = (queries.dims2()?, far.values.dim(2)?);
    let lists = far.lengths.len();
    let (gpu, most) = (Emulator, far.lengths.iter().max().map_or(0, |most| *most as usize));
    let sized = far.ln.is_some();
    let local = local.map(held::<T>).transpose()?;
    let queries = gpu.upload(&queries.flatten_all()?.to_vec1::<T>()?)?;
    let layout = RowLayout {
        offset: 0,
        strides: [rows * head_dim, head_dim, 0],
        dim: head_dim,
    };
    let problem = Problem {
        batch: 1,
        heads: rows,
        kv_heads: lists,
        tokens: 1,
        queries: 1,
        head_dim,
        value_dim,
        dtype: T::DTYPE,
    };
    let far = paged::<T>(far, &problem)?;
    let params = CacheParams {
        q: Rows::new(&layout),
        k: Rows::new(&layout),
        v: Rows::new(&layout),
        bias: BiasEntries::new::<Emulator>(None),
        sizes: Sizes::new(&problem, lists)?,
        key_key: 1,
        max_merge_level: 0,
        sinks: 0,
        window: local.as_ref().map_or(0, |local| local.capacity as u32 - 1),
        fold: if sized {
            fold_code(Fold::Mean)
        } else {
            fold_code(Fold::Drop)
        },
        pages: far.stride as u32,
        first: 0,
        observes: 0,
        scale: 0.0,
        slide: NO_SLIDE,
        scores_first: 0,
        scores_stride: 0,
        value_dim: value_dim as u32,
        column_dim: 0,
        code: 0,
        unused: 0,
    };
    let call = DecodeCall {
        queries: &queries,
        appended: None,
        params,
        most,
        code: None,
        some_sit_out: false,
        scale,
    };
    let output = launch(&gpu, &call, &mut DecodeArgs { far, local }, &mut None)?.download()?;
    Tensor::from_vec(output, (rows, value_dim), &Device::Cpu)
}

/// The cache's arguments without the buffers that only appending needs.
struct DecodeArgs<T> {
    far: HeldPages,
    local: Option<HeldColumns<T>>,
}

impl<T: GpuElement> StateArgs<Emulator> for DecodeArgs<T> {
    fn args<'a>(&'a mut self, gpu: &'a Emulator) -> Vec<EmuArg<'a>> {
        let mut args = vec![
            gpu.read(&self.far.table),
            gpu.write(&mut self.far.lengths),
            gpu.absent(),
            gpu.absent(),
        ];
        match &mut self.local {
            Some(local) => args.extend([
                gpu.write(&mut local.keys),
                gpu.write(&mut local.values),
                gpu.write_some(local.ln.as_mut()),
                gpu.write(&mut local.lengths),
            ]),
            None => args.extend((0..4).map(|_| gpu.absent())),
        }
        args.extend((0..14).map(|_| gpu.absent()));
        args
    }
}

/// Columns in pages, the last page of each list first, so that no two lie where a list of its own would have them.
/// Bytes past a list's end stay unwritten.
fn paged<T: GpuElement>(store: &DecodeStore, problem: &Problem) -> Result<HeldPages> {
    let (dim, value_dim, capacity) = (problem.head_dim, problem.value_dim, store.keys.dim(1)?);
    let (bytes, stride) = (
        page_bytes::<T>(problem, store.ln.is_some(), None),
        capacity.div_ceil(PAGE),
    );
    let (keys, values) = (held_rows::<T>(&store.keys)?, held_rows::<T>(&store.values)?);
    let ln = store.ln.as_ref().map(held_rows::<f32>).transpose()?;
    let mut memory = Emulator.memory(store.lengths.len() * stride * bytes)?;
    let mut addresses = Vec::new();
    for (list, length) in store.lengths.iter().enumerate() {
        for page in 0..stride {
            let first = ((list + 1) * stride - 1 - page) * bytes;
            addresses.push(Emulator.address(&memory) as i64 + first as i64);
            let used = (*length as usize).saturating_sub(page * PAGE).min(PAGE);
            let entries = list * capacity + page * PAGE..list * capacity + page * PAGE + used;
            memory.put(first, &keys[entries.start * dim..entries.end * dim]);
            let values_at = first + PAGE * dim * size_of::<T>();
            memory.put(values_at, &values[entries.start * value_dim..entries.end * value_dim]);
            if let Some(ln) = &ln {
                let ln_at = first + PAGE * ((dim + value_dim) * size_of::<T>() + size_of::<u32>());
                memory.put(ln_at, &ln[entries]);
            }
        }
    }
    Ok(HeldPages {
        table: Emulator.upload(&addresses)?,
        stride,
        lengths: Emulator.upload(&store.lengths)?,
        _memory: memory,
    })
}

fn held_rows<T: Number>(x: &Tensor) -> Result<Vec<T>> {
    x.flatten_all()?.to_vec1::<T>()
}

fn held<T: GpuElement>(store: &DecodeStore) -> Result<HeldColumns<T>> {
    let rows = |x: &Tensor| Emulator.upload(&held_rows::<T>(x)?);
    let ln = |x: &Tensor| Emulator.upload(&held_rows::<f32>(x)?);
    Ok(HeldColumns {
        keys: rows(&store.keys)?,
        values: rows(&store.values)?,
        ln: store.ln.as_ref().map(ln).transpose()?,
        lengths: Emulator.upload(&store.lengths)?,
        capacity: store.keys.dim(1)?,
    })
}
