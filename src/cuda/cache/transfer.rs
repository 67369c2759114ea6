//! Lists downloaded to the host and uploaded again, for a saved cache.

use super::host::{ClosedRows, HostList, HostLists};
use super::upload::Upload;
use super::{DeviceLists, NO_RUN};
use crate::config::{CompressionConfig, HeadStrategies};
use crate::cuda::decode::StateArgs;
use crate::cuda::on_gpu::{Gpu, GpuElement, Kernel, Launch};
use crate::cuda::params::NO_SLIDE;
use crate::problem::Problem;
use candle_core::Result;
use half::bf16;
use std::ops::Range;

/// The closed chains of all lists, list after list.
struct ClosedChains<T> {
    /// The entries of each list.
    ranges: Vec<Range<usize>>,
    rows: ClosedRows<T>,
    tokens: Vec<u32>,
}

impl<T: Copy> ClosedChains<T> {
    /// The rows of some entries.
    fn part(&self, entries: &Range<usize>, [dim, value_dim]: [usize; 2]) -> ClosedRows<T> {
        fn some<N: Copy>(x: &[N], entries: &Range<usize>, dim: usize) -> Vec<N> {
            x[entries.start * dim..entries.end * dim].to_vec()
        }
        match &self.rows {
            ClosedRows::InDtype { keys, values } => ClosedRows::InDtype {
                keys: some(keys, entries, dim),
                values: some(values, entries, value_dim),
            },
            ClosedRows::Coded { codes, scales } => ClosedRows::Coded {
                codes: [some(&codes[0], entries, dim), some(&codes[1], entries, value_dim)],
                scales: [0, 1].map(|which| some(&scales[which], entries, 1)),
            },
        }
    }
}

/// The numbers of `rows` rows of one list, picked by index.
fn pick<T: Copy>(all: &[T], rows: impl Iterator<Item = usize>, dim: usize) -> Vec<T> {
    rows.flat_map(|row| all[row * dim..(row + 1) * dim].iter().copied())
        .collect()
}

