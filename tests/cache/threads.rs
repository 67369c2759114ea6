//! Sixteen threads whose caches are forks of shared prompts: each stays what a cache alone is, bit for bit, and the
//! process's memory does not grow.
//!
//! A process of its own runs the rounds, since memory is that of a process: [`rounds`], which the test starts.
//! `SFA_THREADS_MINUTES` says for how long.

use crate::common::again::full_name;
use crate::common::caches::{part, recorded, with_thresholds};
use crate::common::files::{Contents, TempFile};
use crate::common::inputs::Shape;
use crate::common::saved::bits;
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    AttentionOptions, CompressedKvCache, CompressionConfig, HeadStrategies, MergeStrategy, Storage,
};
use rand::{rngs::StdRng, Rng, SeedableRng};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

const MINUTES: &str = "SFA_THREADS_MINUTES";
const THREADS: usize = 16;
/// Operations of a thread in a round.
const OPERATIONS: usize = 30;
/// Caches that a thread holds at most.
const MOST_FORKS: usize = 5;
const ROLLBACK: usize = 6;
/// More entries than a list keeps without pieces that forks share.
const PROMPT: usize = 400;
/// The tokens that calls draw from; positions count from a cache's own beginning.
const POOL: Shape = Shape(1, 4, 2, 1024, 16);

/// A prompt that threads share, and the settings of its cache.
struct Shared {
    pool: [Tensor; 3],
    strategies: HeadStrategies,
    config: CompressionConfig,
    storage: Storage,
    options: AttentionOptions,
    prompt: Option<CompressedKvCache>,
}

impl Shared {
    fn new(
        pool: &[Tensor; 3],
        strategy: MergeStrategy,
        config: CompressionConfig,
        storage: Storage,
        sliding_window: Option<usize>,
    ) -> Result<Self> {
        let config = CompressionConfig {
            window: 16,
            similarity_threshold: 0.4,
            ..config
        };
        let mut shared = Self {
            pool: pool.clone(),
            strategies: with_thresholds(HeadStrategies::uniform(strategy), &POOL, &config)?,
            config,
            storage,
            options: AttentionOptions {
                sliding_window,
                ..Default::default()
            },
            prompt: None,
        };
        let mut prompt = shared.cache()?;
        shared.append(&mut prompt, Call { at: 0, count: PROMPT })?;
        shared.prompt = Some(prompt);
        Ok(shared)
    }

    fn all() -> Result<Vec<Self>> {
        let (similar, off) = (MergeStrategy::Similarity, MergeStrategy::Off);
        let (pretrained, calibrated) = (CompressionConfig::pretrained, CompressionConfig::calibrated);
        let pool = &POOL.qkv(1, DType::F32)?;
        Ok(vec![
            Self::new(pool, similar, pretrained(), Storage::F32, None)?,
            Self::new(pool, similar, calibrated(), Storage::F32, None)?,
            Self::new(pool, similar, pretrained(), Storage::F16, Some(200))?,
            Self::new(pool, off, pretrained(), Storage::BF16, None)?,
            Self::new(pool, similar, pretrained(), Storage::I8, None)?,
        ])
    }

    fn cache(&self) -> Result<CompressedKvCache> {
        recorded(&self.strategies, &self.config, Some(self.storage), ROLLBACK)
    }

    fn append(&self, cache: &mut CompressedKvCache, call: Call) -> Result<Tensor> {
        let [q, k, v] = part(&self.pool, call.at, call.count)?;
        Ok(cache.append_and_attend(&q, &k, &v, &self.options)?)
    }

    /// A fork of the prompt.
    fn fork(&self) -> Result<Fork> {
        Ok(Fork {
            cache: self.prompt.as_ref().context("a prompt")?.fork(),
            calls: vec![Call { at: 0, count: PROMPT }],
            shortest: PROMPT - ROLLBACK,
            longest: PROMPT,
        })
    }

