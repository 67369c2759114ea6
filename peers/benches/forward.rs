//! Forward attention on the CPU against candle's own and PyTorch's, in one run:
//! `cargo bench -p peers --bench forward`; with SFATTENTION_PYTHON=python3 (one that has torch) PyTorch's rows too.
//! `-- sliding` runs the row of a sliding window alone. Rows that are compared with our own run in turns with them.
//! Leaves plots of time against tokens and against the hidden ratio next to criterion's results.
//!
//! Rejected, with the time relative to the code that stayed, or the speed relative to the gemm crate alone:
//!
//! 1. The gemm crate for the products of a tile. Our own product (4 by 6 AVX-512 registers, nothing packed) first took
//!    1.00 to 1.11 times its time, in tiles of 128 rows by 512 columns. In tiles of 64 by 64 the forward reached 72 %
//!    of the gemm crate's speed alone, as before (N=4096, D=64, one thread). It reached 83 % after three changes, which
//!    were not timed one by one: every buffer that registers read begins at a cache line (a register in two lines takes
//!    two reads), exponentials use fused multiply-adds, and only hidden tokens have edges.
//! 2. Tiles of 32, 48, 96, 192 and 512 columns, and blocks of 128 rows: slower, or no faster.
//! 3. Prefetching the output's cache lines before a block's tiles: at most 2 % faster.
//! 4. Observed mass with its sinks in unused lanes of the window's panels, so that three panels are multiplied instead
//!    of four: 2 % faster at D=64, no faster at 128.
//! 5. Prefetching the rows of strided views 4, 16 or 24 rows ahead instead of 8, for every other cache line only, or
//!    into L2: no change, 1.05 of contiguous in all.
//! 6. Prefetching the rows of edges, or the next block's queries and this block's output rows a few lines at a time
//!    between the products of tiles: 1.00 to 1.02. The time there was not memory's, but that of loops over single
//!    numbers: in registers, four fifths hidden took 0.94.
//! 7. Keys of strided views read in place instead of a copy by head: 1.15 to 1.26.
//! 8. Copies tile by tile: 1.1 to 1.2 of the time of whole heads. Pointers to rows: 0.97 to 1.05 (contiguous; 1.14 with
//!    pair sums at D=128). All threads on one head with the next head gathered ahead: 1.03 to 1.07 of a head to each
//!    thread.
//! 9. Columns gathered block by block as rows come to see them, with the next block's keys, values and queries
//!    prefetched between the products of tiles: 0.99 to 1.01. The products took the time that gathering and queries
//!    saved.
//! 10. Prefetching a line of each page 40 rows ahead: 1.00. More than half of the cost of views is looking up pages,
//!     and each head touches all of them: with pages of 2 MiB views took 1.03 instead of 1.05.
//! 11. The columns that all rows see past the last whole tile, in one tile with those that some rows see: 1.00.
//! 12. The window's band by 32 rows in tiles of 64 columns, instead of 64 rows and 16 columns: 1.01 to 1.04.

mod common;

use candle_core::{DType, Result, Tensor};
use candle_sfattention::{
    attend, AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Fold, HeadStrategies, MergePlan,
    MergeStrategy,
};
use common::plot::{plot, Line};
use common::pytorch::PyTorch;
use common::turns::Turns;
use common::{
    candle_flash, candle_plain, causal_mask, median, print_ratios, token_major, verify, verify_within, Shape,
};
use criterion::{Criterion, SamplingMode};
use std::path::Path;

