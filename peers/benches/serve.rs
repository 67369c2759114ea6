//! What serving costs on the CPU: the memory of forks, a journal while decoding, and going back.
//! `cargo bench -p peers --bench serve`.

mod common;

use candle_core::{bail, Device, Result, Tensor};
use candle_sfattention::{
    AttentionOptions, CacheOptions, CompressedKvCache, CompressionConfig, HeadStrategies, MergeStrategy,
};
use common::turns::Turns;
use common::verify;
use std::time::Instant;

const MIB: f64 = 1024.0 * 1024.0;
const FORKS: usize = 1000;
/// Deep copies that are made; their memory is scaled to as many as there are forks.
const COPIES: usize = 20;
/// Tokens that each fork appends.
const OWN: usize = 16;
const ROLLBACK: usize = 8;
/// Tokens of a draft that are taken back.
const BACK: usize = 4;
/// Times that they are.
const TIMES: usize = 400;

/// One layer: (heads, KV heads, size of a head), tokens of its prompt, and how many of them resemble their left
/// neighbour for each one that does not.
#[derive(Clone, Copy)]
struct Layer {
    name: &'static str,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    context: usize,
    chain: usize,
}

impl Layer {
    const SMALL: Self = Self {
        name: "H=9 Hk=3 D=64",
        heads: 9,
        kv_heads: 3,
        dim: 64,
        context: 8192,
        chain: 0,
    };
    const LARGE: Self = Self {
        name: "H=32 Hk=8 D=128",
        heads: 32,
        kv_heads: 8,
        dim: 128,
        context: 8192,
        chain: 0,
    };

    fn title(&self) -> String {
        format!("{} context={} hidden={}", self.name, self.context, self.hidden())
    }

    fn hidden(&self) -> &'static str {
        match self.chain {
            0 => "none",
            1 => "half",
            _ => "more",
        }
    }

    fn random(&self, heads: usize, tokens: usize) -> Result<Tensor> {
        Tensor::randn(0f32, 1.0, (1, heads, tokens, self.dim), &Device::Cpu)
    }

    /// A cache that has read the prompt.
    fn filled(&self, rollback: usize, k: &Tensor, v: &Tensor) -> Result<CompressedKvCache> {
        // Random keys are far apart; those of a chain are equal.
        let config = CompressionConfig {
            similarity_threshold: 1e-3,
            max_merge_level: self.chain.max(1),
            ..CompressionConfig::pretrained()
        };
        let options = CacheOptions {
            rollback,
            ..Default::default()
        };
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        let mut cache = CompressedKvCache::new(strategies, config, options)?;
        cache.append_without_queries(k, v, self.heads)?;
        Ok(cache)
    }

    fn prompt(&self) -> Result<[Tensor; 2]> {
        let keys = self.random(self.kv_heads, self.context.div_ceil(self.chain + 1))?;
        let repeated = keys.unsqueeze(3)?.repeat((1, 1, 1, self.chain + 1, 1))?.flatten(2, 3)?;
        let keys = repeated.narrow(2, 0, self.context)?.contiguous()?;
        Ok([keys, self.random(self.kv_heads, self.context)?])
    }

    fn tokens(&self, count: usize) -> Result<[Tensor; 3]> {
        Ok([
            self.random(self.heads, count)?,
            self.random(self.kv_heads, count)?,
            self.random(self.kv_heads, count)?,
        ])
    }
}

fn append(cache: &mut CompressedKvCache, [q, k, v]: &[Tensor; 3]) -> Result<Tensor> {
    cache.append_and_attend(q, k, v, &AttentionOptions::default())
}

fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.map_or(f64::NAN, |kib: f64| kib / 1024.0)
}

/// Fails unless two results are equal to the last bit; a NaN fails.
fn verify_equal(what: &str, got: &Tensor, expected: &Tensor) -> Result<()> {
    let [got, expected] = [got, expected].map(|x| x.flatten_all().and_then(|x| x.to_vec1::<f32>()));
    if got? != expected? {
        bail!("{what}: expected equal rows, got others")
    }
    Ok(())
}

/// Caches that go on alike, with their memory in MiB and the last row of the last one.
struct Many {
    /// What they allocate and do not share.
    counted: f64,
    /// By how much the process grew.
    resident: f64,
    row: Tensor,
    /// They stay, so that others do not get their memory.
    _caches: Vec<CompressedKvCache>,
}

impl Many {
    fn new(count: usize, tokens: &[[Tensor; 3]], cache: impl Fn() -> Result<CompressedKvCache>) -> Result<Self> {
        let before = resident();
        let mut caches = (0..count).map(|_| cache()).collect::<Result<Vec<_>>>()?;
        let mut row = None;
        for cache in &mut caches {
            for token in tokens {
                row = Some(append(cache, token)?);
            }
        }
        let Some(row) = row else {
            bail!("memory: expected rows, got none")
        };
        let own = caches
            .iter()
            .map(|cache| cache.bytes_allocated() - cache.bytes_shared());
        Ok(Self {
            counted: own.sum::<usize>() as f64 / MIB,
            resident: resident() - before,
            row,
            _caches: caches,
        })
    }
}

