//! Launches of `cuda/cache/cache_attend.cu`: the newest row over the whole cache, with a bias or dropout.

use super::{page_code, DeviceLists};
use crate::config::AttentionOptions;
use crate::cuda::extras::{softcap_in_base_2, ExtraBuffers};
use crate::cuda::on_gpu::{Gpu, GpuElement, Kernel, Launch};
use crate::cuda::params::{BiasEntries, CacheAttendParams, DropoutParams};
use crate::problem::Problem;
use candle_core::Result;

/// `WARPS` in cuda/cache/cache_attend.cu.
const WARPS: usize = 8;

impl<G: Gpu, T: GpuElement> DeviceLists<G, T> {
    /// The output rows (B * H, Dv) of the last token; the bias is a view whose row axis starts at that token.
    pub(super) fn attend(
        &self,
        gpu: &G,
        queries: &G::Slice<T>,
        options: &AttentionOptions,
        extras: ExtraBuffers<'_, G>,
    ) -> Result<G::Slice<T>> {
        let Problem {
            heads,
            head_dim,
            value_dim,
            ..
        } = self.settings.problem;
        let rows = self.batch * heads;
        let dropout = DropoutParams::new(options);
        let params = CacheAttendParams {
            bias: BiasEntries::new(extras.bias),
            dropout_cut: dropout.cut,
            heads: heads as u32,
            lists: self.settings.lists as u32,
            head_dim: head_dim as u32,
            pages: self.state.pages.stride() as u32,
            window: self.settings.config.window as u32,
            last: (self.seq_len - 1) as u32,
            dropout_key: dropout.key,
            scale: (options.scale(head_dim) * std::f64::consts::LOG2_E) as f32,
            dropout_scale: dropout.scale,
            softcap: softcap_in_base_2(options),
            slide: self.slide(),
            value_dim: value_dim as u32,
            drawn_from: extras.drawn_from,
            sized: u32::from(self.settings.config.fold.has_sizes()),
            code: page_code(self.settings.code),
        };
        let mut output = match self.some_sit_out() {
            true => gpu.zeros::<T>(rows * value_dim)?,
            false => gpu.alloc(rows * value_dim)?,
        };
        let state = &self.state;
        let args = [
            gpu.read(queries),
            gpu.read(state.pages.table()),
            gpu.read(&state.lengths),
            gpu.read_some(state.seen.as_ref()),
            gpu.read(&state.starts),
            gpu.read(&state.local_k),
            gpu.read(&state.local_v),
            gpu.read_some(state.local_ln.as_ref()),
            gpu.read(&state.local_lengths),
            gpu.read_some(extras.bias.map(|bias| bias.data)),
            gpu.read_some(extras.sinks),
            gpu.write(&mut output),
            gpu.value(&params),
        ];
        let launch = Launch {
            grid: [rows, 1, 1],
            threads: 32 * WARPS,
            // A warp's maximum and sum, and its part of the output.
            shared_bytes: WARPS * (2 + value_dim) * size_of::<f32>(),
        };
        gpu.launch(&Kernel::of::<T>("cache_attend"), launch, &args)?;
        drop(args);
        Ok(output)
    }
}
