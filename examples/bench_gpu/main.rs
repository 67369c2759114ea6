//! Verifies, then times attention on a CUDA device: forward, forward and backward, and decoding, in TFLOP/s and TB/s
//! and as a share of this device's speed in a plain matrix product and a plain copy, which are measured first.
//!
//! `cargo run --release --features cuda --example bench_gpu [LONGEST [SHORTEST [PARTS]]]`: the longest and shortest N,
//! and some of decide,attention,decode (the default), prompt (a cache's prompt in one call and in chunks),
//! deterministic (both passes with one owner per sum), and cold (the time of first calls, measured before anything
//! else). `python3 peers/benches/pytorch_gpu.py` prints the same lines for PyTorch's flash attention.
//!
//! `CUDA_CACHE_DISABLE=1 bench_gpu 0 0 cold` runs in a process that finds nothing in the driver's cache.
//!
//! Freed memory stays with the process, as with PyTorch's allocator. With `SFA_GIVE_BACK` set it goes back to the
//! driver whenever the host waits, which is the driver's default, and candle's.
//!
//! FLOPs are those of ordinary causal attention (4·B·H·N²·D/2 forward, 2.5 times that backward), even if tokens are
//! hidden, so that lines of one shape compare as their times do.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var, D};
use candle_sfattention::{
    attend, AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, Criterion, Fold, GroupRule,
    HeadStrategies, MergePlan, MergeStrategy,
};
use std::time::Instant;

mod cache;

/// The speeds of plain kernels on this device.
struct Ceilings {
    /// TFLOP/s of an 8192-cubed bf16 product.
    product: f64,
    /// TB/s of a copy, bytes read and written.
    copy: f64,
}

#[derive(Clone, Copy)]
struct Shape {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    tokens: usize,
    dim: usize,
}

/// Seconds of one call: the median of five rounds, after a warm-up.
fn time(device: &Device, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    call()?;
    device.synchronize()?;
    let start = Instant::now();
    call()?;
    device.synchronize()?;
    let repeats = (0.05 / start.elapsed().as_secs_f64()).clamp(2.0, 200.0) as usize;
    let mut rounds = [0.0; 5];
    for round in &mut rounds {
        let start = Instant::now();
        (0..repeats).try_for_each(|_| call())?;
        device.synchronize()?;
        *round = start.elapsed().as_secs_f64() / repeats as f64;
    }
    rounds.sort_by(f64::total_cmp);
    Ok(rounds[2])
}

/// Lets the device's pool keep freed memory. Otherwise the driver takes it back whenever the host waits, and the next
/// call pays for mapping it again.
fn keep_memory(device: &Device) -> Result<()> {
    use candle_core::cuda_backend::cudarc::driver::{result, sys};
    let context = device.as_cuda_device()?.cuda_stream().context().clone();
    let mut all = u64::MAX;
    // SAFETY: the context's own device, its pool, and the 64 bits that this attribute takes.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        let what = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, what, (&raw mut all).cast())?;
    }
    Ok(())
}

fn ceilings(device: &Device) -> Result<Ceilings> {
    let size = 8192;
    let a = Tensor::randn(0f32, 1.0, (size, size), device)?.to_dtype(DType::BF16)?;
    let product = time(device, || Ok(a.matmul(&a).map(drop)?))?;
    let big = Tensor::zeros(1 << 30, DType::BF16, device)?;
    let copy = time(device, || Ok(big.copy().map(drop)?))?;
    Ok(Ceilings {
        product: 2.0 * (size as f64).powi(3) / product / 1e12,
        copy: 2.0 * 2.0 * (1u64 << 30) as f64 / copy / 1e12,
    })
}

fn config() -> CompressionConfig {
    CompressionConfig {
        criterion: Criterion::KeyKey,
        fold: Fold::Drop,
        group_rule: GroupRule::Unanimous,
        window: 32,
        sinks: 4,
        ..Default::default()
    }
}

