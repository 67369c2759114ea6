//! What a process of its own does: calibrates, or measures one attention at one context.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{CacheOptions, CompressedAttention, CompressedKvCache, CompressionConfig, Policy};
use serde::{Deserialize, Serialize};

use super::args::{BatchSize, Setting};
use super::rows::{Decoded, Rows};
use super::search::{is_out_of_memory, most_rows};
use crate::args::{BenchArgs, CalibrateArgs, ErrorScale, WeightArgs};
use crate::calibrate::{self, Measured};
use crate::compression::Compression;
use crate::corpus::Window;
use crate::error::one_line;
use crate::load::text::Start;
use crate::model::{Llama, LlamaConfig};
use crate::random::{RandomTokens, Shape};
use crate::ranks::Ranks;
use crate::report::write_file;
use crate::session::Session;
use crate::stats::KvUse;

/// Windows of random tokens that a policy is calibrated on.
const WINDOWS: u64 = 2;

/// Tokens of the prompt that a GPU warms up on.
const WARM_UP_TOKENS: usize = 2048;

/// Batches below this number of rows are also tried with one row more, in the place of the prompt's own caches.
const FEW_ROWS: usize = 64;

/// A calibrated policy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Calibration {
    pub share: f64,
    pub tokens: usize,
    pub windows: usize,
    /// Of the tokens that have left the window, in the windows.
    pub hidden: f64,
    /// Of the KV head that hides the fewest and of the one that hides the most, in layers that see all tokens.
    pub least: f64,
    pub most: f64,
}

/// What one attention at one context took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Measurement {
    /// The device does not store such entries, or has no room for the prompt of one row; its own words.
    NotOnThisDevice(String),
    Ran(Box<Run>),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    pub prefill_tokens_per_second: f64,
    /// Of the tokens that have left the window, and of all; both in layers that see all tokens.
    pub hidden: f64,
    pub hidden_of_all: f64,
    /// The prompt's own caches of one row.
    pub kv_bytes: usize,
    pub kv_bytes_allocated: usize,
    pub kv_bytes_dense: usize,
    pub batches: Vec<Batch>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Batch {
    /// As the command line names it.
    pub batch: String,
    /// None where the device has no room for it.
    pub decoded: Option<Decoded>,
    /// Why a device has room for no larger batch, or none for this one.
    pub limit: Option<String>,
}

/// Calibrates a policy for each share, and writes them to [`policy_file`].
pub fn calibrated(args: &BenchArgs, shape: &Shape, tokens: usize, folder: &Path) -> Result<Vec<Calibration>> {
    let config = args.compression.calibrated_config();
    config.check(true)?;
    let measured = Measured::of(&shape.config)?;
    let calibrator = measured.calibrator(config, &CalibrateArgs::RATIOS)?;
    let model = load(args, shape, calibrate::dense(shape.config.layers)?, &Ranks::default())?;
    let windows: Vec<Window> = (0..WINDOWS)
        .map(|window| {
            let mut random = RandomTokens::new(&shape.config, args.serving.weights_seed + 1 + window);
            Window::prose(&random.draw(tokens), &Start::default())
        })
        .collect();
    let weights = WeightArgs {
        error_scale: ErrorScale::Output,
        repeat_weight: 1.0,
    };
    let found = measured.measure(&model, calibrator, &windows, weights)?;
    let fingerprint = model.fingerprint()?;
    let mut all = Vec::new();
    for &share in &args.serving.shares {
        let policy = measured.policy(&found, share, &fingerprint)?;
        write_file(&policy_file(folder, share), &policy.to_json()?)?;
        let parts = policy.parts();
        let layers = parts.layers.iter().zip(model.windows());
        let whole = layers.filter(|(_, window)| window.is_none());
        let heads: Vec<f64> = whole.flat_map(|(layer, _)| layer.hidden_ratios.clone()).collect();
        all.push(Calibration {
            share,
            tokens,
            windows: parts.calibration.windows,
            hidden: parts.calibration.hidden_ratio,
            least: heads.iter().copied().fold(f64::INFINITY, f64::min),
            most: heads.iter().copied().fold(0.0, f64::max),
        });
    }
    Ok(all)
}