/// Prints the memory of forks of a prompt that append tokens, and of deep copies that do.
fn forks(layer: Layer) -> Result<()> {
    let [k, v] = layer.prompt()?;
    let prompt = layer.filled(0, &k, &v)?;
    let tokens = (0..OWN).map(|_| layer.tokens(1)).collect::<Result<Vec<_>>>()?;
    let forks = Many::new(FORKS, &tokens, || Ok(prompt.fork()))?;
    let file = tempfile::NamedTempFile::new()?;
    prompt.save(file.path())?;
    let copies = Many::new(COPIES, &tokens, || CompressedKvCache::load(file.path(), &Device::Cpu))?;
    verify_equal("a fork", &forks.row, &copies.row)?;
    let scale = FORKS as f64 / COPIES as f64;
    let (counted, resident) = (scale * copies.counted, scale * copies.resident);
    println!(
        "\n{}: {FORKS} caches that append {OWN} tokens each to a prompt of {:.1} MiB\n{:<42}{:>14}{:>14}",
        layer.title(),
        prompt.bytes_allocated() as f64 / MIB,
        "MiB",
        "counted",
        "resident"
    );
    let line = |name: &str, counted: f64, resident: f64| println!("{name:<42}{counted:>14.1}{resident:>14.1}");
    line("forks", forks.counted, forks.resident);
    line(&format!("deep copies (scaled from {COPIES})"), counted, resident);
    line("copies / forks", counted / forks.counted, resident / forks.resident);
    Ok(())
}

/// Times a token with and without a journal, in turns.
fn journal(layer: Layer) -> Result<()> {
    let [k, v] = layer.prompt()?;
    let token = layer.tokens(1)?;
    let mut caches = [layer.filled(0, &k, &v)?, layer.filled(ROLLBACK, &k, &v)?];
    for step in 0..3 * ROLLBACK {
        let [plain, recorded] = &mut caches;
        let token = layer.tokens(1)?;
        verify_equal(
            &format!("step {step}"),
            &append(recorded, &token)?,
            &append(plain, &token)?,
        )?;
    }
    // Caches begin anew once they have grown by 1 %.
    let step = |rollback: usize| -> Result<_> {
        let mut cache = layer.filled(rollback, &k, &v)?;
        let (k, v, token) = (&k, &v, &token);
        Ok(move || {
            if cache.seq_len() > layer.context + layer.context / 100 {
                cache = layer.filled(rollback, k, v)?;
            }
            append(&mut cache, token)
        })
    };
    let mut turns = Turns::new();
    turns.row("a token, rollback 0", step(0)?);
    turns.row("a token, rollback 8", step(ROLLBACK)?);
    turns.run(&layer.title())?;
    Ok(())
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Times tokens that are appended and taken back, one after the other.
fn going_back(layer: Layer) -> Result<()> {
    let prompt = layer.prompt()?;
    let new = || layer.filled(ROLLBACK, &prompt[0], &prompt[1]);
    let (mut cache, mut never) = (new()?, new()?);
    let (accepted, refused, next) = (layer.tokens(1)?, layer.tokens(BACK)?, layer.tokens(1)?);
    let both = [0, 1, 2].map(|i| Tensor::cat(&[&accepted[i], &refused[i]], 2));
    let [q, k, v] = both;
    append(&mut cache, &[q?, k?, v?])?;
    cache.truncate(layer.context + 1)?;
    append(&mut never, &accepted)?;
    verify_equal(
        "after going back",
        &append(&mut cache, &next)?,
        &append(&mut never, &next)?,
    )?;

    let (mut appending, mut truncating) = (Vec::new(), Vec::new());
    for time in 0..TIMES {
        if time % 64 == 0 {
            cache = new()?;
        }
        // A step of decoding that accepts one token.
        append(&mut cache, &accepted)?;
        let start = Instant::now();
        append(&mut cache, &refused)?;
        appending.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        cache.truncate(cache.seq_len() - BACK)?;
        truncating.push(start.elapsed().as_secs_f64());
    }
    let (appending, truncating) = (median(appending), median(truncating));
    println!(
        "\n{}, one after the other\n{:<42}{:>11}{:>8}",
        layer.title(),
        "median of",
        "ms",
        "ratio"
    );
    let line = |name: String, seconds: f64| println!("{name:<42}{:>11.3}{:>8.3}", seconds * 1e3, seconds / appending);
    line(format!("append {BACK} tokens"), appending);
    line(format!("truncate by {BACK} tokens"), truncating);
    Ok(())
}

/// Times a few tokens in one call and in a call each; both are taken back.
fn in_one_call(layer: Layer) -> Result<()> {
    let [k, v] = layer.prompt()?;
    let tokens = layer.tokens(BACK)?;
    let parts = (0..BACK).map(|token| {
        let [q, k, v] = &tokens;
        Ok([q.narrow(2, token, 1)?, k.narrow(2, token, 1)?, v.narrow(2, token, 1)?])
    });
    let parts = parts.collect::<Result<Vec<_>>>()?;
    let each = |cache: &mut CompressedKvCache| {
        let rows = parts
            .iter()
            .map(|part| append(cache, part))
            .collect::<Result<Vec<_>>>()?;
        Tensor::cat(&rows, 2)
    };
    let mut caches = [layer.filled(ROLLBACK, &k, &v)?, layer.filled(ROLLBACK, &k, &v)?];
    verify("one call", &append(&mut caches[0], &tokens)?, &each(&mut caches[1])?)?;
    let [mut one, mut four] = caches;
    let mut turns = Turns::new();
    turns.row("4 tokens, a call each, and back", || {
        four.truncate(layer.context)?;
        each(&mut four)
    });
    turns.row("4 tokens in one call, and back", || {
        one.truncate(layer.context)?;
        append(&mut one, &tokens)
    });
    turns.run(&layer.title())?;
    Ok(())
}

fn main() -> Result<()> {
    // First and once: later caches would get memory that these freed.
    forks(Layer::SMALL)?;
    for layer in [Layer::SMALL, Layer::LARGE] {
        for context in [1024, 8192] {
            for chain in [0, 1] {
                let layer = Layer {
                    context,
                    chain,
                    ..layer
                };
                journal(layer)?;
                going_back(layer)?;
                in_one_call(layer)?;
            }
        }
    }
    Ok(())
}
