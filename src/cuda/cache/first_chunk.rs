//! A cache's first chunk: decisions and folds of attention over a whole sequence, whose columns become the cache's
//! lists.

use super::{room, DeviceLists};
use crate::config::{AttentionOptions, Criterion};
use crate::cuda::attention::Attention;
use crate::cuda::decide::{self, DecideCall, ScoreCall};
use crate::cuda::decode::StateArgs;
use crate::cuda::extras::ExtraBuffers;
use crate::cuda::fold::FoldCall;
use crate::cuda::forward::forward;
use crate::cuda::observe;
use crate::cuda::on_gpu::{Gpu, GpuElement, Kernel, Launch, Source};
use crate::cuda::operands::{ColumnBuffers, Part};
use crate::problem::Problem;
use candle_core::Result;

impl<G: Gpu, T: GpuElement> DeviceLists<G, T> {
    /// Appends the first `count` tokens, at least 2, with the decisions and folds of attention over a whole sequence.
    /// Returns their output rows if `options` are given. Waits for the device, to learn how much room is needed.
    pub(super) fn first_chunk(
        &mut self,
        gpu: &G,
        qkv: [Source<'_, G, T>; 3],
        count: usize,
        options: Option<&AttentionOptions>,
        extras: ExtraBuffers<'_, G>,
    ) -> Result<Option<G::Slice<T>>> {
        let [q, k, v] = qkv;
        let settings = self.settings.clone();
        let problem = Problem {
            tokens: count,
            queries: count,
            batch: self.batch,
            ..settings.problem
        };
        let (config, strategies) = (&settings.config, &settings.strategies);
        let call = DecideCall {
            problem,
            q,
            k,
            strategies,
            config,
            bias: extras.bias,
        };
        let (plain, default) = (options.is_none(), AttentionOptions::default());
        let options = options.unwrap_or(&default);
        let scale = options.scale(problem.head_dim);
        let bits = match config.criterion {
            Criterion::ObservedMass => observe::indicators(gpu, &call, v, scale)?,
            Criterion::QueryKey | Criterion::KeyKey => decide::indicators(gpu, &call)?,
            Criterion::Given => match extras.scores {
                Some(scores) => ScoreCall {
                    sizes: [problem.batch, problem.heads, problem.kv_heads, count],
                    strategies,
                    config,
                }
                .indicators(gpu, scores.data)?,
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
            dense: settings.dense,
            window: config.window,
            bias: extras.bias,
            sinks: extras.sinks,
            column_bias: None,
            options,
            part: Part::default(),
        };
        let (output, columns) = if plain {
            (None, None)
        } else {
            let folded = attention.folded(gpu, false)?;
            let output = forward(gpu, &attention.call(&folded), false)?.output;
            (Some(output), folded.columns)
        };
        let columns = match columns {
            Some(columns) => columns,
            None => attention.fold.columns(gpu, false)?,
        };
        self.adopt(gpu, qkv, (count, scale), (&bits, &columns), extras)?;
        Ok(output)
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
        let launch = Launch {
            grid: [all, 1, 1],
            threads: 32,
            shared_bytes: 0,
        };
        let mut args = vec![gpu.read(qkv[0].0)];
        args.extend(chunk_args(gpu, &qkv, bits, columns));
        args.extend(self.state.args(gpu));
        args.push(gpu.value(&params));
        gpu.launch(&Kernel::of::<T>("cache_adopt_state"), launch, &args)?;
        drop(args);
        self.live(gpu)?;
        // The old buffers hold nothing yet.
        self.capacity = room(self.bound);
        let (rows, dim) = (all * self.capacity, self.settings.problem.head_dim);
        (self.state.far_k, self.state.far_v) = (gpu.zeros(rows * dim)?, gpu.zeros(rows * dim)?);
        if self.state.far_ln.is_some() {
            self.state.far_ln = Some(gpu.zeros(rows)?);
        }
        self.state.far_tokens = gpu.zeros(rows)?;
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
