//! Launches of `cuda/decode.cu`: one query row per head against a ragged store whose lengths only the device knows.

use super::gpu::{Gpu, GpuElement, Kernel, Launch};
use super::params::DecodeParams;
use candle_core::{bail, Result};

/// Columns of one kind, list by list.
pub(crate) struct Store<'a, G: Gpu, T: GpuElement> {
    /// (lists, capacity, D); a token that is not finite has a NaN key and a zero value.
    pub keys: &'a G::Slice<T>,
    pub values: &'a G::Slice<T>,
    /// ln n (lists, capacity), where not all are 0.
    pub ln: Option<&'a G::Slice<f32>>,
    /// How many columns each list has, (lists).
    pub lengths: &'a G::Slice<u32>,
    pub capacity: usize,
}

/// One step of decoding.
pub(crate) struct DecodeCall<'a, G: Gpu, T: GpuElement> {
    /// Over all batch rows. Query heads that read one list are neighbours.
    pub lists: usize,
    /// Query heads per list.
    pub group: usize,
    pub head_dim: usize,
    /// (lists * group, D), contiguous; folded already where the fold folds queries.
    pub queries: &'a G::Slice<T>,
    pub far: Store<'a, G, T>,
    /// The open chain and the tokens in the window.
    pub local: Option<Store<'a, G, T>>,
    /// The softmax scale.
    pub scale: f64,
}

/// Blocks to aim for: two waves of four blocks on each of about 132 multiprocessors.
const BLOCKS: usize = 1056;
/// A block reads at least this many columns, or its start and its merge cost more than its reading.
const LEAST_COLUMNS: usize = 256;

/// The output rows (lists * group, D). Nothing waits for the device.
///
/// # Errors
/// A head size that the kernels do not take, or whatever the launches report.
pub(crate) fn decode<G: Gpu, T: GpuElement>(gpu: &G, call: &DecodeCall<'_, G, T>) -> Result<G::Slice<T>> {
    let &DecodeCall {
        lists, group, head_dim, ..
    } = call;
    if head_dim % 8 != 0 || head_dim > 256 {
        bail!(
            "query: expected a head_dim that is a multiple of 8 and at most 256 on CUDA, got {head_dim}; \
             pad the head or move the tensors with to_device(&Device::Cpu)"
        )
    }
    let together = [4, 2, 1].into_iter().find(|g| group % g == 0).unwrap_or(1);
    let shares = group / together;
    let splits = (BLOCKS / (lists * shares)).clamp(1, call.far.capacity.div_ceil(LEAST_COLUMNS).max(1));
    let parts = splits + usize::from(call.local.is_some());
    let rows = lists * group;
    let params = DecodeParams {
        rows: rows as u32,
        together: together as u32,
        parts: parts as u32,
        splits: splits as u32,
        capacity: call.far.capacity as u32,
        local_capacity: call.local.as_ref().map_or(0, |local| local.capacity as u32),
        head_dim: head_dim as u32,
        scale: (call.scale * std::f64::consts::LOG2_E) as f32,
    };
    let dim = match head_dim {
        0..=64 => 64,
        65..=128 => 128,
        _ => 256,
    };
    let mut outputs = gpu.alloc::<f32>(rows * parts * head_dim)?;
    let mut sums = gpu.alloc::<f32>(rows * parts * 2)?;
    let mut args = vec![gpu.read(call.queries)];
    args.extend(store_args(gpu, Some(&call.far)));
    args.extend(store_args(gpu, call.local.as_ref()));
    args.push(gpu.write(&mut outputs));
    args.push(gpu.write(&mut sums));
    args.push(gpu.value(&params));
    let launch = Launch {
        grid: [parts, lists, shares],
        threads: 128,
        // One row of partial output, and its maximum and sum, per row that the block reads at once.
        shared_bytes: 1024 / dim * (dim + 2) * 4,
    };
    gpu.launch(
        &Kernel::of::<T>("decode", &format!("decode_{dim}_{together}")),
        launch,
        &args,
    )?;
    drop(args);
    let mut output = gpu.alloc::<T>(rows * head_dim)?;
    let args = [
        gpu.read(&outputs),
        gpu.read(&sums),
        gpu.write(&mut output),
        gpu.value(&params),
    ];
    let launch = Launch {
        grid: [rows.div_ceil(4), 1, 1],
        threads: 128,
        shared_bytes: 0,
    };
    gpu.launch(&Kernel::of::<T>("decode", "decode_merge"), launch, &args)?;
    drop(args);
    Ok(output)
}

fn store_args<'a, G: Gpu, T: GpuElement>(gpu: &'a G, store: Option<&'a Store<'a, G, T>>) -> [G::Arg<'a>; 4] {
    [
        gpu.read_some(store.map(|store| store.keys)),
        gpu.read_some(store.map(|store| store.values)),
        gpu.read_some(store.and_then(|store| store.ln)),
        gpu.read_some(store.map(|store| store.lengths)),
    ]
}
