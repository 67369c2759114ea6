//! One decoding step on the CPU against candle's own, in one run: `cargo bench -p peers --bench decode`.
//!
//! Decoding reads every kept key and value once, so a large copy on the same threads is the last peer.
//!
//! Rejected: halves widened into buffers, a tile at a time. It took 2.2 and 2.1 times the time in bf16 and f16 (8 heads
//! of 64, one thread). With 4 query heads a KV head it took 1.35 and 1.3: there arithmetic limits the products of
//! queries and keys.

mod common;

use candle_core::{Device, Result, Tensor, D};
use candle_nn::attention::{flash_attn, AttnMask};
use candle_nn::kv_cache::KvCache;
use candle_sfattention::{
    AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Criterion, Fold, GroupRule, HeadStrategies,
    MergeStrategy, Storage,
};
use common::{median, verify, verify_within};
use criterion::{BenchmarkGroup, Criterion as Bench, SamplingMode};
use rayon::prelude::*;

const FLASH: &str = "candle-nn CPU flash, q_len 1";
const PLAIN: &str = "candle KvCache + matmul softmax";
const COPY: &str = "copy of 256 MiB";
/// How many tokens resemble their left neighbour for each one that does not, what keys and values are stored in, and
/// the row's name.
const ROWS: [(usize, Storage, &str); 7] = [
    (0, Storage::F32, "ours, r = 0"),
    (1, Storage::F32, "ours, r = 0.5"),
    (4, Storage::F32, "ours, r = 0.8"),
    (0, Storage::BF16, "ours, r = 0, bf16"),
    (0, Storage::F16, "ours, r = 0, f16"),
    (0, Storage::I8, "ours, r = 0, i8"),
    (0, Storage::F8E4M3, "ours, r = 0, f8"),
];

#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    context: usize,
}

impl Shape {
    fn group_name(&self) -> String {
        format!("{} B={} context={}", self.name, self.batch, self.context)
    }

    fn random(&self, heads: usize, tokens: usize) -> Result<Tensor> {
        Tensor::randn(0f32, 1.0, (self.batch, heads, tokens, self.dim), &Device::Cpu)
    }

    /// Keys in runs of `chain + 1` equal directions: a similarity threshold hides `chain` of them.
    fn keys(&self, chain: usize) -> Result<Tensor> {
        let keys = self.random(self.kv_heads, self.context.div_ceil(chain + 1))?;
        let repeated = keys.unsqueeze(3)?.repeat((1, 1, 1, chain + 1, 1))?.flatten(2, 3)?;
        repeated.narrow(2, 0, self.context)?.contiguous()
    }

    fn kept_bytes(&self, cache: &CompressedKvCache, storage: Storage) -> usize {
        // 8 bits have a scale of 16 for each row.
        let row = storage
            .dtype()
            .map_or(self.dim + 2, |dtype| self.dim * dtype.size_in_bytes());
        cache.lens().iter().flatten().sum::<usize>() * 2 * row
    }
}

fn config(chain: usize) -> CompressionConfig {
    CompressionConfig {
        fold: Fold::Mean,
        criterion: Criterion::KeyKey,
        group_rule: GroupRule::Unanimous,
        similarity_threshold: 1e-3,
        max_merge_level: chain.max(1),
        ..Default::default()
    }
}

fn filled(shape: &Shape, (chain, storage): (usize, Storage), k: &Tensor, v: &Tensor) -> Result<CompressedKvCache> {
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let options = CacheOptions {
        storage: Some(storage),
        ..Default::default()
    };
    let mut cache = CompressedKvCache::new(strategies, config(chain), options)?;
    let q = shape.random(shape.heads, 1)?;
    let q = q.broadcast_as((shape.batch, shape.heads, shape.context, shape.dim))?;
    cache.append(&q, k, v)?;
    Ok(cache)
}

/// Plain attention; heads share keys by broadcasting, with an axis for the group.
fn plain(shape: &Shape, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let Shape {
        batch,
        heads,
        kv_heads,
        dim,
        ..
    } = *shape;
    let q = q.reshape((batch, kv_heads, heads / kv_heads, dim))?;
    let scores = (q.matmul(&k.t()?)? * (1.0 / (dim as f64).sqrt()))?;
    let weights = candle_nn::ops::softmax_last_dim(&scores)?;
    weights.matmul(v)?.reshape((batch, heads, 1, dim))
}

fn flash(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f32).sqrt();
    flash_attn::<f32>(q, k, v, scale, AttnMask::None, None, None)
}

/// Times steps at this context. The cache grows by the timed steps, at most a few hundred entries, and is filled anew
/// for every row.
fn bench_ours(
    group: &mut BenchmarkGroup<criterion::measurement::WallTime>,
    shape: &Shape,
    v: &Tensor,
) -> Result<Vec<(String, usize)>> {
    let mut kept = Vec::new();
    let options = AttentionOptions::default();
    for (chain, storage, name) in ROWS {
        let cache = filled(shape, (chain, storage), &shape.keys(chain)?, v)?;
        let (q, k) = (shape.random(shape.heads, 1)?, shape.random(shape.kv_heads, 1)?);
        let mut running = cache.clone();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                // The cache begins anew after it has grown by 1 %. A clone shares what is stored.
                if running.seq_len() > shape.context + shape.context / 100 {
                    running = cache.clone();
                }
                running.append_and_attend(&q, &k, &k, &options)
            })
        });
        kept.push((name.to_string(), shape.kept_bytes(&cache, storage)));
    }
    Ok(kept)
}