    /// Fails unless the fork holds what a cache holds that was given its calls alone, and goes on as it does.
    fn check(&self, mut fork: Fork, next: Call) -> Result<()> {
        let mut alone = self.cache()?;
        for call in &fork.calls {
            self.append(&mut alone, *call)?;
        }
        let calls = &fork.calls;
        ensure!(content(&fork.cache)? == content(&alone)?, "content after {calls:?}");
        ensure!(fork.cache.bytes() == alone.bytes() && fork.cache.lens() == alone.lens());
        let [got, expected] = [&mut fork.cache, &mut alone].map(|cache| self.append(cache, next));
        ensure!(bits(&got?)? == bits(&expected?)?, "rows of {next:?} after {calls:?}");
        Ok(())
    }

    /// One thread's round.
    fn round(&self, seed: u64) -> Result<()> {
        let rng = &mut StdRng::seed_from_u64(seed);
        let mut forks = vec![self.fork()?];
        for _ in 0..OPERATIONS {
            let index = rng.random_range(0..forks.len());
            match rng.random_range(0..16) {
                0..6 => {
                    let call = Call::draw(rng);
                    self.append(&mut forks[index].cache, call)?;
                    forks[index].took(call);
                }
                6..9 => forks.push(forks[index].fork()),
                9..12 => forks[index].truncate(rng)?,
                12 => forks[index].save_and_load()?,
                13 => drop(forks.swap_remove(index)),
                14 => {
                    let pair = self.side_by_side(forks.swap_remove(index), rng)?;
                    forks.extend(pair);
                }
                _ => forks.push(self.fork()?),
            }
            while forks.len() > MOST_FORKS {
                forks.swap_remove(rng.random_range(0..forks.len()));
            }
            if forks.is_empty() {
                forks.push(self.fork()?);
            }
        }
        forks.into_iter().try_for_each(|fork| self.check(fork, Call::draw(rng)))
    }

    /// A fork and its own fork as two batch rows, which take in a call each and are taken apart again.
    fn side_by_side(&self, fork: Fork, rng: &mut StdRng) -> Result<Vec<Fork>> {
        let calls = [Call::draw(rng), Call::draw(rng)];
        let count = calls[0].count;
        let parts = [
            part(&self.pool, calls[0].at, count)?,
            part(&self.pool, calls[1].at, count)?,
        ];
        let both = |index: usize| Tensor::cat(&[&parts[0][index], &parts[1][index]], 0);
        let mut cache = match rng.random_bool(0.5) {
            true => CompressedKvCache::cat(&[fork.cache.fork(), fork.cache.fork()])?,
            false => {
                let mut cache = fork.cache.fork();
                cache.index_select(&Tensor::new(&[0u32, 0], &Device::Cpu)?)?;
                cache
            }
        };
        cache.append_and_attend(&both(0)?, &both(1)?, &both(2)?, &self.options)?;
        let rows = cache.split()?.into_iter().zip(calls);
        Ok(rows
            .map(|(cache, call)| {
                let mut row = Fork {
                    cache,
                    calls: fork.calls.clone(),
                    ..fork
                };
                row.took(Call { count, ..call });
                row.begin_journal();
                row
            })
            .collect())
    }
}

/// Tokens `at..at + count` of the pool.
#[derive(Clone, Copy, Debug)]
struct Call {
    at: usize,
    count: usize,
}

impl Call {
    fn draw(rng: &mut StdRng) -> Self {
        let count = [1, 1, 1, 1, 2, 5, 9, 40][rng.random_range(0..8)];
        Self {
            at: rng.random_range(0..POOL.3 - 40),
            count,
        }
    }
}

/// A cache, and the calls that made it.
struct Fork {
    cache: CompressedKvCache,
    calls: Vec<Call>,
    /// The shortest length that its journal has covered since it began.
    shortest: usize,
    /// The longest since then.
    longest: usize,
}

