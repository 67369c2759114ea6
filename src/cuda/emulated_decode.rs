//! The decoding launcher on CPU tensors under the emulator: for tests.

use super::decode::{decode as launch, DecodeCall, Store};
use super::emu::{EmuSlice, Emulator};
use super::gpu::{Gpu, GpuElement};
use candle_core::{DType, Device, Result, Tensor};

/// Columns of one kind: keys and values (lists, capacity, D), ln n (lists, capacity) in f32, and each list's length.
pub struct DecodeStore {
    /// The keys.
    pub keys: Tensor,
    /// The values.
    pub values: Tensor,
    /// ln n, where not all are 0.
    pub ln: Option<Tensor>,
    /// How many columns each list has.
    pub lengths: Vec<u32>,
}

struct Held<T> {
    keys: EmuSlice<T>,
    values: EmuSlice<T>,
    ln: Option<EmuSlice<f32>>,
    lengths: EmuSlice<u32>,
    capacity: usize,
}

/// Decodes one row for each of the queries (lists * group, D) under the emulator.
///
/// # Errors
/// What the launchers and the emulator report.
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
    let (rows, head_dim) = queries.dims2()?;
    let lists = far.lengths.len();
    let far = held::<T>(far)?;
    let local = local.map(held::<T>).transpose()?;
    let queries = Emulator.upload(&queries.flatten_all()?.to_vec1::<T>()?)?;
    let call = DecodeCall {
        lists,
        group: rows / lists,
        head_dim,
        queries: &queries,
        far: store(&far),
        local: local.as_ref().map(store),
        scale,
    };
    Tensor::from_vec(launch(&Emulator, &call)?.download()?, (rows, head_dim), &Device::Cpu)
}

fn held<T: GpuElement>(store: &DecodeStore) -> Result<Held<T>> {
    let rows = |x: &Tensor| Emulator.upload(&x.flatten_all()?.to_vec1::<T>()?);
    let ln = |x: &Tensor| Emulator.upload(&x.flatten_all()?.to_vec1::<f32>()?);
    Ok(Held {
        keys: rows(&store.keys)?,
        values: rows(&store.values)?,
        ln: store.ln.as_ref().map(ln).transpose()?,
        lengths: Emulator.upload(&store.lengths)?,
        capacity: store.keys.dim(1)?,
    })
}

fn store<T: GpuElement>(held: &Held<T>) -> Store<'_, Emulator, T> {
    Store {
        keys: &held.keys,
        values: &held.values,
        ln: held.ln.as_ref(),
        lengths: &held.lengths,
        capacity: held.capacity,
    }
}
