//! The sums of the compression loss, and the gradient of its squared term.

use crate::config::MergeStrategy;
use crate::cpu::decide::cosine::{cosine, qualifies, DecideInput, NormedRows, MIN_NORM};
use crate::cpu::number::element::{Accumulator, Element};
use rayon::prelude::*;

/// The sums S and M of one call, in f64 for any dtype.
#[derive(Clone, Copy, Default)]
pub(crate) struct LossSums {
    pub squared: f64,
    pub merged: usize,
}

impl LossSums {
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            squared: self.squared + other.squared,
            merged: self.merged + other.merged,
        }
    }
}

/// The distance of a cosine from the strategy's target.
fn residual<A: Accumulator>(strategy: MergeStrategy, cosine: A) -> A {
    match strategy {
        MergeStrategy::Similarity => cosine - A::ONE,
        MergeStrategy::Difference | MergeStrategy::Off => cosine,
    }
}

/// Sums over every pair of every head that is not off. Heads are added in order: the same result for any thread count.
pub(crate) fn loss_sums<T: Element>(input: &DecideInput<T>) -> LossSums {
    let (heads, pairs) = (input.problem.heads, input.problem.pairs());
    let head_sums = |index: usize| {
        let (batch, head) = (index / heads, index % heads);
        let test = input.strategies.test(input.config, batch, head);
        if test.strategy.is_off() {
            return LossSums::default();
        }
        input.with_sides(batch, head, |left, right| {
            let mut sums = LossSums::default();
            for t in 0..pairs {
                let cosine = cosine(left, t + 1, right, t);
                let residual = residual(test.strategy, cosine).double();
                sums.squared += residual * residual;
                sums.merged += usize::from(qualifies(test, cosine));
            }
            sums
        })
    };
    let sums: Vec<LossSums> = (0..input.problem.batch * heads)
        .into_par_iter()
        .map(head_sums)
        .collect();
    sums.iter().fold(LossSums::default(), |all, one| all.plus(one))
}

/// `upstream` times the gradient of S: (B, H, N, D) for the query, (B, Hk, N, D) for the key.
pub(crate) fn loss_gradients<T: Element>(input: &DecideInput<T>, upstream: f64) -> (Vec<T>, Vec<T>) {
    let problem = input.problem;
    let (group, size) = (problem.group(), problem.tokens * problem.head_dim);
    let mut dq = vec![T::zero(); problem.batch * problem.heads * size];
    let mut dk = vec![T::zero(); problem.batch * problem.kv_heads * size];
    dq.par_chunks_mut(group * size)
        .zip(dk.par_chunks_mut(size))
        .enumerate()
        .for_each(|(index, (dq, dk))| {
            let (batch, kv_head) = (index / problem.kv_heads, index % problem.kv_heads);
            let mut key_sum = vec![T::Acc::ZERO; size];
            for (head, dq) in (kv_head * group..).zip(dq.chunks_exact_mut(size)) {
                head_gradients(input, (batch, head), upstream, dq, &mut key_sum);
            }
            T::narrow(&key_sum, dk);
        });
    (dq, dk)
}

fn head_gradients<T: Element>(
    input: &DecideInput<T>,
    (batch, head): (usize, usize),
    upstream: f64,
    dq: &mut [T],
    key_sum: &mut [T::Acc],
) {
    let (pairs, dim) = (input.problem.pairs(), input.problem.head_dim);
    let strategy = input.strategies.test(input.config, batch, head).strategy;
    if strategy.is_off() {
        return;
    }
    input.with_sides(batch, head, |left, right| {
        let mut query_sum = vec![T::Acc::ZERO; dq.len()];
        for t in 0..pairs {
            let cosine = cosine(left, t + 1, right, t);
            let factor = T::Acc::of(upstream * 2.0) * residual(strategy, cosine);
            let (a, b) = (Side::new(left, t + 1), Side::new(right, t));
            let left_sum = match input.config.criterion.pairs_keys() {
                true => &mut *key_sum,
                false => &mut query_sum,
            };
            a.add_gradient(&b, cosine, factor, &mut left_sum[(t + 1) * dim..][..dim]);
            b.add_gradient(&a, cosine, factor, &mut key_sum[t * dim..][..dim]);
        }
        T::narrow(&query_sum, dq);
    })
}

/// One vector of a pair.
struct Side<'a, A> {
    row: &'a [A],
    /// At least [`MIN_NORM`].
    norm: A,
    /// Whether the norm depends on the vector: false at the floor.
    free: bool,
}

impl<'a, A: Accumulator> Side<'a, A> {
    fn new(rows: &'a NormedRows<A>, token: usize) -> Self {
        let (norm, floor) = (rows.norm(token), A::of(MIN_NORM));
        Self {
            row: rows.row(token),
            norm: if norm < floor { floor } else { norm },
            free: norm >= floor,
        }
    }

    /// Adds `factor * (w - c u) / norm` to `sum`, with u this unit vector, w the other one and c their cosine. The
    /// projection c u is subtracted only where the norm is above the floor.
    fn add_gradient(&self, other: &Self, cosine: A, factor: A, sum: &mut [A]) {
        let projection = if self.free { cosine / self.norm } else { A::ZERO };
        for ((sum, x), y) in sum.iter_mut().zip(self.row).zip(other.row) {
            *sum += factor / self.norm * (*y / other.norm - projection * *x);
        }
    }
}