const FLASH: &str = "candle-nn CPU flash attention";
const PLAIN: &str = "candle matmul + mask + softmax";
const PYTORCH: &str = "PyTorch SDPA f32";
const PYTORCH_BF16: &str = "PyTorch SDPA bf16";
const SHAPES: [(usize, usize); 3] = [(1024, 64), (4096, 64), (4096, 128)];
/// The tokens of the plot, at 8 heads of 64; those above are in `SHAPES`.
const SWEEP: [usize; 3] = [256, 512, 2048];
/// (heads, tokens) of small problems; 8 heads and 256 tokens are in `SWEEP`.
const SMALL: [(usize, usize); 5] = [(1, 64), (8, 64), (64, 64), (1, 256), (64, 256)];
/// Hidden tokens per kept one, and the name of our row.
const RATIOS: [(usize, &str); 3] = [(0, "ours, r = 0"), (1, "ours, r = 0.5"), (4, "ours, r = 0.8")];
const WINDOWED: [(usize, &str); 3] = [
    (0, "ours, window 32, r = 0"),
    (1, "ours, window 32, r = 0.5"),
    (4, "ours, window 32, r = 0.8"),
];
const CACHED: &str = "ours, r = 0, through the cache";
const DECIDE: &str = "ours, deciding only (KeyKey)";
const OBSERVED: &str = "ours, deciding only (observed)";
/// Reading, folding, edges and writing: the cost of a row apart from products.
const NO_PRODUCTS: &str = "ours, all hidden: no products";
/// The same with an eighth of the folding; the difference is the cost of the other seven eighths.
const FOLDED_ONCE: &str = "ours, all hidden, one KV head";
const STRIDED: &str = "ours, r = 0, (B, N, H, D) views";
const GROUPED: &str = "ours, r = 0, 4 heads a KV head";
const BF16: &str = "ours, r = 0, bf16";
const F16: &str = "ours, r = 0, f16";
const SLIDING: &str = "ours, r = 0, sliding window 1024";
/// The sliding window of [`SLIDING`], and its tokens.
const SLIDING_WINDOW: (usize, usize) = (1024, 16384);
const HALVES: [(&str, DType); 2] = [(BF16, DType::BF16), (F16, DType::F16)];
/// The best speed of the gemm crate, through candle.
const GEMM: &str = "gemm alone, 2048 cubed";
const GEMM_SIZE: usize = 2048;
const ONE_THREAD: &str = "ours, r = 0, 1 thread";
/// The allowed difference between an output in halves and f32 of the same inputs.
const HALF_BOUND: f32 = 0.02;

struct Bench {
    criterion: Criterion,
    pytorch: Option<PyTorch>,
}

fn run([q, k, v]: &[Tensor; 3], plan: &MergePlan) -> Result<Tensor> {
    attend(q, k, v, plan, &AttentionOptions::default())
}

/// Ours at three ratios, and the peers.
fn bench_peers(bench: &mut Bench, folder: &Path, shape: Shape) -> Result<()> {
    let qkv = shape.qkv()?;
    let mask = causal_mask(shape.tokens)?;
    let by_token = token_major(&qkv)?;
    let plain = candle_plain(&qkv, &mask)?;
    let config = CompressionConfig::default();
    verify(FLASH, &candle_flash(&by_token)?, &plain)?;
    verify("ours", &run(&qkv, &shape.plan(0, &config)?)?, &plain)?;

    let mut group = bench.criterion.benchmark_group(shape.name());
    group.sampling_mode(SamplingMode::Flat);
    for (chain, name) in RATIOS {
        let plan = shape.plan(chain, &config)?;
        group.bench_function(name, |bencher| bencher.iter(|| run(&qkv, &plan)));
    }
    if let Some(pytorch) = &mut bench.pytorch {
        pytorch.record(folder, "time forward", PYTORCH, shape, "f32")?;
    }
    group.bench_function(PLAIN, |bencher| bencher.iter(|| candle_plain(&qkv, &mask)));
    group.bench_function(FLASH, |bencher| bencher.iter(|| candle_flash(&by_token)));
    group.finish();
    Ok(())
}

/// The same inputs in a half dtype, and in f32 again.
fn rounded(qkv: &[Tensor; 3], dtype: DType) -> Result<[[Tensor; 3]; 2]> {
    let cast = |[q, k, v]: &[Tensor; 3], dtype| -> Result<[Tensor; 3]> {
        Ok([q.to_dtype(dtype)?, k.to_dtype(dtype)?, v.to_dtype(dtype)?])
    };
    let half = cast(qkv, dtype)?;
    let wide = cast(&half, DType::F32)?;
    Ok([half, wide])
}

/// Halves, for PyTorch's.
fn bench_dtypes(bench: &mut Bench, folder: &Path, shape: Shape) -> Result<()> {
    let qkv = shape.qkv()?;
    let nothing = shape.plan(0, &CompressionConfig::default())?;
    let mut group = bench.criterion.benchmark_group(shape.name());
    group.sampling_mode(SamplingMode::Flat);
    for (name, dtype) in HALVES {
        let [half, wide] = rounded(&qkv, dtype)?;
        let output = run(&half, &nothing)?.to_dtype(DType::F32)?;
        verify_within(name, &output, &run(&wide, &nothing)?, HALF_BOUND)?;
        group.bench_function(name, |bencher| bencher.iter(|| run(&half, &nothing)));
    }
    if let Some(pytorch) = &mut bench.pytorch {
        pytorch.record(folder, "time forward", PYTORCH_BF16, shape, "bf16")?;
    }
    group.finish();
    Ok(())
}

