//! The decoding launcher on CPU tensors under the emulator: for tests.

use super::device::{EmuArg, EmuSlice, Emulator};
use crate::cuda::decode::{decode as launch, DecodeCall, StateArgs};
use crate::cuda::on_gpu::{Gpu, GpuElement};
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
    let far = held::<T>(far)?;
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
        fold: 0,
        capacity: far.capacity as u32,
        first: 0,
        observes: 0,
        scale: 0.0,
        slide: NO_SLIDE,
        scores_first: 0,
        scores_stride: 0,
        value_dim: value_dim as u32,
        column_dim: 0,
    };
    let call = DecodeCall {
        queries: &queries,
        appended: None,
        params,
        most,
        scale,
    };
    let output = launch(&gpu, &call, &mut DecodeArgs { far, local }, &mut None)?.download()?;
    Tensor::from_vec(output, (rows, value_dim), &Device::Cpu)
}

/// The cache's arguments without the buffers that only appending needs.
struct DecodeArgs<T> {
    far: HeldColumns<T>,
    local: Option<HeldColumns<T>>,
}

impl<T: GpuElement> StateArgs<Emulator> for DecodeArgs<T> {
    fn args<'a>(&'a mut self, gpu: &'a Emulator) -> Vec<EmuArg<'a>> {
        let mut args = vec![
            gpu.write(&mut self.far.keys),
            gpu.write(&mut self.far.values),
            gpu.write_some(self.far.ln.as_mut()),
            gpu.absent(),
            gpu.write(&mut self.far.lengths),
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

fn held<T: GpuElement>(store: &DecodeStore) -> Result<HeldColumns<T>> {
    let rows = |x: &Tensor| Emulator.upload(&x.flatten_all()?.to_vec1::<T>()?);
    let ln = |x: &Tensor| Emulator.upload(&x.flatten_all()?.to_vec1::<f32>()?);
    Ok(HeldColumns {
        keys: rows(&store.keys)?,
        values: rows(&store.values)?,
        ln: store.ln.as_ref().map(ln).transpose()?,
        lengths: Emulator.upload(&store.lengths)?,
        capacity: store.keys.dim(1)?,
    })
}
