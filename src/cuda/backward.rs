//! Launches of `cuda/backward.cu` and `cuda/backward_f32.cu`: gradients of the columns and of the (folded) queries.

use super::forward::{Attended, AttentionCall};
use super::gpu::{Gpu, GpuElement, Kernel, Launch};
use super::params::AttentionParams;
use crate::problem::Problem;
use candle_core::{bail, Result};

/// Gradients of keys and of values, f32.
pub(crate) struct KeysValues<G: Gpu> {
    pub keys: G::Slice<f32>,
    pub values: G::Slice<f32>,
}

/// Gradients where attention leaves them; [`super::fold::FoldCall`] takes them home.
pub(crate) struct Gradients<G: Gpu> {
    /// Of the queries as attention read them, folded or not: (B, H, N, D).
    pub queries: G::Slice<f32>,
    /// Of far columns, compact (B * lists, N, D): past the last column nothing is written. None in the dense case.
    pub far: Option<KeysValues<G>>,
    /// Of folded tokens at edges, (B * lists, N, D). None in the dense case.
    pub folded: Option<KeysValues<G>>,
    /// Of raw tokens inside windows, or of all of them in the dense case, (B * lists, N, D). None without a window.
    pub near: Option<KeysValues<G>>,
}

/// Rows, or columns, of a block.
const BLOCK: usize = 64;
/// The same in f32.
const F32_BLOCK: usize = 32;
const THREADS: usize = 128;

/// The kernels' template for a head size: its padded size.
pub(super) fn padded(head_dim: usize) -> usize {
    match head_dim {
        0..=64 => 64,
        65..=128 => 128,
        _ => 256,
    }
}

struct Pass<'a, G: Gpu, T: GpuElement> {
    gpu: &'a G,
    call: &'a AttentionCall<'a, G, T>,
    params: AttentionParams,
    grad_output: &'a G::Slice<T>,
    log_sum_exp: &'a G::Slice<f32>,
    delta: G::Slice<f32>,
}

/// Gradients of the sum of `attended.output * grad_output`, which are contiguous (B, H, N, D). Every sum has one owner:
/// the same bits every time. Nothing waits for the device.
///
/// # Errors
/// As [`AttentionCall::params`], an `attended` without its log-sum-exp, or whatever the launches report.
pub(crate) fn backward<G: Gpu, T: GpuElement>(
    gpu: &G,
    call: &AttentionCall<'_, G, T>,
    output: &G::Slice<T>,
    log_sum_exp: &G::Slice<f32>,
    grad_output: &G::Slice<T>,
) -> Result<Gradients<G>> {
    let params = call.params()?;
    let Problem {
        batch, heads, tokens, ..
    } = call.problem;
    let rows = batch * heads * tokens;
    let mut delta = gpu.alloc::<f32>(rows)?;
    let args = [
        gpu.read(output),
        gpu.read(grad_output),
        gpu.write(&mut delta),
        gpu.value(&params),
    ];
    let launch = Launch {
        grid: [rows.div_ceil(4), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
    };
    gpu.launch(&Kernel::of::<T>(module::<T>(), "backward_delta"), launch, &args)?;
    drop(args);
    let pass = Pass {
        gpu,
        call,
        params,
        grad_output,
        log_sum_exp,
        delta,
    };
    pass.gradients()
}

fn module<T: GpuElement>() -> &'static str {
    if T::HALF {
        "backward"
    } else {
        "backward_f32"
    }
}