/// The policy for a share in a folder.
pub fn policy_file(folder: &Path, share: f64) -> PathBuf {
    folder.join(format!("policy-{share}.json"))
}

fn load(args: &BenchArgs, shape: &Shape, attention: Vec<CompressedAttention>, ranks: &Ranks) -> Result<Llama> {
    let options = args.model.load_options_of(ranks)?;
    if options.device.is_cpu() {
        shape.check_memory(options.dtype)?;
    }
    let format = args.model.step_format();
    let form = |linear| format.with_step(linear);
    shape.load(&options, args.serving.weights_seed, attention, &form, ranks)
}

/// Measures one attention at one context, on each rank; times are the rank's own, bytes those of all.
pub fn measured(args: &BenchArgs, shape: &Shape, setting: &Setting, ranks: &Ranks) -> Result<Measurement> {
    let cache = args.cache(setting.storage)?;
    let options = cache.options();
    let (attention, config) = match &setting.hidden {
        None => (
            calibrate::dense(shape.config.layers)?,
            args.compression.calibrated_config(),
        ),
        Some((_, file)) => {
            let text = fs::read_to_string(file).with_context(|| format!("policy {}", file.display()))?;
            let compression = Compression::of_policy(Policy::from_json(&text)?, &file.display().to_string());
            (compression.attention(&shape.config, ranks)?, compression.config)
        }
    };
    let device = args.model.load_options_of(ranks)?;
    let own = shape.config.shard(ranks.world())?;
    if let Some(refusal) = refusal(&own, &attention, &options, device.dtype, &device.device) {
        return Ok(Measurement::NotOnThisDevice(refusal));
    }
    let model = load(args, shape, attention, ranks)?;
    let mut random = RandomTokens::new(&shape.config, args.serving.weights_seed);
    let new_session = || Session::cached(&model, &options, cache.prefill_chunk);
    let prompt = random.draw(setting.context);
    // Kernels load, and threads start, on first use.
    let warm_up = if model.device().is_cpu() { 64 } else { WARM_UP_TOKENS };
    new_session()?.prefill(&prompt[..prompt.len().min(warm_up)])?;
    let mut session = new_session()?;
    match session.prefill(&prompt) {
        Ok(_) => (),
        Err(error) if has_no_room(&error, ranks) => return Ok(Measurement::NotOnThisDevice(one_line(&error))),
        Err(error) => return Err(error),
    }
    let stats = session.stats(0)?;
    let caches = session.into_caches().context("a session with caches")?;
    let kv = KvUse::of(&caches, &model)?;
    let allocated: usize = caches.iter().map(CompressedKvCache::bytes_allocated).sum();
    let allocated: f64 = ranks.gather(vec![allocated as f64])?.concat().iter().sum();
    let hidden_of_all = stats.hidden.hidden_ratio_of_whole_layers;
    let hidden_of_all = hidden_of_all.unwrap_or(stats.hidden.hidden_ratio);
    let mut bench = Bench {
        model: &model,
        random,
        steps: args.decode,
        cache_memory: args.serving.cache_memory(),
    };
    let mut run = Run {
        prefill_tokens_per_second: stats
            .prefill_tokens_per_second
            .context("a prompt of at least one token")?,
        hidden: of_left(hidden_of_all, setting.context, &config),
        hidden_of_all,
        kv_bytes: kv.kv_bytes,
        kv_bytes_allocated: allocated as usize,
        kv_bytes_dense: kv.kv_bytes_dense,
        batches: Vec::new(),
    };
    // The largest one comes last: it may take the place of the prompt's caches.
    let (largest, listed): (Vec<_>, Vec<_>) = args.serving.batches().partition(|size| *size == BatchSize::Largest);
    for size in listed {
        if let BatchSize::Rows(rows) = size {
            run.batches.push(bench.batch(&caches, rows)?);
        }
    }
    if !largest.is_empty() {
        run.batches.push(bench.largest(caches)?);
    }
    Ok(Measurement::Ran(Box::new(run)))
}

/// The share of all tokens as one of the tokens that have left the window.
fn of_left(hidden_of_all: f64, tokens: usize, config: &CompressionConfig) -> f64 {
    let left = (tokens - 1).saturating_sub(config.window).saturating_sub(config.sinks);
    hidden_of_all * tokens as f64 / left.max(1) as f64
}