impl Shape {
    fn qkv(&self, device: &Device, dtype: DType) -> Result<[Tensor; 3]> {
        let one = |heads: usize| -> Result<Tensor> {
            let shape = (self.batch, heads, self.tokens, self.dim);
            Ok(Tensor::randn(0f32, 1.0, shape, device)?.to_dtype(dtype)?)
        };
        Ok([one(self.heads)?, one(self.kv_heads)?, one(self.kv_heads)?])
    }

    /// A plan that hides about this share of all tokens, the same ones in every head.
    fn plan(&self, qkv: &[Tensor; 3], share: f64, options: &AttentionOptions) -> Result<MergePlan> {
        let [q, k, v] = qkv;
        if share == 0.0 {
            let off = HeadStrategies::uniform(MergeStrategy::Off);
            return Ok(MergePlan::new(q, k, v, &off, &config(), options)?);
        }
        let hides = |t: usize| ((t + 1) as f64 * share).floor() > (t as f64 * share).floor();
        let bits: Vec<u8> = (0..self.tokens - 1).map(|t| hides(t).into()).collect();
        let bits = Tensor::from_vec(bits, (1, 1, self.tokens - 1), q.device())?;
        let bits = bits.broadcast_as((self.batch, self.heads, self.tokens - 1))?;
        Ok(MergePlan::from_indicators(&bits.contiguous()?, &config())?)
    }

    fn forward_tflop(&self) -> f64 {
        let pairs = (self.tokens * self.tokens) as f64 / 2.0;
        4.0 * pairs * (self.batch * self.heads * self.dim) as f64 / 1e12
    }

    fn name(&self) -> String {
        let &Shape {
            batch,
            heads,
            kv_heads,
            tokens,
            dim,
        } = self;
        format!("B {batch} H {heads} Hk {kv_heads} N {tokens:>6} D {dim:>3}")
    }
}

/// Holds the device's bf16 result against the CPU's in f32, for every share hidden.
fn verify(device: &Device) -> Result<()> {
    let options = AttentionOptions::default();
    for dim in [64, 128] {
        let shape = Shape {
            batch: 1,
            heads: 4,
            kv_heads: 2,
            tokens: 777,
            dim,
        };
        for share in [0.0, 0.25, 0.5, 0.8] {
            let qkv = shape.qkv(device, DType::BF16)?;
            let plan = shape.plan(&qkv, share, &options)?;
            let [q, k, v] = &qkv;
            let got = attend(q, k, v, &plan, &options)?.to_dtype(DType::F32)?;
            let host = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32);
            let qkv = [host(q)?, host(k)?, host(v)?];
            let plan = shape.plan(&qkv, share, &options)?;
            let expected = attend(&qkv[0], &qkv[1], &qkv[2], &plan, &options)?;
            let error = (host(&got)? - expected)?.abs()?.flatten_all()?.max(D::Minus1)?;
            let error = error.to_scalar::<f32>()?;
            ensure!(
                error < 0.03,
                "D {dim} r {share}: largest error {error}, expected less than 0.03"
            );
        }
    }
    println!("verified: bf16 on the device against f32 on the CPU, D 64 and 128, r 0 to 0.8");
    Ok(())
}

/// Times deciding alone, by the criteria of `pretrained()` and `calibrated()`.
fn bench_decide(device: &Device, shape: Shape) -> Result<()> {
    let [q, k, v] = &shape.qkv(device, DType::BF16)?;
    let similar = HeadStrategies::uniform(MergeStrategy::Similarity);
    // Thresholds of observed mass depend on the model; any value does here.
    let thresholds = Tensor::full(0.01f64, shape.heads, &Device::Cpu)?;
    let scored = similar.clone().with_thresholds(&thresholds)?;
    let rules = [
        ("decide, keys", similar, CompressionConfig::pretrained()),
        ("decide, observed", scored, CompressionConfig::calibrated()),
    ];
    for (what, strategies, config) in rules {
        let plan = || MergePlan::new(q, k, v, &strategies, &config, &AttentionOptions::default());
        let seconds = time(device, || Ok(plan().map(drop)?))?;
        println!("{what:<17} {}        {:>9.3} ms", shape.name(), seconds * 1e3);
    }
    Ok(())
}

