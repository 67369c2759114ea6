//! Ranks that are threads of one process and exchange by shared memory: for the CPU, and for tests.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use anyhow::{bail, Result};
use candle_core::{DType, Tensor};

use super::Communicator;

/// The place where all ranks of a run meet.
pub struct Meeting {
    world: usize,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// What each rank has brought to the exchange that is going on.
    brought: Vec<Option<Part>>,
    /// The exchanges that are over, and what all ranks brought to the last of them.
    over: usize,
    last: Arc<Vec<Part>>,
    /// A rank that has ended: no exchange after it can be whole.
    ended: Option<usize>,
}

#[derive(Clone)]
enum Part {
    Tensor(Tensor),
    Numbers(Vec<f64>),
    /// The rank has its results.
    Finished,
}

impl Part {
    fn name(&self) -> &'static str {
        match self {
            Self::Tensor(_) => "a tensor",
            Self::Numbers(_) => "numbers",
            Self::Finished => "the end of one",
        }
    }
}

/// A rank ended while others had more to exchange: the error is its own, or the calls differ.
#[derive(Debug)]
pub struct EndedEarly {
    pub rank: usize,
}

impl fmt::Display for EndedEarly {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "ranks: expected all of them to go on, got the end of rank {}; its calls differ from the others'",
            self.rank
        )
    }
}

impl std::error::Error for EndedEarly {}

impl Meeting {
    pub fn new(world: usize) -> Arc<Self> {
        Arc::new(Self {
            world,
            state: Mutex::new(State {
                brought: vec![None; world],
                over: 0,
                last: Arc::new(Vec::new()),
                ended: None,
            }),
            changed: Condvar::new(),
        })
    }

    /// What all ranks brought, in their order. Waits for all of them, or until one ends.
    fn exchange(&self, rank: usize, part: Part) -> Result<Arc<Vec<Part>>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.brought[rank] = Some(part);
        let before = state.over;
        if state.brought.iter().all(Option::is_some) {
            let all = state.brought.iter_mut().filter_map(Option::take).collect();
            state.last = Arc::new(all);
            state.over += 1;
            self.changed.notify_all();
        }
        while state.over == before {
            if let Some(rank) = state.ended {
                bail!(EndedEarly { rank })
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(state.last.clone())
    }

    fn end(&self, rank: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.ended.get_or_insert(rank);
        self.changed.notify_all();
    }
}

/// The seat of one rank at a meeting. Its end, by a result, an error or a panic, ends the meeting.
pub struct ThreadRank {
    rank: usize,
    meeting: Arc<Meeting>,
}

impl ThreadRank {
    pub fn new(rank: usize, meeting: Arc<Meeting>) -> Self {
        Self { rank, meeting }
    }
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        self.meeting.end(self.rank);
    }
}

impl Communicator for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.meeting.world
    }

    fn all_reduce_sum(&self, xs: &Tensor) -> Result<Tensor> {
        let parts = self.meeting.exchange(self.rank, Part::Tensor(xs.clone()))?;
        let tensors = parts.iter().map(|part| match part {
            Part::Tensor(tensor) if (tensor.dims(), tensor.dtype()) == (xs.dims(), xs.dtype()) => Ok(tensor),
            Part::Tensor(tensor) => bail!(
                "ranks: expected a tensor of shape {:?} and dtype {:?} on each, got {:?} and {:?}; they ran other \
                 tokens",
                xs.dims(),
                xs.dtype(),
                tensor.dims(),
                tensor.dtype()
            ),
            other => bail!(
                "ranks: expected a tensor from each, got {}; their calls differ",
                other.name()
            ),
        });
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        // In the order of the ranks on each of them; halves are rounded once.
        let wide = match xs.dtype() {
            DType::F16 | DType::BF16 => DType::F32,
            dtype => dtype,
        };
        let mut sum = tensors[0].to_dtype(wide)?;
        for tensor in &tensors[1..] {
            sum = (sum + tensor.to_dtype(wide)?)?;
        }
        Ok(sum.to_dtype(xs.dtype())?)
    }

    fn all_gather(&self, numbers: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        let parts = self.meeting.exchange(self.rank, Part::Numbers(numbers))?;
        let numbers = parts.iter().map(|part| match part {
            Part::Numbers(numbers) => Ok(numbers.clone()),
            other => bail!(
                "ranks: expected numbers from each, got {}; their calls differ",
                other.name()
            ),
        });
        numbers.collect()
    }

    fn finish(&self) -> Result<()> {
        let parts = self.meeting.exchange(self.rank, Part::Finished)?;
        match parts.iter().find(|part| !matches!(part, Part::Finished)) {
            Some(other) => bail!(
                "ranks: expected the end of each, got {}; their calls differ",
                other.name()
            ),
            None => Ok(()),
        }
    }
}
