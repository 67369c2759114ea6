//! Launches of `cuda/forward/forward.cu`, `forward_listed.cu`, `forward_sm90a.cu`, `forward_spread.cu` and
//! `forward_f32.cu`: attention over the columns that folding left.

use super::extras::{has_extras, softcap_in_base_2};
use super::on_gpu::{Gpu, GpuElement, Kernel, Launch, Number};
use super::operands::{padded, BiasBuffer, ColumnBuffers, Part};
use super::params::{AttentionParams, BiasEntries, DropoutParams, Rows, Sizes};
use super::variants::forward::{ForwardVariant, THREADS};
use crate::config::AttentionOptions;
use crate::problem::{Problem, RowLayout};
use candle_core::{bail, Result};

/// The inputs of attention. Queries are already folded if the fold folds queries.
pub(crate) struct AttentionCall<'a, G: Gpu, T: GpuElement> {
    pub problem: Problem,
    pub q: (&'a G::Slice<T>, RowLayout),
    pub k: (&'a G::Slice<T>, RowLayout),
    pub v: (&'a G::Slice<T>, RowLayout),
    /// None where nothing is hidden: the raw keys and values are the columns.
    pub columns: Option<&'a ColumnBuffers<G, T>>,
    /// Lists of columns per batch row: the heads, or the KV heads.
    pub lists: usize,
    pub window: usize,
    pub bias: Option<BiasBuffer<'a, G>>,
    /// Sink logits (H) in f32.
    pub sinks: Option<&'a G::Slice<f32>>,
    /// Whether the sizes of far columns have a column bias in them, whose gradient will be asked for.
    pub fades: bool,
    pub options: &'a AttentionOptions,
    pub part: Part,
}

/// The output (B, H, N, D), and the tensors that the backward pass needs, if asked for.
pub(crate) struct Attended<G: Gpu, T: GpuElement> {
    pub output: G::Slice<T>,
    pub kept: Option<Kept<G, T>>,
}

/// The tensors of the forward pass that the backward pass needs besides the output.
pub(crate) struct Kept<G: Gpu, T: GpuElement> {
    /// Each row's log-sum-exp in base 2 and its rounding error, (2, B, H, N): `saved_sum` in `cuda/lib/softmax.cuh`.
    pub log_sum_exp: G::Slice<f32>,
    /// The rounding error of the output, (B, H, N, D): see [`AttentionCall::keeps_rest`].
    pub rest: Option<G::Slice<T>>,
}

/// The tensors of a forward pass that the backward pass reads.
pub(crate) struct Saved<'a, G: Gpu, T: GpuElement> {
    pub output: &'a G::Slice<T>,
    pub rest: Option<&'a G::Slice<T>>,
    pub log_sum_exp: &'a G::Slice<f32>,
}

#[cfg_attr(not(feature = "cuda-emu"), allow(dead_code))]
impl<G: Gpu, T: GpuElement> Attended<G, T> {
    /// The tensors for the backward pass.
    ///
    /// # Errors
    /// A forward pass that kept no such tensors.
    pub fn saved(&self) -> Result<Saved<'_, G, T>> {
        match &self.kept {
            Some(kept) => Ok(Saved {
                output: &self.output,
                rest: kept.rest.as_ref(),
                log_sum_exp: &kept.log_sum_exp,
            }),
            None => bail!(
                "compressed-attention: expected the forward pass's log-sum-exp, got none; \
                 this is a defect of the crate, please report it"
            ),
        }
    }
}

