//! A later chunk of tokens, appended and attended together: `cuda/cache/chunk.cu` says how.

use super::append::too_many;
use super::copy::copy;
use super::pages::PAGE;
use super::DeviceLists;
use crate::config::{AttentionOptions, Fold, HeadStrategies};
use crate::cuda::decide::{self, reads_bias, DecideCall};
use crate::cuda::decode::StateArgs;
use crate::cuda::extras::ExtraBuffers;
use crate::cuda::fold::FoldCall;
use crate::cuda::on_gpu::{Gpu, GpuElement, Kernel, Launch, Source};
use crate::cuda::operands::BiasBuffer;
use crate::cuda::params::{CacheParams, ChunkParams, CopyParams, NO_SLIDE};
use crate::problem::Problem;
use candle_core::Result;

/// From this many tokens on they are appended together. Fewer take less time one after another.
const TOGETHER: usize = 7;
/// The most tokens that are appended together, and the most masses that their rows give.
const MOST_TOKENS: usize = 4096;
const MOST_MASSES: usize = 1 << 24;
/// Attention's rows before the chunk are a multiple of this, where there are as many: it leaves whole blocks out.
const BLOCK_ROWS: usize = 128;

/// Tokens that are appended together: their rows, and the sizes of the launches.
pub(super) struct Tail<'a, G: Gpu, T: GpuElement> {
    pub qkv: [Source<'a, G, T>; 3],
    pub extras: ExtraBuffers<'a, G>,
    pub options: &'a AttentionOptions,
    pub count: usize,
    /// Tokens of the tail.
    tail: usize,
    pub params: CacheParams,
    pub numbers: ChunkParams,
    /// The tail's raw rows, (batch * kv_heads, tokens, column_dim).
    pub keys: G::Slice<T>,
    pub values: G::Slice<T>,
}

/// The decisions over the tail.
struct TailBits<G: Gpu> {
    /// (batch, heads, tail - 1)
    bits: G::Slice<u8>,
    /// Under observed mass: the masses of the window's tokens after the chunk, and their values' norms.
    masses: Option<(G::Slice<f32>, G::Slice<f32>)>,
}

/// The folded rows that edges are, (batch * lists, tokens, column_dim), and ln n.
pub(super) struct Edges<G: Gpu, T: GpuElement> {
    pub keys: Option<G::Slice<T>>,
    pub values: Option<G::Slice<T>>,
    pub ln: Option<G::Slice<f32>>,
}

impl<G: Gpu, T: GpuElement> DeviceLists<G, T> {
    /// How many of `left` tokens that follow others are taken together; 1 where they are taken one after another.
    pub(super) fn together(&self, left: usize) -> usize {
        let Problem { heads, .. } = self.settings.problem;
        let most = match self.state.observed {
            Some(_) => MOST_TOKENS.min(MOST_MASSES / (heads * self.settings.config.window.max(1))),
            None => MOST_TOKENS,
        };
        match left.min(most) {
            count if count >= TOGETHER && self.ragged.is_none() => count,
            _ => 1,
        }
    }