/// One prefill of a cache that hides nothing.
fn cached([q, k, v]: &[Tensor; 3]) -> Result<Tensor> {
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let mut cache = CompressedKvCache::new(off, CompressionConfig::default(), CacheOptions::default())?;
    cache.append_and_attend(q, k, v, &AttentionOptions::default())
}

/// Our other rows, in turns with nothing hidden: ratios, windows, layouts, halves, the cache, one thread, deciding; and
/// the gemm crate alone.
fn turns(shape: Shape) -> Result<()> {
    let qkv = &shape.qkv()?;
    let [q, k, v] = qkv;
    let plain = CompressionConfig::default();
    let windowed = CompressionConfig {
        window: 32,
        fold: Fold::Mean,
        ..Default::default()
    };
    let nothing = &shape.plan(0, &plain)?;
    let everything = &shape.plan_of(|_| true, &plain)?;
    let options = &AttentionOptions::default();
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    // Thresholds depend on the model; the time does not depend on thresholds.
    let thresholds = Tensor::full(0.01f64, shape.heads, q.device())?;
    let scored = strategies.clone().with_thresholds(&thresholds)?;
    let mut turns = Turns::new();
    for (names, config) in [(RATIOS, &plain), (WINDOWED, &windowed)] {
        for (chain, name) in names {
            let plan = shape.plan(chain, config)?;
            turns.row(name, move || run(qkv, &plan));
        }
    }
    let expected = run(qkv, nothing)?;
    let by_token = token_major(qkv)?;
    let views = [
        by_token[0].transpose(1, 2)?,
        by_token[1].transpose(1, 2)?,
        by_token[2].transpose(1, 2)?,
    ];
    verify(STRIDED, &run(&views, nothing)?, &expected)?;
    turns.row(STRIDED, move || run(&views, nothing));
    let first = |x: &Tensor, heads: usize| x.narrow(1, 0, heads)?.contiguous();
    let quarter = shape.heads / 4;
    let grouped = [q.clone(), first(k, quarter)?, first(v, quarter)?];
    turns.row(GROUPED, move || run(&grouped, nothing));
    turns.row(NO_PRODUCTS, move || run(qkv, everything));
    let folded_once = [q.clone(), first(k, 1)?, first(v, 1)?];
    turns.row(FOLDED_ONCE, move || run(&folded_once, everything));
    for (name, dtype) in HALVES {
        let [half, _] = rounded(qkv, dtype)?;
        turns.row(name, move || run(&half, nothing));
    }
    verify(CACHED, &cached(qkv)?, &expected)?;
    turns.row(CACHED, || cached(qkv));
    let single = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let single = single.map_err(candle_core::Error::wrap)?;
    turns.row(ONE_THREAD, move || single.install(|| run(qkv, nothing)));
    for (name, strategies, config) in [
        (DECIDE, &strategies, CompressionConfig::pretrained()),
        (OBSERVED, &scored, CompressionConfig::calibrated()),
    ] {
        turns.row(name, move || MergePlan::new(q, k, v, strategies, &config, options));
    }
    let square = Tensor::randn(0f32, 1.0, (GEMM_SIZE, GEMM_SIZE), q.device())?;
    turns.row(GEMM, move || square.matmul(&square));
    print_gemm_share(shape, &turns.run(&shape.name())?);

    let [half, wide] = rounded(qkv, DType::BF16)?;
    let output = cached(&half)?.to_dtype(DType::F32)?;
    verify_within(CACHED, &output, &run(&wide, nothing)?, HALF_BOUND)?;
    let mut turns = Turns::new();
    turns.row(BF16, || run(&half, nothing));
    turns.row(CACHED, || cached(&half));
    turns.run(&format!("{}, bf16", shape.name()))?;
    Ok(())
}

/// A sliding window in turns with every earlier token: 0.12 of the products.
fn sliding() -> Result<()> {
    let (length, tokens) = SLIDING_WINDOW;
    let shape = Shape {
        heads: 2,
        tokens,
        dim: 64,
    };
    let qkv = &shape.qkv()?;
    let plan = &shape.plan(0, &CompressionConfig::default())?;
    let options = &AttentionOptions {
        sliding_window: Some(length),
        ..Default::default()
    };
    let slide = || attend(&qkv[0], &qkv[1], &qkv[2], plan, options);
    // The first rows see every earlier token; the last row sees the last tokens.
    let (got, full) = (slide()?, run(qkv, plan)?);
    verify(SLIDING, &got.narrow(2, 0, length)?, &full.narrow(2, 0, length)?)?;
    let last = |x: &Tensor| x.narrow(2, tokens - length, length);
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let tail = [last(&qkv[0])?, last(&qkv[1])?, last(&qkv[2])?];
    let config = CompressionConfig::default();
    let plan_of_tail = MergePlan::new(
        &tail[0],
        &tail[1],
        &tail[2],
        &off,
        &config,
        &AttentionOptions::default(),
    )?;
    let alone = run(&tail, &plan_of_tail)?;
    verify(
        SLIDING,
        &got.narrow(2, tokens - 1, 1)?,
        &alone.narrow(2, length - 1, 1)?,
    )?;
    let mut turns = Turns::new();
    turns.row(RATIOS[0].1, || run(qkv, plan));
    turns.row(SLIDING, slide);
    turns.run(&shape.name())?;
    Ok(())
}

