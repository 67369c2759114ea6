//! The cost of a sequence: speed, cache and memory.

use std::fs;
use std::io::Write;

use anyhow::Result;
use candle_sfattention::CompressedKvCache;
use serde::{Deserialize, Serialize};

use crate::model::{HiddenCounts, Llama};

/// Speed, cache and memory of one sequence.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stats {
    pub prompt_tokens: usize,
    pub generated_tokens: usize,
    /// None if nothing ran.
    pub prefill_tokens_per_second: Option<f64>,
    /// The speed after the prompt, in tokens that the caches keep; None if there was no step.
    pub decode_tokens_per_second: Option<f64>,
    /// None without drafts.
    #[serde(default)]
    pub draft: Option<DraftUse>,
    /// None without a cache.
    #[serde(flatten)]
    pub kv: Option<KvUse>,
    #[serde(flatten)]
    pub hidden: Hidden,
    /// Of the whole process, weights included; None if the system does not tell.
    pub peak_rss_bytes: Option<u64>,
}

/// Drafts of tokens, and how many of them the model chose too.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct DraftUse {
    /// Passes through the model after the prompt.
    pub passes: usize,
    pub drafted: usize,
    pub accepted: usize,
}

/// The size of all layers' caches.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KvUse {
    /// Tokens appended.
    pub kv_tokens: usize,
    pub kv_bytes: usize,
    /// With memory that waits for later entries.
    pub kv_bytes_allocated: usize,
    /// Keys and values of all tokens in the same dtype.
    pub kv_bytes_dense: usize,
    /// Entries kept of `kv_tokens`, the mean of each layer's lists.
    pub entries_per_layer: Vec<f64>,
    /// Of the layers that slide; None if there are none.
    pub sliding: Option<SlidingUse>,
    /// Each layer's window.
    #[serde(skip)]
    windows: Vec<Option<usize>>,
}

/// The caches of the layers whose rows see a window only.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SlidingUse {
    pub layers: usize,
    pub window: usize,
    pub kv_bytes: usize,
    /// Entries of the longest list.
    pub most_entries: usize,
}

/// The caches of one layer, of all ranks: whole numbers, as ranks exchange them.
#[derive(Clone, Copy, Default)]
struct CacheUse {
    lists: f64,
    /// Of all lists.
    entries: f64,
    /// Of the longest list.
    most_entries: f64,
    bytes: f64,
    bytes_allocated: f64,
    bytes_dense: f64,
}

impl CacheUse {
    const NUMBERS: usize = 6;

    fn of(cache: &CompressedKvCache) -> Self {
        let lens = cache.lens().concat();
        Self {
            lists: lens.len() as f64,
            entries: lens.iter().sum::<usize>() as f64,
            most_entries: lens.iter().copied().max().unwrap_or(0) as f64,
            bytes: cache.bytes() as f64,
            bytes_allocated: cache.bytes_allocated() as f64,
            bytes_dense: cache.bytes_dense() as f64,
        }
    }

    fn numbers(self) -> [f64; Self::NUMBERS] {
        [
            self.lists,
            self.entries,
            self.most_entries,
            self.bytes,
            self.bytes_allocated,
            self.bytes_dense,
        ]
    }

    /// Adds the [`Self::numbers`] of a rank.
    fn add(&mut self, numbers: &[f64]) {
        let &[lists, entries, most_entries, bytes, allocated, bytes_dense] = numbers else {
            return;
        };
        self.lists += lists;
        self.entries += entries;
        self.most_entries = self.most_entries.max(most_entries);
        self.bytes += bytes;
        self.bytes_allocated += allocated;
        self.bytes_dense += bytes_dense;
    }
}

/// The part of the tokens that is hidden.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hidden {
    /// Over all heads and layers. Without a cache: hidden pairs / pairs. With one: 1 - entries / tokens, which counts
    /// tokens in the window as kept, and of a layer that slides only the tokens that its next row sees.
    pub hidden_ratio: f64,
    pub hidden_ratio_per_layer: Vec<f64>,
    /// The mean of the layers that see all tokens; None where no layer slides, or all do.
    #[serde(default)]
    pub hidden_ratio_of_whole_layers: Option<f64>,
}

impl KvUse {
    /// Of one cache per layer on every rank of the model.
    pub fn of(caches: &[CompressedKvCache], model: &Llama) -> Result<Self> {
        let own = caches.iter().flat_map(|cache| CacheUse::of(cache).numbers());
        let mut layers = vec![CacheUse::default(); caches.len()];
        for numbers in model.ranks().gather(own.collect())? {
            for (layer, numbers) in layers.iter_mut().zip(numbers.chunks_exact(CacheUse::NUMBERS)) {
                layer.add(numbers);
            }
        }
        let sum = |bytes: fn(&CacheUse) -> f64| layers.iter().map(bytes).sum::<f64>() as usize;
        let windows = model.windows();
        Ok(Self {
            kv_tokens: caches.first().map_or(0, CompressedKvCache::seq_len),
            kv_bytes: sum(|layer| layer.bytes),
            kv_bytes_allocated: sum(|layer| layer.bytes_allocated),
            kv_bytes_dense: sum(|layer| layer.bytes_dense),
            entries_per_layer: layers
                .iter()
                .map(|layer| layer.entries / layer.lists.max(1.0))
                .collect(),
            sliding: SlidingUse::of(&layers, &windows),
            windows,
        })
    }

    /// Bytes / dense bytes.
    pub fn ratio(&self) -> f64 {
        self.kv_bytes as f64 / self.kv_bytes_dense.max(1) as f64
    }