impl<G: Gpu, T: GpuElement> DeviceLists<G, T> {
    /// Downloads all lists. Waits for the device.
    ///
    /// # Errors
    /// An error of the device.
    pub fn to_host(&self, gpu: &G) -> Result<HostLists<T>> {
        if self.seq_len == 0 {
            return Ok(HostLists {
                seq_len: 0,
                sliding_window: self.sliding_window,
                code: self.settings.code,
                lists: vec![HostList::default(); self.all()],
                last_queries: None,
                tests: self.head_tests.clone(),
            });
        }
        let (state, window) = (&self.state, self.settings.config.window);
        let (dim, value_dim) = (self.settings.problem.head_dim, self.settings.problem.value_dim);
        let closed = self.closed_chains(gpu)?;
        let (local_k, local_v) = (gpu.download(&state.local_k)?, gpu.download(&state.local_v)?);
        let (chain_k, chain_v) = (gpu.download(&state.chain_k)?, gpu.download(&state.chain_v)?);
        let previous = match (&state.previous_k, &state.previous_v) {
            (Some(k), Some(v)) => Some((gpu.download(k)?, gpu.download(v)?)),
            _ => None,
        };
        let (chain_sizes, bits) = (gpu.download(&state.chain_sizes)?, gpu.download(&state.bits)?);
        let (run_starts, run_keys) = (gpu.download(&state.run_starts)?, gpu.download(&state.run_keys)?);
        let last_keys = gpu.download(&state.last_keys)?;
        let observed = match &state.observed {
            Some(observed) => Some((gpu.download(&observed.keys)?, gpu.download(&observed.masses)?)),
            None => None,
        };
        let kept_from = match self.slide() {
            NO_SLIDE => vec![0; self.all()],
            _ => gpu.download(&state.starts)?.split_off(self.all()),
        };
        let (seen, given) = (self.seq_len, self.settings.config.criterion.takes_scores());
        let (oldest, base) = (seen.saturating_sub(window), seen.saturating_sub(window + 1));
        let list = |index: usize| -> HostList<T> {
            let (ring, entries) = (index * (window + 1), closed.ranges[index].clone());
            let recent = || (oldest..seen).map(|t| ring + t % window.max(1));
            let (mut recent_k, mut recent_v) = (pick(&local_k, recent(), dim), pick(&local_v, recent(), value_dim));
            let (mut masses, mut sink_keys) = (Vec::new(), Vec::new());
            if let Some((keys, all_masses)) = &observed {
                let (sinks, all) = (self.settings.config.sinks, index * self.settings.seen_keys());
                let raw = pick(keys, (oldest..seen).map(|t| all + sinks + t % window), dim);
                unquarantine(&mut recent_k, &mut recent_v, &raw, [dim, value_dim]);
                masses = (oldest..seen)
                    .map(|t| all_masses[index * window + t % window])
                    .collect();
                sink_keys = pick(keys, all..all + sinks.min(seen), dim);
            }
            HostList {
                kept_from: kept_from[index] as usize,
                far: closed.part(&entries, [dim, value_dim]),
                tokens: closed.tokens[entries.clone()].to_vec(),
                chain: (seen > window).then(|| {
                    let sum = |x: &[f32], dim: usize| x[index * dim..][..dim].to_vec();
                    let raw = |x: Option<&Vec<T>>, dim: usize| match x {
                        Some(x) => x[index * dim..][..dim].iter().map(|x| x.to_f64() as f32).collect(),
                        None => vec![0.0; dim],
                    };
                    let (k, v) = (previous.as_ref().map(|x| &x.0), previous.as_ref().map(|x| &x.1));
                    [
                        sum(&chain_k, dim),
                        sum(&chain_v, value_dim),
                        raw(k, dim),
                        raw(v, value_dim),
                    ]
                }),
                chain_size: chain_sizes[index],
                recent_k,
                recent_v,
                bits: (base..seen - 1).map(|t| bits[ring + t % (window + 1)] as u8).collect(),
                run: (run_starts[index] != NO_RUN)
                    .then(|| (run_starts[index] as usize, run_keys[index * dim..][..dim].to_vec())),
                last_key: last_keys[index * dim..][..dim].to_vec(),
                last_hidden: given && bits[ring + (seen - 1) % (window + 1)] == 1,
                masses,
                sink_keys,
            }
        };
        Ok(HostLists {
            seq_len: seen,
            sliding_window: self.sliding_window,
            code: self.settings.code,
            lists: (0..self.all()).map(list).collect(),
            last_queries: state.last_queries.as_ref().map(|x| gpu.download(x)).transpose()?,
            tests: self.head_tests.clone(),
        })
    }

    /// Downloads the closed chains that a later row sees. Waits for the device.
    fn closed_chains(&self, gpu: &G) -> Result<ClosedChains<T>> {
        let mut end = 0;
        let range = |count| {
            end += count;
            end - count..end
        };
        let ranges: Vec<Range<usize>> = self.closed(gpu)?.into_iter().map(range).collect();
        let firsts: Vec<u32> = ranges.iter().map(|range| range.start as u32).collect();
        let (dim, value_dim) = (self.settings.problem.head_dim, self.settings.problem.value_dim);
        // A buffer is never empty.
        if end == 0 {
            return Ok(ClosedChains {
                ranges,
                rows: match self.settings.code {
                    None => ClosedRows::default(),
                    Some(_) => ClosedRows::Coded {
                        codes: Default::default(),
                        scales: Default::default(),
                    },
                },
                tokens: Vec::new(),
            });
        }
        let (mut tokens, firsts) = (gpu.alloc::<u32>(end)?, gpu.upload(&firsts)?);
        let params = self.bare_params(self.seq_len, 0)?;
        let longest = ranges.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        let launch = Launch {
            grid: [self.all(), longest.div_ceil(4).min(1024), 1],
            threads: 128,
            shared_bytes: 0,
        };
        let lists = |args: &mut Vec<_>| {
            args.extend([
                gpu.read(&firsts),
                gpu.read(self.state.pages.table()),
                gpu.read(&self.state.lengths),
                gpu.read(&self.state.starts),
                gpu.value(&params),
            ]);
        };
        let rows = match self.settings.code {
            None => {
                let (mut keys, mut values) = (gpu.alloc::<T>(end * dim)?, gpu.alloc::<T>(end * value_dim)?);
                let mut args = vec![gpu.write(&mut keys), gpu.write(&mut values), gpu.write(&mut tokens)];
                lists(&mut args);
                gpu.launch(&Kernel::of::<T>("cache_gather"), launch, &args)?;
                drop(args);
                ClosedRows::InDtype {
                    keys: gpu.download(&keys)?,
                    values: gpu.download(&values)?,
                }
            }
            Some(_) => {
                let (mut keys, mut values) = (gpu.alloc::<u8>(end * dim)?, gpu.alloc::<u8>(end * value_dim)?);
                let mut scales = gpu.alloc::<u32>(end)?;
                let mut args = vec![
                    gpu.write(&mut keys),
                    gpu.write(&mut values),
                    gpu.write(&mut scales),
                    gpu.write(&mut tokens),
                ];
                lists(&mut args);
                gpu.launch(&Kernel::plain("cache_gather_coded"), launch, &args)?;
                drop(args);
                let scales = gpu.download(&scales)?;
                let half = |shift: u32| {
                    scales
                        .iter()
                        .map(|word| bf16::from_bits((word >> shift) as u16))
                        .collect()
                };
                ClosedRows::Coded {
                    codes: [gpu.download(&keys)?, gpu.download(&values)?],
                    scales: [half(0), half(16)],
                }
            }
        };
        Ok(ClosedChains {
            ranges,
            rows,
            tokens: gpu.download(&tokens)?,
        })
    }