/// Prints the share of the gemm crate's speed that causal attention reaches, from their times in turns.
fn print_gemm_share(shape: Shape, ratios: &[(&str, f64)]) {
    if let Some((_, gemm)) = ratios.iter().find(|(name, _)| *name == GEMM) {
        let pairs = (shape.tokens * (shape.tokens + 1) / 2) as f64;
        let ours = 4.0 * pairs * (shape.heads * shape.dim) as f64;
        let share = gemm * ours / (2.0 * (GEMM_SIZE as f64).powi(3));
        println!(
            "ours, r = 0: {:.0} % of gemm's floating-point operations a second",
            100.0 * share
        );
    }
}

/// Time against tokens, and against the hidden ratio.
fn plots(folder: &Path) -> Result<()> {
    let at = |tokens: usize, name: &str| {
        let shape = Shape {
            heads: 8,
            tokens,
            dim: 64,
        };
        Some((tokens as f64, median(folder, &shape.name(), name)? * 1e3))
    };
    let tokens = [256, 512, 1024, 2048, 4096];
    let names = [FLASH, PLAIN, PYTORCH, RATIOS[0].1, RATIOS[1].1, RATIOS[2].1];
    let line = |name: &&str| Line {
        name: name.to_string(),
        points: tokens.iter().filter_map(|&n| at(n, name)).collect(),
    };
    let lines: Vec<Line> = names.iter().map(line).filter(|line| !line.points.is_empty()).collect();
    plot(
        &folder.join("time-by-tokens.svg"),
        "causal forward, 8 heads of 64, f32",
        "tokens",
        "ms",
        true,
        &lines,
    )?;

    let lines = SHAPES.map(|(tokens, dim)| {
        let group = Shape { heads: 8, tokens, dim }.name();
        let base = median(folder, &group, RATIOS[0].1);
        let relative = |(chain, name): &(usize, &str)| {
            let ratio = *chain as f64 / (chain + 1) as f64;
            Some((ratio, median(folder, &group, name)? / base?))
        };
        Line {
            name: group.clone(),
            points: RATIOS.iter().filter_map(relative).collect(),
        }
    });
    let title = "time against what is hidden, nothing hidden = 1";
    plot(
        &folder.join("time-by-ratio.svg"),
        title,
        "hidden ratio",
        "time",
        false,
        &lines,
    )
}

fn main() -> Result<()> {
    if std::env::args().any(|argument| argument == "sliding") {
        return sliding();
    }
    let (criterion, folder) = common::criterion("forward");
    let mut bench = Bench {
        criterion,
        pytorch: PyTorch::start()?,
    };
    let shapes = SHAPES.map(|(tokens, dim)| Shape { heads: 8, tokens, dim });
    let sweep = SWEEP.map(|tokens| Shape {
        heads: 8,
        tokens,
        dim: 64,
    });
    let small = SMALL.map(|(heads, tokens)| Shape { heads, tokens, dim: 64 });
    common::forget(&folder, &[PYTORCH, PYTORCH_BF16]);
    for shape in shapes {
        bench_peers(&mut bench, &folder, shape)?;
        bench_dtypes(&mut bench, &folder, shape)?;
        turns(shape)?;
    }
    sliding()?;
    for shape in sweep.into_iter().chain(small) {
        bench_peers(&mut bench, &folder, shape)?;
    }
    bench.criterion.final_summary();
    let mut rows: Vec<&str> = RATIOS.iter().map(|(_, name)| *name).collect();
    rows.extend([BF16, F16, PLAIN]);
    let names: Vec<String> = shapes.iter().chain(&sweep).chain(&small).map(Shape::name).collect();
    print_ratios(&folder, &names, &rows, &[FLASH, PLAIN, PYTORCH, PYTORCH_BF16]);
    plots(&folder)
}