/// Times the first call of each kind, which the driver mostly spends on compiling kernels that it has not met, and the
/// same call again. candle's own kernels have run before.
fn bench_cold(device: &Device, dim: usize) -> Result<()> {
    let shape = Shape {
        batch: 1,
        heads: 8,
        kv_heads: 2,
        tokens: 512,
        dim,
    };
    let [q, k, v] = shape.qkv(device, DType::BF16)?;
    let one = Shape { tokens: 1, ..shape }.qkv(device, DType::BF16)?;
    let used = Var::from_tensor(&q)?;
    used.zeros_like()?.add(&used)?.sum_all()?.backward()?;
    let options = AttentionOptions::default();
    let similar = HeadStrategies::uniform(MergeStrategy::Similarity);
    let scored = similar
        .clone()
        .with_thresholds(&Tensor::full(0.01f64, shape.heads, &Device::Cpu)?)?;
    let line = |what: String, call: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let mut seconds = [0.0; 2];
        for seconds in &mut seconds {
            device.synchronize()?;
            let start = Instant::now();
            call()?;
            device.synchronize()?;
            *seconds = start.elapsed().as_secs_f64();
        }
        println!(
            "cold, D {dim:>3} {what:<32} {:>7.3} s, again {:.6}",
            seconds[0], seconds[1]
        );
        Ok(())
    };
    let rules = [
        ("means", similar, CompressionConfig::pretrained()),
        ("dropped", scored, CompressionConfig::calibrated()),
    ];
    for (fold, strategies, config) in rules {
        let plan = || MergePlan::new(&q, &k, &v, &strategies, &config, &options);
        line(format!("{fold}: decide"), &mut || Ok(plan().map(drop)?))?;
        let plan = plan()?;
        line(format!("{fold}: forward"), &mut || {
            Ok(attend(&q, &k, &v, &plan, &options).map(drop)?)
        })?;
        line(format!("{fold}: forward and backward"), &mut || {
            Ok(attend(&used, &k, &v, &plan, &options)?.backward().map(drop)?)
        })?;
        let mut cache = CompressedKvCache::new(strategies.clone(), config.clone(), CacheOptions::default())?;
        line(format!("{fold}: a cache's prompt"), &mut || {
            cache.reset();
            Ok(cache.append_and_attend(&q, &k, &v, &options).map(drop)?)
        })?;
        line(format!("{fold}: a token decoded"), &mut || {
            Ok(cache.append_and_attend(&one[0], &one[1], &one[2], &options).map(drop)?)
        })?;
    }
    Ok(())
}

/// Times what candle's backward pass adds to one op's: the output's gradient of ones, and the op's gradients, each
/// added to zeros.
fn bench_candle(device: &Device, shape: Shape) -> Result<()> {
    let qkv = shape.qkv(device, DType::BF16)?;
    let seconds = time(device, || {
        qkv[0].ones_like()?;
        qkv.iter().try_for_each(|x| Ok(x.zeros_like()?.add(x).map(drop)?))
    })?;
    println!(
        "{:<17} {}        {:>9.3} ms",
        "candle's part",
        shape.name(),
        seconds * 1e3
    );
    Ok(())
}

fn bench_attention(device: &Device, ceilings: &Ceilings, shape: Shape) -> Result<()> {
    let options = AttentionOptions::default();
    for share in [0.0, 0.25, 0.5, 0.8] {
        let qkv = shape.qkv(device, DType::BF16)?;
        let plan = shape.plan(&qkv, share, &options)?;
        let [q, k, v] = &qkv;
        let seconds = time(device, || Ok(attend(q, k, v, &plan, &options).map(drop)?))?;
        print_line("forward", &shape, share, seconds, shape.forward_tflop(), ceilings);
        bench_both(device, ceilings, shape, share, false)?;
    }
    Ok(())
}