impl Fork {
    fn fork(&self) -> Self {
        Self {
            cache: self.cache.fork(),
            calls: self.calls.clone(),
            ..*self
        }
    }

    fn took(&mut self, call: Call) {
        self.calls.push(call);
        self.longest = self.longest.max(self.cache.seq_len());
    }

    fn begin_journal(&mut self) {
        (self.shortest, self.longest) = (self.cache.seq_len(), self.cache.seq_len());
    }

    fn truncate(&mut self, rng: &mut StdRng) -> Result<()> {
        let tokens = self.cache.seq_len();
        let shortest = self.shortest.max(self.longest - ROLLBACK);
        let to = rng.random_range(shortest.min(tokens)..=tokens);
        self.cache.truncate(to)?;
        let mut start = 0;
        self.calls.retain_mut(|call| {
            let first = start;
            start += call.count;
            call.count = call.count.min(to.saturating_sub(first));
            call.count > 0
        });
        Ok(())
    }

    fn save_and_load(&mut self) -> Result<()> {
        let file = TempFile::new();
        self.cache.save(&file.0)?;
        self.cache = CompressedKvCache::load(&file.0, &Device::Cpu)?;
        self.begin_journal();
        Ok(())
    }
}

/// What a saved file of the cache holds.
fn content(cache: &CompressedKvCache) -> Result<Contents> {
    let file = TempFile::new();
    cache.save(&file.0)?;
    Contents::read(&file.0)
}

/// The memory that this process holds, in MiB; None where the system does not tell.
fn resident() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024.0)
}

/// Runs rounds until the time is over, and compares the memory of the two halves.
#[test]
#[ignore = "the test below starts it in a process of its own"]
fn rounds() -> Result<()> {
    let minutes = std::env::var(MINUTES).ok();
    let minutes: Option<f64> = minutes.map(|text| text.parse().context(MINUTES)).transpose()?;
    let time = minutes.map_or(Duration::from_secs(2), |minutes| {
        Duration::from_secs_f64(60.0 * minutes)
    });
    let shared = Shared::all()?;
    let (start, mut memory) = (Instant::now(), Vec::new());
    while start.elapsed() < time || memory.len() < 8 {
        let round = memory.len();
        thread::scope(|scope| {
            let threads = (0..THREADS).map(|thread| {
                let seed = (round * THREADS + thread) as u64;
                let shared = &shared[thread % shared.len()];
                scope.spawn(move || {
                    shared
                        .round(seed)
                        .with_context(|| format!("thread {thread}, seed {seed}"))
                })
            });
            let threads: Vec<_> = threads.collect();
            let ended = |thread: thread::ScopedJoinHandle<Result<()>>| thread.join().expect("no panic");
            threads.into_iter().try_for_each(ended)
        })?;
        memory.push(resident());
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{} rounds of {THREADS} threads in {seconds:.0} seconds", memory.len());
    let Some(memory) = memory.into_iter().collect::<Option<Vec<f64>>>() else {
        return Ok(());
    };
    let (first, second) = memory.split_at(memory.len() / 2);
    let most = |half: &[f64]| half.iter().copied().fold(0.0, f64::max);
    println!(
        "resident MiB: {:.1} after the first round, {:.1} after the last; at most {:.1} in the first half, {:.1} in \
         the second",
        memory[0],
        memory[memory.len() - 1],
        most(first),
        most(second)
    );
    // Pieces of free memory differ from round to round.
    let allowed = 1.05 * most(first) + 4.0;
    assert!(most(second) <= allowed, "{memory:.1?}");
    Ok(())
}

#[test]
fn threads_with_forks_of_one_prompt_stay_exact() -> Result<()> {
    let name = full_name(module_path!(), "rounds");
    let output = Command::new(std::env::current_exe()?)
        .args(["--ignored", "--nocapture", "--exact", &name])
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{error}");
    Ok(())
}
