//! A cache's first chunk: decisions and folds of attention over a whole sequence, whose columns become the cache's
//! lists. Keys and values of two sizes are padded to one for it, as in `src/cuda/sizes.rs`; the lists are not.

use super::copy::copy;
use super::DeviceLists;
use crate::config::{AttentionOptions, Criterion, HeadStrategies};
use crate::cuda::attention::Attention;
use crate::cuda::decide::{self, DecideCall, ScoreCall};
use crate::cuda::decode::StateArgs;
use crate::cuda::extras::{ExtraBuffers, ScoreBuffer};
use crate::cuda::fold::FoldCall;
use crate::cuda::forward::forward;
use crate::cuda::observe;
use crate::cuda::on_gpu::{Gpu, GpuElement, Kernel, Launch, Source};
use crate::cuda::operands::{ColumnBuffers, Part};
use crate::cuda::params::{CopyParams, PadParams, Rows};
use crate::problem::{Problem, RowLayout};
use candle_core::Result;

impl<G: Gpu, T: GpuElement> DeviceLists<G, T> {
    /// Appends the first `count` tokens, at least 2, with the decisions and folds of attention over a whole sequence.
    /// Returns their output rows if `attend` is set. Waits for the device, to learn how much room is needed.
    pub(super) fn first_chunk(
        &mut self,
        gpu: &G,
        qkv: [Source<'_, G, T>; 3],
        count: usize,
        (options, attend): (&AttentionOptions, bool),
        extras: ExtraBuffers<'_, G>,
    ) -> Result<Option<G::Slice<T>>> {
        let settings = self.settings.clone();
        let (raw, dim) = (qkv, settings.column_dim());
        let Problem {
            heads,
            kv_heads,
            head_dim,
            value_dim,
            ..
        } = settings.problem;
        let problem = Problem {
            tokens: count,
            queries: count,
            batch: self.batch,
            head_dim: dim,
            value_dim: dim,
            ..settings.problem
        };
        let pad = |source: Source<'_, G, T>, heads, from| match from == dim {
            true => Ok(None),
            false => resized(gpu, source, [self.batch, heads, count], [from, dim]).map(Some),
        };
        let padded = [
            pad(raw[0], heads, head_dim)?,
            pad(raw[1], kv_heads, head_dim)?,
            pad(raw[2], kv_heads, value_dim)?,
        ];
        let source = |which: usize, heads| match &padded[which] {
            Some(padded) => (padded, contiguous(heads, count, dim)),
            None => raw[which],
        };
        let (q, k, v) = (source(0, heads), source(1, kv_heads), source(2, kv_heads));
        let (config, strategies) = (&settings.config, &HeadStrategies::of_tests(&self.head_tests, heads));
        let call = DecideCall {
            problem,
            q,
            k,
            strategies,
            config,
            bias: extras.bias,
        };
        let scale = options.scale(head_dim);
        let scaled = AttentionOptions {
            softmax_scale: Some(scale),
            ..options.clone()
        };
        let bits = match config.criterion {
            Criterion::ObservedMass => observe::indicators(gpu, &call, v, scale)?,
            Criterion::QueryKey | Criterion::KeyKey => decide::indicators(gpu, &call)?,
            Criterion::Given => match extras.scores {
                Some(scores) => ScoreCall {
                    sizes: [problem.batch, problem.heads, problem.kv_heads, count],
                    strategies,
                    config,
                }
                .indicators(gpu, &own_scores(gpu, scores, problem.batch * kv_heads, count)?)?,
                None => decide::indicators(gpu, &call)?,
            },
        };
        let attention = Attention {
            fold: FoldCall {
                problem,
                q,
                k,
                v,
                bits: &bits,
                fold: config.fold,
                lists: settings.lists,
            },
            // In 8 bits tokens are rounded when they leave the window, whether anything is hidden or not.
            dense: settings.dense && settings.code.is_none(),
            window: config.window,
            bias: extras.bias,
            sinks: extras.sinks,
            column_bias: None,
            options: &scaled,
            part: Part {
                first_row: 0,
                drawn_from: extras.drawn_from,
            },
        };
        let (output, columns) = if !attend {
            (None, None)
        } else {
            let mut folded = attention.folded(gpu, false)?;
            if let (Some(_), Some(columns)) = (settings.code, &mut folded.columns) {
                self.round_columns(gpu, raw, count, &bits, columns)?;
            }
            let output = forward(gpu, &attention.call(&folded), false)?.output;
            let output = match value_dim == dim {
                true => output,
                false => {
                    let output = (&output, contiguous(heads, count, dim));
                    resized(gpu, output, [self.batch, heads, count], [dim, value_dim])?
                }
            };
            (Some(output), folded.columns)
        };
        let columns = match columns {
            Some(columns) => columns,
            None => attention.fold.columns(gpu, false)?,
        };
        self.adopt(gpu, raw, (count, scale), (&bits, &columns), extras)?;
        Ok(output)
    }

