//! Attention over a later chunk: `cuda/cache/chunk_attend.cu`, and the kernels of whole sequences.

use super::chunk::{Edges, Tail};
use super::first_chunk::{contiguous, resized};
use super::DeviceLists;
use crate::config::AttentionOptions;
use crate::cuda::forward::{forward, AttentionCall};
use crate::cuda::on_gpu::{Gpu, GpuElement, Kernel, Launch};
use crate::cuda::operands::{ColumnBuffers, Part};
use crate::problem::{Problem, RowLayout};
use candle_core::Result;

impl<G: Gpu, T: GpuElement> DeviceLists<G, T> {
    /// The output rows (B, H, count, Dv).
    pub(super) fn attend_chunk(
        &self,
        gpu: &G,
        chunk: &Tail<'_, G, T>,
        queries: &G::Slice<T>,
        edges: Edges<G, T>,
    ) -> Result<G::Slice<T>> {
        let (config, dim) = (&self.settings.config, self.settings.column_dim());
        let Problem {
            heads,
            kv_heads,
            head_dim,
            value_dim,
            ..
        } = self.settings.problem;
        let (lead, tokens) = (chunk.numbers.lead as usize, chunk.numbers.tokens as usize);
        // Rows whose sliding window ends before the first folded column see raw tokens only.
        let columns = match self.slide() as usize <= config.window {
            true => None,
            false => Some(self.far_columns(gpu, chunk, edges)?),
        };
        let options = AttentionOptions {
            softmax_scale: Some(chunk.options.scale(head_dim)),
            ..chunk.options.clone()
        };
        let call = AttentionCall {
            problem: Problem {
                tokens,
                queries: tokens,
                batch: self.batch,
                head_dim: dim,
                value_dim: dim,
                ..self.settings.problem
            },
            q: (queries, contiguous(heads, tokens, dim)),
            k: (&chunk.keys, contiguous(kv_heads, tokens, dim)),
            v: (&chunk.values, contiguous(kv_heads, tokens, dim)),
            columns: columns.as_ref(),
            lists: self.settings.lists,
            window: config.window,
            bias: chunk.extras.bias,
            sinks: chunk.extras.sinks,
            fades: false,
            options: &options,
            part: Part {
                first_row: lead,
                drawn_from: chunk.extras.drawn_from,
            },
        };
        let output = forward(gpu, &call, false)?.output;
        let rows = RowLayout {
            offset: lead * dim,
            ..contiguous(heads, tokens, dim)
        };
        resized(gpu, (&output, rows), [self.batch, heads, chunk.count], [dim, value_dim])
    }

    /// The chunk's queries, (batch * heads, tokens, column_dim), after rows of zeros.
    pub(super) fn queries_of_chunk(&self, gpu: &G, chunk: &Tail<'_, G, T>, bits: &G::Slice<u8>) -> Result<G::Slice<T>> {
        let rows = self.batch * self.settings.problem.heads;
        let mut queries = gpu.zeros::<T>(rows * chunk.numbers.tokens as usize * self.settings.column_dim())?;
        let folds = self.settings.config.fold.folds_queries();
        let args = [
            gpu.read(chunk.qkv[0].0),
            gpu.read_some(self.state.last_queries.as_ref()),
            gpu.read_some(folds.then_some(bits)),
            gpu.write(&mut queries),
            gpu.value(&chunk.params),
            gpu.value(&chunk.numbers),
        ];
        gpu.launch(
            &Kernel::of::<T>("chunk_queries"),
            Launch::warps(chunk.count, rows),
            &args,
        )?;
        drop(args);
        Ok(queries)
    }

    /// The closed chains, those of the chunk among them, in the order of attention's far columns.
    fn far_columns(&self, gpu: &G, chunk: &Tail<'_, G, T>, edges: Edges<G, T>) -> Result<ColumnBuffers<G, T>> {
        let (all, capacity) = (self.all(), chunk.numbers.capacity as usize);
        let (rows, tokens) = (all * capacity, chunk.numbers.tokens as usize);
        let mut keys = gpu.alloc::<T>(rows * self.settings.column_dim())?;
        let mut values = gpu.alloc::<T>(rows * self.settings.column_dim())?;
        let mut ln = match self.settings.config.fold.has_sizes() {
            true => Some(gpu.alloc::<f32>(rows)?),
            false => None,
        };
        let (mut index, mut before) = (gpu.alloc::<u32>(rows)?, gpu.alloc::<u32>(all * (tokens + 1))?);
        let state = &self.state;
        let args = [
            gpu.read(state.pages.table()),
            gpu.read(&state.lengths),
            gpu.read(&state.starts),
            gpu.write(&mut keys),
            gpu.write(&mut values),
            gpu.write_some(ln.as_mut()),
            gpu.write(&mut index),
            gpu.value(&chunk.params),
            gpu.value(&chunk.numbers),
        ];
        let launch = Launch {
            grid: [capacity.div_ceil(4).min(1024), all, 1],
            threads: 128,
            shared_bytes: 0,
        };
        gpu.launch(&Kernel::of::<T>("chunk_far"), launch, &args)?;
        drop(args);
        let args = [
            gpu.read(&index),
            gpu.read(&state.lengths),
            gpu.read(&state.starts),
            gpu.write(&mut before),
            gpu.value(&chunk.params),
            gpu.value(&chunk.numbers),
        ];
        let launch = Launch {
            grid: [tokens / 128 + 1, all, 1],
            threads: 128,
            shared_bytes: 0,
        };
        gpu.launch(&Kernel::plain("chunk_before"), launch, &args)?;
        drop(args);
        Ok(ColumnBuffers {
            capacity,
            far_k: Some(keys),
            far_v: Some(values),
            far_ln: ln,
            far_index: index,
            far_before: before,
            folded_k: edges.keys,
            folded_v: edges.values,
            folded_ln: edges.ln,
        })
    }
}
