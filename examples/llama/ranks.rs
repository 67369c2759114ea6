//! The ranks of a model that is split by heads (tensor parallelism): what they exchange, and how they end together.
//!
//! Each rank is a thread with a shard of the model: some KV heads with their query heads, and a part of the inner
//! numbers of each feed-forward part. It decides, folds, caches and attends by itself. The ranks sum the outputs of
//! o_proj and down_proj; all else is computed on each of them, in the same bits.

#[path = "ranks/threads.rs"]
mod threads;

use std::io::{self, stderr, stdout, Write};
use std::sync::Arc;
use std::thread;

use anyhow::{anyhow, ensure, Context, Result};
use candle_core::Tensor;

use self::threads::Meeting;
pub use self::threads::{EndedEarly, ThreadRank};

/// The exchange of one rank with the others. Every rank makes the same calls in the same order.
pub trait Communicator: Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;
    /// The number of ranks.
    fn world(&self) -> usize;
    /// The sum of `xs` over all ranks, the same bits on each.
    ///
    /// # Errors
    /// Another shape or dtype on some rank, or a rank that has ended.
    fn all_reduce_sum(&self, xs: &Tensor) -> Result<Tensor>;
    /// The numbers of every rank, in the order of the ranks.
    ///
    /// # Errors
    /// A rank that has ended.
    fn all_gather(&self, numbers: Vec<f64>) -> Result<Vec<Vec<f64>>>;
    /// Waits until every rank has its results and calls this.
    ///
    /// # Errors
    /// A rank that has ended without.
    fn finish(&self) -> Result<()>;
}

/// One rank of a model. The default is the only one.
#[derive(Clone, Default)]
pub struct Ranks(Option<Arc<dyn Communicator>>);

impl Ranks {
    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |ranks| ranks.rank())
    }

    /// The number of ranks.
    pub fn world(&self) -> usize {
        self.0.as_ref().map_or(1, |ranks| ranks.world())
    }

    /// Whether this rank speaks for all.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Standard output of the first rank; of the others nothing is seen.
    pub fn stdout(&self) -> Box<dyn Write> {
        match self.is_first() {
            true => Box::new(stdout().lock()),
            false => Box::new(io::sink()),
        }
    }

    /// Standard error of the first rank; of the others nothing is seen.
    pub fn stderr(&self) -> Box<dyn Write> {
        match self.is_first() {
            true => Box::new(stderr().lock()),
            false => Box::new(io::sink()),
        }
    }

    /// The sum of `xs` over all ranks.
    pub fn sum(&self, xs: Tensor) -> Result<Tensor> {
        match &self.0 {
            Some(ranks) => ranks.all_reduce_sum(&xs),
            None => Ok(xs),
        }
    }

    /// The numbers of every rank, in the order of the ranks.
    pub fn gather(&self, numbers: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        match &self.0 {
            Some(ranks) => ranks.all_gather(numbers),
            None => Ok(vec![numbers]),
        }
    }

    /// The first rank's token, whatever this one chose.
    pub fn agreed(&self, token: u32) -> Result<u32> {
        Ok(self.gather(vec![f64::from(token)])?[0][0] as u32)
    }
}

/// Runs `each` on `world` ranks, threads of this process; returns the first rank's result. A rank that fails ends all
/// of them: the result is its error, that of the lowest rank where several fail by themselves.
///
/// # Errors
/// No rank, or the error of a rank.
pub fn run<T: Send>(world: usize, each: impl Fn(&Ranks) -> Result<T> + Sync) -> Result<T> {
    run_by(world, |seat| Ok(Arc::new(seat)), each)
}

/// As [`run`], where `connect` makes each rank's communicator, in its thread. More than one rank is connected.
///
/// # Errors
/// As [`run`], or the error of a connection.
pub fn run_by<T: Send>(
    world: usize,
    connect: impl Fn(ThreadRank) -> Result<Arc<dyn Communicator>> + Sync,
    each: impl Fn(&Ranks) -> Result<T> + Sync,
) -> Result<T> {
    ensure!(world > 0, "ranks: expected at least 1, got 0; 1 runs the whole model");
    if world == 1 {
        return each(&Ranks::default());
    }
    let meeting = &Meeting::new(world);
    let run = &|seat: ThreadRank| {
        let ranks = connect(seat)?;
        let result = each(&Ranks(Some(ranks.clone())))?;
        // What a rank has queued on its device may still need the others.
        ranks.finish()?;
        Ok(result)
    };
    let results: Vec<Result<T>> = thread::scope(|scope| {
        let start = |rank: usize| {
            // The size of a process's own stack.
            let thread = thread::Builder::new().stack_size(8 << 20);
            let seat = ThreadRank::new(rank, meeting.clone());
            thread.spawn_scoped(scope, move || run(seat))
        };
        let started: Vec<_> = (0..world).map(start).collect();
        let end = |(rank, thread): (usize, std::io::Result<thread::ScopedJoinHandle<'_, Result<T>>>)| {
            let result = match thread {
                Ok(thread) => thread.join().unwrap_or_else(|_| Err(anyhow!("the thread panicked"))),
                Err(error) => Err(anyhow!("the thread did not start: {error}")),
            };
            match rank {
                0 => result,
                _ => result.with_context(|| format!("rank {rank} of {world}")),
            }
        };
        started.into_iter().enumerate().map(end).collect()
    });
    let mut values = Vec::new();
    let mut errors = Vec::new();
    for result in results {
        match result {
            Ok(value) => values.push(value),
            Err(error) => errors.push(error),
        }
    }
    let own = |error: &anyhow::Error| !error.chain().any(|cause| cause.is::<EndedEarly>());
    match errors.iter().position(own) {
        Some(index) => Err(errors.swap_remove(index)),
        None if errors.is_empty() => Ok(values.swap_remove(0)),
        None => Err(errors.swap_remove(0)),
    }
}
