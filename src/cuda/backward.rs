//! Launches of `cuda/backward/backward.cu`, `backward_fused.cu`, `backward_listed.cu`, `backward_sm90a.cu` and
//! `backward_f32.cu`: gradients of the columns and of the (folded) queries.

use super::extras::has_extras;
use super::fold::rows_of_warp;
use super::forward::{AttentionCall, Saved};
use super::on_gpu::{Gpu, GpuElement, Kernel, Launch};
use super::operands::padded;
use super::params::AttentionParams;
use super::variants::backward::{BackwardVariant, COLUMNS};
use crate::config::AttentionOptions;
use crate::problem::Problem;
use candle_core::Result;

/// Gradients of keys and of values, f32.
pub(crate) struct KvGradients<G: Gpu> {
    pub keys: G::Slice<f32>,
    pub values: G::Slice<f32>,
}

/// Gradients as attention writes them; [`super::fold::FoldCall`] changes them to gradients of raw tokens.
pub(crate) struct AttendedGradients<G: Gpu, T: GpuElement> {
    /// Gradients of the queries as attention read them, folded or not: (B, H, N, D).
    pub queries: G::Slice<f32>,
    /// Gradients of far columns, compact (B * lists, N, D); past the last column nothing is written. None in the dense
    /// case.
    pub far: Option<KvGradients<G>>,
    /// Gradients of folded tokens at edges, (B * lists, N, D). None in the dense case.
    pub folded: Option<KvGradients<G>>,
    /// Gradients of raw tokens inside windows, or of all raw tokens in the dense case and where they are listed,
    /// (B * lists, N, D). None without a window.
    pub near: Option<KvGradients<G>>,
    /// Sums of far columns' gradients of logits, (B * lists, N), for a column bias; past the last column nothing is
    /// written. None without one.
    pub fades: Option<G::Slice<f32>>,
    /// Finished gradients of keys and values (B, Hk, N, D); if set, the three fields above are None.
    pub done: Option<(G::Slice<T>, G::Slice<T>)>,
}

/// Rows, or columns, of a block.
const BLOCK: usize = 64;
/// Rows, or columns, of a block in f32.
const F32_BLOCK: usize = 32;
const THREADS: usize = 128;

/// `ColumnTarget` in `cuda/backward/backward_fused.cuh`: buffers for the fold to change further, or finished gradients
/// of keys and values (B, Hk, N, D).
enum ColumnTargets<'a, G: Gpu, T: GpuElement> {
    Sums(&'a mut KvGradients<G>),
    Done(&'a mut (G::Slice<T>, G::Slice<T>)),
}

/// Whether one pass over columns makes the gradients.
///
/// # Errors
/// An error of the driver.
pub(crate) fn fuses<G: Gpu, T: GpuElement>(gpu: &G, problem: &Problem, options: &AttentionOptions) -> Result<bool> {
    Ok(BackwardVariant::on::<G, T>(gpu, problem, options, has_extras(options))?.is_some())
}

/// The fewest tokens for which each query head gets a list of its own.
const APART_TOKENS: usize = 256;

/// Lists of columns per batch row of a backward pass where nothing is hidden: one per KV head. One per query head where
/// one pass over columns would have few blocks and the first blocks run long; the gradients of a group are added up
/// afterwards.
///
/// # Errors
/// An error of the driver.
pub(crate) fn lists<G: Gpu, T: GpuElement>(gpu: &G, problem: &Problem, options: &AttentionOptions) -> Result<usize> {
    let Some(variant) = BackwardVariant::on::<G, T>(gpu, problem, options, has_extras(options))? else {
        return Ok(problem.kv_heads);
    };
    let blocks = problem.batch * problem.kv_heads * problem.tokens.div_ceil(COLUMNS);
    let at_a_time = gpu.multiprocessors()? * variant.at_a_time();
    let few = problem.tokens >= APART_TOKENS && blocks < 2 * at_a_time;
    Ok(if few { problem.heads } else { problem.kv_heads })
}

struct Pass<'a, G: Gpu, T: GpuElement> {
    gpu: &'a G,
    call: &'a AttentionCall<'a, G, T>,
    params: AttentionParams,
    grad_output: &'a G::Slice<T>,
    log_sum_exp: &'a G::Slice<f32>,
    delta: G::Slice<f32>,
}

