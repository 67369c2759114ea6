//! Launches of `cuda/cache/decode.cu`, `decode_values.cu`, `decode_group.cu` and `decode_bytes.cu`: one new token per
//! list of a ragged cache whose lengths only the device knows.

use super::cache::pages::PAGE;
use super::on_gpu::{Gpu, GpuElement, Kernel, Launch};
use super::operands::padded;
use super::params::{CacheParams, DecodeParams};
use crate::config::{ByteCode, Storage};
use candle_core::{bail, Result};

/// The arguments that a launch passes as `CACHE_STATE` in cuda/cache/cache_list.cuh.
pub(crate) trait StateArgs<G: Gpu> {
    fn args<'a>(&'a mut self, gpu: &'a G) -> Vec<G::Arg<'a>>;
}

/// The newest token's key and value, and every head's test.
pub(crate) struct Appended<'a, G: Gpu, T: GpuElement> {
    pub key: &'a G::Slice<T>,
    pub value: &'a G::Slice<T>,
    pub tests: &'a G::Slice<f32>,
    /// Its score in each list, at the places that `params` name, where the caller gives them.
    pub scores: Option<&'a G::Slice<f32>>,
}

/// One step of decoding.
pub(crate) struct DecodeCall<'a, G: Gpu, T: GpuElement> {
    /// The newest token's query rows, at the strides of `params`; already folded if the fold folds queries.
    pub queries: &'a G::Slice<T>,
    /// The newest token, if the launch appends it.
    pub appended: Option<Appended<'a, G, T>>,
    pub params: CacheParams,
    /// The code of closed chains in 8 bits; then [`decodes`].
    pub code: Option<ByteCode>,
    /// The most far columns that a list may have. It follows from the number of tokens alone, so that equal caches
    /// decode to equal bits.
    pub most: usize,
    /// Whether some batch row takes no part; its output rows are zeros.
    pub some_sit_out: bool,
    /// The softmax scale.
    pub scale: f64,
}

/// Buffers between the blocks of one step, kept from step to step.
pub(crate) struct Scratch<G: Gpu> {
    parts: G::Slice<f32>,
    room: usize,
    /// Counters (4, lists); the first `lists` of them are 0 between launches.
    counters: G::Slice<u32>,
    lists: usize,
}

impl<G: Gpu> Scratch<G> {
    /// `old` if it is large enough, else new buffers.
    fn fitting(gpu: &G, old: Option<Self>, room: usize, lists: usize) -> Result<Self> {
        if let Some(old) = old.filter(|old| old.room >= room && old.lists == lists) {
            return Ok(old);
        }
        Ok(Self {
            parts: gpu.alloc(room)?,
            room,
            counters: gpu.zeros(4 * lists)?,
            lists,
        })
    }
}

/// The fewest columns that a block reads: `LEAST_PAGES` in cuda/cache/decode_step.cuh.
const LEAST_COLUMNS: usize = 2 * PAGE;
/// From this many columns on one wave of blocks leaves memory idle, if each query head reads keys of its own.
const LONG: usize = 16_000;
/// The most parts of a row; one warp joins them.
const MOST_SPLITS: usize = 128;

/// A variant of the kernel.
struct Variant {
    /// Without the dtype.
    name: String,
    /// Query heads that a block attends.
    together: usize,
    /// Resident blocks of a multiprocessor: `DECODE_BLOCKS` in cuda/cache/decode_step.cuh, `GROUP_BLOCKS` in
    /// decode_group.cuh.
    resident: usize,
}

/// Whether a kernel decodes closed chains of this code, and keys and values of these sizes.
pub(crate) fn decodes<T: GpuElement>(code: Option<ByteCode>, [head_dim, value_dim]: [usize; 2]) -> bool {
    code.is_none() || T::HALF && head_dim == value_dim && head_dim <= 128 && head_dim.is_multiple_of(16)
}

impl Variant {
    /// For closed chains in 8 bits, and keys and values of this size.
    fn coded(code: ByteCode, head_dim: usize) -> Self {
        let code = match code {
            ByteCode::I8 => Storage::I8,
            ByteCode::F8E4M3 => Storage::F8E4M3,
        };
        Self {
            name: format!("decode_{code}_{}", padded(head_dim)),
            together: 8,
            resident: 3,
        }
    }