    /// Rounds a chunk's far columns to 8 bits, as its rows see them.
    fn round_columns(
        &mut self,
        gpu: &G,
        qkv: [Source<'_, G, T>; 3],
        count: usize,
        bits: &G::Slice<u8>,
        columns: &mut ColumnBuffers<G, T>,
    ) -> Result<()> {
        let (params, launch) = (self.params(&qkv, count, 1.0)?, Launch::warps(count, self.all()));
        let mut args = vec![
            gpu.read(qkv[1].0),
            gpu.read(qkv[2].0),
            gpu.read(bits),
            gpu.read(&columns.far_before),
            gpu.write_some(columns.far_k.as_mut()),
            gpu.write_some(columns.far_v.as_mut()),
        ];
        args.extend(self.state.args(gpu));
        args.push(gpu.value(&params));
        gpu.launch(&Kernel::of::<T>("cache_round_columns"), launch, &args)
    }

    /// Moves a chunk's columns into this empty cache.
    fn adopt(
        &mut self,
        gpu: &G,
        qkv: [Source<'_, G, T>; 3],
        (count, scale): (usize, f64),
        (bits, columns): (&G::Slice<u8>, &ColumnBuffers<G, T>),
        extras: ExtraBuffers<'_, G>,
    ) -> Result<()> {
        let (params, all) = (self.params(&qkv, count, scale)?, self.all());
        let launch = self.per_list();
        let mut args = vec![gpu.read(qkv[0].0)];
        args.extend(chunk_args(gpu, &qkv, bits, columns));
        args.extend(self.state.args(gpu));
        args.push(gpu.value(&params));
        gpu.launch(&Kernel::of::<T>("cache_adopt_state"), launch, &args)?;
        drop(args);
        self.learn(gpu)?;
        self.fit(gpu, 0)?;
        let params = self.params(&qkv, count, scale)?;
        let mut args = chunk_args(gpu, &qkv, bits, columns);
        args.extend(self.state.args(gpu));
        args.push(gpu.value(&params));
        gpu.launch(&Kernel::of::<T>("cache_adopt_rows"), Launch::warps(count, all), &args)?;
        drop(args);
        if self.state.observed.is_some() {
            let mut args = vec![gpu.read(qkv[0].0)];
            args.extend(chunk_args(gpu, &qkv, bits, columns));
            args.push(gpu.read(&self.tests));
            args.extend(self.state.args(gpu));
            args.push(gpu.value(&params));
            gpu.launch(&Kernel::of::<T>("cache_adopt_observed"), launch, &args)?;
            drop(args);
        }
        if let Some(scores) = extras.scores {
            let extras = ExtraBuffers { bias: None, ..extras };
            let params = self.params_under(&qkv, extras, count, scale)?;
            let mut args = vec![gpu.read(&self.tests), gpu.read(scores.data)];
            args.extend(self.state.args(gpu));
            args.push(gpu.value(&params));
            gpu.launch(&Kernel::of::<T>("cache_adopt_given"), launch, &args)?;
            drop(args);
        }
        self.seq_len = count;
        Ok(())
    }
}

/// Rows of `from` numbers, padded with zeros to or cut off after `to` numbers: contiguous (B, heads, tokens, to).
pub(super) fn resized<G: Gpu, T: GpuElement>(
    gpu: &G,
    (data, layout): Source<'_, G, T>,
    [batch, heads, tokens]: [usize; 3],
    [from, to]: [usize; 2],
) -> Result<G::Slice<T>> {
    let mut out = gpu.alloc::<T>(batch * heads * tokens * to)?;
    let params = PadParams {
        rows: Rows::new(&layout),
        heads: heads as u32,
        tokens: tokens as u32,
        dim: from as u32,
        padded: to as u32,
    };
    let args = [gpu.read(data), gpu.write(&mut out), gpu.value(&params)];
    let launch = Launch::warps(tokens, batch * heads);
    gpu.launch(&Kernel::of::<T>("cache_pad"), launch, &args)?;
    drop(args);
    Ok(out)
}

/// The scores (lists, count) of these tokens alone.
fn own_scores<G: Gpu>(gpu: &G, scores: ScoreBuffer<'_, G>, lists: usize, count: usize) -> Result<G::Slice<f32>> {
    let mut own = gpu.alloc::<f32>(lists * count)?;
    let params = CopyParams {
        to_offset: 0,
        from_offset: scores.first as u64,
        from_stride: scores.stride as u32,
        to_stride: count as u32,
        count: count as u32,
        unused: 0,
    };
    copy(gpu, "f32", (scores.data, None), &mut own, lists, &params)?;
    Ok(own)
}

pub(super) fn contiguous(heads: usize, tokens: usize, dim: usize) -> RowLayout {
    RowLayout {
        offset: 0,
        strides: [heads * tokens * dim, tokens * dim, dim],
        dim,
    }
}

/// `CACHE_CHUNK` in cuda/cache/cache.cu.
fn chunk_args<'a, G: Gpu, T: GpuElement>(
    gpu: &'a G,
    [_, k, v]: &[Source<'a, G, T>; 3],
    bits: &'a G::Slice<u8>,
    columns: &'a ColumnBuffers<G, T>,
) -> Vec<G::Arg<'a>> {
    vec![
        gpu.read(k.0),
        gpu.read(v.0),
        gpu.read(bits),
        gpu.read(&columns.far_before),
        gpu.read_some(columns.far_k.as_ref()),
        gpu.read_some(columns.far_v.as_ref()),
        gpu.read_some(columns.far_ln.as_ref()),
    ]
}