    /// Appends `count` tokens, as many as [`Self::together`] says, to lists that hold tokens. Returns their output rows
    /// (B, H, count, Dv) if `attend` is set.
    pub(super) fn chunk(
        &mut self,
        gpu: &G,
        qkv: [Source<'_, G, T>; 3],
        count: usize,
        (options, attend): (&AttentionOptions, bool),
        extras: ExtraBuffers<'_, G>,
    ) -> Result<Option<G::Slice<T>>> {
        let mut chunk = self.rows_of_tail(gpu, qkv, count, options, extras)?;
        let decided = self.decided(gpu, &chunk)?;
        let problem = Problem {
            tokens: chunk.tail,
            queries: chunk.tail,
            batch: self.batch,
            ..self.settings.problem
        };
        let [q, k, v] = qkv;
        let scan = FoldCall {
            problem,
            q,
            k,
            v,
            bits: &decided.bits,
            fold: Fold::Drop,
            lists: self.settings.lists,
        };
        let before = scan.columns(gpu, true)?.far_before;
        let closing = self.make_room(gpu, &mut chunk, &before)?;
        let edges = self.fold_tail(gpu, &chunk, (&decided.bits, &before), attend)?;
        // Closing renews the last query, which pair sums of the first row still need.
        let queries = match attend {
            true => Some(self.queries_of_chunk(gpu, &chunk, &decided.bits)?),
            false => None,
        };
        self.close(gpu, &chunk, &decided, &before)?;
        let output = match queries {
            Some(queries) => Some(self.attend_chunk(gpu, &chunk, &queries, edges)?),
            None => None,
        };
        self.move_window(gpu, &chunk)?;
        self.count(gpu, count)?;
        self.state.pages.added(&closing);
        if self.slide() != NO_SLIDE {
            self.slide_lists(gpu)?;
        }
        Ok(output)
    }

    /// Gives every list room for the chains that the chunk closes; returns how many these are. Waits for the device,
    /// and so a list never takes more pages than it needs.
    fn make_room(&mut self, gpu: &G, chunk: &mut Tail<'_, G, T>, before: &G::Slice<u32>) -> Result<Vec<u32>> {
        let (all, window) = (self.all(), self.settings.config.window);
        u32::try_from(self.seq_len + chunk.count).map_err(|_| too_many(self.seq_len + chunk.count))?;
        let closing = match (chunk.tail - 1).checked_sub(window) {
            None => vec![0; all],
            // The open chain after the chunk: tokens that stay before it end chains that are closed.
            Some(edge) => {
                let mut counts = gpu.alloc::<u32>(all)?;
                let params = CopyParams {
                    to_offset: 0,
                    from_offset: edge as u64,
                    from_stride: (chunk.tail + 1) as u32,
                    to_stride: 1,
                    count: 1,
                    unused: 0,
                };
                copy(gpu, "u32", (before, None), &mut counts, all, &params)?;
                gpu.download(&counts)?
            }
        };
        self.learn(gpu)?;
        // The tokens after the chunk find a page of room, as after a first chunk.
        self.fit_each(gpu, |list| closing[list] as usize + PAGE)?;
        let stride = self.state.pages.stride();
        (chunk.params.pages, chunk.numbers.capacity) = (stride as u32, (stride * PAGE) as u32);
        Ok(closing)
    }

    fn rows_of_tail<'a>(
        &mut self,
        gpu: &G,
        qkv: [Source<'a, G, T>; 3],
        count: usize,
        options: &'a AttentionOptions,
        extras: ExtraBuffers<'a, G>,
    ) -> Result<Tail<'a, G, T>> {
        let Problem { kv_heads, head_dim, .. } = self.settings.problem;
        let (seen, window, dim) = (self.seq_len, self.settings.config.window, self.settings.column_dim());
        let held = seen.min(window + 1);
        let reach = match self.slide() {
            NO_SLIDE => held,
            slide => held.max(slide as usize),
        };
        // A bias and dropout count the tokens of the whole sequence.
        let lead = match options.bias.is_some() || options.dropout.is_some() {
            true => seen,
            false => reach.next_multiple_of(BLOCK_ROWS).min(seen),
        };
        let bias = extras.bias.filter(|_| reads_bias(&self.settings.config));
        let scale = options.scale(head_dim);
        let rows = self.batch * kv_heads;
        let mut chunk = Tail {
            qkv,
            extras,
            options,
            count,
            tail: held + count,
            params: self.params_under(&qkv, ExtraBuffers { bias, ..extras }, count, scale)?,
            numbers: ChunkParams {
                lead: lead as u32,
                tokens: (lead + count) as u32,
                // Known once the lists have room.
                capacity: 0,
            },
            keys: gpu.zeros(rows * (lead + count) * dim)?,
            values: gpu.zeros(rows * (lead + count) * dim)?,
        };
        let args = [
            gpu.read(qkv[1].0),
            gpu.read(qkv[2].0),
            gpu.read(&self.state.local_k),
            gpu.read(&self.state.local_v),
            gpu.write(&mut chunk.keys),
            gpu.write(&mut chunk.values),
            gpu.value(&chunk.params),
            gpu.value(&chunk.numbers),
        ];
        gpu.launch(&Kernel::of::<T>("chunk_rows"), Launch::warps(held + count, rows), &args)?;
        drop(args);
        Ok(chunk)
    }