    /// For `group` query heads that share a list, and keys and values of these sizes.
    fn pick<T: GpuElement>(group: usize, [head_dim, value_dim]: [usize; 2]) -> Self {
        let dim = padded(head_dim.max(value_dim));
        if T::HALF && group > 1 && head_dim == value_dim && dim <= 128 {
            return Self {
                name: format!("decode_group_{dim}"),
                together: 8,
                resident: if dim == 64 { 3 } else { 2 },
            };
        }
        let together = [4, 2, 1]
            .into_iter()
            .find(|together| group.is_multiple_of(*together))
            .unwrap_or(1);
        let name = match value_dim == head_dim {
            true => "decode",
            false => "decode_values",
        };
        Self {
            name: format!("{name}_{dim}_{together}"),
            together,
            resident: match (T::HALF, together) {
                (true, 1) => 4,
                (true, 2) => 3,
                _ => 2,
            },
        }
    }
}

/// The output rows (batch * heads, Dv). Does not wait for the device.
///
/// # Errors
/// A head size that the kernels do not accept, or an error of a launch.
pub(crate) fn decode<G: Gpu, T: GpuElement>(
    gpu: &G,
    call: &DecodeCall<'_, G, T>,
    state: &mut impl StateArgs<G>,
    scratch: &mut Option<Scratch<G>>,
) -> Result<G::Slice<T>> {
    let sizes = call.params.sizes;
    let [batch, heads, lists, head_dim] =
        [sizes.batch, sizes.heads, sizes.lists, sizes.head_dim].map(|size| size as usize);
    let value_dim = call.params.value_dim as usize;
    if [head_dim, value_dim].iter().any(|dim| dim % 8 != 0 || *dim > 256) {
        bail!(
            "query: expected head sizes that are multiples of 8 and at most 256 on CUDA, got {head_dim} for keys and \
             {value_dim} for values; pad the heads or move the tensors with to_device(&Device::Cpu)"
        )
    }
    let (group, lists, rows) = (heads / lists, batch * lists, batch * heads);
    if !decodes::<T>(call.code, [head_dim, value_dim]) {
        bail!(
            "storage: expected f16 or bf16 heads of one size of at most 128 that is a multiple of 16 for decoding in 8 \
             bits, got {head_dim} for keys and {value_dim} for values; this is a defect of the crate, please report it"
        )
    }
    let variant = match call.code {
        None => Variant::pick::<T>(group, [head_dim, value_dim]),
        Some(code) => Variant::coded(code, head_dim),
    };
    let shares = group.div_ceil(variant.together);
    // All blocks are resident at once, so that no block waits for another to end, and all end together. Twice as many
    // blocks run where a block has little to compute and much to read.
    let alone = variant.together == 1 || call.code.is_some() && group == 1;
    let waves = if alone && call.most >= LONG { 2 } else { 1 };
    let slots = waves * gpu.multiprocessors()? * variant.resident;
    let splits = slots.saturating_sub(lists) / (lists * shares);
    let splits = splits.clamp(1, call.most.div_ceil(LEAST_COLUMNS).clamp(1, MOST_SPLITS));
    let params = DecodeParams {
        rows: rows as u32,
        parts: (splits + 1) as u32,
        splits: splits as u32,
        appends: u32::from(call.appended.is_some()),
        scale: (call.scale * std::f64::consts::LOG2_E) as f32,
    };
    let room = rows * (splits + 1) * (value_dim + 2);
    let mut kept = Scratch::fitting(gpu, scratch.take(), room, lists)?;
    let mut output = match call.some_sit_out {
        true => gpu.zeros::<T>(rows * value_dim)?,
        false => gpu.alloc(rows * value_dim)?,
    };
    let appended = call.appended.as_ref();
    let mut args = vec![
        gpu.read(call.queries),
        gpu.read_some(appended.map(|new| new.key)),
        gpu.read_some(appended.map(|new| new.value)),
        gpu.read_some(appended.map(|new| new.tests)),
        gpu.read_some(appended.and_then(|new| new.scores)),
    ];
    args.extend(state.args(gpu));
    args.push(gpu.write(&mut kept.parts));
    args.push(gpu.write(&mut kept.counters));
    args.push(gpu.write(&mut output));
    args.push(gpu.value(&call.params));
    args.push(gpu.value(&params));
    let launch = Launch {
        grid: [lists, 1 + splits * shares, 1],
        threads: 128,
        shared_bytes: 0,
    };
    gpu.launch(&Kernel::of::<T>(&variant.name), launch, &args)?;
    drop(args);
    // A launch that failed drops its counters.
    *scratch = Some(kept);
    Ok(output)
}