    /// Uploads the lists of [`Self::to_host`] or of a cache on the CPU: one list for each of this device's.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn from_host(
        gpu: &G,
        problem: &Problem,
        strategies: &HeadStrategies,
        config: &CompressionConfig,
        host: &HostLists<T>,
    ) -> Result<Self> {
        let mut new = Self::with_tests(gpu, problem, (strategies, config), host.code, host.tests.clone())?;
        let config = new.settings.config.clone();
        new.sliding_window = host.sliding_window;
        if host.seq_len == 0 {
            return Ok(new);
        }
        new.seq_len = host.seq_len;
        let kept_from = host.lists.iter().map(|list| list.kept_from as u32);
        let starts: Vec<u32> = vec![0; host.lists.len()].into_iter().chain(kept_from).collect();
        new.state.starts = gpu.upload(&starts)?;
        let upload = Upload {
            gpu,
            host,
            dim: problem.head_dim,
            value_dim: problem.value_dim,
            window: config.window,
        };
        new.state.lengths = upload.words(|list| list.tokens.len() as u32)?;
        new.learn(gpu)?;
        new.fit(gpu, 0)?;
        upload.chains(&mut new.state)?;
        upload.decisions(&mut new.state)?;
        if let Some(observed) = &mut new.state.observed {
            upload.observed(observed, config.sinks)?;
        }
        // A buffer is never empty.
        let rows = config.window.max(1);
        let (dim, value_dim) = (problem.head_dim, problem.value_dim);
        let recent_k = upload.rows(rows, dim, |list, to| upload.ring(&list.recent_k, to, dim))?;
        let recent_v = upload.rows(rows, value_dim, |list, to| upload.ring(&list.recent_v, to, value_dim))?;
        new.restore(gpu, [&recent_k, &recent_v], &upload)?;
        // On the CPU a list without a token in a call leaves nothing behind until its next token.
        if new.slide() != NO_SLIDE {
            new.slide_lists(gpu)?;
        }
        Ok(new)
    }

    /// Writes closed chains into the lists' pages, and recomputes the buffers that follow from the others, as the
    /// device computes them: local columns, logarithms, norms.
    fn restore(&mut self, gpu: &G, [k, v]: [&G::Slice<T>; 2], upload: &Upload<'_, G, T>) -> Result<()> {
        let tokens = upload.entries(|list| list.tokens.clone())?;
        let mut first = 0;
        let firsts = upload.words(|list| {
            first += list.tokens.len();
            (first - list.tokens.len()) as u32
        })?;
        let params = self.bare_params(self.seq_len, 0)?;
        let launch = Launch {
            grid: [self.all(), (self.settings.config.window + 1).div_ceil(4), 1],
            threads: 128,
            shared_bytes: 0,
        };
        let closed = match self.settings.code {
            None => Some([0, 1].map(|which| upload.entries(|list| list.far.in_dtype()[which].to_vec()))),
            Some(_) => None,
        };
        let [closed_k, closed_v] = match closed {
            Some([keys, values]) => [Some(keys?), Some(values?)],
            None => [None, None],
        };
        let mut args = vec![
            gpu.read(k),
            gpu.read(v),
            gpu.read_some(closed_k.as_ref()),
            gpu.read_some(closed_v.as_ref()),
            gpu.read(&tokens),
            gpu.read(&firsts),
        ];
        args.extend(self.state.args(gpu));
        args.push(gpu.value(&params));
        gpu.launch(&Kernel::of::<T>("cache_restore"), launch, &args)?;
        drop(args);
        if self.settings.code.is_none() {
            return Ok(());
        }
        let [keys, values] = [0, 1].map(|which| upload.entries(|list| list.far.codes()[which].to_vec()));
        let (keys, values, scales) = (keys?, values?, upload.entries(|list| list.far.scales())?);
        let longest = upload
            .host
            .lists
            .iter()
            .map(|list| list.tokens.len())
            .max()
            .unwrap_or(0);
        let launch = Launch {
            grid: [self.all(), longest.div_ceil(4).clamp(1, 1024), 1],
            threads: 128,
            shared_bytes: 0,
        };
        let args = [
            gpu.read(&keys),
            gpu.read(&values),
            gpu.read(&scales),
            gpu.read(&tokens),
            gpu.read(&firsts),
            gpu.read(self.state.pages.table()),
            gpu.read(&self.state.lengths),
            gpu.read(&self.state.starts),
            gpu.value(&params),
        ];
        gpu.launch(&Kernel::plain("cache_restore_coded"), launch, &args)
    }

    /// Whether no list merges: each has a head that is off.
    pub fn never_merges(&self) -> bool {
        (0..self.all()).all(|list| self.is_off(list))
    }

    /// Whether a list never merges: it has a head that is off.
    pub(super) fn is_off(&self, list: usize) -> bool {
        let group = self.settings.problem.heads / self.settings.lists;
        self.head_tests[list * group..][..group]
            .iter()
            .any(|test| test.strategy.is_off())
    }

    /// Whether [`Self::truncate`] to this many tokens is exact: the columns of the next row are kept. Waits for the
    /// device under a sliding window.
    ///
    /// # Errors
    /// An error of the device.
    pub fn can_truncate(&self, gpu: &G, tokens: usize) -> Result<bool> {
        // Tokens would be raw again, which 8 bits do not give back.
        if self.settings.code.is_some() {
            return Ok(tokens == self.seq_len);
        }
        let Some(length) = self.sliding_window.flatten() else {
            return Ok(true);
        };
        let starts = gpu.download(&self.state.starts)?;
        let first_seen = (tokens + 1).saturating_sub(length);
        Ok(starts[self.all()..]
            .iter()
            .all(|kept_from| *kept_from as usize <= first_seen))
    }

    /// Cuts lists that never merge back to the first `tokens` tokens, at least 1 and at most all.
    ///
    /// # Errors
    /// An error of the device.
    pub fn truncate(&mut self, gpu: &G, tokens: usize) -> Result<()> {
        if tokens >= self.seq_len {
            return Ok(());
        }
        let params = self.bare_params(self.seq_len, tokens)?;
        let launch = self.per_list();
        let mut args = self.state.args(gpu);
        args.push(gpu.value(&params));
        gpu.launch(&Kernel::of::<T>("cache_truncate"), launch, &args)?;
        drop(args);
        self.seq_len = tokens;
        self.learn(gpu)?;
        self.fit(gpu, 0)
    }
}

/// Undoes the replacement of keys and values that are not finite. Attention reads a NaN key and a zero value in their
/// place, and decisions read the raw key. Both are kept: a finite key gets a value of NaN, which makes the column NaN
/// again.
fn unquarantine<T: GpuElement>(keys: &mut [T], values: &mut [T], raw: &[T], [dim, value_dim]: [usize; 2]) {
    let rows = keys.chunks_exact_mut(dim).zip(values.chunks_exact_mut(value_dim));
    for ((key, value), raw) in rows.zip(raw.chunks_exact(dim)) {
        let (bad, finite) = (key[0].to_f64().is_nan(), raw.iter().all(|x| x.to_f64().is_finite()));
        key.copy_from_slice(raw);
        if bad && finite {
            value.fill(T::from_f64(f64::NAN));
        }
    }
}