    fn decided(&mut self, gpu: &G, chunk: &Tail<'_, G, T>) -> Result<TailBits<G>> {
        let (heads, launch) = (self.batch * self.settings.problem.heads, self.per_list());
        let mut bits = gpu.alloc::<u8>(heads * (chunk.tail - 1))?;
        if self.state.observed.is_some() {
            let masses = Some(self.observe_chunk(gpu, chunk, &mut bits)?);
            return Ok(TailBits { bits, masses });
        }
        if let Some(scores) = chunk.extras.scores {
            let mut args = vec![gpu.read(&self.tests), gpu.read(scores.data), gpu.write(&mut bits)];
            args.extend(self.state.args(gpu));
            args.push(gpu.value(&chunk.params));
            gpu.launch(&Kernel::of::<T>("chunk_given"), launch, &args)?;
            drop(args);
            return Ok(TailBits { bits, masses: None });
        }
        let own = self.own_bits(gpu, chunk)?;
        let bias = chunk.extras.bias.filter(|_| reads_bias(&self.settings.config));
        let mut args = vec![
            gpu.read(chunk.qkv[0].0),
            gpu.read(chunk.qkv[1].0),
            gpu.read(&self.tests),
            gpu.read_some(bias.map(|bias| bias.data)),
            gpu.read(&own),
            gpu.write(&mut bits),
        ];
        args.extend(self.state.args(gpu));
        args.push(gpu.value(&chunk.params));
        gpu.launch(&Kernel::of::<T>("chunk_pairs"), launch, &args)?;
        drop(args);
        Ok(TailBits { bits, masses: None })
    }

    /// The decisions by cosines over the chunk alone, as if a sequence began with it.
    fn own_bits(&self, gpu: &G, chunk: &Tail<'_, G, T>) -> Result<G::Slice<u8>> {
        let (mut config, seen) = (self.settings.config.clone(), self.seq_len);
        config.sinks = config.sinks.saturating_sub(seen);
        let bias = chunk.extras.bias.map(|bias| BiasBuffer {
            offset: bias.offset + seen * bias.strides[3],
            ..bias
        });
        decide::indicators(
            gpu,
            &DecideCall {
                problem: Problem {
                    tokens: chunk.count,
                    queries: chunk.count,
                    batch: self.batch,
                    ..self.settings.problem
                },
                q: chunk.qkv[0],
                k: chunk.qkv[1],
                strategies: &HeadStrategies::of_tests(&self.head_tests, self.settings.problem.heads),
                config: &config,
                bias,
            },
        )
    }

    /// Writes the decisions by observed mass to `bits`; returns [`TailBits::masses`].
    fn observe_chunk(
        &mut self,
        gpu: &G,
        chunk: &Tail<'_, G, T>,
        bits: &mut G::Slice<u8>,
    ) -> Result<(G::Slice<f32>, G::Slice<f32>)> {
        let (all, window) = (self.all(), self.settings.config.window);
        let (rows, seen) = (
            self.batch * self.settings.problem.heads * chunk.count,
            self.settings.seen_keys(),
        );
        let mut weights = gpu.zeros::<f32>(rows * window)?;
        let mut logits = gpu.alloc::<f32>(all * chunk.count * seen)?;
        let mut args = vec![
            gpu.read(chunk.qkv[0].0),
            gpu.read(chunk.qkv[1].0),
            gpu.write(&mut weights),
            gpu.write(&mut logits),
        ];
        args.extend(self.state.args(gpu));
        args.push(gpu.value(&chunk.params));
        gpu.launch(&Kernel::of::<T>("chunk_weigh"), Launch::warps(chunk.count, all), &args)?;
        drop(args);
        let (mut masses, mut norms) = (gpu.alloc::<f32>(all * window)?, gpu.alloc::<f32>(all * window)?);
        let mut args = vec![
            gpu.read(chunk.qkv[2].0),
            gpu.read(&self.tests),
            gpu.read(&weights),
            gpu.write(&mut masses),
            gpu.write(&mut norms),
            gpu.write(bits),
        ];
        args.extend(self.state.args(gpu));
        args.push(gpu.value(&chunk.params));
        gpu.launch(&Kernel::of::<T>("chunk_settle"), Launch::warps(chunk.tail, all), &args)?;
        drop(args);
        Ok((masses, norms))
    }

