//! Launches of `cuda/decide/fold.cu`: the columns that merging leaves, and the gradients of raw tokens from the
//! gradients of columns.

use super::on_gpu::{Gpu, GpuElement, Kernel, Launch, Source};
use super::params::{FoldParams, Rows, Sizes};
use crate::config::Fold;
use crate::cuda::operands::ColumnBuffers;
use crate::problem::{Problem, RowLayout};
use candle_core::Result;

/// `SCAN_WARPS` of `cuda/decide/fold.cu`.
const SCAN_THREADS: usize = 32 * 32;

/// Rows that share a warp: `Lanes` in cuda/lib/warp_row.cuh.
pub(super) fn rows_of_warp(head_dim: usize) -> usize {
    match head_dim {
        0..=64 => 4,
        65..=128 => 2,
        _ => 1,
    }
}

/// As `FoldKind` in cuda/lib/params.cuh.
pub(crate) fn fold_code(fold: Fold) -> u32 {
    match fold {
        Fold::PairSum => 0,
        Fold::Mean => 1,
        Fold::Drop => 2,
    }
}

/// `far_before`, then the gradients of far columns and of folded tokens, (B·lists, N, D).
pub(crate) type FoldedGradients<'a, G> = (
    &'a <G as Gpu>::Slice<u32>,
    &'a <G as Gpu>::Slice<f32>,
    &'a <G as Gpu>::Slice<f32>,
);

/// The inputs of folding.
pub(crate) struct FoldCall<'a, G: Gpu, T: GpuElement> {
    pub problem: Problem,
    pub q: Source<'a, G, T>,
    pub k: Source<'a, G, T>,
    pub v: Source<'a, G, T>,
    /// Merge indicators (B, H, N-1).
    pub bits: &'a G::Slice<u8>,
    pub fold: Fold,
    /// Lists per batch row: the KV heads if all query heads of each KV head agree, else the query heads.
    pub lists: usize,
}

