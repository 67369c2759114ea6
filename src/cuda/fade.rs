//! Launches of `cuda/decide/fade.cu`: a column bias on far columns, and its gradient.

use super::on_gpu::{Gpu, GpuElement, Kernel, Launch};
use crate::cuda::fold::FoldCall;
use crate::cuda::operands::ColumnBuffers;
use crate::problem::Problem;
use candle_core::Result;

const THREADS: usize = 128;

fn launch(tokens: usize, lists: usize) -> Launch {
    Launch {
        grid: [tokens.div_ceil(THREADS), lists, 1],
        threads: THREADS,
        shared_bytes: 0,
    }
}

impl<G: Gpu, T: GpuElement> FoldCall<'_, G, T> {
    /// Adds a column bias (B, Hk, N) to the sizes of gathered far columns.
    ///
    /// # Errors
    /// An error of the device.
    pub fn fade(&self, gpu: &G, columns: &mut ColumnBuffers<G, T>, bias: &G::Slice<f32>) -> Result<()> {
        let Problem { batch, tokens, .. } = self.problem;
        let (lists, params) = (batch * self.lists, self.params(self.lists)?);
        let mut sizes = match columns.far_ln.take() {
            Some(sizes) => sizes,
            None => gpu.alloc::<f32>(lists * tokens)?,
        };
        let args = [
            gpu.read(bias),
            gpu.read(&columns.far_index),
            gpu.read(&columns.far_before),
            gpu.write(&mut sizes),
            gpu.value(&params),
        ];
        gpu.launch(&Kernel::plain("fade_columns"), launch(tokens, lists), &args)?;
        drop(args);
        columns.far_ln = Some(sizes);
        Ok(())
    }

    /// The gradient of the column bias (B, Hk, N), from `far_before` and the sums of far columns (B·lists, N).
    ///
    /// # Errors
    /// An error of the device.
    pub fn unfade(&self, gpu: &G, far_before: &G::Slice<u32>, far: &G::Slice<f32>) -> Result<G::Slice<f32>> {
        let Problem {
            batch,
            kv_heads,
            tokens,
            ..
        } = self.problem;
        let params = self.params(self.lists)?;
        let mut out = gpu.alloc::<f32>(batch * kv_heads * tokens)?;
        let args = [
            gpu.read(far),
            gpu.read(far_before),
            gpu.write(&mut out),
            gpu.value(&params),
        ];
        gpu.launch(
            &Kernel::plain("fade_gradients"),
            launch(tokens, batch * kv_heads),
            &args,
        )?;
        drop(args);
        Ok(out)
    }
}