    /// Puts the chains that close into the lists' pages, and renews the open chains.
    fn fold_tail(
        &mut self,
        gpu: &G,
        chunk: &Tail<'_, G, T>,
        (bits, before): (&G::Slice<u8>, &G::Slice<u32>),
        attend: bool,
    ) -> Result<Edges<G, T>> {
        let (all, fold) = (self.all(), self.settings.config.fold);
        let Problem {
            head_dim, value_dim, ..
        } = self.settings.problem;
        let rows = all * chunk.numbers.tokens as usize;
        let edge_rows = || match attend && fold.keeps_hidden() {
            true => gpu.zeros::<T>(rows * self.settings.column_dim()).map(Some),
            false => Ok(None),
        };
        let mut edges = Edges {
            keys: edge_rows()?,
            values: edge_rows()?,
            ln: match attend && fold.has_sizes() {
                true => Some(gpu.zeros::<f32>(rows)?),
                false => None,
            },
        };
        let previous = |dim: usize| match fold.sums_pairs() {
            true => gpu.alloc::<T>(all * dim).map(Some),
            false => Ok(None),
        };
        let (mut chain_k, mut chain_v) = (gpu.alloc::<f32>(all * head_dim)?, gpu.alloc::<f32>(all * value_dim)?);
        let (mut previous_k, mut previous_v) = (previous(head_dim)?, previous(value_dim)?);
        let mut sizes = gpu.alloc::<u32>(all)?;
        let mut args = vec![
            gpu.read(&chunk.keys),
            gpu.read(&chunk.values),
            gpu.read(bits),
            gpu.read(before),
            gpu.write_some(edges.keys.as_mut()),
            gpu.write_some(edges.values.as_mut()),
            gpu.write_some(edges.ln.as_mut()),
            gpu.write(&mut chain_k),
            gpu.write(&mut chain_v),
            gpu.write(&mut sizes),
            gpu.write_some(previous_k.as_mut()),
            gpu.write_some(previous_v.as_mut()),
        ];
        args.extend(self.state.args(gpu));
        args.extend([gpu.value(&chunk.params), gpu.value(&chunk.numbers)]);
        gpu.launch(&Kernel::of::<T>("chunk_chains"), Launch::warps(chunk.tail, all), &args)?;
        drop(args);
        // A list that is still within its window has no open chain.
        if self.seq_len + chunk.count > self.settings.config.window {
            let state = &mut self.state;
            (state.chain_k, state.chain_v, state.chain_sizes) = (chain_k, chain_v, sizes);
            (state.previous_k, state.previous_v) = (previous_k, previous_v);
        }
        Ok(edges)
    }

    fn close(&mut self, gpu: &G, chunk: &Tail<'_, G, T>, decided: &TailBits<G>, before: &G::Slice<u32>) -> Result<()> {
        let (masses, launch) = (decided.masses.as_ref(), self.per_list());
        let mut args = vec![
            gpu.read(chunk.qkv[0].0),
            gpu.read(chunk.qkv[1].0),
            gpu.read(&self.tests),
            gpu.read_some(chunk.extras.scores.map(|scores| scores.data)),
            gpu.read(&decided.bits),
            gpu.read(before),
            gpu.read_some(masses.map(|(masses, _)| masses)),
            gpu.read_some(masses.map(|(_, norms)| norms)),
        ];
        args.extend(self.state.args(gpu));
        args.push(gpu.value(&chunk.params));
        gpu.launch(&Kernel::of::<T>("chunk_close"), launch, &args)
    }

    fn move_window(&mut self, gpu: &G, chunk: &Tail<'_, G, T>) -> Result<()> {
        let moved = chunk.count.min(self.settings.config.window);
        if moved == 0 {
            return Ok(());
        }
        let launch = Launch::warps(moved, self.all());
        let mut args = vec![gpu.read(chunk.qkv[1].0), gpu.read(&chunk.keys), gpu.read(&chunk.values)];
        args.extend(self.state.args(gpu));
        args.extend([gpu.value(&chunk.params), gpu.value(&chunk.numbers)]);
        gpu.launch(&Kernel::of::<T>("chunk_window"), launch, &args)
    }
}