/// Why the device does not store such entries, if it does not: a cache of one token of this model is made, without its
/// weights.
fn refusal(
    config: &LlamaConfig,
    attention: &[CompressedAttention],
    options: &CacheOptions,
    dtype: DType,
    device: &Device,
) -> Option<String> {
    options.storage?;
    let attempt = || -> Result<()> {
        let layer = attention.first().context("a layer")?;
        let token = |heads| Tensor::zeros((1, heads, 1, config.head_dim), dtype, device);
        let (q, kv) = (token(config.heads)?, token(config.kv_heads)?);
        let mut cache = layer.new_cache(options.clone())?;
        layer.forward_cached_probed([&q, &kv, &kv], &kv, &mut cache)?;
        Ok(())
    };
    attempt().err().map(|error| one_line(&error))
}

/// Whether one rank's device has no room. Of several ranks each may find another answer, so that it is their error.
fn has_no_room(error: &anyhow::Error, ranks: &Ranks) -> bool {
    ranks.world() == 1 && is_out_of_memory(error)
}

/// Batches of one prompt's rows.
struct Bench<'m> {
    model: &'m Llama,
    random: RandomTokens,
    steps: usize,
    /// In bytes; on the CPU.
    cache_memory: f64,
}

impl Bench<'_> {
    fn decode(&mut self, rows: Result<Rows>) -> Result<Decoded> {
        rows?.decode(self.model, &mut self.random, self.steps)
    }

    /// A batch of this number of rows, if the device has room for it.
    fn batch(&mut self, prompt: &[CompressedKvCache], rows: usize) -> Result<Batch> {
        let (decoded, limit) = match self.decode(Rows::copies(prompt, rows)) {
            Ok(decoded) => (Some(decoded), None),
            Err(error) if has_no_room(&error, self.model.ranks()) => (None, Some(one_line(&error))),
            Err(error) => return Err(error).with_context(|| format!("batch {rows}")),
        };
        Ok(Batch {
            batch: rows.to_string(),
            decoded,
            limit,
        })
    }

    /// The largest batch that fits.
    fn largest(&mut self, prompt: Vec<CompressedKvCache>) -> Result<Batch> {
        let (decoded, limit) = match self.model.device().is_cpu() {
            true => (self.largest_within(&prompt)?, None),
            false => self.largest_by_trying(prompt)?,
        };
        Ok(Batch {
            batch: BatchSize::Largest.to_string(),
            decoded,
            limit,
        })
    }

    /// By the memory that one row has allocated after its steps.
    fn largest_within(&mut self, prompt: &[CompressedKvCache]) -> Result<Option<Decoded>> {
        let one = self.decode(Rows::copies(prompt, 1))?;
        match (self.cache_memory / one.kv_bytes_allocated as f64) as usize {
            0 => Ok(None),
            1 => Ok(Some(one)),
            rows => self.decode(Rows::copies(prompt, rows)).map(Some),
        }
    }

    /// By trying. Each try takes its rows and decodes a token; the largest decodes all.
    fn largest_by_trying(&mut self, prompt: Vec<CompressedKvCache>) -> Result<(Option<Decoded>, Option<String>)> {
        let (mut fits, error) = most_rows(|rows| {
            let copies = Rows::copies(&prompt, rows)?;
            copies.try_step(self.model, &mut self.random)
        })?;
        let mut limit = error.map(|error| one_line(&error));
        // Later steps may take more memory than the first one.
        let mut best = None;
        while fits > 0 && best.is_none() {
            match self.decode(Rows::copies(&prompt, fits)) {
                Ok(decoded) => best = Some(decoded),
                Err(error) if !is_out_of_memory(&error) => return Err(error),
                Err(error) => {
                    limit = Some(one_line(&error));
                    fits -= (fits / FEW_ROWS).max(1);
                }
            }
        }
        if fits < FEW_ROWS {
            // The prompt's caches took the place of a row.
            match self.decode(Rows::in_place_of(prompt, fits + 1)) {
                Ok(decoded) => best = Some(decoded),
                Err(error) if !is_out_of_memory(&error) => return Err(error),
                Err(error) => limit = Some(one_line(&error)),
            }
        }
        Ok((best, limit))
    }
}