impl<G: Gpu, T: GpuElement> AttentionCall<'_, G, T> {
    /// The arguments of the kernels for this call.
    ///
    /// # Errors
    /// Sizes or strides that the kernels do not accept.
    pub fn params(&self) -> Result<AttentionParams> {
        let Problem { head_dim, .. } = self.problem;
        if head_dim % 8 != 0 || head_dim > 256 {
            bail!(
                "query: expected a head_dim that is a multiple of 8 and at most 256 on CUDA, got {head_dim}; \
                 pad the head or move the tensors with to_device(&Device::Cpu)"
            )
        }
        for (name, (_, layout)) in [("query", &self.q), ("key", &self.k), ("value", &self.v)] {
            if !layout.is_aligned(8) {
                bail!(
                    "{name}: expected rows that start at multiples of 8 elements on CUDA, got offset {} and strides \
                     {:?}; call contiguous() on it first",
                    layout.offset,
                    layout.strides
                )
            }
        }
        let options = self.options;
        let scale = options.scale(head_dim) * std::f64::consts::LOG2_E;
        let dropout = DropoutParams::new(options);
        Ok(AttentionParams {
            q: Rows::new(&self.q.1),
            k: Rows::new(&self.k.1),
            v: Rows::new(&self.v.1),
            bias: BiasEntries::new(self.bias),
            dropout_cut: dropout.cut,
            sizes: Sizes::new(&self.problem, self.lists)?,
            capacity: self.columns.map_or(0, |columns| columns.capacity as u32),
            // A window longer than the sequence acts like one of all tokens.
            window: self.window.min(self.problem.tokens) as u32,
            causal: options.causal.into(),
            dense: self.columns.is_none().into(),
            listed: self.listed().into(),
            softcap: softcap_in_base_2(options),
            slide: self.slide() as u32,
            first_row: self.part.first_row as u32,
            drawn_from: self.part.drawn_from,
            dropout_key: dropout.key,
            scale: scale.abs() as f32,
            scale_sign: if scale < 0.0 { -1.0 } else { 1.0 },
            dropout_scale: dropout.scale,
        })
    }

    /// Whether the columns are raw tokens by their lists: "listed" in `cuda/lib/params.cuh`.
    pub fn listed(&self) -> bool {
        self.columns.is_some_and(|columns| columns.far_k.is_none())
    }

    /// Whether an option excludes the lean kernels.
    pub fn extras(&self) -> bool {
        has_extras(self.options)
    }

    /// L of the sliding window, at most the number of tokens, which is none.
    fn slide(&self) -> usize {
        let tokens = self.problem.tokens;
        // Rows that are no tokens count from the first query.
        let behind = if self.options.causal { 0 } else { self.part.first_row };
        let length = self.options.sliding_window.unwrap_or(tokens);
        length.saturating_add(behind).min(tokens)
    }

    /// Whether a sliding window hides columns, or rows are left out: only kernels with a left border know of these.
    fn is_cut(&self) -> bool {
        self.slide() < self.problem.tokens || self.part.first_row > 0
    }

    /// The blocks of this many rows of all heads, without those before the first row.
    pub(super) fn row_blocks(&self, rows: usize) -> usize {
        let Problem {
            batch, heads, tokens, ..
        } = self.problem;
        batch * heads * (tokens.div_ceil(rows) - self.part.first_row / rows)
    }

    /// A buffer of `len` numbers that kernels write; zeros where they leave rows out.
    pub(super) fn target<N: Number>(&self, gpu: &G, len: usize) -> Result<G::Slice<N>> {
        match self.part.first_row {
            0 => gpu.alloc(len),
            _ => gpu.zeros(len),
        }
    }

    /// Whether the rounding error of the output is kept for the backward pass, as another tensor of the output's size.
    /// Where one weight is nearly all of a row's sum, gradients are small differences, and the rounding of the output
    /// is their only error. The lean causal kernels do not keep it, as other fused kernels do not: their rows rarely
    /// have such a weight, and keeping it costs 1 %. Rows of a short sliding window have, and
    /// rows whose far columns fade.
    fn keeps_rest(&self) -> bool {
        T::HALF && (self.extras() || self.fades || self.is_cut() || !self.options.causal || self.problem.head_dim > 128)
    }

    /// q, k, v, then the columns in the order that every attention kernel takes, then the bias.
    pub fn inputs<'a>(&'a self, gpu: &'a G) -> Vec<G::Arg<'a>> {
        let columns = self.columns;
        let words = |pick: fn(&ColumnBuffers<G, T>) -> &G::Slice<u32>| gpu.read_some(columns.map(pick));
        vec![
            gpu.read(self.q.0),
            gpu.read(self.k.0),
            gpu.read(self.v.0),
            gpu.read_some(columns.and_then(|c| c.far_k.as_ref())),
            gpu.read_some(columns.and_then(|c| c.far_v.as_ref())),
            gpu.read_some(columns.and_then(|c| c.far_ln.as_ref())),
            words(|c| &c.far_index),
            words(|c| &c.far_before),
            gpu.read_some(columns.and_then(|c| c.folded_k.as_ref())),
            gpu.read_some(columns.and_then(|c| c.folded_v.as_ref())),
            gpu.read_some(columns.and_then(|c| c.folded_ln.as_ref())),
            gpu.read_some(self.bias.as_ref().map(|bias| bias.data)),
        ]
    }
}

/// The largest head size with kernels that read raw tokens by their lists.
pub(super) const LARGEST_LISTED: usize = 128;

/// `SPREAD_WARPS` of `cuda/forward/forward_spread.cu`.
const SPREAD_THREADS: usize = 8 * 32;
/// Rows of a block of the f32 kernels.
const F32_ROWS: usize = 32;