fn bench_shape(bench: &mut Bench, shape: Shape) -> Result<Vec<(String, usize)>> {
    let (k, v) = (shape.keys(0)?, shape.random(shape.kv_heads, shape.context)?);
    let (q, new) = (shape.random(shape.heads, 1)?, shape.random(shape.kv_heads, 1)?);
    let (all_k, all_v) = (Tensor::cat(&[&k, &new], 2)?, Tensor::cat(&[&v, &new], 2)?);
    let expected = plain(&shape, &q, &all_k, &all_v)?;
    let bounds = [
        (Storage::F32, 1e-4),
        (Storage::F16, 2e-3),
        (Storage::BF16, 0.02),
        (Storage::I8, 0.02),
        (Storage::F8E4M3, 0.05),
    ];
    for (storage, bound) in bounds {
        let mut cache = filled(&shape, (0, storage), &k, &v)?;
        let output = cache.append_and_attend(&q, &new, &new, &Default::default())?;
        verify_within("ours", &output, &expected, bound)?;
    }
    let by_token = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let (fq, fk, fv) = (by_token(&q)?, by_token(&all_k)?, by_token(&all_v)?);
    verify(FLASH, &flash(&fq, &fk, &fv)?, &expected)?;

    let mut group = bench.benchmark_group(shape.group_name());
    group.sampling_mode(SamplingMode::Flat);
    let kept = bench_ours(&mut group, &shape, &v)?;
    let mut candle = KvCache::new(2, shape.context + 1);
    candle.append(&k, &v)?;
    group.bench_function(PLAIN, |bencher| {
        bencher.iter(|| {
            let mut candle = candle.clone();
            let (k, v) = candle.append(&new, &new)?;
            plain(&shape, &q, &k, &v)
        })
    });
    group.bench_function(FLASH, |bencher| bencher.iter(|| flash(&fq, &fk, &fv)));
    group.finish();
    Ok(kept)
}

/// Reads and writes 256 MiB in all threads: the memory speed of this machine, in bytes read plus bytes written per
/// second.
fn bench_copy(bench: &mut Bench) {
    let source = vec![1u8; 256 << 20];
    let mut target = vec![0u8; source.len()];
    let chunk = source.len() / rayon::current_num_threads();
    let mut group = bench.benchmark_group("memory");
    group.bench_function(COPY, |bencher| {
        bencher.iter(|| {
            let pairs = target.par_chunks_mut(chunk).zip(source.par_chunks(chunk));
            pairs.for_each(|(target, source)| target.copy_from_slice(source))
        })
    });
    group.finish();
}

fn main() -> Result<()> {
    let (mut bench, folder) = common::criterion("decode");
    let mut rows = Vec::new();
    for (name, heads, kv_heads, dim) in [("H=32 Hk=8 D=128", 32, 8, 128), ("SmolLM2 H=9 Hk=3 D=64", 9, 3, 64)] {
        for batch in [1, 4] {
            for context in [1024, 8192, 32768] {
                let shape = Shape {
                    name,
                    batch,
                    heads,
                    kv_heads,
                    dim,
                    context,
                };
                rows.push((shape.group_name(), bench_shape(&mut bench, shape)?));
            }
        }
    }
    bench_copy(&mut bench);
    bench.final_summary();
    print_table(&folder, &rows);
    Ok(())
}

fn print_table(folder: &std::path::Path, rows: &[(String, Vec<(String, usize)>)]) {
    let Some(copy) = median(folder, "memory", COPY) else {
        return;
    };
    let bandwidth = 2.0 * f64::from(256 << 20) / copy;
    println!("\ncopy: {:.1} GB/s (read and written)", bandwidth / 1e9);
    for (group, kept) in rows {
        let peers = [FLASH, PLAIN].map(|peer| median(folder, group, peer));
        println!(
            "\n{group}\n{:<18}{:>10}{:>12}{:>12}{:>12}{:>14}",
            "", "ms", "flash/ours", "plain/ours", "time / r=0", "of copy GB/s"
        );
        let first = kept.first().and_then(|(name, _)| median(folder, group, name));
        for (name, bytes) in kept {
            let Some(ours) = median(folder, group, name) else {
                continue;
            };
            let ratio = |x: Option<f64>, y: f64| x.map_or("-".into(), |x| format!("{:.2}", x / y));
            println!(
                "{name:<18}{:>10.3}{:>12}{:>12}{:>12}{:>13.0}%",
                ours * 1e3,
                ratio(peers[0], ours),
                ratio(peers[1], ours),
                ratio(Some(ours), first.unwrap_or(ours)),
                100.0 * *bytes as f64 / ours / bandwidth
            );
        }
    }
}
