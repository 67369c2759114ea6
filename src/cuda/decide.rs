//! Launches of `cuda/decide/decide.cu`: which pairs merge.

use super::on_gpu::{Gpu, GpuElement, Kernel, Launch, Source};
use super::params::{BiasEntries, DecideParams, FewTests, Rows, ScoreParams, Sizes, SweepParams};
use crate::config::{CompressionConfig, Criterion, GroupRule, HeadStrategies, HeadTest, MergeRule};
use crate::cuda::operands::BiasBuffer;
use crate::problem::Problem;
use candle_core::Result;

/// Threads of a block where each thread has a pair of its own.
const THREADS: usize = 128;
/// As in `cuda/decide/decide.cu`.
const WARP_PAIRS: usize = 64;

/// The inputs of decisions and of the compression loss.
pub(crate) struct DecideCall<'a, G: Gpu, T: GpuElement> {
    pub problem: Problem,
    pub q: Source<'a, G, T>,
    pub k: Source<'a, G, T>,
    pub strategies: &'a HeadStrategies,
    pub config: &'a CompressionConfig,
    /// The bias as a view of (B, H, Nq, N); only read where [`reads_bias`] says so.
    pub bias: Option<BiasBuffer<'a, G>>,
}

/// Whether a bias of -inf keeps pairs of tokens apart: a pair then qualifies only where its second token's row sees
/// both.
pub(crate) fn reads_bias(config: &CompressionConfig) -> bool {
    config.criterion.compares_pairs() && config.rule.is_causal()
}

/// As `key_key` in cuda/params.cuh: 1 where pairs are of two keys.
pub(crate) fn key_key(criterion: Criterion) -> u32 {
    u32::from(criterion.pairs_keys())
}

impl<G: Gpu, T: GpuElement> DecideCall<'_, G, T> {
    /// The distance up to which the reference rule looks for candidates.
    fn levels(&self) -> usize {
        self.config.max_merge_level.min(self.problem.pairs()).min(5)
    }

    /// The arguments of the kernels, for `lists` decisions per batch row.
    ///
    /// # Errors
    /// As [`Sizes::new`].
    pub fn params(&self, lists: usize) -> Result<DecideParams> {
        let count = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        Ok(DecideParams {
            q: Rows::new(&self.q.1),
            k: Rows::new(&self.k.1),
            bias: BiasEntries::new(self.bias),
            sizes: Sizes::new(&self.problem, lists)?,
            key_key: key_key(self.config.criterion),
            max_merge_level: count(self.config.max_merge_level),
            sinks: count(self.config.sinks),
            levels: self.levels() as u32,
            first_row: self.problem.first_row(true) as u32,
            reserved: 0,
        })
    }

    /// [`table`] of this call.
    pub fn table(&self) -> Vec<f32> {
        table(&head_tests(
            [self.problem.batch, self.problem.heads],
            self.strategies,
            self.config,
        ))
    }

    /// [`table`] of this call, uploaded only if it is too large for an argument.
    ///
    /// # Errors
    /// An error of an upload.
    pub fn tests(&self, gpu: &G) -> Result<Tests<G>> {
        Tests::new(gpu, &self.table())
    }
}

/// `Tests` in `cuda/lib/cosine.cuh`: a few tests are passed as an argument, which spares a copy to the device.
pub(crate) struct Tests<G: Gpu> {
    pub many: Option<G::Slice<f32>>,
    pub few: FewTests,
}

impl<G: Gpu> Tests<G> {
    fn new(gpu: &G, table: &[f32]) -> Result<Self> {
        let mut few = FewTests { numbers: [0.0; 256] };
        let many = match few.numbers.get_mut(..table.len()) {
            Some(numbers) => {
                numbers.copy_from_slice(table);
                None
            }
            None => Some(gpu.upload(table)?),
        };
        Ok(Self { many, few })
    }
}

/// Decisions by scores that the caller gives.
pub(crate) struct ScoreCall<'a> {
    /// B, H, Hk, N; N is at least 2.
    pub sizes: [usize; 4],
    pub strategies: &'a HeadStrategies,
    pub config: &'a CompressionConfig,
}

impl ScoreCall<'_> {
    /// The merge indicators (B, H, N-1), 0 or 1, of contiguous scores (B, Hk, N).
    ///
    /// # Errors
    /// Sizes beyond 32 bits, or an error of the device.
    pub fn indicators<G: Gpu>(&self, gpu: &G, scores: &G::Slice<f32>) -> Result<G::Slice<u8>> {
        let [batch, heads, kv_heads, tokens] = self.sizes;
        let tests = table(&head_tests([batch, heads], self.strategies, self.config));
        let tests = Tests::new(gpu, &tests)?;
        let count = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let params = ScoreParams {
            group: count(heads / kv_heads),
            tokens: count(tokens),
            sinks: count(self.config.sinks),
            decided: count((tokens - 1).saturating_sub(self.config.window)),
        };
        let mut bits = gpu.alloc::<u8>(batch * heads * (tokens - 1))?;
        let launch = Launch {
            grid: [(tokens - 1).div_ceil(THREADS), batch * kv_heads, 1],
            threads: THREADS,
            shared_bytes: 0,
        };
        let args = [
            gpu.read(scores),
            gpu.read_some(tests.many.as_ref()),
            gpu.write(&mut bits),
            gpu.value(&params),
            gpu.value(&tests.few),
        ];
        gpu.launch(&Kernel::plain("decide_given"), launch, &args)?;
        drop(args);
        Ok(bits)
    }
}