/// Gradients of the sum of `saved.output * grad_output`, which are contiguous (B, H, N, D). With
/// [`AttentionOptions::deterministic`], and in f32 and above a head size of 128 always, every sum has one owner: the
/// same bits every time. Does not wait for the device.
///
/// # Errors
/// As [`AttentionCall::params`], or an error of a launch.
pub(crate) fn backward<G: Gpu, T: GpuElement>(
    gpu: &G,
    call: &AttentionCall<'_, G, T>,
    saved: &Saved<'_, G, T>,
    grad_output: &G::Slice<T>,
) -> Result<AttendedGradients<G, T>> {
    let params = call.params()?;
    let Problem {
        batch, heads, tokens, ..
    } = call.problem;
    let rows = batch * heads * tokens;
    let mut delta = gpu.alloc::<f32>(rows)?;
    let mut args = vec![gpu.read(saved.output)];
    if T::HALF {
        args.push(gpu.read_some(saved.rest));
    }
    args.extend([gpu.read(grad_output), gpu.write(&mut delta), gpu.value(&params)]);
    let rows_of_warp = if T::HALF {
        rows_of_warp(call.problem.head_dim)
    } else {
        1
    };
    let launch = Launch {
        grid: [rows.div_ceil(THREADS / 32 * rows_of_warp), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
    };
    let kernel = Kernel::of::<T>("backward_delta").early();
    gpu.launch(&kernel, launch, &args)?;
    drop(args);
    let pass = Pass {
        gpu,
        call,
        params,
        grad_output,
        log_sum_exp: saved.log_sum_exp,
        delta,
    };
    pass.gradients()
}

impl<G: Gpu, T: GpuElement> Pass<'_, G, T> {
    fn gradients(&self) -> Result<AttendedGradients<G, T>> {
        match BackwardVariant::on::<G, T>(self.gpu, &self.call.problem, self.call.options, self.call.extras())? {
            Some(variant) => self.one_pass_gradients(&variant),
            None => self.owned_gradients(),
        }
    }

    /// Computes queries and columns one after the other: every sum has one owner.
    fn owned_gradients(&self) -> Result<AttendedGradients<G, T>> {
        let dense = self.params.dense == 1;
        let mut fades = self.fades()?;
        Ok(AttendedGradients {
            queries: self.queries()?,
            far: match (dense, &mut fades) {
                (true, _) => None,
                (false, None) => Some(self.columns("far", None)?),
                (false, Some(fades)) => Some(self.columns("faded", Some(fades))?),
            },
            folded: if dense { None } else { Some(self.edges(None)?) },
            near: match (dense, self.params.window) {
                (true, _) => Some(self.columns("far", None)?),
                (false, 0) => None,
                (false, _) => Some(self.columns("near", None)?),
            },
            fades,
            done: None,
        })
    }

    /// Makes one pass over each kind of columns, which also adds up the queries' gradients.
    fn one_pass_gradients(&self, variant: &BackwardVariant) -> Result<AttendedGradients<G, T>> {
        let Problem {
            batch,
            heads,
            kv_heads,
            tokens,
            head_dim,
            ..
        } = self.call.problem;
        let mut queries = self.gpu.zeros(batch * heads * tokens * head_dim)?;
        if self.params.dense == 1 || self.call.listed() {
            let kind = if self.params.dense == 1 { "far" } else { "listed" };
            let (mut done, mut near) = (None, None);
            if self.params.sizes.lists as usize == kv_heads {
                let rows = || self.gpu.alloc::<T>(batch * kv_heads * tokens * head_dim);
                let target = done.insert((rows()?, rows()?));
                self.one_pass(variant, kind, &mut queries, ColumnTargets::Done(target), None)?;
            } else {
                let target = near.insert(self.lists()?.1);
                self.one_pass(variant, kind, &mut queries, ColumnTargets::Sums(target), None)?;
            }
            return Ok(AttendedGradients {
                queries,
                far: None,
                folded: None,
                near,
                fades: None,
                done,
            });
        }
        let mut sums = |kind, fades: Option<&mut G::Slice<f32>>| -> Result<KvGradients<G>> {
            let (_, mut target) = self.lists()?;
            self.one_pass(variant, kind, &mut queries, ColumnTargets::Sums(&mut target), fades)?;
            Ok(target)
        };
        let mut fades = self.fades()?;
        let far = match &mut fades {
            None => sums("far", None)?,
            Some(fades) => sums("faded", Some(fades))?,
        };
        let near = if self.params.window > 0 {
            Some(sums("near", None)?)
        } else {
            None
        };
        Ok(AttendedGradients {
            far: Some(far),
            folded: Some(self.edges(Some(&mut queries))?),
            near,
            fades,
            done: None,
            queries,
        })
    }

    /// `kind` and `fades` as for [`Self::columns`], or "listed".
    fn one_pass(
        &self,
        variant: &BackwardVariant,
        kind: &str,
        queries: &mut G::Slice<f32>,
        columns: ColumnTargets<'_, G, T>,
        fades: Option<&mut G::Slice<f32>>,
    ) -> Result<()> {
        let lists = self.call.problem.batch * self.params.sizes.lists as usize;
        // There are two kinds of listed columns, each with a last block of its own.
        let blocks = self.call.problem.tokens.div_ceil(COLUMNS) + usize::from(kind == "listed");
        let launch = Launch {
            grid: [lists * blocks, 1, 1],
            threads: variant.threads,
            shared_bytes: 0,
        };
        let mut args = self.inputs();
        args.push(self.gpu.write(queries));
        match columns {
            ColumnTargets::Sums(sums) => {
                args.extend([self.gpu.write(&mut sums.keys), self.gpu.write(&mut sums.values)]);
                args.extend([self.gpu.absent(), self.gpu.absent()]);
            }
            ColumnTargets::Done(done) => {
                args.extend([self.gpu.absent(), self.gpu.absent()]);
                args.extend([self.gpu.write(&mut done.0), self.gpu.write(&mut done.1)]);
            }
        }
        args.push(self.gpu.value(&self.params));
        args.extend(fades.map(|fades| self.gpu.write(fades)));
        self.gpu.launch(&variant.kernel::<T>(kind).early(), launch, &args)
    }

    fn inputs(&self) -> Vec<G::Arg<'_>> {
        let mut args = self.call.inputs(self.gpu);
        args.push(self.gpu.read(self.grad_output));
        args.push(self.gpu.read(self.log_sum_exp));
        args.push(self.gpu.read(&self.delta));
        args
    }

    fn launch(&self, name: &str, blocks: usize, args: &[G::Arg<'_>]) -> Result<()> {
        let launch = Launch {
            grid: [blocks, 1, 1],
            threads: THREADS,
            shared_bytes: 0,
        };
        self.gpu.launch(&Kernel::plain(name), launch, args)
    }

    fn queries(&self) -> Result<G::Slice<f32>> {
        let Problem {
            batch,
            heads,
            tokens,
            head_dim,
            ..
        } = self.call.problem;
        let mut target = self.call.target::<f32>(self.gpu, batch * heads * tokens * head_dim)?;
        let mut args = self.inputs();
        args.push(self.gpu.write(&mut target));
        args.push(self.gpu.value(&self.params));
        let name = format!("backward_queries_{}_{}", padded(head_dim), T::SUFFIX);
        let rows = if T::HALF { BLOCK } else { F32_BLOCK };
        self.launch(&name, self.call.row_blocks(rows), &args)?;
        drop(args);
        Ok(target)
    }

    /// Allocates buffers of (B * lists, N, D).
    fn lists(&self) -> Result<(usize, KvGradients<G>)> {
        let lists = self.call.problem.batch * self.params.sizes.lists as usize;
        let size = lists * self.call.problem.tokens * self.call.problem.head_dim;
        let target = KvGradients {
            keys: self.gpu.alloc(size)?,
            values: self.gpu.alloc(size)?,
        };
        Ok((lists, target))
    }

    /// Room for the sums of far columns, where a column bias fades them.
    fn fades(&self) -> Result<Option<G::Slice<f32>>> {
        let lists = self.call.problem.batch * self.params.sizes.lists as usize;
        match self.call.fades {
            true => Ok(Some(self.gpu.alloc(lists * self.call.problem.tokens)?)),
            false => Ok(None),
        }
    }

    /// Gradients of edge columns. Adds the queries' share to `queries`, if given.
    fn edges(&self, queries: Option<&mut G::Slice<f32>>) -> Result<KvGradients<G>> {
        let (lists, mut target) = self.lists()?;
        let Problem { tokens, head_dim, .. } = self.call.problem;
        let mut args = self.inputs();
        let name = match T::HALF {
            true => {
                args.push(self.gpu.write_some(queries));
                format!("backward_edges_{}", T::SUFFIX)
            }
            false => format!("backward_edges_{}_f32", padded(head_dim)),
        };
        args.push(self.gpu.write(&mut target.keys));
        args.push(self.gpu.write(&mut target.values));
        args.push(self.gpu.value(&self.params));
        self.launch(&name, (lists * tokens).div_ceil(4), &args)?;
        drop(args);
        Ok(target)
    }

    /// Gradients of one kind of columns: `kind` is "far" (every column, in the dense case), "near", or "faded", which
    /// is far ones whose sums of gradients of logits go to `fades`.
    fn columns(&self, kind: &str, fades: Option<&mut G::Slice<f32>>) -> Result<KvGradients<G>> {
        let (lists, mut target) = self.lists()?;
        let (head_dim, tokens) = (self.call.problem.head_dim, self.call.problem.tokens);
        let dtype = T::SUFFIX;
        let blocks = lists * tokens.div_ceil(if T::HALF { BLOCK } else { F32_BLOCK });
        match padded(head_dim) {
            // Accumulators for keys and values of D = 256 do not fit into the registers together.
            256 if T::HALF => {
                self.both(&format!("backward_keys_256_{dtype}_{kind}"), blocks, &mut target, fades)?;
                let kind = if kind == "faded" { "far" } else { kind };
                self.both(
                    &format!("backward_values_256_{dtype}_{kind}"),
                    blocks,
                    &mut target,
                    None,
                )?;
            }
            dim => self.both(
                &format!("backward_columns_{dim}_{dtype}_{kind}"),
                blocks,
                &mut target,
                fades,
            )?,
        }
        Ok(target)
    }

    fn both(
        &self,
        name: &str,
        blocks: usize,
        target: &mut KvGradients<G>,
        fades: Option<&mut G::Slice<f32>>,
    ) -> Result<()> {
        let mut args = self.inputs();
        args.push(self.gpu.write(&mut target.keys));
        args.push(self.gpu.write(&mut target.values));
        args.push(self.gpu.value(&self.params));
        args.extend(fades.map(|fades| self.gpu.write(fades)));
        self.launch(name, blocks, &args)
    }
}