    pub fn hidden(&self) -> Hidden {
        let hidden = |(entries, window): (&f64, &Option<usize>)| {
            // With nothing hidden a layer keeps what its next row sees beside its own token.
            let most = window.map_or(self.kv_tokens, |window| (window - 1).min(self.kv_tokens));
            match most {
                0 => 0.0,
                most => 1.0 - entries / most as f64,
            }
        };
        let layers = self.entries_per_layer.iter().zip(&self.windows);
        let per_layer: Vec<f64> = layers.map(hidden).collect();
        Hidden::new(mean(&per_layer), per_layer, &self.windows)
    }
}

impl SlidingUse {
    fn of(caches: &[CacheUse], windows: &[Option<usize>]) -> Option<Self> {
        let window = windows.iter().flatten().max()?;
        let slides = || caches.iter().zip(windows).filter(|(_, window)| window.is_some());
        Some(Self {
            layers: slides().count(),
            window: *window,
            kv_bytes: slides().map(|(cache, _)| cache.bytes).sum::<f64>() as usize,
            most_entries: slides().map(|(cache, _)| cache.most_entries).fold(0.0, f64::max) as usize,
        })
    }

    fn print(&self, kv: &KvUse, out: &mut dyn Write) -> Result<()> {
        let others = kv.entries_per_layer.len() - self.layers;
        writeln!(
            out,
            "  {others} layers that see all tokens: {:.2} MiB; {} that see {}: {:.2} MiB, at most {} entries a list",
            mib((kv.kv_bytes - self.kv_bytes) as u64),
            self.layers,
            self.window,
            mib(self.kv_bytes as u64),
            self.most_entries
        )?;
        Ok(())
    }
}

impl Hidden {
    /// Of the counts of every rank of the model.
    pub fn of(counts: &HiddenCounts, model: &Llama) -> Result<Self> {
        let counts = counts.over(model.ranks())?;
        Ok(Self::new(counts.ratio(), counts.ratio_per_layer(), &model.windows()))
    }

    fn new(ratio: f64, per_layer: Vec<f64>, windows: &[Option<usize>]) -> Self {
        let layers = per_layer.iter().zip(windows);
        let whole: Vec<f64> = layers
            .filter_map(|(ratio, window)| window.is_none().then_some(*ratio))
            .collect();
        Self {
            hidden_ratio: ratio,
            hidden_ratio_of_whole_layers: (1..per_layer.len()).contains(&whole.len()).then(|| mean(&whole)),
            hidden_ratio_per_layer: per_layer,
        }
    }

    pub fn print(&self, out: &mut dyn Write) -> Result<()> {
        writeln!(out, "hidden ratio      {:.4}", self.hidden_ratio)?;
        if let Some(whole) = self.hidden_ratio_of_whole_layers {
            writeln!(out, "  of layers that see all tokens {whole:.4}")?;
        }
        per_layer(out, &self.hidden_ratio_per_layer, |ratio| format!("{ratio:.3}"))
    }
}

impl Stats {
    pub fn print(&self, out: &mut dyn Write) -> Result<()> {
        let speed = |speed: Option<f64>| speed.map_or("-".into(), |speed| format!("{speed:.1} tokens per second"));
        writeln!(out, "prompt tokens     {}", self.prompt_tokens)?;
        writeln!(out, "generated tokens  {}", self.generated_tokens)?;
        writeln!(out, "prefill           {}", speed(self.prefill_tokens_per_second))?;
        writeln!(out, "decode            {}", speed(self.decode_tokens_per_second))?;
        if let Some(draft) = &self.draft {
            writeln!(
                out,
                "drafts            {} of {} tokens accepted, {:.2} tokens a pass",
                draft.accepted,
                draft.drafted,
                (draft.passes + draft.accepted) as f64 / draft.passes.max(1) as f64
            )?;
        }
        if let Some(kv) = &self.kv {
            writeln!(
                out,
                "KV cache          {:.2} MiB of {:.2} MiB dense, {:.3}",
                mib(kv.kv_bytes as u64),
                mib(kv.kv_bytes_dense as u64),
                kv.ratio()
            )?;
            if let Some(sliding) = &kv.sliding {
                sliding.print(kv, out)?;
            }
            writeln!(
                out,
                "entries kept      {:.1} of {} tokens",
                mean(&kv.entries_per_layer),
                kv.kv_tokens
            )?;
            per_layer(out, &kv.entries_per_layer, |entries| format!("{entries:.0}"))?;
        }
        self.hidden.print(out)?;
        if let Some(bytes) = self.peak_rss_bytes {
            writeln!(out, "peak memory       {:.0} MiB", mib(bytes))?;
        }
        Ok(())
    }
}

/// One number per layer, ten in a line.
fn per_layer(out: &mut dyn Write, numbers: &[f64], show: impl Fn(f64) -> String) -> Result<()> {
    for (row, layers) in numbers.chunks(10).enumerate() {
        let first = row * 10;
        let shown: Vec<String> = layers.iter().map(|number| show(*number)).collect();
        let last = first + layers.len() - 1;
        writeln!(out, "  layers {first:>3}..{last:<3}  {}", shown.join(" "))?;
    }
    Ok(())
}

fn mean(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len().max(1) as f64
}

pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

pub fn gib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 30)
}

/// A line of /proc/self/status in bytes: `VmHWM`, the most memory held so far, or `VmRSS`, that held now.
pub fn memory(name: &str) -> Option<u64> {
    line_of("/proc/self/status", name)
}

/// The memory of the machine that a process can still take; None if the system does not tell.
pub fn memory_available() -> Option<u64> {
    line_of("/proc/meminfo", "MemAvailable")
}

fn line_of(file: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