/// Attends; every launch goes to the device's own stream and no launch is waited for.
///
/// # Errors
/// As [`AttentionCall::params`], or an error of a launch.
pub(crate) fn forward<G: Gpu, T: GpuElement>(
    gpu: &G,
    call: &AttentionCall<'_, G, T>,
    keep: bool,
) -> Result<Attended<G, T>> {
    let Problem {
        batch,
        heads,
        tokens,
        head_dim,
        ..
    } = call.problem;
    let params = call.params()?;
    let rows = batch * heads;
    let mut output = call.target::<T>(gpu, rows * tokens * head_dim)?;
    let mut kept = match keep {
        true => Some(Kept {
            log_sum_exp: call.target::<f32>(gpu, 2 * rows * tokens)?,
            rest: match call.keeps_rest() {
                true => Some(call.target::<T>(gpu, rows * tokens * head_dim)?),
                false => None,
            },
        }),
        false => None,
    };
    let variant = match T::HALF {
        true => {
            // Where every tile is searched for numbers that are not finite, warpgroups have no advantage.
            let searches = params.dense == 1 && params.causal == 0;
            let short = match searches || call.extras() {
                true => None,
                false => gpu.warpgroups()?,
            };
            let warpgroups = short.and_then(|short| match call.is_cut() {
                true => ForwardVariant::sliding_by_warpgroups(head_dim),
                false => ForwardVariant::by_warpgroups(head_dim, tokens, call.listed(), short),
            });
            let extras = call.extras() || call.is_cut();
            Some(warpgroups.unwrap_or_else(|| ForwardVariant::pick(head_dim, extras, call.listed())))
        }
        false => None,
    };
    let block_rows = variant.as_ref().map_or(F32_ROWS, |variant| variant.rows);
    let blocks = tokens.div_ceil(block_rows);
    // A second kernel handles numbers that are not finite only where the tensor-core kernels attend to raw tokens
    // throughout. Where these have a left border, each block finds the numbers by itself.
    let raw = (params.dense | params.listed) == 1;
    let mut first_bad = match T::HALF && raw && params.causal == 1 && !call.is_cut() {
        true => Some(gpu.alloc::<u32>(rows * blocks)?),
        false => None,
    };
    let mut args = call.inputs(gpu);
    args.push(gpu.write(&mut output));
    let (log_sum_exp, rest) = match kept.as_mut() {
        Some(kept) => (Some(&mut kept.log_sum_exp), kept.rest.as_mut()),
        None => (None, None),
    };
    if T::HALF {
        args.push(gpu.write_some(rest));
    }
    args.push(gpu.write_some(log_sum_exp));
    if T::HALF {
        args.push(gpu.write_some(first_bad.as_mut()));
    }
    args.push(gpu.read_some(call.sinks));
    args.push(gpu.value(&params));
    let (name, launch) = match &variant {
        Some(variant) => {
            let launch = Launch {
                grid: [variant.grid(gpu, call.row_blocks(block_rows))?, 1, 1],
                threads: variant.threads(),
                shared_bytes: 0,
            };
            (variant.name.to_string(), launch)
        }
        None => {
            let launch = Launch {
                grid: [call.row_blocks(block_rows), 1, 1],
                threads: THREADS,
                shared_bytes: 0,
            };
            (format!("forward_{}", padded(head_dim)), launch)
        }
    };
    gpu.launch(&Kernel::of::<T>(&name).early(), launch, &args)?;
    drop(args);
    if let Some(first_bad) = first_bad.filter(|_| blocks > 1) {
        spread_nan(gpu, &params, block_rows, &first_bad, &mut output)?;
    }
    Ok(Attended { output, kept })
}

fn spread_nan<G: Gpu, T: GpuElement>(
    gpu: &G,
    params: &AttentionParams,
    block_rows: usize,
    first_bad: &G::Slice<u32>,
    output: &mut G::Slice<T>,
) -> Result<()> {
    let params = super::params::SpreadParams {
        tokens: params.sizes.tokens,
        head_dim: params.sizes.head_dim,
        block_rows: block_rows as u32,
        heads: params.sizes.batch * params.sizes.heads,
    };
    let launch = Launch {
        grid: [params.heads as usize, 1, 1],
        threads: SPREAD_THREADS,
        shared_bytes: 0,
    };
    let args = [gpu.read(first_bad), gpu.write(output), gpu.value(&params)];
    let kernel = Kernel::plain("forward_spread_nan").early();
    gpu.launch(&kernel, launch, &args)
}