impl<G: Gpu, T: GpuElement> FoldCall<'_, G, T> {
    /// Launches over the tokens of `lists` lists. With `chains`, under a mean, a warp walks along each chain.
    fn launch(&self, lists: usize, chains: bool) -> Launch {
        let rows = match chains && self.fold.walks_chains() {
            true => 1,
            false => rows_of_warp(self.problem.head_dim),
        };
        Launch::warps(self.problem.tokens.div_ceil(rows), lists)
    }

    pub(super) fn params(&self, lists: usize) -> Result<FoldParams> {
        Ok(FoldParams {
            q: Rows::new(&self.q.1),
            k: Rows::new(&self.k.1),
            v: Rows::new(&self.v.1),
            sizes: Sizes::new(&self.problem, lists)?,
            fold: fold_code(self.fold),
            reserved: 0,
        })
    }

    /// Folds keys and values and gathers the far columns. With `listed` only finds which tokens these are, for kernels
    /// that read raw tokens.
    ///
    /// # Errors
    /// An error of the device.
    pub fn columns(&self, gpu: &G, listed: bool) -> Result<ColumnBuffers<G, T>> {
        let Problem {
            batch,
            tokens,
            head_dim,
            ..
        } = self.problem;
        let (lists, params) = (batch * self.lists, self.params(self.lists)?);
        let rows = |wanted: bool| match wanted {
            true => gpu.alloc::<T>(lists * tokens * head_dim).map(Some),
            false => Ok(None),
        };
        let sizes = || match self.fold.has_sizes() {
            // Past the last far column nothing is written, and nothing may be read.
            true => gpu.alloc::<f32>(lists * tokens).map(Some),
            false => Ok(None),
        };
        // Under drop no token changes: edges read the raw tokens.
        let changed = self.fold.keeps_hidden();
        let mut columns = ColumnBuffers {
            capacity: tokens,
            far_k: rows(!listed)?,
            far_v: rows(!listed)?,
            far_ln: sizes()?,
            far_index: gpu.alloc(lists * tokens)?,
            far_before: gpu.alloc(lists * (tokens + 1))?,
            folded_k: rows(changed)?,
            folded_v: rows(changed)?,
            folded_ln: sizes()?,
        };
        let args = [
            gpu.read(self.bits),
            gpu.write(&mut columns.far_index),
            gpu.write(&mut columns.far_before),
            gpu.value(&params),
        ];
        let launch = Launch {
            grid: [lists, 1, 1],
            threads: SCAN_THREADS,
            shared_bytes: 0,
        };
        gpu.launch(&Kernel::plain("fold_scan").early(), launch, &args)?;
        drop(args);
        if listed {
            return Ok(columns);
        }
        let args = [
            gpu.read(self.k.0),
            gpu.read(self.v.0),
            gpu.read(self.bits),
            gpu.read(&columns.far_before),
            gpu.write_some(columns.far_k.as_mut()),
            gpu.write_some(columns.far_v.as_mut()),
            gpu.write_some(columns.far_ln.as_mut()),
            gpu.write_some(columns.folded_k.as_mut()),
            gpu.write_some(columns.folded_v.as_mut()),
            gpu.write_some(columns.folded_ln.as_mut()),
            gpu.value(&params),
        ];
        gpu.launch(&Kernel::of::<T>("fold_gather"), self.launch(lists, true), &args)?;
        drop(args);
        Ok(columns)
    }

    /// The folded queries (B, H, N, D); None where the fold leaves queries alone.
    ///
    /// # Errors
    /// An error of the device.
    pub fn queries(&self, gpu: &G) -> Result<Option<G::Slice<T>>> {
        if !self.fold.folds_queries() {
            return Ok(None);
        }
        let (problem, params) = (self.problem, self.params(self.problem.heads)?);
        let rows = problem.batch * problem.heads;
        let mut out = gpu.alloc::<T>(rows * problem.tokens * problem.head_dim)?;
        let args = [
            gpu.read(self.q.0),
            gpu.read(self.bits),
            gpu.write(&mut out),
            gpu.value(&params),
        ];
        gpu.launch(&Kernel::of::<T>("fold_queries"), self.launch(rows, false), &args)?;
        drop(args);
        Ok(Some(out))
    }

    /// Changes gradients of columns and of near tokens to gradients of raw keys or values (B, Hk, N, D). `columns`
    /// holds `far_before`, the gradients of far columns and of folded tokens; `near` the gradients of near tokens; each
    /// is (B·lists, N, D). Either may be absent.
    ///
    /// # Errors
    /// An error of the device.
    pub fn unfold(
        &self,
        gpu: &G,
        columns: Option<FoldedGradients<'_, G>>,
        near: Option<&G::Slice<f32>>,
    ) -> Result<G::Slice<T>> {
        let Problem {
            batch,
            kv_heads,
            tokens,
            head_dim,
            ..
        } = self.problem;
        let params = self.params(self.lists)?;
        let mut unfolded = None;
        // Under a mean, chains are walked before lists are added up; otherwise one kernel does both.
        if let (Some((far_before, far, folded)), true) = (columns, self.fold.walks_chains()) {
            let mut target = gpu.alloc::<f32>(batch * self.lists * tokens * head_dim)?;
            let args = [
                gpu.read(far),
                gpu.read(folded),
                gpu.read(self.bits),
                gpu.read(far_before),
                gpu.write(&mut target),
                gpu.value(&params),
            ];
            let launch = self.launch(batch * self.lists, true);
            gpu.launch(&Kernel::plain("fold_unfold"), launch, &args)?;
            drop(args);
            unfolded = Some(target);
        }
        let columns = columns.filter(|_| !self.fold.walks_chains());
        let mut out = gpu.alloc::<T>(batch * kv_heads * tokens * head_dim)?;
        let args = [
            gpu.read_some(unfolded.as_ref()),
            gpu.read_some(columns.map(|(_, far, _)| far)),
            gpu.read_some(columns.map(|(_, _, folded)| folded)),
            gpu.read_some(columns.map(|_| self.bits)),
            gpu.read_some(columns.map(|(far_before, _, _)| far_before)),
            gpu.read_some(near),
            gpu.write(&mut out),
            gpu.value(&params),
        ];
        let launch = self.launch(batch * kv_heads, false);
        gpu.launch(&Kernel::of::<T>("fold_reduce"), launch, &args)?;
        drop(args);
        Ok(out)
    }

    /// Changes gradients of the queries as attention read them, f32 (B, H, N, D), to gradients of the raw queries.
    /// `were_folded`: whether attention read folded queries, if the fold folds queries.
    ///
    /// # Errors
    /// An error of the device.
    pub fn unfold_queries(&self, gpu: &G, folded: &G::Slice<f32>, were_folded: bool) -> Result<G::Slice<T>> {
        let (problem, params) = (self.problem, self.params(self.problem.heads)?);
        let rows = problem.batch * problem.heads;
        let mut out = gpu.alloc::<T>(rows * problem.tokens * problem.head_dim)?;
        let bits = (were_folded && self.fold.folds_queries()).then_some(self.bits);
        let args = [
            gpu.read(folded),
            gpu.read_some(bits),
            gpu.write(&mut out),
            gpu.value(&params),
        ];
        gpu.launch(
            &Kernel::of::<T>("fold_unfold_queries").early(),
            self.launch(rows, false),
            &args,
        )?;
        drop(args);
        Ok(out)
    }
}

/// The layout of a contiguous (B, H, N, D) buffer.
pub(crate) fn contiguous_rows(problem: &Problem) -> RowLayout {
    let Problem {
        heads,
        tokens,
        head_dim: dim,
        ..
    } = *problem;
    RowLayout {
        offset: 0,
        strides: [heads * tokens * dim, tokens * dim, dim],
        dim,
    }
}
