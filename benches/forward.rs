//! Forward attention on the CPU against candle's own, in one run: `cargo bench --bench forward`.

mod common;

use candle_core::{Result, Tensor};
use candle_sfattention::{
    attend, AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Fold, HeadStrategies, MergePlan,
    MergeStrategy,
};
use common::{candle_flash, candle_plain, causal_mask, print_ratios, token_major, verify, Shape};
use criterion::{Criterion, SamplingMode};

const FLASH: &str = "candle-nn CPU flash attention";
const PLAIN: &str = "candle matmul + mask + softmax";
const SHAPES: [(usize, usize); 3] = [(1024, 64), (4096, 64), (4096, 128)];
/// Hidden tokens per kept one, and the name of our row.
const RATIOS: [(usize, &str); 3] = [(0, "ours, r = 0"), (1, "ours, r = 0.5"), (4, "ours, r = 0.8")];
const WINDOWED: [(usize, &str); 3] = [
    (0, "ours, window 32, r = 0"),
    (1, "ours, window 32, r = 0.5"),
    (4, "ours, window 32, r = 0.8"),
];
const CACHED: &str = "ours, r = 0, through the cache";
const DECIDE: &str = "ours, deciding only (KeyKey)";
const OBSERVE: &str = "ours, deciding only (ObservedMass)";
const STRIDED: &str = "ours, r = 0, (B, N, H, D) views";

fn bench_shape(criterion: &mut Criterion, shape: Shape) -> Result<()> {
    let qkv = shape.qkv()?;
    let [q, k, v] = &qkv;
    let mask = causal_mask(shape.tokens)?;
    let by_token = token_major(&qkv)?;
    let views = [
        by_token[0].transpose(1, 2)?,
        by_token[1].transpose(1, 2)?,
        by_token[2].transpose(1, 2)?,
    ];
    let options = AttentionOptions::default();
    let windowed = CompressionConfig {
        window: 32,
        fold: Fold::Mean,
        ..Default::default()
    };

    let nothing = shape.plan(0, &CompressionConfig::default())?;
    let plain = candle_plain(&qkv, &mask)?;
    verify(FLASH, &candle_flash(&by_token)?, &plain)?;
    verify("ours", &attend(q, k, v, &nothing, &options)?, &plain)?;
    verify(
        STRIDED,
        &attend(&views[0], &views[1], &views[2], &nothing, &options)?,
        &plain,
    )?;

    let mut group = criterion.benchmark_group(shape.name());
    group.sampling_mode(SamplingMode::Flat);
    let run = |plan: &MergePlan, [q, k, v]: &[Tensor; 3]| attend(q, k, v, plan, &options);
    for (config, rows) in [(CompressionConfig::default(), RATIOS), (windowed, WINDOWED)] {
        for (chain, name) in rows {
            let plan = shape.plan(chain, &config)?;
            group.bench_function(name, |bencher| bencher.iter(|| run(&plan, &qkv)));
        }
    }
    group.bench_function(STRIDED, |bencher| bencher.iter(|| run(&nothing, &views)));
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let cached = || {
        let mut cache = CompressedKvCache::new(off.clone(), CompressionConfig::default(), CacheOptions::default())?;
        cache.append_and_attend(q, k, v, &options)
    };
    verify(CACHED, &cached()?, &plain)?;
    group.bench_function(CACHED, |bencher| bencher.iter(cached));
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let pretrained = CompressionConfig::pretrained();
    group.bench_function(DECIDE, |bencher| {
        bencher.iter(|| MergePlan::new(q, k, v, &strategies, &pretrained, &options))
    });
    let observing = CompressionConfig {
        criterion: candle_sfattention::Criterion::ObservedMass,
        fold: Fold::Drop,
        ..pretrained
    };
    let thresholds = strategies.with_thresholds(&Tensor::full(4f32, shape.heads, q.device())?)?;
    group.bench_function(OBSERVE, |bencher| {
        bencher.iter(|| MergePlan::new(q, k, v, &thresholds, &observing, &options))
    });
    group.bench_function(PLAIN, |bencher| bencher.iter(|| candle_plain(&qkv, &mask)));
    group.bench_function(FLASH, |bencher| bencher.iter(|| candle_flash(&by_token)));
    group.finish();
    Ok(())
}

fn main() -> Result<()> {
    let (mut criterion, folder) = common::criterion("forward");
    let shapes = SHAPES.map(|(tokens, dim)| Shape { heads: 8, tokens, dim });
    for shape in shapes {
        bench_shape(&mut criterion, shape)?;
    }
    criterion.final_summary();
    let mut rows: Vec<&str> = RATIOS.iter().chain(&WINDOWED).map(|(_, name)| *name).collect();
    rows.extend([STRIDED, CACHED, DECIDE, OBSERVE, PLAIN]);
    print_ratios(&folder, &shapes.map(|shape| shape.name()), &rows, &[FLASH, PLAIN]);
    Ok(())
}