/// The tests of every query head of every batch row.
pub(crate) fn head_tests(
    [batch, heads]: [usize; 2],
    strategies: &HeadStrategies,
    config: &CompressionConfig,
) -> Vec<HeadTest> {
    (0..batch * heads)
        .map(|row| strategies.test(config, row / heads, row % heads))
        .collect()
}

/// Strategy and threshold of every query head, (B, H, 2), as the kernels read them.
pub(crate) fn table(tests: &[HeadTest]) -> Vec<f32> {
    let entry = |test: &HeadTest| {
        // A head that is off reads no threshold.
        let off = test.strategy.is_off();
        [
            test.strategy.code() as f32,
            if off { 0.0 } else { test.threshold as f32 },
        ]
    };
    tests.iter().flat_map(entry).collect()
}

/// The merge indicators (B, H, N-1), 0 or 1, by the cosine criteria. N is at least 2.
///
/// # Errors
/// An error of the device.
pub(crate) fn indicators<G: Gpu, T: GpuElement>(gpu: &G, call: &DecideCall<G, T>) -> Result<G::Slice<u8>> {
    let Problem {
        batch,
        heads,
        kv_heads,
        head_dim,
        ..
    } = call.problem;
    let pairs = call.problem.pairs();
    if call.strategies.all_off() {
        return gpu.zeros(batch * heads * pairs);
    }
    let tests = call.tests(gpu)?;
    match call.config.rule {
        MergeRule::Causal => {}
        MergeRule::Reference => return reference_rule(gpu, call, &tests),
    }
    let lists = match call.config.group_rule {
        GroupRule::PerQueryHead => heads,
        GroupRule::Unanimous => kv_heads,
    };
    let params = call.params(lists)?;
    let launch = Launch::warps(pairs.div_ceil(WARP_PAIRS), batch * lists);
    let mut bits = gpu.alloc::<u8>(batch * heads * pairs)?;
    let bias = call.bias.filter(|_| reads_bias(call.config));
    let args = [
        gpu.read(call.q.0),
        gpu.read(call.k.0),
        gpu.read_some(bias.map(|bias| bias.data)),
        gpu.read_some(tests.many.as_ref()),
        gpu.write(&mut bits),
        gpu.value(&params),
        gpu.value(&tests.few),
    ];
    let dim = match head_dim {
        dim if dim > 256 || dim % 8 != 0 => "any",
        0..=64 => "64",
        65..=128 => "128",
        _ => "256",
    };
    let kernel = Kernel::of::<T>(&format!("decide_causal_{dim}")).early();
    gpu.launch(&kernel, launch, &args)?;
    drop(args);
    Ok(bits)
}

/// Launches the candidates, then as many sweeps as there can be: a sweep that changes nothing copies its input.
fn reference_rule<G: Gpu, T: GpuElement>(gpu: &G, call: &DecideCall<G, T>, tests: &Tests<G>) -> Result<G::Slice<u8>> {
    let (pairs, rows) = (call.problem.pairs(), call.problem.batch * call.problem.heads);
    let (params, sweeps) = (call.params(call.problem.heads)?, 2 * call.levels());
    let mut levels = gpu.alloc::<u8>(rows * pairs)?;
    let mut bits = gpu.alloc::<u8>(rows * pairs)?;
    let args = [
        gpu.read(call.q.0),
        gpu.read(call.k.0),
        gpu.read_some(tests.many.as_ref()),
        gpu.write(&mut levels),
        gpu.write(&mut bits),
        gpu.value(&params),
        gpu.value(&tests.few),
    ];
    gpu.launch(&Kernel::of::<T>("decide_levels"), Launch::warps(pairs, rows), &args)?;
    drop(args);
    let mut swept = gpu.alloc::<u8>(rows * pairs)?;
    let mut flags = gpu.zeros::<u32>(2 * sweeps)?;
    let launch = Launch {
        grid: [pairs.div_ceil(THREADS), rows, 1],
        threads: THREADS,
        shared_bytes: 0,
    };
    for sweep in 0..sweeps {
        let params = SweepParams {
            heads: rows as u32,
            pairs: pairs as u32,
            levels: params.levels,
            sweep: sweep as u32,
        };
        let args = [gpu.read(&bits), gpu.write(&mut flags), gpu.value(&params)];
        gpu.launch(&Kernel::plain("decide_adjacent"), launch, &args)?;
        drop(args);
        let args = [
            gpu.read(&levels),
            gpu.read(&bits),
            gpu.write(&mut swept),
            gpu.write(&mut flags),
            gpu.value(&params),
        ];
        gpu.launch(&Kernel::plain("decide_sweep"), launch, &args)?;
        drop(args);
        std::mem::swap(&mut bits, &mut swept);
    }
    Ok(bits)
}