impl<G: Gpu, T: GpuElement> Pass<'_, G, T> {
    fn gradients(&self) -> Result<Gradients<G>> {
        let dense = self.params.dense == 1;
        let near = dense || self.params.window > 0;
        Ok(Gradients {
            queries: self.queries()?,
            far: if dense { None } else { Some(self.columns("far")?) },
            folded: if dense { None } else { Some(self.edges()?) },
            near: match (near, dense) {
                (true, true) => Some(self.columns("far")?),
                (true, false) => Some(self.columns("near")?),
                _ => None,
            },
        })
    }

    /// A pair of tiles of 64 rows, and one or two stages of another pair with two words per row: `stages` in
    /// `cuda/backward_block.cuh`.
    fn shared_bytes(&self) -> usize {
        let dim = padded(self.call.problem.head_dim);
        let (pair, stages) = (2 * BLOCK * 2 * dim, if dim <= 128 { 2 } else { 1 });
        match T::HALF {
            true => pair + stages * (pair + 2 * 4 * BLOCK),
            false => 0,
        }
    }

    fn inputs(&self) -> Vec<G::Arg<'_>> {
        let mut args = self.call.inputs(self.gpu);
        args.push(self.gpu.read(self.grad_output));
        args.push(self.gpu.read(self.log_sum_exp));
        args.push(self.gpu.read(&self.delta));
        args
    }

    fn launch(&self, name: &str, blocks: usize, shared_bytes: usize, args: &[G::Arg<'_>]) -> Result<()> {
        let launch = Launch {
            grid: [blocks, 1, 1],
            threads: THREADS,
            shared_bytes,
        };
        self.gpu.launch(&Kernel::plain(module::<T>(), name), launch, args)
    }

    fn queries(&self) -> Result<G::Slice<f32>> {
        let Problem {
            batch,
            heads,
            tokens,
            head_dim,
            ..
        } = self.call.problem;
        let mut target = self.gpu.alloc::<f32>(batch * heads * tokens * head_dim)?;
        let mut args = self.inputs();
        args.push(self.gpu.write(&mut target));
        args.push(self.gpu.value(&self.params));
        let name = format!("backward_queries_{}_{}", padded(head_dim), T::SUFFIX);
        let rows = if T::HALF { BLOCK } else { F32_BLOCK };
        let blocks = batch * heads * tokens.div_ceil(rows);
        self.launch(&name, blocks, self.shared_bytes(), &args)?;
        drop(args);
        Ok(target)
    }

    /// Buffers of (B * lists, N, D).
    fn lists(&self) -> Result<(usize, KeysValues<G>)> {
        let lists = self.call.problem.batch * self.params.sizes.lists as usize;
        let size = lists * self.call.problem.tokens * self.call.problem.head_dim;
        let target = KeysValues {
            keys: self.gpu.alloc(size)?,
            values: self.gpu.alloc(size)?,
        };
        Ok((lists, target))
    }

    fn edges(&self) -> Result<KeysValues<G>> {
        let (lists, mut target) = self.lists()?;
        let Problem { tokens, head_dim, .. } = self.call.problem;
        let name = match T::HALF {
            true => format!("backward_edges_{}", T::SUFFIX),
            false => format!("backward_edges_{}_f32", padded(head_dim)),
        };
        self.both(&name, (lists * tokens).div_ceil(4), &mut target)?;
        Ok(target)
    }

    /// `kind` is "far" (every column, in the dense case) or "near".
    fn columns(&self, kind: &str) -> Result<KeysValues<G>> {
        let (lists, mut target) = self.lists()?;
        let (head_dim, tokens) = (self.call.problem.head_dim, self.call.problem.tokens);
        let dtype = T::SUFFIX;
        let blocks = lists * tokens.div_ceil(if T::HALF { BLOCK } else { F32_BLOCK });
        match padded(head_dim) {
            // Accumulators for keys and values of 256 do not fit into the registers together.
            256 if T::HALF => {
                self.both(&format!("backward_keys_256_{dtype}_{kind}"), blocks, &mut target)?;
                self.both(&format!("backward_values_256_{dtype}_{kind}"), blocks, &mut target)?;
            }
            dim => self.both(&format!("backward_columns_{dim}_{dtype}_{kind}"), blocks, &mut target)?,
        }
        Ok(target)
    }

    fn both(&self, name: &str, blocks: usize, target: &mut KeysValues<G>) -> Result<()> {
        let mut args = self.inputs();
        args.push(self.gpu.write(&mut target.keys));
        args.push(self.gpu.write(&mut target.values));
        args.push(self.gpu.value(&self.params));
        self.launch(name, blocks, self.shared_bytes(), &args)
    }
}

#[cfg_attr(not(feature = "cuda-emu"), allow(dead_code))]
impl<G: Gpu, T: GpuElement> Attended<G, T> {
    /// The log-sum-exp that the backward pass needs.
    ///
    /// # Errors
    /// A forward pass that did not keep it.
    pub fn kept_log_sum_exp(&self) -> Result<&G::Slice<f32>> {
        match &self.log_sum_exp {
            Some(sums) => Ok(sums),
            None => bail!(
                "compressed-attention: expected the forward pass's log-sum-exp, got none; \
                 this is a defect of the crate, please report it"
            ),
        }
    }
}