/// Forward and backward.
fn bench_both(device: &Device, ceilings: &Ceilings, shape: Shape, share: f64, deterministic: bool) -> Result<()> {
    let options = AttentionOptions {
        deterministic,
        ..Default::default()
    };
    let qkv = shape.qkv(device, DType::BF16)?;
    let plan = shape.plan(&qkv, share, &options)?;
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Var::from_tensor);
    let (q, k, v) = (q?, k?, v?);
    let seconds = time(device, || {
        // The output's gradient is ones; there is no reduction over the output.
        attend(&q, &k, &v, &plan, &options)?.backward()?;
        Ok(())
    })?;
    let what = match deterministic {
        true => "both, one owner",
        false => "forward+backward",
    };
    print_line(what, &shape, share, seconds, 3.5 * shape.forward_tflop(), ceilings);
    Ok(())
}

fn print_line(what: &str, shape: &Shape, share: f64, seconds: f64, tflop: f64, ceilings: &Ceilings) {
    let speed = tflop / seconds;
    println!(
        "{what:<17} {} r {share:<4} {:>9.3} ms {speed:>7.1} TFLOP/s {:>5.1}% of a product",
        shape.name(),
        seconds * 1e3,
        100.0 * speed / ceilings.product
    );
}

fn main() -> Result<()> {
    let bound = |index: usize, default: usize| match std::env::args().nth(index) {
        Some(text) => text
            .parse()
            .with_context(|| format!("N: expected a number, got {text}")),
        None => Ok(default),
    };
    let wanted = bound(2, 0)?..=bound(1, 65536)?;
    let parts = std::env::args()
        .nth(3)
        .unwrap_or_else(|| "decide,attention,decode".to_string());
    let has = |part: &str| parts.split(',').any(|name| name == part);
    let device = Device::new_cuda(0)?;
    match std::env::var_os("SFA_GIVE_BACK") {
        Some(_) => println!("memory: freed to the driver"),
        None => keep_memory(&device)?,
    }
    if has("cold") {
        bench_cold(&device, 64)?;
        bench_cold(&device, 128)?;
        verify(&device)?;
        return Ok(());
    }
    verify(&device)?;
    let ceilings = ceilings(&device)?;
    println!(
        "ceilings: product {:.0} TFLOP/s, copy {:.2} TB/s",
        ceilings.product, ceilings.copy
    );
    for tokens in [1024, 4096, 16384, 65536].into_iter().filter(|n| wanted.contains(n)) {
        for (dim, heads) in [(64, 32), (128, 16)] {
            for kv_heads in [heads, heads / 4] {
                let batch = (16384 / tokens).clamp(1, 4);
                let shape = Shape {
                    batch,
                    heads,
                    kv_heads,
                    tokens,
                    dim,
                };
                if has("decide") {
                    bench_decide(&device, shape)?;
                }
                if has("attention") {
                    bench_candle(&device, shape)?;
                    bench_attention(&device, &ceilings, shape)?;
                }
                if has("deterministic") {
                    bench_both(&device, &ceilings, shape, 0.0, true)?;
                    bench_both(&device, &ceilings, shape, 0.5, true)?;
                }
            }
        }
    }
    for tokens in [8192, 16384, 32768, 65536].into_iter().filter(|n| wanted.contains(n)) {
        for (dim, heads) in [(64, 32), (128, 16)] {
            for group in [1, 4, 8] {
                let shape = Shape {
                    batch: 4,
                    heads,
                    kv_heads: heads / group,
                    tokens,
                    dim,
                };
                for share in [0.0, 0.5, 0.75] {
                    if !has("decode") {
                        continue;
                    }
                    if let Err(error) = cache::decode(&device, &ceilings, shape, share) {
                        println!("{:<17} {} r {share} skipped: {error}", "decode", shape.name());
                    }
                }
                if has("prompt") && group == 4 {
                    cache::prompts(&device, Shape { batch: 1, ..shape })?;
                }
            }
        }
    }
    Ok(())
}
